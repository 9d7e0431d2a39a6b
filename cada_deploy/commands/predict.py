"""`cada-deploy predict`: full-coverage labels."""

from __future__ import annotations

from typing import Any

import click

from cada_deploy import command_options as shared
from cada_deploy.labelling import RunOptions, predict
from cada_deploy.policies import fixed
from cada_deploy.reporting import summary
from cada_deploy.selection import Selecting


@click.command(name="predict")
@shared.model_options
@click.option("--images", type=shared.PATH, required=True, help="Folder of images, or a list file.")
@click.option("--out", type=shared.PATH, required=True, help="Folder for everything that is made.")
@shared.frame_options
@shared.file_options
@shared.work_options
def command(**options: Any) -> int:
    """Label every pixel of every image: OUT/labels/<name>.png, 255 only where nothing is valid.

    \b
    Example:
      cada-deploy predict --model model.onnx --images frames/ --out predictions/ --overlay
    """
    run = RunOptions(
        shared.model_choice(options),
        options["images"],
        options["out"],
        Selecting(policy=fixed.NAME, threshold=0.0),
        shared.sizes(options),
        shared.ignored(options),
        shared.label_files(options),
        shared.work(options),
    )
    say = shared.say(options["quiet"])
    outcome = predict(run, say)
    say(summary(outcome))
    return shared.exit_code(outcome, options["allow_rejects"])
