"""From a checkpoint to an ONNX file that carries its spec and was proven equal before it exists.

    export_checkpoint(Path("GTA5_150000.pth"), Path("model.onnx"), preset="caffe-bgr", say=print)

`cada-deploy export` calls it. What equal means is in proof.py; what a checkpoint is, in
checkpoints.py.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxscript
import onnxslim
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from cada_deploy import __version__, durable, scenes
from cada_deploy.classes import ClassSet
from cada_deploy.errors import ArtefactMismatch, CheckFailed, UsageError, nearest
from cada_deploy.image_files import find_images
from cada_deploy.images import decode, read_bytes
from cada_deploy.model_spec import METADATA_KEY, ModelSpec, OutputSpec, Size
from cada_deploy.rejections import ImageRejected

from .checkpoint_spec import checkpoint_spec, require_statement
from .checkpoints import Branches, load_checkpoint
from .proof import CONFIDENCE, HEADS, IMAGE, LABELS, SCORES, Frames, Proof, Truth, checked, prove

OPSET = 18
TRACED = (2, 97, 129)  # N, H, W where they are dynamic; the proof uses others
LARGEST = 2**31 - 2**24  # bytes: protobuf ends at 2 GiB, and the metadata needs some
MOST_FRAMES = 4
# Odd sizes, both styles: source looks like the training's data, target like what is labelled.
_SCENES: tuple[tuple[int, str, Size], ...] = (
    (11, scenes.SOURCE, (97, 161)),
    (12, scenes.TARGET, (128, 256)),
    (13, scenes.TARGET, (113, 226)),
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """What was written, and what shows that it is right."""

    path: Path
    bytes: int
    nodes: int
    spec: ModelSpec
    proof: Proof
    seconds: float


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    arch: str = "auto",
    preset: str | None = None,
    spec_file: Path | None = None,
    classes: ClassSet | None = None,
    size: Size | None = None,
    batch: int | None = None,
    aspp_branches: Branches = "auto",
    head: str = "scores",
    images: Path | None = None,
    allow_partial: bool = False,
    overwrite: bool = False,
    say: Say = lambda _: None,
) -> Exported:
    """Write `out`, or nothing. size and batch None = dynamic; images None = procedural scenes.

    Raises UsageError, ArtefactMismatch (the checkpoint does not fit) and CheckFailed (the export is
    not the same function).
    """
    started = time.monotonic()
    _check_names(checkpoint, out, head, overwrite)
    require_statement(checkpoint, preset, spec_file)
    frames = proof_frames(images)
    loaded = load_checkpoint(
        checkpoint, arch=arch, aspp_branches=aspp_branches, allow_partial=allow_partial,
        classes=len(classes) if classes else None,
    )  # fmt: skip
    say(loaded.describe())
    spec = checkpoint_spec(checkpoint, loaded, preset=preset, spec_file=spec_file, classes=classes)
    spec = _for_file(spec, head, size)
    truth = Truth(loaded.model, spec, head, batch)
    try:
        exported = export_network(truth, frames, say)
    except CheckFailed as error:
        raise CheckFailed(f"{error}. {out} was not written") from error
    _write(out, exported.packed, overwrite)
    say(exported.proof.text())
    seconds = time.monotonic() - started
    return Exported(
        out, len(exported.packed), exported.nodes, exported.spec, exported.proof, seconds
    )


@dataclass(frozen=True)
class Packed:
    """A proven file that is not written yet."""

    packed: bytes
    nodes: int
    spec: ModelSpec
    proof: Proof


def export_network(truth: Truth, frames: Frames, say: Say = lambda _: None) -> Packed:
    """The network as ONNX with truth's spec inside, and its proof. Raises CheckFailed."""
    _check_room(truth.network)
    began = time.monotonic()
    model = onnx_from_network(truth)
    names = ", ".join(name for name, _ in frames)
    say(f"exported in {time.monotonic() - began:.0f} s: {len(model.graph.node)} nodes")
    say(f"proving it equal on three sizes and on {names}")
    began = time.monotonic()
    proof = prove(truth, packed_with(model, truth.spec), frames)
    say(f"proven in {time.monotonic() - began:.0f} s")
    spec = replace(
        truth.spec, provenance={**truth.spec.provenance, **_exporter(), "proof": proof.to_json()}
    )
    return Packed(packed_with(model, spec), len(model.graph.node), spec, proof)


def packed_with(model: onnx.ModelProto, spec: ModelSpec) -> bytes:
    """The file's bytes with that spec in its metadata."""
    helper.set_model_props(model, {METADATA_KEY: spec.dumps()})
    packed: bytes = model.SerializeToString()
    return packed


def _exporter() -> dict[str, str]:
    return {
        "exporter": f"cada-deploy {__version__}",
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
        "onnxscript": onnxscript.__version__,
        "onnxslim": onnxslim.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


# --- before any work ---------------------------------------------------------------------------


def _check_names(checkpoint: Path, out: Path, head: str, overwrite: bool) -> None:
    if head not in HEADS:
        raise UsageError(f"no head is called {head!r}; {nearest(head, HEADS)}")
    if checkpoint.suffix == ".onnx":
        raise UsageError(
            f"{checkpoint} is an ONNX model already; expected a checkpoint. Run it as it is with "
            "--model, with --preset or --spec if it is foreign"
        )
    if out.suffix != ".onnx":
        raise UsageError(f"-o {out}: expected a name that ends in .onnx")
    _check_free(out, overwrite)


def _check_free(out: Path, overwrite: bool) -> None:
    if out.is_dir():
        raise UsageError(f"-o {out} is a folder; expected the name of a file")
    if (out.exists() or out.is_symlink()) and not overwrite:
        raise UsageError(f"{out} exists; give another -o, or --overwrite to replace it")


def _check_room(network: nn.Module) -> None:
    size = sum(p.numel() for p in network.parameters()) * 4
    if size > LARGEST:
        raise ArtefactMismatch(
            f"the network has {size / 2**30:.1f} GiB of weights; one ONNX file holds 2 GiB. This "
            "version of cada-deploy writes no external weights"
        )


def _for_file(spec: ModelSpec, head: str, size: Size | None) -> ModelSpec:
    if size and spec.input.size and tuple(size) != tuple(spec.input.size):
        raise UsageError(
            f"--size is {size[0]}x{size[1]} but the spec says "
            f"{spec.input.size[0]}x{spec.input.size[1]} (HxW); leave one of them out"
        )
    return replace(
        spec,
        input=replace(spec.input, size=size or spec.input.size),
        output=replace(spec.output, name=HEADS[head][0]),
    )


def proof_frames(images: Path | None) -> list[tuple[str, np.ndarray[Any, Any]]]:
    """Frames that the proof looks at: some of a folder, spread evenly, or procedural scenes."""
    if images is None:
        return [
            (f"scene {seed} ({style}, {size[0]}x{size[1]})", scenes.scene(seed, style, size).image)
            for seed, style, size in _SCENES
        ]
    refs = find_images(images)
    count = min(MOST_FRAMES, len(refs))
    frames, refused = [], ""
    for k in range(count):
        ref = refs[(2 * k + 1) * len(refs) // (2 * count)]
        try:
            frames.append((ref.path.name, decode(read_bytes(ref.path)).image))
        except ImageRejected as error:
            refused = f"{ref.path.name}: {error}"
    if not frames:
        raise UsageError(f"--images {images}: none of {count} images can be read; {refused}")
    return frames


def _write(out: Path, packed: bytes, overwrite: bool) -> None:
    durable.make_folder(out.parent)
    _check_free(out, overwrite)  # an hour may have passed
    durable.write_file(out, packed)
    durable.sync_folder(out.parent)


# --- the graph ---------------------------------------------------------------------------------


def onnx_from_network(truth: Truth) -> onnx.ModelProto:
    """Exported, simplified, with its head; checked after every step. No metadata yet."""
    model = _exported(truth.network, truth.spec.input.size, truth.batch)
    _check(model)
    with _quiet():
        model = onnxslim.slim(model)
    _tidy(model, truth)
    _check(model)
    if truth.head != "scores":
        _attach_head(model, truth)
        _check(model)
    return model


def _check(model: onnx.ModelProto) -> None:
    if model.ByteSize() > LARGEST:
        raise ArtefactMismatch(
            f"the graph has {model.ByteSize() / 2**30:.1f} GiB; one ONNX file holds 2 GiB"
        )
    checked(model.SerializeToString())
    left = [n.name for n in model.graph.node if n.op_type == "BatchNormalization"]
    if left:
        raise CheckFailed(f"batch norms were not folded into convolutions: {', '.join(left[:3])}")


def _exported(network: nn.Module, size: Size | None, batch: int | None) -> onnx.ModelProto:
    n, height, width = TRACED
    image = torch.zeros(batch or n, 3, *(size or (height, width)))
    dynamic: dict[int, Any] = {} if batch else {0: torch.export.Dim("N")}
    if size is None:
        dynamic |= {2: torch.export.Dim("H"), 3: torch.export.Dim("W")}
    with _quiet(), torch.inference_mode():
        program = torch.onnx.export(
            network,
            (image,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(dynamic,) if dynamic else None,
            external_data=False,
            input_names=[IMAGE],
            output_names=[SCORES],
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells its developers things that are of no use to who exports."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


def _tidy(model: onnx.ModelProto, truth: Truth) -> None:
    """Stable names and dimensions; no stack traces with the paths of whose machine it was."""
    graph = model.graph
    for holder in (*graph.node, *graph.initializer, *graph.input, *graph.output, graph, model):
        del holder.metadata_props[:]
        holder.doc_string = ""
    del graph.value_info[:]
    graph.name = "cada-deploy"
    model.producer_name, model.producer_version = "cada-deploy", __version__
    size, n = truth.spec.input.size, truth.batch or "N"
    _set_shape(graph.input[0], [n, 3, *(size or ("H", "W"))])
    low = [d.dim_value or name for d, name in zip(_dims(graph.output[0])[2:], ("h", "w"))]
    _set_shape(graph.output[0], [n, truth.classes, *low])


def _dims(value: onnx.ValueInfoProto) -> Any:
    return value.type.tensor_type.shape.dim


def _set_shape(value: onnx.ValueInfoProto, shape: list[int | str]) -> None:
    value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))


def _attach_head(model: onnx.ModelProto, truth: Truth) -> None:
    """scores -> labels (N, H, W) uint8, and confidence (N, H, W) float32, inside the graph."""
    graph = model.graph
    sizes = _sizes_nodes(graph, truth)
    graph.node.extend(sizes)
    graph.node.extend(head_nodes(truth.spec.output, confidence=truth.head != "labels"))
    if truth.head != "labels":
        graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "class_axis"))
    shape = [truth.batch or "N", *(truth.spec.input.size or ("H", "W"))]
    del graph.output[:]
    kinds = {LABELS: TensorProto.UINT8, CONFIDENCE: TensorProto.FLOAT}
    for name in HEADS[truth.head]:
        graph.output.append(helper.make_tensor_value_info(name, kinds[name], shape))


def _sizes_nodes(graph: onnx.GraphProto, truth: Truth) -> list[onnx.NodeProto]:
    """`sizes` (4,) of the full-size scores: a constant where all is fixed. Always sizes and never
    scales, with which a ratio like 1024 / 129 loses a pixel."""

    def constant(name: str, values: list[int]) -> None:
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))

    size = truth.spec.input.size
    if size and truth.batch:
        constant("sizes", [truth.batch, truth.classes, *size])
        return []
    for name, value in (("first", 0), ("third", 2), ("fifth", 4)):
        constant(name, [value])
    make = helper.make_node
    return [
        make("Shape", [SCORES], ["scores_shape"], name="scores_shape"),
        make("Slice", ["scores_shape", "first", "third"], ["n_c"], name="n_c"),
        make("Shape", [IMAGE], ["image_shape"], name="image_shape"),
        make("Slice", ["image_shape", "third", "fifth"], ["h_w"], name="h_w"),
        make("Concat", ["n_c", "h_w"], ["sizes"], name="sizes", axis=0),
    ]


def head_nodes(output: OutputSpec, *, confidence: bool) -> list[onnx.NodeProto]:
    """Upsampling and softmax in the spec's order, then the best class and its probability."""
    transform = "align_corners" if output.align_corners else "half_pixel"
    make = helper.make_node

    def resize(given: str, made: str) -> onnx.NodeProto:
        return make(
            "Resize", [given, "", "", "sizes"], [made], name=made, mode="linear",
            coordinate_transformation_mode=transform,
        )  # fmt: skip

    if output.order == "probs":
        nodes = [
            make("Softmax", [SCORES], ["low_probabilities"], name="low_probabilities", axis=1),
            resize("low_probabilities", "full_probabilities"),
        ]
        best = "full_probabilities"
    else:
        nodes, best = [resize(SCORES, "full_scores")], "full_scores"
        if confidence:
            nodes.append(
                make("Softmax", [best], ["full_probabilities"], name="full_probabilities", axis=1)
            )
    nodes += [
        make("ArgMax", [best], ["label_ids"], name="label_ids", axis=1, keepdims=0),
        make("Cast", ["label_ids"], [LABELS], name=LABELS, to=TensorProto.UINT8),
    ]
    if confidence:
        nodes.append(
            make(
                "ReduceMax",
                ["full_probabilities", "class_axis"],
                [CONFIDENCE],
                name=CONFIDENCE,
                keepdims=0,
            )
        )
    return nodes
