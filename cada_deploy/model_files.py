"""Model files: reads an ONNX file, its digest and its spec, and refuses what cannot be trusted.

No inference happens here and no ONNX Runtime is imported.
"""

from __future__ import annotations

import hashlib
import math
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from cada_deploy import presets
from cada_deploy.classes import CITYSCAPES_19, ClassSet, anonymous
from cada_deploy.errors import ArtefactMismatch, UsageError
from cada_deploy.model_spec import METADATA_KEY, InputSpec, ModelSpec, OutputSpec, Size

_FLOATS = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16"}

Dimensions = tuple[int | None, ...]  # None = not fixed in the file


@dataclass(frozen=True)
class Tensor:
    """One graph input or output as the file declares it. shape is None when it has none."""

    name: str
    dtype: str
    shape: Dimensions | None


@dataclass(frozen=True)
class Model:
    """An ONNX model with the spec that says how to feed it.

    content is the file's bytes when the weights are inside; None when they lie in external files
    (then `path` is opened by the runtime, after those files were checked). sha256 covers both.
    """

    path: Path
    content: bytes | None
    sha256: str
    spec: ModelSpec
    input: Tensor
    output: Tensor
    batch: int | None  # a fixed batch dimension, or None
    classes_named: bool = True  # False: a preset stands for any class set of the right size

    @property
    def declared_classes(self) -> int | None:
        shape = self.output.shape
        return shape[1] if shape is not None else None


def load_model(
    path: Path,
    *,
    preset: str | None = None,
    spec_file: Path | None = None,
    classes: ClassSet | None = None,
    spec: ModelSpec | None = None,
) -> Model:
    """Read `path` and settle its spec: the one given, --spec, --preset, or the file's own.

    Raises UsageError when it has none (the message shows what to write) and ArtefactMismatch for
    a file that is not a usable ONNX model or does not fit its spec.
    """
    content = _read(path)
    proto = _parse(path, content)
    external = _external_files(path, proto)
    sha256 = _digest(content, external)
    inputs = [_tensor(v) for v in proto.graph.input if v.name not in _initializers(proto)]
    outputs = [_tensor(v) for v in proto.graph.output]
    named = classes is not None or spec_file is not None or spec is not None
    spec = spec or _spec(path, proto, preset, spec_file, classes)
    image = _image_input(path, inputs, spec)
    scores = _score_output(path, outputs, spec)
    spec = _fitted(path, spec, image, scores, named_classes=named)
    return Model(
        path=path,
        content=None if external else content,
        sha256=sha256,
        spec=spec,
        input=image,
        output=scores,
        batch=image.shape[0] if image.shape else None,
        classes_named=named,
    )


def _read(path: Path) -> bytes:
    try:
        # Looked at before it is opened: opening a FIFO waits for a writer.
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UsageError(f"model {path} is a folder; name the .onnx file in it")
        if not stat.S_ISREG(mode):
            raise UsageError(f"model {path} is not a regular file")
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"model {path} does not exist") from None
    except PermissionError:
        raise UsageError(f"model {path} cannot be read: permission denied") from None


def _parse(path: Path, content: bytes) -> onnx.ModelProto:
    try:
        proto = onnx.ModelProto()
        proto.ParseFromString(content)
    except DecodeError as error:
        raise ArtefactMismatch(f"{path} is not an ONNX file, or is cut short ({error})") from error
    if not proto.graph.node or not proto.graph.output:
        raise ArtefactMismatch(f"{path} is not an ONNX model: it holds no graph with an output")
    return proto


def _initializers(proto: onnx.ModelProto) -> set[str]:
    return {t.name for t in proto.graph.initializer}


def _external_files(path: Path, proto: onnx.ModelProto) -> list[Path]:
    """Weight files beside the model. Anything that points out of the model's folder is refused:
    ONNX Runtime reads hard links, which onnx itself refuses (research: CVE-2026-34446)."""
    names = set()
    for tensor in _all_tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            names |= {e.value for e in tensor.external_data if e.key == "location"}
    return [_checked_external(path, name) for name in sorted(names)]


def _all_tensors(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    in_functions = (t for f in proto.functions for t in _node_tensors(f.node))
    return [*_graph_tensors(proto.graph), *in_functions]


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _dense_parts(graph.sparse_initializer)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            yield from _dense_parts((attribute.sparse_tensor, *attribute.sparse_tensors))
            for inner in (attribute.g, *attribute.graphs):
                yield from _graph_tensors(inner)


def _dense_parts(sparse: Iterable[onnx.SparseTensorProto]) -> Iterator[onnx.TensorProto]:
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)


def _checked_external(path: Path, name: str) -> Path:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or not name:
        raise ArtefactMismatch(
            f"{path} keeps weights in {name!r}, outside its own folder; refused. Save the model "
            "with its weights inside, or beside it under a plain name"
        )
    file = path.parent / relative
    folder = path.parent.resolve()
    try:
        status = file.lstat()
    except OSError:
        raise ArtefactMismatch(
            f"{path} keeps weights in {name!r}, which is missing; copy it beside the model"
        ) from None
    plain = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
    if not plain or not file.resolve().is_relative_to(folder):
        raise ArtefactMismatch(
            f"{path} keeps weights in {name!r}, which is a link or not a plain file; refused. "
            "Copy the real file beside the model"
        )
    return file


def _digest(content: bytes, external: list[Path]) -> str:
    digest = hashlib.sha256(content)
    for file in external:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    shape: Dimensions | None = None
    if kind.HasField("shape"):
        shape = tuple(
            d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None
            for d in kind.shape.dim
        )
    dtype = _FLOATS.get(kind.elem_type) or onnx.TensorProto.DataType.Name(kind.elem_type).lower()
    return Tensor(value.name, dtype, shape)


def _spec(
    path: Path,
    proto: onnx.ModelProto,
    preset: str | None,
    spec_file: Path | None,
    classes: ClassSet | None,
) -> ModelSpec:
    stated = stated_spec(preset, spec_file, classes)
    if stated is not None:
        return stated
    own = [p.value for p in proto.metadata_props if p.key == METADATA_KEY]
    if own:
        spec = ModelSpec.loads(own[0])
        return spec.with_classes(classes) if classes else spec
    raise UsageError(
        f"{path.name} does not say how it must be fed, and cada-deploy never guesses that. Give "
        f"--preset with one of {', '.join(presets.PRESETS)}, or --spec FILE.toml:\n\n"
        + presets.spec_template()
    )


def stated_spec(
    preset: str | None, spec_file: Path | None, classes: ClassSet | None
) -> ModelSpec | None:
    """The spec that --spec or --preset states; None when neither is given."""
    if preset and spec_file:
        raise UsageError("--preset and --spec both say how to feed the model; give one of them")
    if spec_file:
        return presets.load_spec(spec_file, classes)
    if not preset:
        return None
    chosen_input, chosen_output = presets.preset(preset)
    return ModelSpec(
        classes=classes or CITYSCAPES_19,
        input=chosen_input,
        output=chosen_output,
        preset=preset,
        provenance={"spec": f"--preset {preset}"},
    )


def _image_input(path: Path, inputs: list[Tensor], spec: ModelSpec) -> Tensor:
    chosen = _named(path, "input", inputs, spec.input.name)
    if chosen.dtype not in _FLOATS.values():
        raise ArtefactMismatch(
            f"{path.name}: input {chosen.name!r} takes {chosen.dtype}; expected float32 or float16"
        )
    if chosen.shape is not None and len(chosen.shape) != 4:
        raise ArtefactMismatch(
            f"{path.name}: input {chosen.name!r} has rank {len(chosen.shape)}; expected an image "
            "batch of rank 4"
        )
    channels = _channels(chosen, spec.input.layout)
    if channels not in (3, None):
        raise ArtefactMismatch(
            f"{path.name}: input {chosen.name!r} has {channels} channels in layout "
            f"{spec.input.layout}; expected 3 (set input.layout in --spec if it is the other one)"
        )
    return chosen


def _score_output(path: Path, outputs: list[Tensor], spec: ModelSpec) -> Tensor:
    chosen = _named(path, "output", outputs, spec.output.name)
    if chosen.dtype not in _FLOATS.values() or (
        chosen.shape is not None and len(chosen.shape) != 4
    ):
        raise ArtefactMismatch(
            f"{path.name}: output {chosen.name!r} is {chosen.dtype} of shape {chosen.shape}; "
            "expected per-class scores, float (N, C, h, w). A label map cannot be thresholded: "
            "export the model without its argmax"
        )
    return chosen


def _named(path: Path, what: str, tensors: list[Tensor], name: str) -> Tensor:
    names = [t.name for t in tensors]
    if name:
        for tensor in tensors:
            if tensor.name == name:
                return tensor
        raise ArtefactMismatch(f"{path.name} has no {what} {name!r}; it has {names}")
    if len(tensors) != 1:
        raise UsageError(
            f"{path.name} has {len(tensors)} {what}s {names}; say which one in --spec FILE.toml "
            f"([{what}] name = ...)"
        )
    return tensors[0]


def _channels(tensor: Tensor, layout: str) -> int | None:
    return tensor.shape[layout.index("C")] if tensor.shape else None


def _fixed_size(tensor: Tensor, layout: str) -> Size | None:
    if tensor.shape is None:
        return None
    height, width = tensor.shape[layout.index("H")], tensor.shape[layout.index("W")]
    if height is None or width is None:
        return None
    return height, width


def _fitted(
    path: Path, spec: ModelSpec, image: Tensor, scores: Tensor, *, named_classes: bool
) -> ModelSpec:
    """The spec with what the file itself declares: names, element type, a fixed size."""
    fixed = _fixed_size(image, spec.input.layout)
    if fixed and spec.input.size and fixed != spec.input.size:
        raise ArtefactMismatch(
            f"{path.name} takes {fixed[0]}x{fixed[1]} (HxW) but its spec says "
            f"{spec.input.size[0]}x{spec.input.size[1]}; correct input.size"
        )
    _check_fixed(path, spec, fixed)
    filled_input: InputSpec = replace(
        spec.input, name=image.name, dtype=image.dtype, size=fixed or spec.input.size
    )
    filled_output: OutputSpec = replace(spec.output, name=scores.name)
    found = scores.shape[1] if scores.shape else None
    spec = replace(spec, input=filled_input, output=filled_output)
    return check_classes(path, spec, found, named_classes) if found else spec


def _check_fixed(path: Path, spec: ModelSpec, fixed: Size | None) -> None:
    """A fixed-size network runs at that size alone: as the window, or on the whole frame once."""
    inference = spec.inference
    if fixed and inference.mode == "slide" and inference.window != fixed:
        raise ArtefactMismatch(
            f"{path.name} takes {fixed[0]}x{fixed[1]} (HxW) only, but inference.window is "
            f"{inference.window}; make them equal"
        )
    if fixed and inference.mode == "whole" and inference.scales != (1.0,):
        raise ArtefactMismatch(
            f"{path.name} takes {fixed[0]}x{fixed[1]} (HxW) only, so inference.scales "
            f"{inference.scales} cannot be run; export the model with a dynamic size"
        )


def check_classes(path: Path, spec: ModelSpec, found: int, named: bool = True) -> ModelSpec:
    """Raises ArtefactMismatch when the model gives another number of classes than its set has. A
    preset names no class set: then 19 means Cityscapes, and any other number gets plain names."""
    if found == len(spec.classes):
        return spec
    if spec.preset and not named and not spec.weights_sha256 and 1 <= found <= 255:
        return spec.with_classes(anonymous(found))
    raise ArtefactMismatch(
        f"{path.name} gives {found} classes but class set {spec.classes.name!r} has "
        f"{len(spec.classes)}; name the right set with --classes or in --spec"
    )


def metadata(spec: ModelSpec) -> dict[str, Any]:
    """The spec as the entry that goes into an ONNX file's metadata_props."""
    return {METADATA_KEY: spec.dumps()}


def lowest_precision(path: Path) -> str:
    """The narrowest kind of number that the ONNX file's quantisation or the greater part of its
    weights is in: int8, float8, float16, bfloat16 or float32. No check that it is used."""
    proto = _parse(path, _read(path))
    tensors = _all_tensors(proto)
    named = {onnx.TensorProto.DataType.Name(t.data_type) for t in tensors}
    if any("Quantize" in n.op_type or "Integer" in n.op_type for n in proto.graph.node):
        return "float8" if any(name.startswith("FLOAT8") for name in named) else "int8"
    sizes: dict[str, int] = {}
    for tensor in tensors:
        name = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        sizes[name] = sizes.get(name, 0) + math.prod(tensor.dims)
    floats = {n: sizes.get(n, 0) for n in ("float", "float16", "bfloat16")}
    most = max(floats, key=lambda name: floats[name])
    return "float32" if most == "float" else most
