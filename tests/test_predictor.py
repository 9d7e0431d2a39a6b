"""The Python API: the same bytes as the command line, and clear refusals."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from command_line import cada
from foreign_models import street_like

import cada_deploy
from cada_deploy.errors import ArtefactMismatch, UsageError
from cada_deploy.labels import read_label_png
from cada_deploy.policies import Rule
from cada_deploy.predictor import Predictor, read_rule


@pytest.fixture(scope="module")
def predictor(colour_model: Path) -> Predictor:
    return cada_deploy.load(str(colour_model), preset="imagenet-rgb")


def frame(k: int) -> np.ndarray:
    return street_like(48, 64, seed=k)


def test_predict_gives_the_bytes_of_the_predict_command(
    predictor: Predictor, colour_model: Path, frames: Path, tmp_path: Path
) -> None:
    ran = cada(
        "predict", "--model", colour_model, "--preset", "imagenet-rgb", "--images", frames,
        "--out", tmp_path / "out", "--workers", 2,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert not (tmp_path / "out" / "thresholds.json").exists()
    for k in range(3):
        expected = read_label_png((tmp_path / "out" / "labels" / f"frame_00{k}.png").read_bytes())
        found = predictor.predict(frame(k))
        assert found.labels.tobytes() == expected.tobytes()
        assert (found.labels != 255).all()


def test_a_runs_rule_gives_the_bytes_of_the_run(predictor: Predictor, finished: Path) -> None:
    rule = read_rule(finished / "thresholds.json")
    for k in range(3):
        expected = read_label_png((finished / "labels" / f"frame_00{k}.png").read_bytes())
        found = predictor.predict(frame(k), rule=rule).labels
        assert found.tobytes() == expected.tobytes()
        assert (found == 255).any() and (found != 255).any()


def test_maps_are_what_they_say(predictor: Predictor) -> None:
    found = predictor.predict(frame(0))
    for values in (found.entropy, found.confidence):
        assert values.dtype == np.float32 and values.shape == (48, 64)
    assert (found.confidence >= 1 / 6).all() and (found.confidence <= 1 + 1e-6).all()
    assert (found.entropy >= -1e-6).all() and (found.entropy <= np.log(6) + 1e-6).all()
    certain = found.confidence > 0.999
    assert certain.any() and (found.entropy[certain] < 0.02).all()


def test_size_and_mask(predictor: Predictor) -> None:
    assert predictor.predict(frame(0), size=(20, 30)).labels.shape == (20, 30)
    mask = np.zeros((48, 64), np.uint8)
    mask[:8] = 9
    found = predictor.predict(frame(0), mask=mask).labels
    assert (found[:8] == 255).all() and (found[8:] != 255).all()


def test_many_threads_share_one_predictor(predictor: Predictor) -> None:
    expected = [predictor.predict(frame(k)).labels.tobytes() for k in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda k: predictor.predict(frame(k % 4)).labels.tobytes(), range(16))
        )
    assert found == expected * 4


def test_threads_change_no_byte(predictor: Predictor, colour_model: Path) -> None:
    many = cada_deploy.load(colour_model, preset="imagenet-rgb", threads=3)
    for k in range(2):
        assert (
            many.predict(frame(k)).labels.tobytes() == predictor.predict(frame(k)).labels.tobytes()
        )


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((48, 64), np.uint8), np.zeros((48, 64, 4), np.uint8),
        np.zeros((3, 48, 64), np.uint8), np.zeros((48, 64, 3), np.float32),
        np.zeros((0, 64, 3), np.uint8), np.zeros((1, 48, 64, 3), np.uint8), [[[1, 2, 3]]], None,
    ],
    ids=lambda b: f"{getattr(b, 'dtype', type(b))} {getattr(b, 'shape', '')}",
)  # fmt: skip
def test_a_frame_of_another_shape_is_refused(predictor: Predictor, bad: object) -> None:
    with pytest.raises(UsageError, match=r"expected a numpy array \(H, W, 3\) of uint8"):
        predictor.predict(bad)  # type: ignore[arg-type]


def test_a_mask_or_rule_that_does_not_fit_is_refused(predictor: Predictor) -> None:
    with pytest.raises(UsageError, match=r"48x64.*10x10"):
        predictor.predict(frame(0), mask=np.zeros((10, 10), np.uint8))
    with pytest.raises(UsageError, match=r"2 thresholds.*6 classes"):
        predictor.predict(frame(0), rule=Rule("entropy", "<", (0.1, 0.2)))


def test_a_frame_of_any_layout_in_memory_is_read_right(predictor: Predictor) -> None:
    image = frame(1)
    expected = predictor.predict(image).labels.tobytes()
    backwards = np.ascontiguousarray(image[..., ::-1])[..., ::-1]
    wide = np.zeros((48, 128, 3), np.uint8)
    wide[:, ::2] = image
    for view in (backwards, wide[:, ::2], np.asfortranarray(image)):
        assert not view.flags.c_contiguous
        assert predictor.predict(view).labels.tobytes() == expected


def test_load_refuses_what_the_command_line_refuses(colour_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="never guesses"):
        cada_deploy.load(colour_model)
    with pytest.raises(UsageError, match="does not exist"):
        cada_deploy.load(tmp_path / "none.onnx", preset="imagenet-rgb")


def test_the_inputs_size_can_be_fixed(colour_model: Path) -> None:
    small = cada_deploy.load(colour_model, preset="imagenet-rgb", size=(24, 32))
    assert small.predict(frame(0)).labels.shape == (48, 64)
    assert len(small.classes) == 6 and small.spec.preset == "imagenet-rgb"


@pytest.mark.parametrize("data", ["", "[]", "{}", '{"scope": "dataset"}', '{"scope": "dataset", '
    '"classes": [{"threshold": "a"}], "measure": "entropy", "comparator": "<"}'])  # fmt: skip
def test_what_is_no_thresholds_json_is_refused(data: str, tmp_path: Path) -> None:
    (tmp_path / "thresholds.json").write_text(data)
    with pytest.raises(ArtefactMismatch, match=r"thresholds\.json"):
        read_rule(tmp_path / "thresholds.json")


def test_thresholds_of_single_images_are_no_rule(finished: Path, tmp_path: Path) -> None:
    assert cada("select", finished, "--out", tmp_path / "own", "--scope", "image").code == 0
    with pytest.raises(ArtefactMismatch, match="scope image"):
        read_rule(tmp_path / "own" / "thresholds.json")


def test_public_names_are_few_and_lazy() -> None:
    assert set(cada_deploy.__all__) == {"ClassSet", "ModelSpec", "__version__", "load"}
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        cada_deploy.lod  # noqa: B018
