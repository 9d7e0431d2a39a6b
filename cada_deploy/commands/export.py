"""`cada-deploy export`: from a checkpoint to ONNX or a TensorRT engine that was proven equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cada_deploy import command_options as shared
from cada_deploy import engines
from cada_deploy.engine_plans import HARDWARE, SUFFIXES, Build, PlanOptions
from cada_deploy.errors import EnvironmentLacks, UsageError
from cada_deploy.pipeline import parse_size
from cada_deploy.presets import PRESETS

_TRT = "trt"


@click.command(name="export")
@click.argument("checkpoint", metavar="MODEL", type=shared.PATH)
@click.option("-o", "--out", type=shared.PATH, required=True, help="The file to write.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["onnx", _TRT]),
    help="onnx, or trt: a TensorRT engine for this machine's GPU (default: by the name of OUT).",
)
@click.option("--arch", default="auto", show_default=True, help="Network, if not told by its file.")
@click.option("--preset", type=click.Choice(sorted(PRESETS)), help="How its images are prepared.")
@click.option("--spec", "spec_file", type=shared.PATH, help="TOML file: how it is fed and read.")
@click.option("--classes", help="Class set, such as cityscapes-19 (default for 19 classes).")
@click.option("--size", help="Fixed input size HxW (default: any size).")
@click.option(
    "--batch",
    "--batch-size",
    "batch",
    type=shared.COUNT,
    help="Fixed batch size (default: any; an engine's is 1).",
)
@click.option(
    "--aspp-branches",
    type=click.Choice(["auto", "2", "4"]),
    default="auto",
    show_default=True,
    help="Summed ASPP branches of a DeepLabV2; auto decides from the tensors and says why.",
)
@click.option(
    "--head",
    type=click.Choice(["scores", "labels", "labels+confidence"]),
    default="scores",
    show_default=True,
    help="Per-class scores, which cada-deploy needs; or a full-size label map from the graph, for "
    "Triton, Isaac and DeepStream (cada-deploy itself refuses it: labels have no entropy).",
)
@click.option("--images", type=shared.PATH, help="Frames for the proof (default: drawn scenes).")
@click.option("--allow-partial", is_flag=True, help="Load what fits; the rest stays untrained.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@click.option("--min-size", help="trt: smallest input HxW of an engine of many sizes.")
@click.option("--opt-size", help="trt: input HxW that the engine is tuned for.")
@click.option("--max-size", help="trt: largest input HxW.")
@click.option("--workspace", type=shared.COUNT, help="trt: MiB of GPU memory for the build.")
@click.option(
    "--hardware-compatible",
    "hardware",
    type=click.Choice(sorted(HARDWARE)),
    help="trt: an engine for more than this model of GPU; slower.",
)
@click.option("--version-compatible", is_flag=True, help="trt: also for later TensorRT; slower.")
@click.option("--dla", type=click.IntRange(min=0), help="trt: DLA core of a Jetson Orin.")
@click.option("--timing-cache", type=shared.PATH, help="trt: file of measured kernel times.")
@click.option("--device", help="trt: cuda:N to build on and for (default: cuda:0).")
@click.option("--quiet", is_flag=True, help="No load report and no figures.")
def command(checkpoint: Path, quiet: bool, kind: str | None, **options: Any) -> int:
    """Turn a CHECKPOINT (.pth, .pt, .pkl, .safetensors) into ONNX, and prove the two equal.

    Takes the files of BDL, CRST, FDA, AdaptSegNet, ADVENT, CLAN and MaxSquare as they are. ONNX
    Runtime is compared with PyTorch on sizes that were not traced and, from the bytes of frames to
    labels and entropy, with the preprocessing that the file states. Where they are not the same it
    exits 5 and writes nothing. Code in a checkpoint is never run.

    With --format trt, ONNX (or a checkpoint, by way of ONNX) becomes a TensorRT engine with
    OUT.json beside it; it must agree with ONNX Runtime on frames, or exit 5.

    \b
    Example:
      cada-deploy export BDL_gta5.pth -o bdl.onnx --preset bdl --images frames/
      cada-deploy export bdl.onnx -o bdl.engine --format trt --size 512x1024
    """
    say = shared.say(quiet)
    out = options["out"]
    build = _build(options, quiet)
    device = options.pop("device") or engines.default_device(_TRT)
    if (kind or (_TRT if out.suffix in SUFFIXES else "onnx")) == _TRT:
        _export_engine(checkpoint, build, device, options, say)
    else:
        _only_for_engines(build)
        _export_onnx(checkpoint, options, say)
    return 0


def _export_onnx(checkpoint: Path, options: dict[str, Any], say: Any) -> None:
    size, classes = options.pop("size"), options.pop("classes")
    branches = options.pop("aspp_branches")
    made = _exporter()(
        checkpoint,
        size=None if size is None else parse_size("--size", size),
        classes=shared.named_classes(classes),
        aspp_branches=branches if branches == "auto" else int(branches),
        say=say,
        **options,
    )
    say(
        f"{made.path}: {made.bytes / 1e6:.1f} MB, {made.nodes} nodes, proven equal in "
        f"{made.seconds:.0f} s"
    )


def _export_engine(
    model: Path, build: Build, device: str, options: dict[str, Any], say: Any
) -> None:
    """A checkpoint becomes ONNX beside the engine first: a rebuild starts from that."""
    out = options["out"]
    if out.suffix not in SUFFIXES:
        raise UsageError(f"-o {out}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if out.exists() and not options["overwrite"]:
        raise UsageError(f"{out} exists; give another -o, or --overwrite to replace it")
    if options["head"] != "scores":
        raise UsageError("--head: an engine for cada-deploy gives scores; leave --head out")
    engines.require(_TRT)  # before an export that takes minutes
    feeding = {"preset": options["preset"], "spec_file": options["spec_file"]}
    classes = shared.named_classes(options["classes"])
    if model.suffix != ".onnx":
        onnx = out.with_suffix(".onnx")
        _export_onnx(model, {**options, "out": onnx}, say)
        model, classes, feeding = onnx, None, {}  # the file says it all
    loaded = engines.load_model(_TRT, model, classes=classes, build=build, **feeding)
    engine = engines.open_engine(_TRT, loaded, device)
    say(f"{out}: TensorRT {engine.version}, {engine.classes} classes, passed its gates")


def _build(options: dict[str, Any], quiet: bool) -> Build:
    """Take the engine's own options out of `options`."""
    low, best, high = (
        None if text is None else parse_size(name, text)
        for name, text in (
            ("--min-size", options.pop("min_size")),
            ("--opt-size", options.pop("opt_size")),
            ("--max-size", options.pop("max_size")),
        )
    )
    if options["size"] is not None:
        if low or best or high:
            raise UsageError("--size fixes the input; leave out --min-size, --opt-size, --max-size")
        low = best = high = parse_size("--size", options["size"])
    wishes = PlanOptions(
        low, best, high, options["batch"] or 1, options.pop("workspace"), options.pop("hardware"),
        options.pop("version_compatible"), options.pop("dla"),
    )  # fmt: skip
    return Build(
        wishes, True, options["out"], options.pop("timing_cache"), options["images"], quiet,
        shared.say(quiet),
    )  # fmt: skip


def _only_for_engines(build: Build) -> None:
    wishes = build.options
    sized = wishes.minimum != wishes.maximum or wishes.minimum != wishes.optimum
    more = (wishes.workspace_mib, wishes.hardware, wishes.dla, build.timing_cache)
    if sized or wishes.version_compatible or any(value is not None for value in more):
        raise UsageError("an option that is marked trt goes with --format trt, or -o NAME.engine")


def _exporter() -> Any:
    """The one door from this command to torch; it opens only when the command is called."""
    try:
        from cada_deploy.training.export import export_checkpoint
    except ImportError as error:
        if (error.name or "").startswith("cada_deploy"):
            raise  # a fault of ours is not mended by installing something
        raise EnvironmentLacks(
            f"export needs {error.name or 'PyTorch'}; install it with: "
            "pip install 'cada-deploy[cpu,train]'"
        ) from error
    return export_checkpoint
