"""Labels against truth: pairs files by relative path and adds up one confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cada_deploy.classes import ClassSet
from cada_deploy.errors import UsageError
from cada_deploy.image_files import ImageRef, find_images, output_stem
from cada_deploy.images import read_bytes
from cada_deploy.labels import LabelMap, read_label_png
from cada_deploy.metrics import ConfusionMatrix, TableRow, confusion_matrix, empty_matrix
from cada_deploy.progress import progress


@dataclass(frozen=True)
class Comparison:
    """What was compared. Truth files without a label are counted, not ignored."""

    matrix: ConfusionMatrix
    pairs: int
    without_truth: int
    without_label: int


def compare_folders(
    labels: Path, truth: Path, classes: ClassSet, *, truth_ids: str = "train", quiet: bool = False
) -> Comparison:
    """labels/<stem>.png against truth/<stem>.png, by relative path.

    truth_ids "label" maps the truth's label ids to train ids first (Cityscapes labelIds); ids of
    no class become void. Raises UsageError when no pair is found, ArtefactMismatch for a map of
    another size or with ids outside the class set.
    """
    found = {output_stem(r.relative): r for r in find_images(labels)}
    expected = {output_stem(r.relative): r for r in find_images(truth)}
    stems = sorted(found.keys() & expected.keys())
    if not stems:
        raise UsageError(
            f"no file of {labels} ({_example(found)}) has a counterpart in {truth} "
            f"({_example(expected)}): relative paths without suffix must agree"
        )
    table = _train_id_table(classes) if truth_ids == "label" else None
    matrix = empty_matrix(classes)
    with progress("comparing", len(stems), quiet=quiet) as bar:
        for prediction, true, name in _maps(stems, found, expected):
            reference = true if table is None else table[true]
            matrix = matrix + confusion_matrix(
                prediction,
                reference,
                classes,
                prediction_name=f"label {name}",
                truth_name=f"truth of {name}",
            )
            bar.advance(1)
    return Comparison(
        matrix, len(stems), len(found.keys() - expected.keys()), len(expected.keys() - found.keys())
    )


def _maps(
    stems: list[bytes], found: dict[bytes, ImageRef], expected: dict[bytes, ImageRef]
) -> Iterator[tuple[LabelMap, LabelMap, str]]:
    for stem in stems:
        name = stem.decode(errors="backslashreplace")
        yield _read(found[stem], name), _read(expected[stem], f"truth of {name}"), name


def _read(ref: ImageRef, name: str) -> LabelMap:
    return read_label_png(read_bytes(ref.path), name)


def _example(refs: dict[bytes, ImageRef]) -> str:
    first = min(refs)
    return f"{len(refs)} files such as {first.decode(errors='backslashreplace')}"


def _train_id_table(classes: ClassSet) -> LabelMap:
    table = np.full(256, classes.ignore_id, np.uint8)
    for train_id, label_id in enumerate(classes.label_ids):
        table[label_id] = train_id
    return table


def table_text(comparison: Comparison, rows: list[TableRow]) -> str:
    """Percentages per class for a terminal; '-' where a figure is undefined."""
    lines = [f"{'class':<14} {'IoU':>7} {'IoU sel.':>9} {'precision':>10} {'coverage':>9}"]
    for row in rows:
        lines.append(
            f"{row.name:<14} {_percent(row.iou):>7} {_percent(row.iou_selected):>9} "
            f"{_percent(row.precision):>10} {_percent(row.coverage):>9}"
        )
    lines.append(
        f"{comparison.pairs} pairs; {comparison.without_truth} labels without truth, "
        f"{comparison.without_label} truth maps without labels"
    )
    return "\n".join(lines)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"
