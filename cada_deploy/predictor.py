"""The Python API: load a model once, label frames that are already in memory.

import cada_deploy
model = cada_deploy.load("model.onnx")
prediction = model.predict(frame)      # frame: (H, W, 3) uint8 RGB
prediction.labels                      # (H, W) uint8 train ids
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy import device_frames, durable
from cada_deploy.classes import ClassSet
from cada_deploy.engine_plans import Build, PlanOptions
from cada_deploy.engines import default_device
from cada_deploy.errors import ArtefactMismatch, UsageError
from cada_deploy.fused import Floats, Labels, best_kernel
from cada_deploy.ignored import IgnoredArea, Mask, MaskSizeError
from cada_deploy.labelling import ModelChoice
from cada_deploy.model_spec import ModelSpec, Size
from cada_deploy.pipeline import Pipeline, Sizes
from cada_deploy.policies import Rule
from cada_deploy.policies.fixed import every_class
from cada_deploy.stages import StageClock


@dataclass(frozen=True, eq=False)
class Prediction:
    """Of one frame, all (H, W): labels uint8 (255 = invalid, masked or, under a rule, not
    selected), entropy float32 in nats and confidence float32 (both NaN where invalid)."""

    labels: Labels
    entropy: Floats
    confidence: Floats


@dataclass(frozen=True)
class Predictor:
    """An open model. Thread-safe."""

    pipeline: Pipeline

    @property
    def spec(self) -> ModelSpec:
        return self.pipeline.spec

    @property
    def classes(self) -> ClassSet:
        return self.pipeline.spec.classes

    def predict(
        self,
        frame: npt.NDArray[np.uint8],
        *,
        rule: Rule | None = None,
        size: Size | None = None,
        mask: Mask | None = None,
    ) -> Prediction:
        """Label one frame (H, W, 3) uint8 RGB.

        rule keeps only the pixels that it selects (see `read_rule`); the default keeps every valid
        one. size is the label grid (H, W), the frame's own by default; mask (H, W) uint8 of the
        frame's size leaves out its nonzero pixels. The labels are those of `cada-deploy predict`
        for the same pixels. Raises UsageError for an array of another shape or type.
        """
        _check_frame(frame)
        if rule is not None and len(rule.thresholds) != len(self.classes):
            raise UsageError(
                f"the rule has {len(rule.thresholds)} thresholds, the model {len(self.classes)} "
                "classes; read the thresholds.json of a run of this model"
            )
        clock = StageClock()
        shape: Size = (frame.shape[0], frame.shape[1])
        scores = self.pipeline.scores(frame, clock)
        keep = rule or every_class(len(self.classes), 0.0)
        selection = self.pipeline.kernel.select(
            scores,
            size or self.pipeline.sizes.label_size(shape, self.pipeline.input_size(shape)),
            keep,
            None if mask is None else _area(mask, shape, size or shape),
            entropy=True,
            confidence=True,
        )
        assert selection.entropy is not None and selection.confidence is not None
        return Prediction(selection.labels, selection.entropy, selection.confidence)


def _check_frame(frame: npt.NDArray[Any]) -> None:
    found = f"{type(frame).__name__} {getattr(frame, 'dtype', '')} {getattr(frame, 'shape', '')}"
    if (
        not isinstance(frame, np.ndarray)
        or frame.dtype != np.uint8
        or frame.ndim != 3
        or frame.shape[2] != 3
        or 0 in frame.shape
    ):
        raise UsageError(
            f"frame is {found}; expected a numpy array (H, W, 3) of uint8 in RGB order (OpenCV "
            "gives BGR: frame[..., ::-1])"
        )


def _area(mask: Mask, frame: Size, grid: Size) -> Mask | None:
    try:
        return IgnoredArea(mask).on_grid(frame, grid)
    except MaskSizeError as error:
        raise UsageError(str(error)) from error


def load(
    model: str | os.PathLike[str],
    *,
    preset: str | None = None,
    spec: str | os.PathLike[str] | None = None,
    classes: ClassSet | None = None,
    engine: str = "ort",
    device: str | None = None,
    size: Size | None = None,
    threads: int = 1,
) -> Predictor:
    """Open an ONNX model. A foreign one needs `preset` or `spec` (a TOML file).

    size is the network's input (H, W) for a model of dynamic size; threads is how many the
    network and the fused kernel use for one frame. device is cpu or cuda:N; None is the CPU, or
    cuda:0 for engine "trt", which builds its engine for `size` the first time (that takes minutes)
    and keeps it. Raises CadaError with what to do.
    """
    choice = ModelChoice(
        Path(model),
        engine,
        device or default_device(engine),
        preset,
        Path(spec) if spec is not None else None,
        classes,
        Build(PlanOptions(size, size, size)),
    )
    opened, runtime = choice.load(threads)
    frames = device_frames.for_engine(runtime, opened.spec)
    return Predictor(
        Pipeline(runtime, best_kernel(threads), opened.spec, Sizes(input=size), on_device=frames)
    )


def read_rule(thresholds: str | os.PathLike[str]) -> Rule:
    """The rule of a finished run from its thresholds.json. Raises ArtefactMismatch when the file
    is not one, or has a threshold of each image's own (--scope image)."""
    path = Path(thresholds)
    data: Mapping[str, Any] = durable.read_json(path)
    try:
        if data["scope"] == "image":
            raise ArtefactMismatch(f"{path}: its thresholds belong to single images (scope image)")
        values = tuple(row["threshold"] for row in data["classes"])
        return Rule(str(data["measure"]), str(data["comparator"]), values)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ArtefactMismatch(f"{path} is not a thresholds.json: {error!r}") from error
