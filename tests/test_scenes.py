"""Street scenes: exact labels, two styles of one street, the same bytes everywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from cada_deploy import scenes
from cada_deploy.classes import CITYSCAPES_19
from cada_deploy.errors import UsageError

# `digest` of the first 8 scenes of SOURCE_TRAIN; the digest of all 600 takes half a minute.
SOURCE_PREFIX = "da0da1aca22770e7afb3e480093bdb7e58d4f7895390e928a8693a6c2c9dd263"

FROZEN = (
    scenes.SOURCE_TRAIN,
    scenes.SOURCE_VAL,
    scenes.TARGET_TRAIN,
    scenes.TARGET_DEV,
    scenes.TARGET_DEMO,
)


def test_the_demo_set_is_the_frozen_one() -> None:
    assert scenes.digest(scenes.TARGET_DEMO) == scenes.TARGET_DEMO.sha256


def test_the_source_set_begins_as_it_was_frozen() -> None:
    assert scenes.digest(replace(scenes.SOURCE_TRAIN, count=8)) == SOURCE_PREFIX


def test_frozen_sets_share_no_street() -> None:
    seeds = [seed for frozen in FROZEN for seed in frozen.seeds]
    assert len(set(seeds)) == len(seeds)
    assert all(len(frozen.sha256) == 64 for frozen in FROZEN)


def test_pcg64_gives_the_stream_that_the_sets_were_drawn_from() -> None:
    dice = scenes._Dice(7, 1)
    drawn = [dice.below(1000) for _ in range(4)] + dice.bytes(3).tolist()
    assert drawn == [770, 111, 189, 159, 116, 32, 113]


@pytest.mark.parametrize("style", [scenes.SOURCE, scenes.TARGET])
def test_a_seed_gives_the_same_scene_again(style: str) -> None:
    first, again = scenes.scene(11, style, (64, 128)), scenes.scene(11, style, (64, 128))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert (first.image != scenes.scene(12, style, (64, 128)).image).any()


def test_both_styles_show_the_same_street_in_another_light() -> None:
    for seed in range(6):
        day = scenes.scene(seed, scenes.SOURCE, (128, 256))
        dusk = scenes.scene(seed, scenes.TARGET, (128, 256))
        np.testing.assert_array_equal(day.labels, dusk.labels)
        assert np.abs(day.image.astype(int) - dusk.image).mean() > 20


def test_every_pixel_has_a_class_and_every_class_appears() -> None:
    seen = np.zeros(256, np.int64)
    for _, labels in replace(scenes.TARGET_DEMO, size=(128, 256)):
        seen += np.bincount(labels.ravel(), minlength=256)
    assert (seen[: len(CITYSCAPES_19)] > 0).all(), seen[: len(CITYSCAPES_19)]
    assert seen[len(CITYSCAPES_19) :].sum() == 0


@pytest.mark.parametrize("style", [scenes.SOURCE, scenes.TARGET])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (7, 13), (97, 211), (200, 120)])
def test_any_size_can_be_drawn(style: str, size: tuple[int, int]) -> None:
    image, labels = scenes.scene(3, style, size)
    assert image.shape == (*size, 3) and image.dtype == np.uint8
    assert labels.shape == size and labels.dtype == np.uint8


def test_another_size_shows_the_same_street() -> None:
    small = scenes.scene(5, scenes.SOURCE, (64, 128)).labels
    large = scenes.scene(5, scenes.SOURCE, (192, 384)).labels
    # 3x: the centre of a small pixel is the centre of the middle one of nine.
    np.testing.assert_array_equal(small, large[1::3, 1::3])


def test_written_files_hold_the_very_arrays(tmp_path: Path) -> None:
    few = replace(scenes.TARGET_DEMO, count=2, size=(48, 96))
    seen: list[tuple[int, int]] = []
    scenes.write_set(tmp_path, few, lambda done, count: seen.append((done, count)))
    assert seen == [(1, 2), (2, 2)]
    for (name, image), (drawn, labels) in zip(scenes.frames(few), few):
        np.testing.assert_array_equal(image, drawn)
        stored = cv2.imread(str(tmp_path / "images" / f"{name}.png"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(stored[..., ::-1], image)
        stored = cv2.imread(str(tmp_path / "labels" / f"{name}.png"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(stored, labels)
    assert len(list((tmp_path / "images").iterdir())) == 2


def test_nonsense_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'target'"):
        scenes.scene(0, "targets")
    for seed, size in ((-1, (8, 8)), (0, (0, 8)), (0, (8, 9000))):
        with pytest.raises(UsageError, match="seed"):
            scenes.scene(seed, scenes.SOURCE, size)
