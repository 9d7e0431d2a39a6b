"""`cada-deploy demo`: see the whole thing work, offline, in a minute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cada_deploy import command_options as shared
from cada_deploy.demo import run_demo
from cada_deploy.evaluation import table_text
from cada_deploy.metrics import iou_table
from cada_deploy.reporting import summary


@click.command(name="demo")
@click.option(
    "--out", type=shared.PATH, default="demo-out", show_default=True, help="Folder for the demo."
)
@shared.policy_options
@click.option("--quiet", is_flag=True, help="No progress and no summary.")
def command(out: Path, quiet: bool, **options: Any) -> int:
    """Pseudo-label 48 procedural street scenes at dusk with the model that ships in the package,
    compare the labels with the scenes' truth, and draw the report.

    \b
    Example:
      cada-deploy demo --out demo-out --delta 10%
    """
    say = shared.say(quiet)
    result = run_demo(out, shared.selecting(options), quiet, say)
    if not quiet:
        rows = iou_table(result.selected.matrix, result.outcome.spec.classes)
        click.echo(table_text(result.selected, rows))
        click.echo(result.verdict())
    say(summary(result.outcome))
    return 0
