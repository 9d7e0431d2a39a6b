"""Makes the README's figures from the recorded rows; run it after recording new ones.

python benchmarks/readme_tables.py       rewrites the part between the markers in README.md
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_MARKED = re.compile(r"(<!-- performance -->\n).*?(<!-- /performance -->)", re.S)
_ADAPTATION = re.compile(r"(<!-- adaptation -->\n).*?(<!-- /adaptation -->)", re.S)

Row = dict[str, Any]


def latest(results: Path, name: str) -> list[Row]:
    """The rows of one benchmark, each of the newest recording that measured its case."""
    lines = (results / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    newest = {row.get("case", ""): row["when"] for row in rows}
    return [row for row in rows if row["when"] == newest[row.get("case", "")]]


def performance(results: Path) -> str:
    """Markdown of everything that is claimed."""
    fused, runs = latest(results, "fused_kernel"), latest(results, "throughput")
    return f"{_kernel(fused)}\n{_throughput(runs)}"


def _kernel(rows: list[Row]) -> str:
    best = next(r["isa"] for r in rows if r["contender"] == "ours")
    lines = [
        f"The fused kernel (statistics, labels and entropy), {rows[0]['shape']}, "
        f"{rows[0]['threads']} threads, {rows[0]['machine']['cpu']} ({best}), medians of pairs in "
        "one process:",
        "",
        "| against | upsample, then softmax | softmax, then upsample |",
        "|---|---|---|",
    ]
    orders = ("logits", "probs")
    for rival in ("PyTorch eager", "torch.compile", "ONNX Runtime graph"):
        cells = [_one(rows, order, rival)["ours_is_faster_by"] for order in orders]
        lines.append(f"| {rival} | {cells[0]:.0f}x faster | {cells[1]:.0f}x faster |")
    lines += [
        "",
        "| instruction set | upsample, then softmax | of a bare loop of the same exp |",
        "|---|---|---|",
    ]
    for row in rows:
        if row["contender"] == "ours" and row["order"] == "logits":
            name = (
                f"{row['isa']} (the oracle of the bits)" if row["isa"] == "scalar" else row["isa"]
            )
            lines.append(f"| {name} | {row['median_ms']:.1f} ms | {row['of_bare_exp']:.2f}x |")
    return "\n".join(lines) + "\n"


def _one(rows: list[Row], order: str, contender: str) -> Row:
    (row,) = [
        r for r in rows
        if r["order"] == order and r["contender"] == contender and "ours_is_faster_by" in r
    ]  # fmt: skip
    return row


def _throughput(rows: list[Row]) -> str:
    lines = [
        f"Whole runs over {rows[0]['frame']} frames on {rows[0]['cores']} cores, decoding to label "
        "PNG; the colour model is a network that costs almost nothing:",
        "",
        "| model | images/s | wall time / (sum of the stages measured alone / cores) |",
        "|---|---|---|",
    ]
    for row in rows:
        if row["case"].startswith("end to end"):
            name = row["case"].removeprefix("end to end, ")
            lines.append(f"| {name} | {row['images_per_s']:.1f} | {row['wall_of_ideal']:.2f} |")
    (memory,) = [r for r in rows if r["case"] == "peak memory"]
    lines += [
        "",
        f"Peak memory: {memory['peak_mb'][0]:.0f} MB for {memory['images'][0]} images, "
        f"{memory['peak_mb'][1]:.0f} MB for {memory['images'][1]}.",
    ]
    return "\n".join(lines) + "\n"


def adaptation(results: Path) -> str:
    """What training gained, recipe by recipe: means over the seeds that were run, and how many."""
    from cada_deploy.training.ablation import Row as Arm
    from cada_deploy.training.ablation import markdown, summary

    path = results / "adaptation.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    by_recipe: dict[str, list[Arm]] = {}
    commands: dict[str, str] = {}
    for row in map(json.loads, lines):
        names = ("arm", "seed", "mean_iou", "iou", "model", "more")
        by_recipe.setdefault(row["recipe"], []).append(Arm(**{name: row[name] for name in names}))
        commands[row["recipe"]] = row["made_by"]
    parts = [
        f"`{commands[recipe]}`:\n\n{markdown(summary(rows))}"
        for recipe, rows in sorted(by_recipe.items())
    ]
    return "\n".join(parts)


def main() -> int:
    readme = ROOT / "README.md"
    results = ROOT / "benchmarks" / "results"
    old = new = readme.read_text(encoding="utf-8")
    for marked, text in ((_MARKED, performance(results)), (_ADAPTATION, adaptation(results))):
        new = marked.sub(lambda m, text=text: m.group(1) + text + m.group(2), new)
    readme.write_text(new, encoding="utf-8")
    print("README.md is up to date" if new == old else "README.md rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
