"""One frame through a network: whole or in windows, at several scales, with its mirror image.

Several passes are averaged in the network's own output (logits or probabilities), float32, in
the order scale, mirror, window; so the sum does not depend on threads or batch size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy.engines import Engine
from cada_deploy.model_spec import InferenceSpec, ModelSpec, Size
from cada_deploy.preprocess import to_batch_row
from cada_deploy.stages import StageClock

Array = npt.NDArray[Any]


def frame_scores(
    engine: Engine, spec: ModelSpec, image: npt.NDArray[np.uint8], size: Size, clock: StageClock
) -> Array:
    """image (H, W, 3) uint8 RGB, size the network's input (H, W) -> scores (1, C, h, w)."""
    if spec.inference.plain:
        return _pass(engine, spec, image, size, clock)
    return _averaged(engine, spec, image, size, clock)


def _pass(
    engine: Engine, spec: ModelSpec, image: npt.NDArray[np.uint8], size: Size, clock: StageClock
) -> Array:
    with clock.stage("preprocess"):
        row = to_batch_row(image, spec.input, size)
    return _infer(engine, row, clock)


def _infer(engine: Engine, row: Array, clock: StageClock) -> Array:
    with clock.stage("infer"):
        return np.asarray(engine.infer(row).array)


def _averaged(
    engine: Engine, spec: ModelSpec, image: npt.NDArray[np.uint8], size: Size, clock: StageClock
) -> Array:
    """Every view's scores, resampled to the grid of the first one, and their mean."""
    total: Array | None = None
    passes = 0
    for scale in spec.inference.scales:
        scaled = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
        for mirrored in (False, True) if spec.inference.flip else (False,):
            view = np.ascontiguousarray(image[:, ::-1]) if mirrored else image
            scores = _view(engine, spec, view, scaled, clock)
            scores = scores[..., ::-1] if mirrored else scores
            if total is None:
                total = np.zeros(scores.shape, np.float32)
            total += _resampled(scores, total.shape[2:], spec.output.align_corners)
            passes += 1
    assert total is not None
    return total / np.float32(passes)


def _view(
    engine: Engine, spec: ModelSpec, image: npt.NDArray[np.uint8], size: Size, clock: StageClock
) -> Array:
    if spec.inference.mode == "whole":
        return _pass(engine, spec, image, size, clock).astype(np.float32)
    with clock.stage("preprocess"):
        row = to_batch_row(image, spec.input, size)
    return _slid(engine, spec, row, size, clock)


def _slid(engine: Engine, spec: ModelSpec, row: Array, size: Size, clock: StageClock) -> Array:
    """Overlapping windows, their scores averaged on the grid that the frame as a whole has."""
    total: Array | None = None
    weight: Array | None = None
    grid: Size = (0, 0)
    for top, left, height, width in windows(size, spec.inference):
        scores = _infer(engine, _crop(row, spec, top, left, height, width), clock)
        if total is None or weight is None:
            grid = tuple(
                max(1, -(-whole * low // part))
                for whole, part, low in zip(size, (height, width), scores.shape[2:])
            )
            total = np.zeros((1, scores.shape[1], *grid), np.float32)
            weight = np.zeros(grid, np.float32)
        rows = _covered(top, height, size[0], grid[0])
        columns = _covered(left, width, size[1], grid[1])
        part = _resampled(
            scores.astype(np.float32),
            (rows.stop - rows.start, columns.stop - columns.start),
            spec.output.align_corners,
        )
        total[:, :, rows, columns] += part
        weight[rows, columns] += 1
    assert total is not None and weight is not None
    return total / weight


def windows(size: Size, inference: InferenceSpec) -> Iterator[tuple[int, int, int, int]]:
    """(top, left, height, width) of every window; the last of a row or column ends at the edge."""
    assert inference.window and inference.stride
    height, width = min(inference.window[0], size[0]), min(inference.window[1], size[1])
    for top in _starts(size[0], height, inference.stride[0]):
        for left in _starts(size[1], width, inference.stride[1]):
            yield top, left, height, width


def _starts(whole: int, window: int, stride: int) -> list[int]:
    count = max(0, -(-(whole - window) // stride)) + 1
    return [min(i * stride, whole - window) for i in range(count)]


def _crop(row: Array, spec: ModelSpec, top: int, left: int, height: int, width: int) -> Array:
    if spec.input.layout == "NHWC":
        return np.ascontiguousarray(row[:, top : top + height, left : left + width])
    return np.ascontiguousarray(row[:, :, top : top + height, left : left + width])


def _covered(start: int, length: int, whole: int, grid: int) -> slice:
    """The cells of a grid over `whole` pixels that a window of pixels stands for (at least one)."""
    first = min(round(start * grid / whole), grid - 1)
    return slice(first, max(first + 1, round((start + length) * grid / whole)))


def _resampled(scores: Array, size: tuple[int, ...], align_corners: bool) -> Array:
    """(1, C, h, w) -> (1, C, *size), bilinear, float32; the same array when nothing changes."""
    for axis, target in ((2, size[0]), (3, size[1])):
        scores = _resampled_axis(scores, axis, target, align_corners)
    return scores


def _resampled_axis(scores: Array, axis: int, target: int, align_corners: bool) -> Array:
    source = scores.shape[axis]
    if source == target:
        return scores
    position = _positions(source, target, align_corners)
    low = np.minimum(position.astype(np.intp), source - 1)
    high = np.minimum(low + 1, source - 1)
    shape = [1] * scores.ndim
    shape[axis] = target
    fraction = (position - low).astype(np.float32).reshape(shape)
    first = np.take(scores, low, axis)
    result: Array = first + (np.take(scores, high, axis) - first) * fraction
    return result


def _positions(source: int, target: int, align_corners: bool) -> npt.NDArray[np.float64]:
    index = np.arange(target, dtype=np.float64)
    if align_corners:
        return index * ((source - 1) / (target - 1) if target > 1 else 0.0)
    return np.clip((index + 0.5) * (source / target) - 0.5, 0, source - 1)
