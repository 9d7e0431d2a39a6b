"""Delta's spellings, the two policies' thresholds, and what a Rule refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cada_deploy.errors import UsageError
from cada_deploy.policies import Rule, category_adaptive, fixed, policies, policy
from cada_deploy.policies.category_adaptive import Delta, Options, parse_delta
from cada_deploy.statistics import HISTOGRAM_BINS, ClassStatistics

NAMES = ("road", "car", "sky")


def statistics() -> ClassStatistics:
    """road: two equal classes (ln 2); car: certain (0); sky: nobody predicted it."""
    sums = np.array([[5, 5, 0], [0, 9, 0], [0, 0, 0]], object)
    histogram = np.zeros((3, HISTOGRAM_BINS), object)
    return ClassStatistics("confidence", np.array([2, 1, 0], object), sums, histogram, 0, 0)


@pytest.mark.parametrize(
    ("text", "deltas"),
    [
        ("0", (Delta(0.0),)),
        ("0.25", (Delta(0.25),)),
        (" -1e-3 ", (Delta(-0.001),)),
        ("10%", (Delta(0.1, True),)),
        ("0.1, 20% ,0", (Delta(0.1), Delta(0.2, True), Delta(0.0))),
        ("*=0.1,car=50%", (Delta(0.1), Delta(0.5, True), Delta(0.1))),
        ("car=0.2", (Delta(0.0), Delta(0.2), Delta(0.0))),
    ],
)
def test_delta_is_read_as_written(text: str, deltas: tuple[Delta, ...]) -> None:
    assert parse_delta(text, NAMES) == deltas


@given(st.floats(-9e3, 9e3), st.booleans())
def test_a_delta_is_read_back_from_its_own_text(amount: float, relative: bool) -> None:
    (found,) = parse_delta(str(Delta(amount, relative)), NAMES)
    assert found.relative == relative
    assert found.amount == pytest.approx(amount, rel=1e-11, abs=1e-300)


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "1e6", "0.1,0.2", "bus=1", "car=1,car=2"])
def test_a_delta_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--delta"):
        parse_delta(text, NAMES)


def test_thresholds_are_centroid_entropy_less_delta() -> None:
    def thresholds(text: str) -> tuple[float | None, ...]:
        options = Options(parse_delta(text, NAMES))
        rule = category_adaptive.rule(statistics(), options)
        assert (rule.measure, rule.comparator) == ("entropy", "<")
        return rule.thresholds

    ln2 = pytest.approx(math.log(2), rel=1e-15)
    assert thresholds("0") == (ln2, 0.0, None)
    assert thresholds("0.1") == (pytest.approx(math.log(2) - 0.1), -0.1, None)
    assert thresholds("25%") == (pytest.approx(math.log(2) * 0.75), 0.0, None)
    assert thresholds("-50%,0.2,7") == (pytest.approx(math.log(2) * 1.5), -0.2, None)


def test_per_class_deltas_must_fit_the_class_count() -> None:
    with pytest.raises(UsageError, match="2 values for 3 classes"):
        category_adaptive.rule(statistics(), Options((Delta(0), Delta(1))))


def test_options_refuse_unknown_words() -> None:
    for bad in ({"centroid": "median"}, {"scope": "video"}):
        with pytest.raises(UsageError, match="expected one of"):
            Options(**bad)


def test_the_fixed_policy_keeps_confident_pixels_of_every_class() -> None:
    rule = fixed.rule(statistics(), fixed.Options(0.75))
    assert rule == Rule("confidence", ">=", (0.75,) * 3)
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="--threshold"):
            fixed.Options(bad)


@pytest.mark.parametrize(
    "bad",
    [
        ("entrop", "<", (1.0,)),
        ("entropy", "=", (1.0,)),
        ("entropy", "<", (float("nan"),)),
        ("ratio", ">", (1.0,)),
        ("entropy", "<", (1.0,), (1.0,)),
        ("ratio", ">", (1.0,), (0.0,)),
        ("ratio", ">", (1.0,), (float("inf"),)),
        ("ratio", ">", (1.0,), (float("nan"),)),
        ("ratio", ">", (1.0,), (1.0, 1.0)),
    ],
    ids=str,
)
def test_a_rule_refuses_nonsense(bad: tuple) -> None:  # type: ignore[type-arg]
    with pytest.raises(UsageError):
        Rule(*bad)


def test_an_unknown_policy_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'category-adaptive'"):
        policy("category-adaptiv")
    assert {"category-adaptive", "fixed"} <= set(policies())
