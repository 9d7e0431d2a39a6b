"""`cada-deploy select`: other thresholds, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cada_deploy import command_options as shared
from cada_deploy.errors import REJECTED_SOME
from cada_deploy.labelling import Work, select_again
from cada_deploy.reporting import publish_report, summary


@click.command(name="select")
@click.argument("run", type=shared.PATH)
@click.option(
    "--out", type=shared.PATH, help="Write there (default: RUN itself, replacing its labels)."
)
@shared.policy_options
@shared.file_options
@click.option(
    "--workers", type=shared.COUNT, help="Images worked on at once (default: one per core)."
)
@click.option("--quiet", is_flag=True, help="No progress and no summary.")
def command(run: Path, out: Path | None, **options: Any) -> int:
    """Cut the labels of a finished RUN anew, with another policy or Delta, from its cached scores.

    \b
    Example:
      cada-deploy select labels-1/ --delta 0.1 --out labels-2/
    """
    say = shared.say(options["quiet"])
    files = shared.label_files(options)
    outcome = select_again(
        run,
        out or run,
        shared.selecting(options),
        files,
        Work(workers=options["workers"], quiet=options["quiet"]),
        say,
    )
    publish_report(outcome)
    say(summary(outcome))
    lost = [i for shard in outcome.selected for i in shard.images if i.rejected]
    return REJECTED_SOME if lost else 0  # what RUN had rejected itself was said then
