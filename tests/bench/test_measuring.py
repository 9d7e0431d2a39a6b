"""Order statistics that drop nothing, the end of a warm-up, and trtexec's record of a run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cada_deploy.bench import measuring
from cada_deploy.bench.measuring import RunTimes, Series, repeated, runs_for, warm_up


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("percent", "runs"), [(50, 2), (90, 10), (95, 20), (99, 100), (99.9, 1000), (99.99, 10000)]
)
def test_a_percentile_needs_runs_above_it(percent: float, runs: int) -> None:
    assert runs_for(percent) == runs
    values = tuple(float(v) for v in range(runs))
    assert Series(values[1:]).percentile(percent) is None
    found = Series(values).percentile(percent)
    assert found is not None and found < max(values)


def test_a_percentile_is_the_measured_value_of_its_rank() -> None:
    series = Series(tuple(float(v) for v in range(1000, 0, -1)))
    assert series.percentile(50) == 500
    assert series.percentile(90) == 900
    assert series.percentile(99) == 990
    assert series.percentile(99.9) == 999


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_nothing_is_dropped(values: list[float]) -> None:
    series = Series(tuple(values))
    row = series.to_json((50, 90, 99))
    assert row["max_ms"] == max(values) and row["min_ms"] == min(values)
    for percent, found in row["percentiles_ms"].items():
        if found is not None:
            assert found in values
            assert sum(v <= found for v in values) >= float(percent) / 100 * len(values) - 1e-9


def test_one_slow_run_moves_the_mean_and_the_maximum() -> None:
    row = Series((1.0,) * 99 + (1000.0,)).to_json((99,))
    assert row["median_ms"] == 1 and row["max_ms"] == 1000
    assert row["mean_ms"] == pytest.approx(10.99)
    assert row["coefficient_of_variation"] > 9


def test_a_warm_up_ends_when_the_medians_agree() -> None:
    clock = Clock()
    times = iter([1.0, 0.5, 0.4, *[0.3] * 100])

    def run(_: int) -> None:
        clock.now += next(times)

    found = warm_up(run, 60, clock)
    assert found.stable is True
    assert found.runs == 6  # 1.0, 0.5, 0.4 and three that agree; each is a window of its own
    assert found.medians_ms == pytest.approx((300, 300, 300))


def test_a_warm_up_that_never_settles_says_so_at_its_limit() -> None:
    clock = Clock()

    def run(k: int) -> None:
        clock.now += 1.0 if k % 2 else 2.0

    found = warm_up(run, 10, clock)
    assert found.stable is False
    assert 10 <= found.seconds <= 13
    assert found.to_json()["criterion"] == measuring.CRITERION


def test_nan_is_never_stable() -> None:
    assert not measuring.is_stable([float("nan")] * measuring.WINDOWS)


def test_no_warm_up_is_no_warm_up() -> None:
    assert warm_up(lambda k: pytest.fail("ran"), 0).stable is None


def test_it_runs_long_enough_and_often_enough() -> None:
    clock = Clock()

    def run(k: int) -> int:
        clock.now += 1.0
        return k

    assert repeated(run, 5, 1, clock=clock) == ([0, 1, 2, 3, 4], 5.0)
    assert repeated(run, 0, 3, clock=clock) == ([0, 1, 2], 3.0)


def test_the_exported_keys_are_trtexecs() -> None:
    row = RunTimes(0, 2, 1, 3, 3, 9, 9, 10).to_trtexec()
    assert list(row) == [
        "startEnqMs", "endEnqMs", "startH2dMs", "endH2dMs", "startComputeMs", "endComputeMs",
        "startD2hMs", "endD2hMs", "h2dMs", "computeMs", "d2hMs", "latencyMs",
    ]  # fmt: skip
    assert (row["h2dMs"], row["computeMs"], row["d2hMs"], row["latencyMs"]) == (2, 6, 1, 9)
