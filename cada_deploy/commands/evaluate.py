"""`cada-deploy evaluate`: labels against truth."""

from __future__ import annotations

import json
import math
from pathlib import Path

import click

from cada_deploy import command_options as shared
from cada_deploy.classes import class_set
from cada_deploy.evaluation import Comparison, compare_folders, table_text
from cada_deploy.metrics import TableRow, iou_table


@click.command(name="evaluate")
@click.option("--labels", type=shared.PATH, required=True, help="Folder of label PNGs (train ids).")
@click.option("--truth", type=shared.PATH, required=True, help="Folder of true label PNGs.")
@click.option("--classes", default="cityscapes-19", show_default=True, help="Class set of both.")
@click.option(
    "--truth-ids",
    type=click.Choice(["train", "label"]),
    default="train",
    show_default=True,
    help="What the truth holds: train ids, or the data set's label ids.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(
    labels: Path, truth: Path, classes: str, truth_ids: str, as_json: bool, quiet: bool
) -> int:
    """IoU per class (for cityscapes-19 in the paper's column order), mIoU, and for pseudo labels
    the coverage and precision of the selected pixels.

    IoU is that of the Cityscapes benchmark: void truth is left out, an unlabelled pixel on
    labelled ground counts as missed. `IoU sel.` looks at the labelled pixels alone.

    \b
    Example:
      cada-deploy evaluate --labels predictions/labels --truth truth/
    """
    chosen = class_set(classes)
    comparison = compare_folders(labels, truth, chosen, truth_ids=truth_ids, quiet=quiet)
    rows = iou_table(comparison.matrix, chosen)
    click.echo(_json(comparison, rows) if as_json else table_text(comparison, rows))
    return 0


def _json(comparison: Comparison, rows: list[TableRow]) -> str:
    def number(value: float) -> float | None:
        return None if math.isnan(value) else value

    def row_json(row: TableRow) -> dict[str, float | None]:
        return {
            "iou": number(row.iou),
            "iou_selected": number(row.iou_selected),
            "precision": number(row.precision),
            "coverage": number(row.coverage),
        }

    return json.dumps(
        {
            "pairs": comparison.pairs,
            "without_truth": comparison.without_truth,
            "without_label": comparison.without_label,
            "classes": {row.name: row_json(row) for row in rows[:-1]},
            "mean": row_json(rows[-1]),
        },
        indent=1,
    )
