"""`cada-deploy export`: from a checkpoint to an ONNX file that was proven equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cada_deploy import command_options as shared
from cada_deploy.errors import EnvironmentLacks
from cada_deploy.pipeline import parse_size
from cada_deploy.presets import PRESETS


@click.command(name="export")
@click.argument("checkpoint", type=shared.PATH)
@click.option("-o", "--out", type=shared.PATH, required=True, help="The ONNX file to write.")
@click.option("--arch", default="auto", show_default=True, help="Network, if not told by its file.")
@click.option("--preset", type=click.Choice(sorted(PRESETS)), help="How its images are prepared.")
@click.option("--spec", "spec_file", type=shared.PATH, help="TOML file: how it is fed and read.")
@click.option("--classes", help="Class set, such as cityscapes-19 (default for 19 classes).")
@click.option("--size", help="Fixed input size HxW (default: any size).")
@click.option("--batch", type=shared.COUNT, help="Fixed batch size (default: any).")
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
@click.option("--quiet", is_flag=True, help="No load report and no figures.")
def command(checkpoint: Path, quiet: bool, **options: Any) -> int:
    """Turn a CHECKPOINT (.pth, .pt, .pkl, .safetensors) into ONNX, and prove the two equal.

    Takes the files of BDL, CRST, FDA, AdaptSegNet, ADVENT, CLAN and MaxSquare as they are. ONNX
    Runtime is compared with PyTorch on sizes that were not traced and, from the bytes of frames to
    labels and entropy, with the preprocessing that the file states. Where they are not the same it
    exits 5 and writes nothing. Code in a checkpoint is never run.

    \b
    Example:
      cada-deploy export BDL_gta5.pth -o bdl.onnx --preset bdl --images frames/
    """
    say = shared.say(quiet)
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
    return 0


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
