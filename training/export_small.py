"""Writes the small network as ONNX with its spec inside, and proves it equal to PyTorch first.

    python -m cada_deploy.training.export_small DIR -o scenes19.onnx

DIR is the --out of `cada_deploy.training.source`. Uses torch's TorchScript exporter, which needs no
onnxscript. General checkpoints are the business of `cada_deploy.training.export`, not of this file.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import torch

from cada_deploy import scenes
from cada_deploy.classes import CITYSCAPES_19
from cada_deploy.errors import CadaError, CheckFailed
from cada_deploy.model_spec import METADATA_KEY, InputSpec, ModelSpec, OutputSpec

from .batches import MEAN, STD
from .source import Training, iou_per_class, mean_iou

OPSET = 18
TRACED = (256, 512)
UNTRACED = ((1, 64, 96), (2, 131, 257), (1, 250, 333))  # N, H, W; odd sides round up to 8
TOLERANCE = 1e-4  # of the largest score; what the bits of two convolution libraries may differ by


def onnx_from_network(network: torch.nn.Module) -> onnx.ModelProto:
    """The network in inference mode, batch norms folded, any batch, height and width."""
    network.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.onnx")
        torch.onnx.export(
            network,
            (torch.zeros(1, 3, *TRACED),),
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["scores"],
            dynamic_axes={"image": {0: "N", 2: "H", 3: "W"}, "scores": {0: "N", 2: "h", 3: "w"}},
        )
    return onnx.load_model_from_string(buffer.getvalue())


def weights_sha256(model: onnx.ModelProto) -> str:
    """SHA-256 over the initializers by name: name, ONNX type, shape, little-endian data."""
    running = hashlib.sha256()
    for tensor in sorted(model.graph.initializer, key=lambda t: t.name):
        values = onnx.numpy_helper.to_array(tensor)
        head = f"{tensor.name}\0{tensor.data_type}\0{list(tensor.dims)}\0"
        running.update(head.encode())
        running.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return running.hexdigest()


def spec_of(model: onnx.ModelProto, provenance: dict[str, Any]) -> ModelSpec:
    """The spec of a network that source.py trained: the preset `imagenet-rgb`, stride 8."""
    return ModelSpec(
        classes=CITYSCAPES_19,
        input=InputSpec(
            name="image", colour="RGB", scale=1 / 255, mean=MEAN, std=STD, resize="bilinear"
        ),
        output=OutputSpec(name="scores", align_corners=False, order="logits", stride=8),
        preset="imagenet-rgb",
        weights_sha256=weights_sha256(model),
        provenance=provenance,
    )


def export(network: torch.nn.Module, path: Path, provenance: dict[str, Any]) -> float:
    """Writes path and returns the largest relative error seen in the parity check.

    Raises CheckFailed, and writes nothing, when ONNX Runtime and PyTorch disagree.
    """
    model = onnx_from_network(network)
    onnx.helper.set_model_props(model, {METADATA_KEY: spec_of(model, provenance).dumps()})
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    packed = model.SerializeToString()
    error = parity_error(network, packed, UNTRACED)
    if not error <= TOLERANCE:
        raise CheckFailed(
            f"ONNX Runtime differs from PyTorch by {error:.3g} of the largest score; at most "
            f"{TOLERANCE:g} was expected. {path} was not written"
        )
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(packed)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    return error


def parity_error(
    network: torch.nn.Module, packed: bytes, shapes: Iterable[tuple[int, int, int]]
) -> float:
    """The largest |ONNX Runtime - PyTorch| over the largest |score|, over random images."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(packed, options, providers=["CPUExecutionProvider"])
    draw = np.random.default_rng(0)
    network.eval()
    errors = []
    for n, height, width in shapes:
        image = draw.standard_normal((n, 3, height, width), dtype=np.float32)
        with torch.inference_mode():
            truth = network(torch.from_numpy(image)).numpy()
        found = session.run(["scores"], {"image": image})[0]
        if found.shape != truth.shape:
            raise CheckFailed(f"scores are {found.shape} in ONNX and {truth.shape} in PyTorch")
        errors.append(np.abs(found - truth).max() / np.abs(truth).max())
    return float(np.max(errors))  # np.max passes a NaN on


def provenance_of(training: Training) -> dict[str, Any]:
    """Where the weights come from and what they reach, measured now."""
    sets = (scenes.SOURCE_VAL, scenes.TARGET_DEMO)
    return {
        "trainer": "cada_deploy.training.source",
        "recipe": asdict(training.recipe),
        "steps": training.step,
        "torch": torch.__version__,
        "exporter": "cada_deploy.training.export_small",
        "sets": {s.name: s.sha256 for s in (scenes.SOURCE_TRAIN, *sets)},
        "miou_percent": {
            s.name: round(100 * mean_iou(iou_per_class(training.model, s)), 2) for s in sets
        },
    }


@click.command(help="Write a network that cada_deploy.training.source trained as ONNX.")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True)
def main(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    try:
        training = Training.load(folder)
        provenance = provenance_of(training)
        error = export(training.model, out, provenance)
    except CadaError as failure:
        click.echo(f"error: {failure}", err=True)
        raise SystemExit(failure.exit_code) from failure
    reached = ", ".join(f"{k} {v:.2f} %" for k, v in provenance["miou_percent"].items())
    click.echo(f"{out}: {out.stat().st_size} bytes, mIoU {reached}, largest error {error:.2g}")


if __name__ == "__main__":
    main()
