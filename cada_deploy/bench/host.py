"""The measurements on a CPU: the engine's call is the work, and nothing is copied to a device."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy.bench.frames import Frames
from cada_deploy.bench.measuring import FrameTimes, RunTimes
from cada_deploy.images import decode
from cada_deploy.labels import encode_label_png
from cada_deploy.model_spec import Size
from cada_deploy.pipeline import Pipeline
from cada_deploy.policies.fixed import every_class
from cada_deploy.preprocess import to_batch_row
from cada_deploy.stages import StageClock

DISTINCT_BATCHES = 4  # the engine does not see the same input twice in a row


@dataclass(frozen=True)
class Host:
    """A pipeline on the CPU as a Subject."""

    pipeline: Pipeline
    frames: Frames
    batch_size: int
    png: bool
    network: Size
    batches: tuple[npt.NDArray[Any], ...]
    enqueues: bool = False

    @property
    def engine_boundary(self) -> str:
        assert self.pipeline.engine is not None
        copies = (
            "nothing is copied to a device"
            if self.pipeline.engine.device == "cpu"
            else "its own copies to the device and back are in it, and are not told apart"
        )
        return (
            "the engine's call: from a preprocessed batch in host memory to the network's scores "
            f"in host memory; {copies}"
        )

    @property
    def frame_boundary(self) -> str:
        assert self.pipeline.engine is not None
        where = "" if self.pipeline.engine.device == "cpu" else " on the CPU"
        last = "encode the label PNG (in memory)" if self.png else "labels (H, W) in host memory"
        return (
            "from the bytes of an image file in host memory: decode, preprocess, network, encode "
            f"scores, select every valid pixel's label{where}; to {last}. One run is one batch, "
            "nothing overlaps, no file is read or written"
        )

    def engine_run(self, k: int, since: float) -> RunTimes:
        assert self.pipeline.engine is not None
        batch = self.batches[k % len(self.batches)]
        start = _ms(since)
        self.pipeline.engine.infer(batch)
        end = _ms(since)
        return RunTimes(start, end, start, start, start, end, end, end)

    def frame_run(self, k: int) -> FrameTimes:
        clock = StageClock()
        start = time.perf_counter()
        for position in range(self.batch_size):
            self._one(
                self.frames.data[(k * self.batch_size + position) % len(self.frames.data)], clock
            )
        total = (time.perf_counter() - start) * 1e3
        return FrameTimes(total, {stage: s * 1e3 for stage, s in clock.seconds.items()})

    def _one(self, data: bytes, clock: StageClock) -> None:
        with clock.stage("decode"):
            image = decode(data).image
        size = image.shape[0], image.shape[1]
        scores = self.pipeline.scores(image, clock)
        keep = every_class(scores.classes, 0.0)
        chosen = self.pipeline.select(scores, size, self.pipeline.input_size(size), keep, clock)
        if self.png:
            with clock.stage("encode png"):
                encode_label_png(chosen.labels)


def open_host(pipeline: Pipeline, frames: Frames, batch_size: int, png: bool) -> Host:
    """Prepares the batches of the engine's own measurement from the first frames of one size."""
    network, batches = engine_batches(pipeline, frames, batch_size)
    return Host(pipeline, frames, batch_size, png, network, batches)


def engine_batches(
    pipeline: Pipeline, frames: Frames, batch_size: int
) -> tuple[Size, tuple[npt.NDArray[Any], ...]]:
    """(H, W) of the engine's input and a few batches of it; a window of it in mode `slide`."""
    spec = pipeline.spec
    whole = pipeline.input_size(frames.sizes[0])
    window = spec.inference.window
    network = (min(window[0], whole[0]), min(window[1], whole[1])) if window else whole
    fitting = [
        data
        for data, size in zip(frames.data, frames.sizes, strict=True)
        if pipeline.input_size(size) == whole
    ]
    rows = [
        to_batch_row(decode(data).image, spec.input, network)
        for data in fitting[: DISTINCT_BATCHES * batch_size]
    ]
    count = max(1, min(DISTINCT_BATCHES, len(rows)))
    return network, tuple(
        np.concatenate([rows[(k + position) % len(rows)] for position in range(batch_size)])
        for k in range(count)
    )


def _ms(since: float) -> float:
    return (time.perf_counter() - since) * 1e3
