"""End to end: the labels of a run are those of a float64 statement in NumPy, except at ties."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
from command_line import cada, read
from foreign_models import fitted_colours, linear_scores, save_colour_model, street_like

from cada_deploy.engines import open_engine
from cada_deploy.errors import UsageError
from cada_deploy.fused import best_kernel
from cada_deploy.fused.reference import Kernel as Reference
from cada_deploy.image_files import find_images
from cada_deploy.labels import read_label_png
from cada_deploy.model_files import load_model
from cada_deploy.pipeline import Pipeline, Sizes, parse_size
from cada_deploy.policies import category_adaptive
from cada_deploy.policies.category_adaptive import Options
from cada_deploy.scores import EncodedScores, Upsampling
from cada_deploy.stages import StageClock
from cada_deploy.statistics import merged

SHARPNESS = 80.0  # with 11 colours among one evening's few tones: mean confidence 0.88
SOAK = os.environ.get("CADA_SOAK") == "1"
STRIDE = 8
MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
DUSK = Path(__file__).parents[2] / "shared" / "data" / "camvid" / "dusk" / "images"
TIE = 1e-4  # two best probabilities, or entropy and threshold, this close decide either way
EXCUSED = 0.001


def stated_scores(image: np.ndarray, colours: np.ndarray, sharpness: float) -> np.ndarray:
    """(C, h, w) float64 from the model's weights alone; H and W divisible by STRIDE."""
    x = (image / 255.0 - MEAN) / STD
    h, w = image.shape[0] // STRIDE, image.shape[1] // STRIDE
    blocks = x.reshape(h, STRIDE, w, STRIDE, 3).mean(axis=(1, 3))
    weight, bias = (v.astype(np.float64) for v in linear_scores(colours, sharpness))
    return np.einsum("kc,hwc->khw", weight, blocks) + bias[:, None, None]


def upsampled(planes: np.ndarray, size: tuple[int, int], align_corners: bool) -> np.ndarray:
    """(C, h, w) -> (C, H, W) float64: bilinear along one axis, then the other; ends are held."""
    for axis, target in ((1, size[0]), (2, size[1])):
        source = planes.shape[axis]
        i = np.arange(target)
        if align_corners:
            at = i * (source - 1) / max(1, target - 1)
        else:
            at = np.clip((i + 0.5) * source / target - 0.5, 0, source - 1)
        low = np.minimum(at.astype(int), source - 1)
        high = np.minimum(low + 1, source - 1)
        shape = [1, 1, 1]
        shape[axis] = target
        first, second = np.take(planes, low, axis), np.take(planes, high, axis)
        planes = first + (second - first) * (at - low).reshape(shape)
    return planes


def softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(axis=0))
    return e / e.sum(axis=0)


def probabilities(scores: EncodedScores, size: tuple[int, int]) -> np.ndarray:
    low, way = scores.array.astype(np.float64), scores.upsampling
    if way.order == "logits":
        return softmax(upsampled(low, size, way.align_corners))
    return upsampled(softmax(low), size, way.align_corners)


def entropies(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.maximum(p, 1e-300))).sum(axis=0)


@dataclass(frozen=True)
class Statement:
    """What the paper says of one image, in float64 from the engine's own scores."""

    scores: EncodedScores
    labels: np.ndarray  # (H, W)
    margin: np.ndarray  # (H, W) best probability less the second
    entropy: np.ndarray  # (H, W)
    confidence: float


def statement(scores: EncodedScores, size: tuple[int, int]) -> Statement:
    p = probabilities(scores, size)
    best = np.sort(p, axis=0)
    return Statement(
        scores, p.argmax(axis=0), best[-1] - best[-2], entropies(p), float(best[-1].mean())
    )


def check_truth(
    folder: Path, colours: np.ndarray, sharpness: float, tmp_path: Path
) -> list[Statement]:
    """Run predict and pseudo-label over `folder`; compare every pixel with the statement."""
    model = save_colour_model(tmp_path / "m.onnx", colours, stride=STRIDE, sharpness=sharpness)
    for job, out in (("predict", "full"), ("pseudo-label", "chosen")):
        ran = cada(
            job, "--model", model, "--preset", "imagenet-rgb", "--images", folder,
            "--out", tmp_path / out, "--quiet",
        )  # fmt: skip
        assert ran.code == 0, ran.err
    opened = load_model(model, preset="imagenet-rgb")
    pipeline = Pipeline(open_engine("ort", opened, "cpu"), Reference(), opened.spec)
    stated, full, chosen = [], [], []
    for ref in find_images(folder):
        image = pipeline.open_frame(ref, StageClock()).image
        scores = pipeline.scores(image, StageClock())
        _check_scores(scores, image, colours, sharpness)
        stated.append(statement(scores, image.shape[:2]))
        name = f"{ref.path.stem}.png"
        full.append(read_label_png((tmp_path / "full" / "labels" / name).read_bytes()))
        chosen.append(read_label_png((tmp_path / "chosen" / "labels" / name).read_bytes()))
    _check_labels(stated, full)
    _check_selection(stated, chosen, tmp_path / "chosen")
    return stated


def _check_scores(
    scores: EncodedScores, image: np.ndarray, colours: np.ndarray, sharpness: float
) -> None:
    """ORT's float32 and the rounding to fp16 stay within half a step of fp16 of the weights' own
    float64 arithmetic, and flip next to no label of it."""
    exact = stated_scores(image, colours, sharpness)
    centred = np.maximum(exact - exact.max(axis=0), -65504.0)
    found = scores.array.astype(np.float64)
    step = np.spacing(np.abs(centred).astype(np.float16)).astype(np.float64)
    assert (np.abs(found - centred) <= 0.51 * step + 1e-3).all()
    size = (image.shape[0], image.shape[1])
    u, v = upsampled(centred, size, False), upsampled(found, size, False)
    differ = u.argmax(axis=0) != v.argmax(axis=0)
    assert differ.mean() <= EXCUSED


def _check_labels(stated: list[Statement], full: list[np.ndarray]) -> None:
    differ = np.concatenate([(s.labels != f).ravel() for s, f in zip(stated, full, strict=True)])
    margins = np.concatenate([s.margin.ravel() for s in stated])
    assert differ.mean() <= EXCUSED
    assert (margins[differ] < TIE).all()


def _check_selection(stated: list[Statement], chosen: list[np.ndarray], out: Path) -> None:
    reference = Reference()
    parts = [
        reference.accumulate(s.scores, s.labels.shape, "confidence").statistics for s in stated
    ]
    evidence = merged(parts, stated[0].scores.classes, "confidence")
    thresholds = category_adaptive.rule(evidence, Options()).thresholds
    rows = read(out / "thresholds.json")["classes"]
    for expected, row in zip(thresholds, rows, strict=True):
        assert (expected is None) == (row["threshold"] is None)
        assert expected is None or abs(expected - row["threshold"]) <= 1e-4
    limits = np.array([np.nan if t is None else t for t in thresholds])
    undecided = differ = total = 0
    for s, labels in zip(stated, chosen, strict=True):
        limit = limits[s.labels]
        expected = np.where(s.entropy < limit, s.labels, 255)
        wrong = expected != labels
        excused = (s.margin < TIE) | (np.abs(s.entropy - limit) < TIE)
        assert not (wrong & ~excused).any()
        undecided, differ = undecided + int(excused.sum()), differ + int(wrong.sum())
        total += wrong.size
    assert differ <= EXCUSED * total, f"{differ} of {total} differ, {undecided} could"


def test_labels_and_selection_are_what_numpy_says(tmp_path: Path) -> None:
    pictures = [street_like(64, 96, seed) for seed in range(6)]
    (tmp_path / "frames").mkdir()
    for k, picture in enumerate(pictures):
        data = cv2.imencode(".png", picture[..., ::-1])[1]
        (tmp_path / "frames" / f"{k}.png").write_bytes(data.tobytes())
    colours = fitted_colours(pictures, 12)
    stated = check_truth(tmp_path / "frames", colours, 8.0, tmp_path)
    assert len(np.unique([s.labels for s in stated])) >= 10


def test_labels_of_real_images_at_dusk_are_what_numpy_says(tmp_path: Path) -> None:
    if not DUSK.is_dir():
        pytest.skip(f"not run: the CamVid dusk images are not at {DUSK}")
    found = find_images(DUSK)
    spread = found[:: len(found) // 8][:8]  # the model is fitted to these, in the soak too
    few = found if SOAK else spread
    (tmp_path / "frames").mkdir()
    for ref in few:
        (tmp_path / "frames" / ref.path.name).symlink_to(ref.path)
    pictures = [cv2.imread(str(r.path))[..., ::-1] for r in spread]
    colours = fitted_colours(pictures, 11)
    stated = check_truth(tmp_path / "frames", colours, SHARPNESS, tmp_path)
    assert len(stated) == len(few)
    assert len(np.unique([s.labels for s in stated])) >= 10
    assert np.mean([s.confidence for s in stated]) > 0.8


@pytest.mark.parametrize("order", ["logits", "probs"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_the_kernel_in_use_agrees_with_float64_in_both_orders(
    order: str, align_corners: bool
) -> None:
    """What the run uses (best_kernel), on scores of a network's kind."""
    colours = fitted_colours([street_like(64, 96, 1)], 7)
    exact = stated_scores(street_like(64, 96, 2), colours, 8.0).astype(np.float32)
    kernel = best_kernel(1)
    encoded = kernel.encode(exact[None], "logits")[0]
    scores = EncodedScores(encoded, Upsampling(order, align_corners))
    for size in ((64, 96), (61, 97), (8, 12), (1, 1), (200, 3)):
        stated = statement(scores, size)
        found = kernel.accumulate(scores, size, "confidence", labels=True, entropy=True)
        assert found.labels is not None and found.entropy is not None
        differ = found.labels != stated.labels
        assert (stated.margin[differ] < TIE).all()
        assert np.abs(found.entropy - stated.entropy).max() <= 2e-5


@pytest.mark.parametrize(
    ("sizes", "label", "statistics"),
    [
        (Sizes(), (30, 40), (30, 40)),
        (Sizes(label="model"), (8, 9), (8, 9)),
        (Sizes(label=(5, 6)), (5, 6), (5, 6)),
        (Sizes(statistics=(3, 4)), (30, 40), (3, 4)),
        (Sizes(label="model", statistics=(3, 4)), (8, 9), (3, 4)),
    ],
)
def test_sizes(sizes: Sizes, label: tuple[int, int], statistics: tuple[int, int]) -> None:
    assert sizes.label_size((30, 40), (8, 9)) == label
    assert sizes.statistics_size((30, 40), (8, 9)) == statistics


def test_a_pipeline_refuses_a_size_that_its_model_does_not_take(tmp_path: Path) -> None:
    path = save_colour_model(
        tmp_path / "m.onnx", fitted_colours([street_like(64, 96, 1)], 7), size=(48, 64)
    )
    spec = load_model(path, preset="imagenet-rgb").spec
    with pytest.raises(UsageError, match="48x64"):
        Pipeline(None, best_kernel(1), spec, Sizes(input=(64, 64)))
    assert Pipeline(None, best_kernel(1), spec).input_size((10, 10)) == (48, 64)


def test_sizes_are_parsed() -> None:
    assert parse_size("--size", "512x1024") == (512, 1024)
    assert parse_size("--size", "1X65535") == (1, 65535)
    for bad in ("", "5", "5x", "x5", "5x5x5", "0x5", "5x65536", "-1x5", "5.0x5", " 5x5", "²x5"):
        with pytest.raises(UsageError, match="--size"):
            parse_size("--size", bad)
