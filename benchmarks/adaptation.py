"""Do the paper's effects show on data that is here? Records what `cada-train ablation` measured.

    cada-train ablation --recipe camvid-dusk --data DATA --seeds 1,2,3 --out RUNS
    python benchmarks/adaptation.py RUNS --recipe camvid-dusk --command "cada-train ablation ..."

Appends a row for every arm and seed that is not there yet to results/adaptation.jsonl. Trainings of
hours are not repeated here: the rows of RUNS are, with the recipe and the command that made them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from cada_deploy.training.ablation import read_rows, summary
from harness import RESULTS, record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="the --out of cada-train ablation")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--command", required=True, help="the command line that made the runs")
    given = parser.parse_args()
    rows = list(read_rows(given.runs))
    for line in summary(rows):
        print(f"{line.arm:<34} {line.mean:5.1f}  {line.seeds} seeds")
    known = _known(given.recipe)
    new = [row for row in rows if (row.arm, row.seed) not in known]
    sys.argv = ["RUNS" if word == str(given.runs) else word for word in sys.argv]  # of this machine
    record(
        "adaptation",
        [
            {**row.to_json(), "case": f"{given.recipe}, {row.arm}, seed {row.seed}",
             "recipe": given.recipe, "made_by": given.command}
            for row in new
        ],
    )  # fmt: skip
    return 0


def _known(recipe: str) -> set[tuple[str, int]]:
    path = RESULTS / "adaptation.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["arm"], row["seed"]) for row in rows if row["recipe"] == recipe}


if __name__ == "__main__":
    sys.exit(main())
