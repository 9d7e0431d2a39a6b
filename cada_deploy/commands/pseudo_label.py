"""`cada-deploy pseudo-label`: the main job."""

from __future__ import annotations

from typing import Any

import click

from cada_deploy import command_options as shared
from cada_deploy.labelling import RunOptions, pseudo_label
from cada_deploy.reporting import publish_report, summary


@click.command(name="pseudo-label")
@shared.model_options
@click.option("--images", type=shared.PATH, required=True, help="Folder of images, or a list file.")
@click.option("--out", type=shared.PATH, required=True, help="Folder for everything that is made.")
@shared.policy_options
@shared.frame_options
@click.option("--stats-size", help="Grid of the statistics HxW (default: the label size).")
@shared.file_options
@click.option(
    "--cache",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Keep the scores, so that new thresholds need no network (off: it runs twice).",
)
@click.option(
    "--auto-batch",
    is_flag=True,
    help="Halve the batch, and say so, when the GPU has no room for it.",
)
@shared.work_options
def command(**options: Any) -> int:
    """Label a folder of unlabelled images with the pixels the model is sure of.

    Scores every image, learns one entropy threshold per class from the whole set, and writes
    OUT/labels/<name>.png (255 = not selected), thresholds.json, statistics.json, rejected.jsonl
    and report.html. Stopped at any time, the same command goes on where it was.

    \b
    Example:
      cada-deploy pseudo-label --model model.onnx --images frames/ --out labels-1/
    """
    run = RunOptions(
        shared.model_choice(options),
        options["images"],
        options["out"],
        shared.selecting(options),
        shared.sizes(options),
        shared.ignored(options),
        shared.label_files(options),
        shared.work(options),
    )
    say = shared.say(options["quiet"])
    outcome = pseudo_label(run, say)
    publish_report(outcome)
    say(summary(outcome))
    return shared.exit_code(outcome, options["allow_rejects"])
