"""The official script's numbers, a plain loop's numbers, and the laws of counting."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cada_deploy.classes import BUILT_IN, CITYSCAPES_19, ClassSet
from cada_deploy.errors import ArtefactMismatch
from cada_deploy.metrics import ConfusionMatrix, confusion_matrix, empty_matrix, iou_table

VOID = 255


def random_map(rng: np.random.Generator, shape: tuple[int, int], void: float, ids: Any) -> Any:
    labels = rng.choice(np.array(ids, np.uint8), shape)
    labels[rng.random(shape) < void] = VOID
    return labels


def plain(prediction: Any, truth: Any, count: int) -> dict[str, Any]:
    """Every figure by counting pixels one at a time."""
    hit, miss, wrong, skipped = ([0] * count for _ in range(4))
    for p, t in zip(prediction.ravel().tolist(), truth.ravel().tolist()):
        if t == VOID:
            continue
        if p == t:
            hit[t] += 1
            continue
        miss[t] += 1
        if p == VOID:
            skipped[t] += 1
        else:
            wrong[p] += 1

    def ratio(a: float, b: float) -> float:
        return a / b if b else math.nan

    each = range(count)
    labelled, unselected = sum(hit) + sum(miss), sum(skipped)
    return {
        "iou": [ratio(hit[c], hit[c] + miss[c] + wrong[c]) for c in each],
        "iou_selected": [ratio(hit[c], hit[c] + miss[c] - skipped[c] + wrong[c]) for c in each],
        "precision_per_class": [ratio(hit[c], hit[c] + wrong[c]) for c in each],
        "coverage_per_class": [
            ratio(hit[c] + miss[c] - skipped[c], hit[c] + miss[c]) for c in each
        ],
        "pixel_accuracy": ratio(sum(hit), labelled),
        "coverage": ratio(labelled - unselected, labelled),
        "precision": ratio(sum(hit), labelled - unselected),
        "labelled": [hit[c] + miss[c] for c in each],
    }


def assert_same(found: ConfusionMatrix, expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=0, atol=1e-12, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    void=st.sampled_from([0.0, 0.3, 1.0]),
    unselected=st.sampled_from([0.0, 0.4, 1.0]),
    present=st.sampled_from([range(19), range(3), [0, 7, 18]]),
)
def test_equals_a_plain_loop(
    seed: int, height: int, width: int, void: float, unselected: float, present: Any
) -> None:
    rng = np.random.default_rng(seed)
    truth = random_map(rng, (height, width), void, present)
    prediction = random_map(rng, (height, width), unselected, range(19))
    found = confusion_matrix(prediction, truth, CITYSCAPES_19)
    assert_same(found, plain(prediction, truth, 19))
    ious = [v for v in plain(prediction, truth, 19)["iou"] if not math.isnan(v)]
    mean = sum(ious) / len(ious) if ious else math.nan
    np.testing.assert_allclose(found.mean_iou, mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("void", [0.0, 0.2])
@pytest.mark.parametrize("unselected", [0.0, 0.5])
@pytest.mark.parametrize("present", [range(19), [0, 2, 10, 13]])
def test_equals_cityscapes_scripts(
    tmp_path: Path, void: float, unselected: float, present: Any
) -> None:
    """Its own evaluation, on files of labelIds; void and "not selected" are 0, unlabeled."""
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official

    rng = np.random.default_rng(round(10 * void + 100 * unselected))
    predictions, truths, total = [], [], empty_matrix(CITYSCAPES_19)
    for k in range(3):
        truth = random_map(rng, (60, 80), void, present)
        right = rng.random(truth.shape) < 0.6
        guess = random_map(rng, truth.shape, 0.0, present)
        prediction = np.where(right & (truth != VOID), truth, guess).astype(np.uint8)
        prediction[rng.random(truth.shape) < unselected] = VOID
        total += confusion_matrix(prediction, truth, CITYSCAPES_19)
        for labels, name, files in (
            (prediction, "pred", predictions), (truth, "gt", truths),
        ):  # fmt: skip
            files.append(str(tmp_path / f"{name}{k}.png"))
            Image.fromarray(CITYSCAPES_19.label_id_table[labels]).save(files[-1])
    args = SimpleNamespace(**vars(official.args))
    args.evalInstLevelScore, args.JSONOutput, args.quiet = False, False, True
    theirs = official.evaluateImgLists(predictions, truths, args)
    their_iou = [theirs["classScores"][name] for name in CITYSCAPES_19.names]
    np.testing.assert_allclose(total.iou, their_iou, rtol=0, atol=1e-12)
    assert abs(total.mean_iou - theirs["averageScoreClasses"]) <= 1e-12


def test_merging_is_the_same_in_any_order_and_grouping() -> None:
    rng = np.random.default_rng(3)
    maps = [
        (random_map(rng, (9, 11), 0.3, range(19)), random_map(rng, (9, 11), 0.1, range(19)))
        for _ in range(5)
    ]
    parts = [confusion_matrix(p, t, CITYSCAPES_19) for p, t in maps]
    forward = sum(parts, empty_matrix(CITYSCAPES_19))
    backward = sum(parts[::-1], empty_matrix(CITYSCAPES_19))
    grouped = (parts[0] + parts[1]) + ((parts[2] + parts[3]) + parts[4])
    whole = confusion_matrix(
        np.hstack([p for p, _ in maps]), np.hstack([t for _, t in maps]), CITYSCAPES_19
    )
    assert forward == backward == grouped == whole
    assert forward.counts.dtype == np.int64 and not forward.counts.flags.writeable
    with pytest.raises(ArtefactMismatch, match="11 classes to one of 19"):
        _ = forward + empty_matrix(BUILT_IN["camvid-11"])


def test_a_matrix_does_not_change_after_it_is_made() -> None:
    counts = np.zeros((2, 3), np.int64)
    matrix = ConfusionMatrix(counts)
    counts[0, 0] = 5
    assert matrix.counts.sum() == 0
    with pytest.raises(ValueError, match="read-only"):
        matrix.counts[0, 0] = 1
    for wrong in (np.zeros((2, 2)), np.zeros(3), -np.ones((2, 3))):
        with pytest.raises(ValueError, match="none negative"):
            ConfusionMatrix(wrong)


def test_counts_beyond_32_bits_stay_exact() -> None:
    big = ConfusionMatrix(np.array([[2**40 + 1, 3, 0], [1, 2**41, 7]]))
    assert (big + big).counts[0, 0] == 2**41 + 2


def test_perfect_absent_and_void() -> None:
    truth = np.array([[0, 1], [VOID, 1]], np.uint8)
    perfect = confusion_matrix(truth, truth, CITYSCAPES_19)
    assert perfect.iou[:2].tolist() == [1, 1] and np.isnan(perfect.iou[2:]).all()
    assert perfect.mean_iou == perfect.pixel_accuracy == perfect.coverage == 1.0
    nothing = confusion_matrix(np.full_like(truth, VOID), truth, CITYSCAPES_19)
    assert nothing.mean_iou == 0.0 and nothing.coverage == 0.0
    assert math.isnan(nothing.precision) and np.isnan(nothing.iou_selected).all()
    void = confusion_matrix(truth, np.full_like(truth, VOID), CITYSCAPES_19)
    assert math.isnan(void.mean_iou) and math.isnan(void.pixel_accuracy)
    # A class that is predicted on labelled ground, but never true, counts with 0.
    wrong = confusion_matrix(np.full_like(truth, 5), truth, CITYSCAPES_19)
    assert wrong.iou[5] == 0.0 and wrong.mean_iou == 0.0


def test_foreign_values_name_the_value_and_the_file() -> None:
    good = np.zeros((4, 4), np.uint8)
    foreign = good.copy()
    foreign[1, 2] = foreign[3, 3] = 33
    names = {"prediction_name": "out/a.png", "truth_name": "gt/a.png"}
    with pytest.raises(ArtefactMismatch, match=r"out/a\.png holds the value 33 in 2 pixels"):
        confusion_matrix(foreign, good, CITYSCAPES_19, **names)
    with pytest.raises(ArtefactMismatch, match=r"gt/a\.png holds the value 33"):
        confusion_matrix(good, foreign, CITYSCAPES_19, **names)
    with pytest.raises(ArtefactMismatch, match=r"out/a\.png holds"):  # even where truth is void
        confusion_matrix(foreign, np.full_like(good, VOID), CITYSCAPES_19, **names)


def test_sizes_must_agree() -> None:
    names = {"prediction_name": "out/a.png", "truth_name": "gt/a.png"}
    small, large = np.zeros((4, 5), np.uint8), np.zeros((8, 10), np.uint8)
    with pytest.raises(ArtefactMismatch, match=r"out/a\.png is 4x5 but gt/a\.png is 8x10"):
        confusion_matrix(small, large, CITYSCAPES_19, **names)
    for wrong in (small[..., None], small.astype(np.int32)):
        with pytest.raises(ArtefactMismatch, match=r"expected \(H, W\) uint8"):
            confusion_matrix(wrong, small, CITYSCAPES_19, **names)


def test_another_ignore_id() -> None:
    classes = ClassSet("two", ("a", "b"), (0, 1), ((0, 0, 0), (9, 9, 9)), ignore_id=11)
    labels = np.array([[0, 1, 11, 11]], np.uint8)
    found = confusion_matrix(labels, labels[:, ::-1].copy(), classes)
    assert found.labelled.tolist() == [1, 1] and found.coverage == 0.0
    with pytest.raises(ArtefactMismatch, match="value 255"):
        confusion_matrix(np.full((1, 4), 255, np.uint8), labels, classes)


def test_table_has_the_papers_column_order() -> None:
    rng = np.random.default_rng(4)
    truth = random_map(rng, (30, 30), 0.1, range(18))
    prediction = random_map(rng, (30, 30), 0.3, range(18))
    matrix = confusion_matrix(prediction, truth, CITYSCAPES_19)
    rows = iou_table(matrix, CITYSCAPES_19)
    assert [row.name for row in rows] == [
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
        "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
        "motorcycle", "bicycle", "mean",
    ]  # fmt: skip
    assert rows[3].iou == matrix.iou[3] and rows[3].labelled_pixels == (truth == 3).sum()
    assert math.isnan(rows[18].iou)
    assert rows[-1].iou == matrix.mean_iou == pytest.approx(np.nanmean(matrix.iou), abs=1e-15)
    assert rows[-1].coverage == matrix.coverage and rows[-1].precision == matrix.precision
    with pytest.raises(ArtefactMismatch, match="'camvid-11' has 11"):
        iou_table(matrix, BUILT_IN["camvid-11"])
