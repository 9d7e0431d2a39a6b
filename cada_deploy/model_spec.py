"""ModelSpec: what a model expects and gives. It lives inside the ONNX file as JSON.

A spec is stored in the ONNX `metadata_props` under METADATA_KEY, so that a model and the way to
feed it cannot be parted. A foreign ONNX gets its spec from a preset or a TOML file; preprocessing
is never guessed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cada_deploy.classes import ClassSet
from cada_deploy.errors import ArtefactMismatch, UsageError, nearest

METADATA_KEY = "cada_deploy.model_spec"
SCHEMA = 1

Size = tuple[int, int]  # (height, width) in pixels


def _one_of(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{what} is {value!r}; {nearest(str(value), allowed)}")


def _true_or_false(what: str, value: object) -> None:
    if not isinstance(value, bool):
        raise UsageError(f"{what} is {value!r}; expected true or false")


def _size(what: str, value: Size | None) -> None:
    if value is not None and (len(value) != 2 or any(v < 1 or v > 65535 for v in value)):
        raise UsageError(f"{what} is {value}; expected (height, width), each 1 to 65535 pixels")


@dataclass(frozen=True)
class InputSpec:
    """One image tensor: x = (scale * v - mean) / std, v being 0..255, in `colour` order.

    size is (H, W) for a fixed-size model and None for one that takes any size. resize names the
    filter used when an image must change size: "bilinear" is OpenCV's INTER_LINEAR, "bicubic" is
    Pillow's BICUBIC (antialiased when it shrinks). mean and std are in the model's colour order.
    """

    colour: str
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: str
    name: str = ""
    layout: str = "NCHW"
    dtype: str = "float32"
    size: Size | None = None

    def __post_init__(self) -> None:
        _one_of("input.colour", self.colour, ("RGB", "BGR"))
        _one_of("input.layout", self.layout, ("NCHW", "NHWC"))
        _one_of("input.dtype", self.dtype, ("float32", "float16"))
        _one_of("input.resize", self.resize, ("bilinear", "bicubic"))
        _size("input.size", self.size)
        numbers = (self.scale, *self.mean, *self.std)
        if len(self.mean) != 3 or len(self.std) != 3 or not all(math.isfinite(n) for n in numbers):
            raise UsageError("input.mean and input.std are three finite numbers each")
        if self.scale <= 0 or any(s <= 0 for s in self.std):
            raise UsageError("input.scale and input.std must be positive")


@dataclass(frozen=True)
class InferenceSpec:
    """How a frame is put through the network: whole, or in overlapping windows whose scores are
    averaged; at several scales; with its mirror image. Averages are of the network's own output
    (logits or probabilities), in float32, in a fixed order."""

    mode: str = "whole"
    window: Size | None = None
    stride: Size | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        _one_of("inference.mode", self.mode, ("whole", "slide"))
        _size("inference.window", self.window)
        _size("inference.stride", self.stride)
        given = {self.window is not None, self.stride is not None}
        if given != {self.mode == "slide"}:
            raise UsageError("inference.window and inference.stride go with mode 'slide', both")
        if self.window and self.stride and any(s > w for s, w in zip(self.stride, self.window)):
            raise UsageError(f"inference.stride {self.stride} exceeds window {self.window}: gaps")
        _true_or_false("inference.flip", self.flip)
        if not self.scales or any(not 0.05 <= s <= 8 for s in self.scales):
            raise UsageError(f"inference.scales is {self.scales}; expected numbers in 0.05..8")

    @property
    def plain(self) -> bool:
        """One pass over the whole frame, nothing averaged."""
        return self.mode == "whole" and self.scales == (1.0,) and not self.flip


@dataclass(frozen=True)
class OutputSpec:
    """Per-class scores (N, C, h, w). stride is input pixels per score (1, 4, 8 ...).

    order says where the upsampling stands: "logits" upsamples and then takes the softmax,
    "probs" takes the softmax at (h, w) and upsamples probabilities (BDL).
    """

    align_corners: bool
    order: str = "logits"
    meaning: str = "logits"
    name: str = ""
    stride: int = 1

    def __post_init__(self) -> None:
        _one_of("output.meaning", self.meaning, ("logits", "probabilities"))
        _one_of("output.order", self.order, ("logits", "probs"))
        _true_or_false("output.align_corners", self.align_corners)
        if self.meaning == "probabilities" and self.order != "probs":
            raise UsageError(
                "an output of probabilities is upsampled as such: output.order is 'probs'"
            )
        if not 1 <= self.stride <= 256:
            raise UsageError(f"output.stride is {self.stride}; expected 1 to 256")


@dataclass(frozen=True)
class ModelSpec:
    """Everything needed to run a model and to read its scores. Refuses nonsense when made."""

    classes: ClassSet
    input: InputSpec
    output: OutputSpec
    inference: InferenceSpec = InferenceSpec()
    preset: str = ""
    weights_sha256: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "classes": self.classes.to_json(),
            "input": _plain(self.input),
            "inference": _plain(self.inference),
            "output": _plain(self.output),
            "preset": self.preset,
            "weights_sha256": self.weights_sha256,
            "provenance": dict(self.provenance),
        }

    def dumps(self) -> str:
        return json.dumps(self.to_json(), sort_keys=True)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Raises ArtefactMismatch for another schema, UsageError for unknown keys or bad values."""
        if data.get("schema") != SCHEMA:
            raise ArtefactMismatch(
                f"model spec has schema {data.get('schema')!r}; this cada-deploy reads {SCHEMA}. "
                "Export the model again, or use the version that wrote it"
            )
        known = {"schema", "classes", "input", "inference", "output", "preset",
                 "weights_sha256", "provenance"}  # fmt: skip
        _no_unknown("model spec", data, known)
        try:
            return cls(
                classes=ClassSet.from_json(data["classes"]),
                input=_parse(InputSpec, "input", data["input"]),
                inference=_parse(InferenceSpec, "inference", data.get("inference", {})),
                output=_parse(OutputSpec, "output", data["output"]),
                preset=str(data.get("preset", "")),
                weights_sha256=str(data.get("weights_sha256", "")),
                provenance=_table("provenance", data.get("provenance", {})),
            )
        except KeyError as error:
            raise UsageError(f"model spec lacks {error}") from error

    @classmethod
    def loads(cls, text: str) -> ModelSpec:
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArtefactMismatch(f"the model's spec is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise ArtefactMismatch("the model's spec is JSON, but not an object")
        return cls.from_json(data)

    def with_classes(self, classes: ClassSet) -> ModelSpec:
        return replace(self, classes=classes)


def _plain(value: object) -> dict[str, Any]:
    """A flat dataclass as a JSON object; tuples become lists."""
    fields = vars(value)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def _no_unknown(what: str, data: Mapping[str, Any], known: set[str]) -> None:
    for key in data:
        if key not in known:
            raise UsageError(f"{what} has an unknown key {key!r}; {nearest(key, known)}")


def _table(what: str, data: Any) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise UsageError(f"{what} of the model spec is {data!r}; expected a table")
    return dict(data)


def _parse(kind: type, what: str, data: Any) -> Any:
    data = _table(what, data)
    _no_unknown(what, data, set(kind.__dataclass_fields__))  # type: ignore[attr-defined]
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})
    except TypeError as error:
        raise UsageError(f"{what} of the model spec: {error}") from error
