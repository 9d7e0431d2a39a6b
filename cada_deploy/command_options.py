"""Options that several commands share, and how their texts become values."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from cada_deploy import engines, policies
from cada_deploy.classes import ClassSet, class_set
from cada_deploy.engine_plans import Build, PlanOptions
from cada_deploy.errors import REJECTED_SOME, UsageError
from cada_deploy.ignored import IgnoredArea, parse_rows
from cada_deploy.labelling import ModelChoice, Outcome, Work
from cada_deploy.labels import read_label_png
from cada_deploy.outputs import LabelFiles
from cada_deploy.pipeline import Sizes, parse_size
from cada_deploy.policies.category_adaptive import SCOPES
from cada_deploy.presets import PRESETS
from cada_deploy.selection import Selecting
from cada_deploy.statistics import CENTROIDS

Command = TypeVar("Command", bound=Callable[..., Any])
Options = dict[str, Any]


class PathBytes(click.ParamType[Path]):
    """A path of any bytes; click's own Path type would refuse names that are not UTF-8."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return value if isinstance(value, Path) else Path(os.fsdecode(value))


PATH = PathBytes()
COUNT = click.IntRange(min=1)


def _stacked(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


model_options = _stacked(
    click.option(
        "--model", type=PATH, required=True,
        help="ONNX, a checkpoint (torch) or a built engine (trt).",
    ),
    click.option(
        "--engine", type=click.Choice(engines.names()), default="ort", show_default=True,
        help="What runs the network.",
    ),
    click.option("--device", help="cpu or cuda:N (default: cpu; cuda:0 for trt)."),
    click.option(
        "--rebuild", is_flag=True,
        help="Build the TensorRT engine anew, in place of the kept one (trt).",
    ),
    click.option(
        "--preset", type=click.Choice(sorted(PRESETS)), help="Preprocessing of a foreign model."
    ),
    click.option(
        "--spec", "spec_file", type=PATH, help="TOML file: how to feed a foreign model."
    ),
    click.option("--classes", help="Class set of the model, such as cityscapes-19."),
)  # fmt: skip

frame_options = _stacked(
    click.option("--size", help="Network input HxW (default: the image's own, or the model's)."),
    click.option(
        "--label-size", default="image", show_default=True,
        help="Size of the labels: image, model (the network's input) or HxW.",
    ),
    click.option(
        "--ignore-mask", type=PATH,
        help="PNG; its nonzero pixels get no label and count in no statistic.",
    ),
    click.option(
        "--ignore-rows", multiple=True, metavar="START:STOP",
        help="Image rows to leave out, such as 0:16 or -120: (repeatable).",
    ),
)  # fmt: skip

policy_options = _stacked(
    click.option(
        "--policy", type=click.Choice(sorted(policies.policies())), default="category-adaptive",
        show_default=True, help="How pixels are chosen.",
    ),
    click.option(
        "--delta",
        help="Margin below the centroid's entropy: nats (0.1), a share (10%), one per class "
        "(0.1,0.2,...) or by name ('*=0.1,car=20%'). Default 0.",
    ),
    click.option(
        "--centroid", type=click.Choice(CENTROIDS), default="confidence", show_default=True,
        help="How the category centroid is weighted.",
    ),
    click.option(
        "--scope", type=click.Choice(SCOPES), default="dataset", show_default=True,
        help="Centroids of the whole set, or of each image alone.",
    ),
    click.option(
        "--threshold", type=float,
        help="Confidence for --policy fixed (default 0.9; 0 keeps all).",
    ),
)  # fmt: skip

file_options = _stacked(
    click.option(
        "--ids", type=click.Choice(["train", "label"]), default="train", show_default=True,
        help="Train ids and 255, or the data set's label ids and 0.",
    ),
    click.option("--overlay", is_flag=True, help="Also write overlay/<stem>.png."),
    click.option("--confidence", is_flag=True, help="Also write confidence/<stem>.png, 16 bit."),
    click.option("--entropy", is_flag=True, help="Also write entropy/<stem>.png, 16 bit."),
)  # fmt: skip

work_options = _stacked(
    click.option("--workers", type=COUNT, help="Images worked on at once (default: one per core)."),
    click.option(
        "--batch-size", type=COUNT, default=1, show_default=True,
        help="Images handed to a worker at once. The network of ort and torch still runs one by "
        "one, so that a label cannot depend on its neighbours; an engine of trt is built for it.",
    ),
    click.option("--shard-size", type=COUNT, help="Images per unit of resume (default 64)."),
    click.option(
        "--allow-rejects", type=click.IntRange(min=0), default=0, show_default=True,
        help="So many rejected inputs still count as success.",
    ),
    click.option("--quiet", is_flag=True, help="No progress and no summary."),
)  # fmt: skip


def model_choice(options: Options) -> ModelChoice:
    return ModelChoice(
        options["model"],
        options["engine"],
        options["device"] or engines.default_device(options["engine"]),
        options["preset"],
        options["spec_file"],
        named_classes(options["classes"]),
        _build(options),
    )


def _build(options: Options) -> Build:
    """An engine is built for the one size and the batch that the run has."""
    size = None if options["size"] is None else parse_size("--size", options["size"])
    wishes = PlanOptions(size, size, size, options.get("batch_size", 1))
    return Build(wishes, options["rebuild"], quiet=options["quiet"], say=say(options["quiet"]))


def named_classes(name: str | None) -> ClassSet | None:
    return None if name is None else class_set(name)


def sizes(options: Options) -> Sizes:
    label, statistics = options["label_size"], options.get("stats_size")
    return Sizes(
        None if options["size"] is None else parse_size("--size", options["size"]),
        label if label in ("image", "model") else parse_size("--label-size", label),
        None if statistics is None else parse_size("--stats-size", statistics),
    )


def ignored(options: Options) -> IgnoredArea:
    path = options["ignore_mask"]
    mask = None
    if path is not None:
        try:
            mask = read_label_png(path.read_bytes())
        except OSError as error:
            raise UsageError(f"--ignore-mask {path}: {error.strerror}") from error
    return IgnoredArea(mask, parse_rows(options["ignore_rows"]))


def selecting(options: Options) -> Selecting:
    return Selecting(
        options["policy"],
        options["delta"],
        options["centroid"],
        options["scope"],
        options["threshold"],
    )


def label_files(options: Options) -> LabelFiles:
    return LabelFiles(options["ids"], options["overlay"], options["confidence"], options["entropy"])


def work(options: Options) -> Work:
    return Work(
        options["workers"],
        options.get("batch_size", 1),
        options.get("shard_size"),
        options.get("cache", "off"),
        options["quiet"],
        options.get("auto_batch", False),
    )


def say(quiet: bool) -> Callable[[str], None]:
    """Remarks go to standard error, so that standard output can be piped."""
    return (lambda _: None) if quiet else (lambda text: click.echo(text, err=True))


def exit_code(outcome: Outcome, allow_rejects: int) -> int:
    """0, or 6 when more inputs were rejected than allowed. The rejected are named either way."""
    return REJECTED_SOME if len(outcome.rejected) > allow_rejects else 0
