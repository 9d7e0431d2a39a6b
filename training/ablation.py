"""The paper's Tables 2 and 3 on any data: every arm, every seed, mean and 95 % interval.

An arm is a path through stages; arms share the stages they have in common. Each figure is the last
network's, on the evaluation set, which chooses nothing. Every table carries two controls: the
source network with batch norm statistics of the target, and a network that saw target labels.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cada_deploy import durable
from cada_deploy.errors import UsageError
from cada_deploy.metrics import ConfusionMatrix

from . import processes, self_training
from .export import export_checkpoint
from .recipes import Recipe, Stage
from .stages import Data, Trained, Workplace, class_set, evaluate, reestimated, run_stage
from .trainer import Domains

ROWS = "rows.jsonl"
# Student's t for a two-sided interval of 95 %, by degrees of freedom.
_STUDENT = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
}
PAPER = {  # mIoU of GTA5 to Cityscapes, Tables 2 and 3
    "original": 44.6,
    "original + adv": 45.5,
    "original + adv + SSL once": 48.5,
    "original + adv + SSL twice": 50.2,
    "style: Gram matrix": 44.7,
    "style: mean & std": 45.1,
}


@dataclass(frozen=True)
class Row:
    """One arm with one seed."""

    arm: str
    seed: int
    mean_iou: float
    iou: dict[str, float]
    model: str
    more: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self)}


class Arms:
    """The arms of one recipe and seed. Each is a method that trains what is missing."""

    def __init__(self, recipe: Recipe, data: Data, work: Workplace) -> None:
        self._recipe = recipe
        self._data = data
        self._work = work
        self._domains = Domains(data.source, data.target)
        self.evaluation = data.evaluation

    def source(self) -> Trained:
        return self._stage("source", None)

    def target_statistics(self) -> Trained:
        return reestimated(self._recipe, self.source(), self._data.target, self._work)

    def adapted(self, style: str = "adversarial") -> Trained:
        """Eq. 5 with this style term; `none` is the paper's `original`."""
        stage = replace(self._recipe.stage("adapt"), style_kind=style)
        return self._stage("adapt", self.source(), stage=stage)

    def self_trained(
        self, rounds: int | None = None, policy: str = "category-adaptive"
    ) -> tuple[Trained, dict[str, Any]]:
        """So many rounds after `adapted` (None: the recipe's), and how good the last round's labels
        were where there is truth."""
        chosen = replace(self._recipe.self_training, policy=policy)
        first = trained = self.adapted()
        found: dict[str, Any] = {}
        for _ in range(rounds or chosen.rounds):
            pseudo = self_training.label(
                self._recipe, trained, self._data.target, self._work, chosen
            )
            matrix = self_training.quality(pseudo, self._data.evaluation)
            found = {"coverage": _plain(matrix.coverage), "precision": _precision(matrix)}
            begin = first if chosen.start == "initial" else trained
            domains = Domains(self._data.source, self._data.target, pseudo)
            trained = self._stage("self-train", begin, domains=domains)
        return trained, found

    def upper_bound(self) -> tuple[Trained, dict[str, Any], ConfusionMatrix]:
        """Supervised training on labelled target frames, from the source network. Where the recipe
        has `folds`, each half of the frames is judged by the network that learnt from the other."""
        found: list[tuple[Trained, ConfusionMatrix]] = []
        for learnt, judged in self._data.upper_bounds:
            domains = Domains(learnt, self._data.target)
            trained = self._stage("upper-bound", self.source(), domains=domains)
            found.append((trained, evaluate(self._recipe, trained.model, judged)))
        matrix = found[0][1]
        for _, other in found[1:]:
            matrix = matrix + other
        return found[0][0], {"folds": len(found)}, matrix

    def _stage(
        self,
        name: str,
        start: Trained | None,
        *,
        stage: Stage | None = None,
        domains: Domains | None = None,
    ) -> Trained:
        chosen: Stage = stage or self._recipe.stage(name)
        judge = None
        if chosen.snapshot == "best-source":
            judge = self._data.validation
        elif chosen.snapshot == "best-target":
            judge = self._data.evaluation
            self._work.say(
                f"WARNING: stage {name} chooses its checkpoint by labels of the target. Its "
                "figure is no result of unsupervised adaptation; report it as what it is"
            )
        learnt = replace(domains or self._domains, judge=judge)
        return run_stage(self._recipe, name, learnt, self._work, start=start, stage=chosen)


# The last network, what else is worth telling, and its confusion matrix where that is not the one
# on the evaluation set.
Arm = Callable[
    [Arms], "tuple[Trained, dict[str, Any]] | tuple[Trained, dict[str, Any], ConfusionMatrix]"
]


def arms(recipe: Recipe, tables: Sequence[str]) -> dict[str, Arm]:
    """By name, in the order of the table."""
    found: dict[str, Arm] = {
        "source only": lambda a: (a.source(), {}),
        "source only, target statistics": lambda a: (a.target_statistics(), {}),
    }
    if "2" in tables:
        found |= {
            "original": lambda a: (a.adapted("none"), {}),
            "original + adv": lambda a: (a.adapted(), {}),
            "original + adv + SSL once": lambda a: a.self_trained(1),
            "original + adv + SSL twice": lambda a: a.self_trained(2),
            "fixed threshold, SSL once": lambda a: a.self_trained(1, "fixed"),
        }
    if "3" in tables:
        found |= {
            "style: Gram matrix": lambda a: (a.adapted("gram"), {}),
            "style: mean & std": lambda a: (a.adapted("mean-std"), {}),
            "original + adv": lambda a: (a.adapted(), {}),
        }
    if recipe.upper_bound:
        found["target labels"] = lambda a: a.upper_bound()
    return found


def run(recipe: Recipe, seeds: Sequence[int], tables: Sequence[str], work: Workplace) -> list[Row]:
    """Every arm for every seed, seed by seed, so that a stopped run has whole columns. Rows are
    written as they come; those that are there already are not made again."""
    if not set(tables) <= {"2", "3"} or not tables:
        raise UsageError(f"--tables {','.join(tables)}: expected 2, 3 or 2,3")
    done = {(row.arm, row.seed): row for row in read_rows(work.folder)}
    for seed in seeds:
        seeded = replace(recipe, seed=seed)
        made = Arms(seeded, Data.of(seeded), work)
        for name, arm in arms(recipe, tables).items():
            if (name, seed) in done:
                continue
            trained, more, *own = arm(made)
            matrix = own[0] if own else evaluate(seeded, trained.model, made.evaluation)
            row = _row(seeded, name, trained, more, matrix)
            work.say(f"seed {seed}, {name}: {100 * row.mean_iou:.1f} mIoU")
            done[name, seed] = row
            if processes.is_first():
                _append(work.folder, row)
    return [done[name, seed] for name in arms(recipe, tables) for seed in seeds]


def _row(
    recipe: Recipe, arm: str, trained: Trained, more: dict[str, Any], matrix: ConfusionMatrix
) -> Row:
    classes = class_set(recipe)
    known = matrix.labelled > 0
    iou = {n: float(v) for n, v, k in zip(classes.names, matrix.iou, known) if k}
    seconds = trained.facts.get("seconds")
    return Row(
        arm, recipe.seed, float(np.mean(list(iou.values()))), iou,
        str(trained.model.relative_to(trained.model.parents[1])),
        {**more, "stage_seconds": seconds},
    )  # fmt: skip


def _precision(matrix: ConfusionMatrix) -> float | None:
    """Share of the selected pixels that are right; None when none was selected."""
    selected = matrix.counts[:, :-1].sum()
    return float(np.trace(matrix.counts[:, :-1]) / selected) if selected else None


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def export_models(
    recipe: Recipe, seed: int, rows: Sequence[Row], work: Workplace, folder: Path
) -> None:
    """source-only.onnx and best.onnx of one seed: the control and the last self-training."""
    wanted = {"source-only.onnx": "source only", "best.onnx": "original + adv + SSL twice"}
    durable.make_folder(folder)
    for name, arm in wanted.items():
        found = [row for row in rows if (row.arm, row.seed) == (arm, seed)]
        if not found:
            raise UsageError(f"--export needs the arm {arm!r}; run with --tables 2")
        checkpoint = work.folder / found[0].model
        made = export_checkpoint(
            checkpoint, folder / name, classes=class_set(recipe), overwrite=True
        )
        work.say(f"{made.path}: {made.bytes / 1e6:.1f} MB")


# --- tables ------------------------------------------------------------------------------------


def read_rows(folder: Path) -> Iterator[Row]:
    path = folder / ROWS
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield Row(**json.loads(line))


def _append(folder: Path, row: Row) -> None:
    durable.make_folder(folder)
    with (folder / ROWS).open("ab") as file:
        file.write(durable.json_line(row.to_json()))


@dataclass(frozen=True)
class Line:
    """One arm over its seeds: mean mIoU and half of its 95 % interval, in per cent. gap: how much
    of the way from `source only` to `target labels` it goes."""

    arm: str
    mean: float
    half: float
    seeds: int
    gap: float | None
    paper: float | None


def summary(rows: Sequence[Row]) -> list[Line]:
    by_arm: dict[str, list[float]] = {}
    for row in rows:
        by_arm.setdefault(row.arm, []).append(100 * row.mean_iou)
    means = {arm: float(np.mean(values)) for arm, values in by_arm.items()}
    low, high = means.get("source only"), means.get("target labels")
    lines = []
    for arm, values in by_arm.items():
        gap = None
        if low is not None and high is not None and high > low:
            gap = (means[arm] - low) / (high - low)
        lines.append(
            Line(arm, means[arm], _half_interval(values), len(values), gap, PAPER.get(arm))
        )
    return lines


def _half_interval(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return _STUDENT.get(len(values) - 1, 1.96) * spread


def markdown(lines: Sequence[Line]) -> str:
    text = ["| arm | mIoU, mean and 95 % interval | of the gap | paper (GTA5 to Cityscapes) |",
            "|---|---|---|---|"]  # fmt: skip
    for line in lines:
        interval = "one seed" if math.isnan(line.half) else f"± {line.half:.1f}"
        gap = "" if line.gap is None else f"{100 * line.gap:.0f} %"
        paper = "" if line.paper is None else f"{line.paper}"
        text.append(f"| {line.arm} | {line.mean:.1f} {interval} ({line.seeds}) | {gap} | {paper} |")
    return "\n".join(text) + "\n"


def comma_separated(rows: Sequence[Row]) -> str:
    """Every arm and seed, with the IoU of every class."""
    classes = list(dict.fromkeys(name for row in rows for name in row.iou))
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["arm", "seed", "mIoU", *classes])
    for row in rows:
        ious = [f"{100 * row.iou[c]:.2f}" if c in row.iou else "" for c in classes]
        writer.writerow([row.arm, row.seed, f"{100 * row.mean_iou:.2f}", *ious])
    return out.getvalue()


def plot(lines: Sequence[Line]) -> str:
    """An SVG: a bar for every arm, its interval, and the paper's figure beside it."""
    width, left, row = 760, 250, 30
    height = row * len(lines) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for k, line in enumerate(lines):
        parts += _bar(line, 10 + k * row, left, (width - left - 60) / 100)
    note = "mIoU in per cent; red ring: the paper, GTA5 to Cityscapes"
    parts.append(f'<text x="{left}" y="{height - 10}">{note}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _bar(line: Line, y: int, left: int, scale: float) -> list[str]:
    half = 0.0 if math.isnan(line.half) else line.half
    low, mean, high = (left + scale * (line.mean + sign * half) for sign in (-1, 0, 1))
    text = f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{_escaped(line.arm)}</text>'
    bar = f'<rect x="{left}" y="{y + 3}" width="{mean - left:.1f}" height="16" fill="#4477aa"/>'
    parts = [text, bar, f'<text x="{high + 6:.1f}" y="{y + 15}">{line.mean:.1f}</text>']
    if half:
        ends = "".join(f"M{x:.1f} {y + 6}V{y + 16}" for x in (low, high))
        path = f"M{low:.1f} {y + 11}H{high:.1f}{ends}"
        parts.append(f'<path d="{path}" stroke="black" fill="none"/>')
    if line.paper is not None:
        x = left + scale * line.paper
        ring = 'r="4" fill="none" stroke="#cc3311" stroke-width="2"'
        parts.append(f'<circle cx="{x:.1f}" cy="{y + 11}" {ring}/>')
    return parts


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def write_tables(rows: Sequence[Row], folder: Path) -> None:
    lines = summary(rows)
    durable.write_file(folder / "table.md", markdown(lines).encode())
    durable.write_file(folder / "table.csv", comma_separated(rows).encode())
    durable.write_file(folder / "table.svg", plot(lines).encode())
    durable.sync_folder(folder)
