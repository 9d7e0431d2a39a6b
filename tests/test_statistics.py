"""Integers in, the centroid's entropy out: exact at any size, the same on every machine."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cada_deploy.errors import ArtefactMismatch
from cada_deploy.statistics import (
    HISTOGRAM_BINS,
    UNIT,
    ClassStatistics,
    centroid_entropies,
    merged,
    weighting_of,
)

SUMS = st.lists(st.integers(0, 1 << 70), min_size=1, max_size=19)


def of_sums(*rows: list[int], pixels: list[int] | None = None) -> ClassStatistics:
    count = len(rows)
    return ClassStatistics(
        "confidence",
        np.array(pixels or [1] * count, object),
        np.array(rows, object).reshape(count, count),
        np.zeros((count, HISTOGRAM_BINS), object),
        0,
        0,
    )


def padded(sums: list[int]) -> ClassStatistics:
    """One class with these sums; the others were never predicted."""
    zero = [0] * len(sums)
    return of_sums(sums, *[zero] * (len(sums) - 1), pixels=[1] + [0] * (len(sums) - 1))


def entropy_by_definition(sums: list[int]) -> Decimal:
    """-sum f ln f of the exact fractions f, with 60 digits."""
    total = sum(sums)
    with localcontext() as context:
        context.prec = 60
        shares = [Fraction(s, total) for s in sums if s]
        found = Decimal(0)
        for share in shares:
            f = Decimal(share.numerator) / Decimal(share.denominator)
            found -= f * f.ln()
        return found


@given(SUMS)
def test_the_centroids_entropy_is_that_of_the_exact_fractions(sums: list[int]) -> None:
    (found, *others) = centroid_entropies(padded(sums), "confidence")
    assert others == [None] * (len(sums) - 1)
    if sum(sums) == 0:
        assert found is None
    else:
        assert found is not None
        expected = entropy_by_definition(sums)
        # 34 digits, less what cancels in ln N - (1/N) sum S ln S, rounded once to float64.
        assert abs(Decimal(found) - expected) <= Decimal(found).copy_abs() * Decimal("1.2e-16") + (
            Decimal("1e-31")
        )
        assert -1e-30 <= found <= math.log(len(sums)) + 1e-15


@given(st.integers(1, 1 << 60), st.integers(1, 255))
def test_equal_sums_have_the_entropy_ln_c(value: int, classes: int) -> None:
    found = centroid_entropies(padded([value] * classes), "mean")[0]
    assert found == pytest.approx(math.log(classes), rel=1e-15, abs=1e-30)


@given(SUMS.filter(any), st.integers(2, 1 << 40))
def test_more_of_the_same_evidence_changes_no_threshold(sums: list[int], times: int) -> None:
    once = centroid_entropies(padded(sums), "confidence")[0]
    often = centroid_entropies(padded([s * times for s in sums]), "confidence")[0]
    assert once is not None and often is not None
    assert abs(once - often) <= 1e-15 * abs(once) + 1e-30


@given(SUMS.filter(any), st.randoms(use_true_random=False))
def test_the_order_of_the_classes_does_not_matter(sums: list[int], dice: object) -> None:
    shuffled = list(sums)
    dice.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = (centroid_entropies(padded(s), "mean")[0] for s in (sums, shuffled))
    assert one is not None and other is not None
    assert abs(one - other) <= 1e-15 * abs(one) + 1e-30


@given(st.integers(1, UNIT), st.integers(1, 1 << 40))
def test_the_literal_reading_is_minus_m_ln_m(own: int, pixels: int) -> None:
    statistics = of_sums([own * pixels], pixels=[pixels])
    found = centroid_entropies(statistics, "literal")[0]
    mean = own / UNIT
    assert found is not None
    assert found == pytest.approx(-mean * math.log(mean), rel=1e-12, abs=1e-15)
    assert found <= math.exp(-1) + 1e-15, "docs/mathematics.md: at most 0.368 nat"


def test_the_literal_reading_of_a_class_without_pixels_is_none() -> None:
    assert centroid_entropies(of_sums([0], pixels=[0]), "literal") == [None]


def test_a_million_frames_do_not_overflow() -> None:
    frame = of_sums([UNIT * 8_000_000, 5], [3, UNIT * 2_000_000], pixels=[1 << 40, 1 << 40])
    total = frame
    for _ in range(60):
        total = total + total
    assert total.sums[0, 0] == UNIT * 8_000_000 << 60
    assert centroid_entropies(total, "mean")[1] == centroid_entropies(frame, "mean")[1]


@given(st.lists(st.integers(0, 1 << 200), min_size=2, max_size=2))
def test_json_keeps_integers_above_2_to_53(values: list[int]) -> None:
    import json

    statistics = of_sums(values, values[::-1], pixels=values)
    text = json.dumps(statistics.to_json())
    assert ClassStatistics.from_json(json.loads(text)) == statistics
    assert f'"{values[0]}"' in text, "a sum is a string: JavaScript and others round integers"


def test_statistics_of_other_kinds_do_not_merge() -> None:
    one = ClassStatistics.zero(3, "confidence")
    with pytest.raises(ArtefactMismatch, match=r"3 classes \(mean\)"):
        one + ClassStatistics.zero(3, "mean")
    with pytest.raises(ArtefactMismatch, match="4 classes"):
        one + ClassStatistics.zero(4, "confidence")
    with pytest.raises(ArtefactMismatch):
        merged([one], 4, "confidence")


@pytest.mark.parametrize(
    "change",
    [
        {"pixels": ["1"]}, {"sums": [["1"]]}, {"histogram": []}, {"pixels": ["x", "y"]},
        {"weighting": None, "pixels": None}, {"invalid_pixels": "many"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_statistics_is_refused(change: dict[str, object]) -> None:
    whole = ClassStatistics.zero(2, "mean").to_json()
    with pytest.raises(ArtefactMismatch):
        ClassStatistics.from_json({**whole, **change})
    for key in whole:
        with pytest.raises(ArtefactMismatch):
            ClassStatistics.from_json({k: v for k, v in whole.items() if k != key})


def test_statistics_are_frozen() -> None:
    statistics = ClassStatistics.zero(2, "mean")
    with pytest.raises(ValueError, match="read-only"):
        statistics.pixels[0] = 1


def test_what_each_centroid_is_weighted_with() -> None:
    assert [weighting_of(c) for c in ("confidence", "mean", "literal")] == [
        "confidence", "mean", "mean",
    ]  # fmt: skip
