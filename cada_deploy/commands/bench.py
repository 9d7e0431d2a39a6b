"""`cada-deploy bench`: how long a model takes here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cada_deploy import command_options as shared
from cada_deploy import durable, engines
from cada_deploy.bench.session import PERCENTILES, BenchOptions, BenchResult, bench
from cada_deploy.bench.words import text
from cada_deploy.errors import REJECTED_SOME, CheckFailed, UsageError
from cada_deploy.pipeline import parse_size
from cada_deploy.presets import PRESETS


@click.command(name="bench")
@click.argument("model", type=shared.PATH)
@click.option(
    "--engine",
    type=click.Choice(engines.names()),
    default="ort",
    show_default=True,
    help="What runs the network.",
)
@click.option("--device", help="cpu or cuda:N (default: cpu; cuda:0 for trt).")
@click.option(
    "--rebuild",
    is_flag=True,
    help="Build the TensorRT engine anew, in place of the kept one (trt).",
)
@click.option(
    "--preset", type=click.Choice(sorted(PRESETS)), help="Preprocessing of a foreign model."
)
@click.option("--spec", "spec_file", type=shared.PATH, help="TOML file: how to feed the model.")
@click.option("--classes", help="Class set of the model, such as cityscapes-19.")
@click.option("--size", help="Network input HxW, and the size of drawn frames.")
@click.option(
    "--images",
    type=shared.PATH,
    help="Folder or list; its first 64 images (default: drawn scenes).",
)
@click.option("--batch-size", type=shared.COUNT, default=1, show_default=True, help="Per run.")
@click.option(
    "--duration",
    type=float,
    default=10.0,
    show_default=True,
    metavar="S",
    help="Each of the two measurements lasts at least so many seconds ...",
)
@click.option(
    "--iterations",
    type=shared.COUNT,
    default=10,
    show_default=True,
    help="... and at least so many runs.",
)
@click.option(
    "--warm-up",
    type=float,
    default=10.0,
    show_default=True,
    metavar="S",
    help="Run before each measurement until the times are stable, at most so long (0: not).",
)
@click.option(
    "--percentile",
    default=",".join(f"{p:g}" for p in PERCENTILES),
    show_default=True,
    help="Comma-separated. One that has too few runs behind it is not stated.",
)
@click.option(
    "--threads",
    type=shared.COUNT,
    default=1,
    show_default=True,
    help="Of the network and the fused kernel, for one frame on the CPU.",
)
@click.option("--png", is_flag=True, help="Encoding the label PNG belongs to end to end.")
@click.option("--json", "json_file", type=shared.PATH, help="Write the result as JSON.")
@click.option(
    "--export-times", type=shared.PATH, help="Write every run of the engine as trtexec does."
)
@click.option(
    "--baseline", type=shared.PATH, help="--json of an earlier bench, to compare this one with."
)
@click.option(
    "--max-p99-ms", type=float, metavar="MS", help="End-to-end p99 above this is exit code 5."
)
@click.option("--quiet", is_flag=True, help="No progress and no text.")
def command(model: Path, quiet: bool, **options: Any) -> int:
    """Measure MODEL (ONNX, a checkpoint or a built engine) twice in one run: the engine alone, and
    the way from image bytes to labels with every stage.

    Warms up until the times are stable, counts every run, and says where the boundary of each
    measurement lies. Clocks, power and energy come from NVML, a Jetson's rails or RAPL, where they
    can be read.

    \b
    Example:
      cada-deploy bench model.onnx --images frames/ --json bench.json
    """
    size = options["size"]
    result = bench(
        BenchOptions(
            shared.model_choice({**options, "model": model, "quiet": quiet}),
            None if size is None else parse_size("--size", size),
            options["images"],
            options["batch_size"],
            options["duration"],
            options["iterations"],
            options["warm_up"],
            _percentiles(options["percentile"]),
            options["threads"],
            options["png"],
            options["max_p99_ms"],
            options["baseline"],
            quiet,
        )
    )
    if options["json_file"] is not None:
        durable.write_json(options["json_file"], result.data)
    if options["export_times"] is not None:
        _write_times(options["export_times"], result)
    if not quiet:
        click.echo(text(result.data))
    if not result.met:
        objective = result.data["objective"]
        raise CheckFailed(
            f"{objective['what']} is {objective['found_ms']:.6g} ms; asked for was at most "
            f"{objective['max_ms']:g} ms (--max-p99-ms)"
        )
    return REJECTED_SOME if result.data["frames"]["rejected"] else 0


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        return tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise UsageError(
            f"--percentile {text!r}; expected numbers between commas, such as 50,90,99.9"
        ) from None


def _write_times(path: Path, result: BenchResult) -> None:
    rows = [run.to_trtexec() for run in result.runs]
    durable.write_file(path, (json.dumps(rows, indent=2) + "\n").encode())
