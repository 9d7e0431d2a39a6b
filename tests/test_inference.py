"""Windows, scales and mirror: every pixel is covered, and the averages are what NumPy says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from foreign_models import save_colour_model, spread_colours, street_like
from hypothesis import given
from hypothesis import strategies as st

from cada_deploy.classes import anonymous
from cada_deploy.engines import open_engine
from cada_deploy.inference import frame_scores, windows
from cada_deploy.model_files import load_model
from cada_deploy.model_spec import InferenceSpec, InputSpec, ModelSpec, OutputSpec
from cada_deploy.scores import Scores
from cada_deploy.stages import StageClock

CLASSES = 4
WEIGHT = np.linspace(-2, 2, CLASSES * 3, dtype=np.float32).reshape(CLASSES, 3)
PLAIN = ModelSpec(
    anonymous(CLASSES),
    InputSpec("RGB", 1 / 255, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear"),
    OutputSpec(align_corners=False),
)


@dataclass(frozen=True)
class BlockModel:
    """scores = WEIGHT x mean of each block of stride x stride pixels; one row at a time."""

    stride: int = 1
    layout: str = "NCHW"
    name: str = "block"
    version: str = "1"
    device: str = "cpu"
    classes: int = CLASSES

    def infer(self, batch: np.ndarray) -> Scores:
        rows = batch.transpose(0, 3, 1, 2) if self.layout == "NHWC" else batch
        return Scores(block_scores(rows[0], self.stride)[None])


def block_scores(row: np.ndarray, stride: int) -> np.ndarray:
    """(3, H, W) -> (C, ceil(H / stride), ceil(W / stride)) float32."""
    starts = [np.arange(0, n, stride) for n in row.shape[1:]]
    sums = np.add.reduceat(np.add.reduceat(row.astype(np.float64), starts[0], 1), starts[1], 2)
    counts = np.add.reduceat(np.add.reduceat(np.ones(row.shape[1:]), starts[0], 0), starts[1], 1)
    return np.einsum("kc,chw->khw", WEIGHT.astype(np.float64), sums / counts).astype(np.float32)


def fed(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The network's input by its formula: (3, H, W) float64."""
    if image.shape[:2] != size:
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    x = (image / 255.0 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.4])
    return x.transpose(2, 0, 1)


def run(inference: InferenceSpec, image: np.ndarray, *, size: tuple[int, int] | None = None,
        stride: int = 1, **output: Any) -> np.ndarray:  # fmt: skip
    spec = replace(PLAIN, inference=inference, output=replace(PLAIN.output, **output))
    whole = size or (image.shape[0], image.shape[1])
    return frame_scores(BlockModel(stride), spec, image, whole, StageClock())


def slide(window: tuple[int, int], stride: tuple[int, int], **more: Any) -> InferenceSpec:
    return InferenceSpec("slide", window, stride, **more)


SIDE = st.integers(1, 60)


@given(st.tuples(SIDE, SIDE), st.tuples(SIDE, SIDE), st.data())
def test_windows_cover_every_pixel_and_stay_inside(
    size: tuple[int, int], window: tuple[int, int], data: st.DataObject
) -> None:
    stride = tuple(data.draw(st.integers(1, w)) for w in window)
    covered = np.zeros(size, int)
    found = list(windows(size, slide(window, (stride[0], stride[1]))))
    for top, left, height, width in found:
        assert top >= 0 and left >= 0 and top + height <= size[0] and left + width <= size[1]
        assert (height, width) == (min(window[0], size[0]), min(window[1], size[1]))
        covered[top : top + height, left : left + width] += 1
    assert covered.min() >= 1
    assert len(set(found)) == len(found), "no window is run twice"


@given(st.tuples(SIDE, SIDE), st.tuples(SIDE, SIDE), st.integers(0, 999), st.data())
def test_sliding_a_pointwise_model_equals_the_whole_image(
    size: tuple[int, int], window: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    stride = tuple(data.draw(st.integers(max(1, w // 4), w)) for w in window)
    image = street_like(*size, seed=seed)
    whole = run(InferenceSpec(), image)
    slid = run(slide(window, (stride[0], stride[1])), image)
    assert slid.shape == whole.shape and slid.dtype == np.float32
    assert np.abs(slid - whole).max() <= 1e-5 * max(1.0, float(np.abs(whole).max()))


def test_sliding_on_a_stride_of_8_equals_the_whole_image_where_windows_fit_its_cells() -> None:
    image = street_like(64, 96, seed=1)
    whole = run(InferenceSpec(), image, stride=8)
    slid = run(slide((32, 48), (16, 24)), image, stride=8)
    assert whole.shape == slid.shape == (1, CLASSES, 8, 12)
    assert np.abs(slid - whole).max() <= 1e-5


@given(st.tuples(SIDE, SIDE), st.tuples(SIDE, SIDE), st.sampled_from([1, 4, 8]), st.booleans())
def test_sliding_anywhere_gives_finite_scores_within_the_networks_range(
    size: tuple[int, int], window: tuple[int, int], stride: int, align_corners: bool
) -> None:
    image = street_like(*size, seed=5)
    half = (max(1, window[0] // 2), max(1, window[1] // 2))
    scores = run(slide(window, half), image, stride=stride, align_corners=align_corners)
    exact = block_scores(fed(image, size), 1)
    assert np.isfinite(scores).all() and scores.shape[:2] == (1, CLASSES)
    for k in range(CLASSES):
        assert exact[k].min() - 1e-4 <= scores[0, k].min()
        assert scores[0, k].max() <= exact[k].max() + 1e-4


def interpolated(scores: np.ndarray, size: tuple[int, int], align_corners: bool) -> np.ndarray:
    """Separable bilinear by np.interp, float64."""
    for axis, target in ((1, size[0]), (2, size[1])):
        source = scores.shape[axis]
        i = np.arange(target)
        if align_corners:
            at = i * (source - 1) / max(1, target - 1)
        else:
            at = (i + 0.5) * source / target - 0.5  # np.interp holds the ends
        scores = np.apply_along_axis(
            lambda v, at=at, n=source: np.interp(at, np.arange(n), v), axis, scores
        )
    return scores


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.5), (0.75,), (2.0, 0.31)])
@pytest.mark.parametrize("stride", [1, 4])
def test_scales_and_mirror_are_averaged_as_numpy_says(
    stride: int, scales: tuple[float, ...], flip: bool, align_corners: bool
) -> None:
    image = street_like(37, 52, seed=3)
    found = run(InferenceSpec(scales=scales, flip=flip), image, stride=stride,
                align_corners=align_corners)[0]  # fmt: skip
    views = []
    for scale in scales:
        size = (round(37 * scale), round(52 * scale))
        views.append(block_scores(fed(image, size), stride).astype(np.float64))
        if flip:
            mirrored = block_scores(fed(image[:, ::-1], size), stride)
            views.append(mirrored[..., ::-1].astype(np.float64))
    grid = views[0].shape[1:]
    expected = np.mean([interpolated(v, grid, align_corners) for v in views], axis=0)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2e-5


def test_mirror_of_a_symmetric_image_changes_nothing() -> None:
    half = street_like(24, 16, seed=2)
    image = np.concatenate([half, half[:, ::-1]], axis=1)
    plain = run(InferenceSpec(), image)
    assert np.abs(run(InferenceSpec(flip=True), image) - plain).max() <= 1e-6


def test_nhwc_windows_are_cut_along_the_right_axes() -> None:
    image = street_like(30, 44, seed=4)
    straight = run(slide((16, 20), (8, 9)), image)
    spec = replace(
        PLAIN, input=replace(PLAIN.input, layout="NHWC"), inference=slide((16, 20), (8, 9))
    )
    turned = frame_scores(BlockModel(layout="NHWC"), spec, image, (30, 44), StageClock())
    assert turned.tobytes() == straight.tobytes()


@pytest.mark.parametrize(
    "inference",
    [
        InferenceSpec(),
        slide((32, 32), (20, 24)),
        InferenceSpec(scales=(0.5, 1.0), flip=True),
        slide((32, 32), (20, 24), scales=(1.0, 1.25), flip=True),
    ],
    ids=lambda i: f"{i.mode} {i.scales} {i.flip}",
)
def test_a_real_network_gives_the_same_bits_every_time(
    inference: InferenceSpec, tmp_path: Path
) -> None:
    path = save_colour_model(tmp_path / "m.onnx", spread_colours(CLASSES), stride=8)
    model = load_model(path, preset="imagenet-rgb")
    spec = replace(model.spec, inference=inference)
    image = street_like(48, 64, seed=6)
    found = {
        frame_scores(
            open_engine("ort", model, "cpu"), spec, image, (48, 64), StageClock()
        ).tobytes()
        for _ in range(4)
    }
    assert len(found) == 1
