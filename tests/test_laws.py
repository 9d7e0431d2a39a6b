"""The laws of docs/mathematics.md: no cut of the work, no order and no restart changes a byte."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from command_line import Ran, cada, deliverables, read
from hypothesis import given, settings
from hypothesis import strategies as st

from cada_deploy.fused import UNSELECTED, best_kernel
from cada_deploy.labels import read_label_png
from cada_deploy.policies import COMPARATORS, Rule, category_adaptive
from cada_deploy.policies.category_adaptive import Delta, Options
from cada_deploy.scores import EncodedScores, Upsampling
from cada_deploy.statistics import HISTOGRAM_BINS, ClassStatistics, merged

# --- merging -----------------------------------------------------------------------------------

BIG = st.integers(0, 1 << 80)


@st.composite
def statistics(draw: st.DrawFn, classes: int = 2) -> ClassStatistics:
    histogram = np.zeros((classes, HISTOGRAM_BINS), object)
    histogram[0, draw(st.integers(0, HISTOGRAM_BINS - 1))] = draw(BIG)
    rows = st.lists(BIG, min_size=classes, max_size=classes)
    return ClassStatistics(
        "confidence",
        draw(rows),  # type: ignore[arg-type]
        [draw(rows) for _ in range(classes)],  # type: ignore[arg-type]
        histogram,
        draw(BIG),
        draw(BIG),
    )


@given(statistics(), statistics(), statistics())
def test_merging_is_commutative_and_associative(
    a: ClassStatistics, b: ClassStatistics, c: ClassStatistics
) -> None:
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert merged([c, a, b], 2, "confidence") == a + b + c


@given(statistics())
def test_zero_is_neutral_and_merging_loses_nothing(a: ClassStatistics) -> None:
    assert merged([a], 2, "confidence") == a
    assert merged([], 2, "confidence") == ClassStatistics.zero(2, "confidence")
    assert (a + a).sums[1, 1] == 2 * a.sums[1, 1]


# --- the same bytes however the work was cut ----------------------------------------------------


def label(model: Path, images: Path, out: Path, *more: str | int | Path) -> dict[str, bytes]:
    ran: Ran = cada(
        "pseudo-label", "--model", model, "--preset", "imagenet-rgb",
        "--images", images, "--out", out, *more,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return deliverables(out)


@pytest.mark.parametrize(
    "cut",
    [
        ("--workers", 1),
        ("--workers", 2),
        ("--workers", 3, "--batch-size", 2),
        ("--batch-size", 3, "--workers", 1),
        ("--batch-size", 64),
        ("--shard-size", 1),
        ("--shard-size", 4, "--workers", 3),
        ("--shard-size", 100),
        ("--cache", "off", "--shard-size", 2),
        ("--cache", "on"),
    ],
    ids=lambda cut: " ".join(map(str, cut)),
)
def test_no_cut_of_the_work_changes_a_byte(
    cut: tuple[str | int, ...], colour_model: Path, frames: Path, finished: Path, tmp_path: Path
) -> None:
    assert label(colour_model, frames, tmp_path / "out", *cut) == deliverables(finished)


@pytest.mark.parametrize("scope", ["dataset", "image"])
@pytest.mark.parametrize("cache", ["on", "off"])
def test_scope_and_cache_do_not_depend_on_workers(
    scope: str, cache: str, colour_model: Path, frames: Path, tmp_path: Path
) -> None:
    options = ("--scope", scope, "--cache", cache, "--delta", "5%")
    one = label(colour_model, frames, tmp_path / "1", *options, "--workers", 1)
    three = label(colour_model, frames, tmp_path / "3", *options, "--workers", 3, "--shard-size", 2)
    assert one == three


@settings(max_examples=4)
@given(st.randoms(use_true_random=False))
def test_the_order_of_a_list_changes_no_byte(
    colour_model: Path,
    frames: Path,
    finished: Path,
    tmp_path_factory: pytest.TempPathFactory,
    shuffler: random.Random,
) -> None:
    names = sorted(p.name for p in frames.iterdir() if p.suffix == ".png")
    shuffler.shuffle(names)
    folder = tmp_path_factory.mktemp("list")
    for path in frames.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "list.txt").write_text("\n".join(names))
    found = label(colour_model, folder / "list.txt", folder / "out", "--quiet")
    assert found == deliverables(finished)
    shutil.rmtree(folder)


def test_another_delta_from_the_cache_equals_a_fresh_run(
    colour_model: Path, frames: Path, tmp_path: Path
) -> None:
    """Every centroid and scope, relative and per-class Delta, in place and into a new folder."""
    per_class = "0.01,5%,0,0.2,1%,-0.05"
    for number, (centroid, scope, delta) in enumerate(
        [
            ("confidence", "dataset", "0.05"),
            ("confidence", "image", "10%"),
            ("mean", "dataset", per_class),
            ("mean", "image", "0.02"),
            ("literal", "dataset", "-0.3"),
            ("literal", "image", "*=-0.2,class-1=-50%"),
        ]
    ):
        options = ("--centroid", centroid, "--scope", scope, f"--delta={delta}")
        here = tmp_path / str(number)
        fresh = label(colour_model, frames, here / "fresh", *options)
        first = label(colour_model, frames, here / "first", "--centroid", centroid)
        ran = cada("select", here / "first", "--out", here / "again", *options)
        assert ran.code == 0, ran.err
        assert deliverables(here / "again") == fresh
        assert deliverables(here / "first") == first
        ran = cada("select", here / "first", *options)
        assert ran.code == 0, ran.err
        assert deliverables(here / "first") == fresh


def test_a_run_without_cache_is_selected_again_to_the_same_bytes(
    colour_model: Path, frames: Path, tmp_path: Path
) -> None:
    fresh = label(colour_model, frames, tmp_path / "fresh", "--delta", "0.1")
    label(colour_model, frames, tmp_path / "first", "--cache", "off")
    assert not list((tmp_path / "first" / "scores").iterdir())
    ran = cada("select", tmp_path / "first", "--delta", "0.1")
    assert ran.code == 0, ran.err
    assert "network runs again" in ran.err
    assert deliverables(tmp_path / "first") == fresh


def test_a_second_identical_command_changes_no_byte(
    colour_model: Path, frames: Path, tmp_path: Path
) -> None:
    first = label(colour_model, frames, tmp_path / "out")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "labels").iterdir()}
    assert label(colour_model, frames, tmp_path / "out") == first
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps, "finished labels are not redone"


def test_losing_any_part_of_a_run_and_repeating_the_command_restores_every_byte(
    colour_model: Path, frames: Path, finished: Path, tmp_path: Path
) -> None:
    expected = deliverables(finished)
    parts = sorted(
        p.relative_to(finished)
        for p in finished.rglob("*")
        if p.is_file() and p.name not in ("run.json", ".lock")
    )
    assert len(parts) > 15
    for part in parts:
        out = tmp_path / "out"
        shutil.copytree(finished, out)
        (out / part).unlink()
        assert label(colour_model, frames, out) == expected, part
        assert (out / part).exists(), part
        shutil.rmtree(out)


# --- Delta --------------------------------------------------------------------------------------


def label_maps(out: Path) -> dict[str, np.ndarray]:
    return {
        os.fsdecode(p.name): read_label_png(p.read_bytes())
        for p in sorted((out / "labels").iterdir())
    }


def test_raising_delta_never_adds_a_pixel(finished: Path, tmp_path: Path) -> None:
    maps = []
    for number, delta in enumerate(["-0.2", "0", "0.01", "0.1", "0.3", "5"]):
        ran = cada("select", finished, "--out", tmp_path / str(number), f"--delta={delta}")
        assert ran.code == 0, ran.err
        maps.append(label_maps(tmp_path / str(number)))
    totals = [sum((m != UNSELECTED).sum() for m in found.values()) for found in maps]
    assert totals[0] > totals[2] > totals[-1] == 0, "the Deltas do cut, and the last cuts all"
    for looser, tighter in itertools.pairwise(maps):
        for name, narrow in tighter.items():
            kept = narrow != UNSELECTED
            assert (looser[name][kept] == narrow[kept]).all(), name


def random_scores(seed: int, classes: int, low: tuple[int, int], sharp: float) -> EncodedScores:
    generator = np.random.Generator(np.random.PCG64(seed))
    raw = generator.normal(0, sharp, (1, classes, *low)).astype(np.float32)
    encoded = best_kernel(1).encode(raw, "logits")[0]
    return EncodedScores(encoded, Upsampling("logits", False))


@given(
    st.integers(0, 10**6),
    st.integers(2, 19),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from([0.01, 0.3, 1.0, 5.0, 30.0]),
    st.sampled_from(["confidence", "mean"]),
)
def test_at_delta_0_no_predicted_class_is_emptied_unless_its_entropies_are_equal(
    seed: int, classes: int, low: tuple[int, int], sharp: float, centroid: str
) -> None:
    kernel, size = best_kernel(1), (13, 17)
    scores = random_scores(seed, classes, low, sharp)
    evidence = kernel.accumulate(scores, size, centroid, labels=True, entropy=True)
    rule = category_adaptive.rule(evidence.statistics, Options(centroid=centroid))
    selection = kernel.select(scores, size, rule)
    assert evidence.labels is not None and evidence.entropy is not None
    for k in range(classes):
        mine = evidence.entropy[evidence.labels == k]
        assert len(mine) == selection.predicted[k]
        if len(mine) == 0:
            assert rule.thresholds[k] is None and selection.selected[k] == 0
        elif selection.selected[k] == 0:
            # Integer sums round to 2^-23: a spread below that much can vanish with them.
            assert float(mine.max()) - float(mine.min()) <= 1e-5


@given(
    st.integers(0, 10**6),
    st.lists(st.floats(-1, 1), min_size=2, max_size=5),
    st.booleans(),
)
def test_selected_sets_are_nested_in_delta(seed: int, deltas: list[float], relative: bool) -> None:
    kernel, size = best_kernel(1), (11, 9)
    scores = random_scores(seed, 5, (3, 4), 2.0)
    evidence = kernel.accumulate(scores, size, "confidence").statistics
    before = None
    for delta in sorted(deltas):
        options = Options(delta=(Delta(delta, relative),))
        kept = kernel.select(scores, size, category_adaptive.rule(evidence, options)).labels
        if before is not None:
            assert (before[kept != UNSELECTED] == kept[kept != UNSELECTED]).all()
        before = kept


# --- thresholds ---------------------------------------------------------------------------------

FLOAT64 = st.floats(allow_nan=False)
FLOAT32 = st.floats(width=32)


def decides(value: float, comparator: str, threshold: float) -> bool:
    """In exact arithmetic where both are finite."""
    a: Fraction | float = Fraction(value) if np.isfinite(value) else value
    b: Fraction | float = Fraction(threshold) if np.isfinite(threshold) else threshold
    return {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[comparator]


def decides32(value: np.float32, comparator: str, threshold: np.float32) -> bool:
    compare = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}
    return bool(compare[comparator](value, threshold))


@given(FLOAT64, st.sampled_from(COMPARATORS), FLOAT32)
def test_float32_thresholds_decide_as_float64_ones_do(
    threshold: float, comparator: str, value: float
) -> None:
    rule = Rule("entropy", comparator, (threshold,))
    small = rule.float32_thresholds[0]
    assert decides32(np.float32(value), comparator, small) == decides(value, comparator, threshold)


@given(FLOAT32.filter(np.isfinite), st.integers(-2, 2), st.sampled_from(COMPARATORS))
def test_float32_thresholds_decide_as_float64_ones_do_next_door(
    value: float, steps: int, comparator: str
) -> None:
    """Thresholds a float64 step away from a float32 value, denormals and zero included."""
    threshold = float(value)
    for _ in range(abs(steps)):
        threshold = float(np.nextafter(threshold, np.inf * np.sign(steps)))
    small = Rule("entropy", comparator, (threshold,)).float32_thresholds[0]
    with np.errstate(over="ignore"):
        neighbours = [np.nextafter(np.float32(value), np.float32(d)) for d in (-np.inf, np.inf)]
    for near in [np.float32(value), *neighbours]:
        assert decides32(near, comparator, small) == decides(float(near), comparator, threshold)


@pytest.mark.parametrize("comparator", COMPARATORS)
def test_no_threshold_selects_nothing(comparator: str) -> None:
    small = Rule("entropy", comparator, (None,)).float32_thresholds[0]
    for value in (0.0, -1.0, 3.0, np.inf, -np.inf, np.nan):
        assert not decides32(np.float32(value), comparator, small)


def test_thresholds_follow_from_the_statistics_that_stand_beside_them(finished: Path) -> None:
    told = read(finished / "statistics.json")
    rows = read(finished / "thresholds.json")["classes"]
    evidence = ClassStatistics.from_json(told)
    rule = category_adaptive.rule(evidence, Options())
    assert [row["threshold"] for row in rows] == list(rule.thresholds)
    assert [row["pixels"] for row in rows] == [int(n) for n in told["pixels"]]
    assert sum(row["predicted"] for row in rows) == 7 * 48 * 64
    maps = label_maps(finished)
    for row in rows:
        assert row["selected"] == sum(int((m == row["id"]).sum()) for m in maps.values())
