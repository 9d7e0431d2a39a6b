"""Runs and their times: order statistics, trtexec's record of a run, and when a warm-up may end.

Nothing is dropped and nothing is clipped: every run after the warm-up counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, TypeVar

from cada_deploy.model_spec import Size

Taken = TypeVar("Taken")
Clock = Callable[[], float]

# A warm-up ends when WINDOWS consecutive windows have medians that lie within SPREAD of each
# other. A window is the runs of WINDOW_S seconds, at least one.
WINDOW_S = 0.25
WINDOWS = 3
SPREAD = 0.03
CRITERION = (
    f"the medians of {WINDOWS} consecutive windows of {WINDOW_S} s (at least one run each) lie "
    f"within {SPREAD:.0%} of the smallest"
)


@dataclass(frozen=True)
class Series:
    """Milliseconds of every run, in the order they were taken. At least one."""

    ms: tuple[float, ...]

    def percentile(self, percent: float) -> float | None:
        """The measured value at that rank (nearest rank, no interpolation). None with fewer than
        100 / (100 - percent) runs: it would be the maximum under another name."""
        share = Fraction(str(percent)) / 100
        if len(self.ms) < runs_for(percent):
            return None
        return sorted(self.ms)[max(math.ceil(share * len(self.ms)), 1) - 1]

    @property
    def median(self) -> float:
        ordered, middle = sorted(self.ms), len(self.ms) // 2
        return (ordered[middle] + ordered[-1 - middle]) / 2

    @property
    def mean(self) -> float:
        return math.fsum(self.ms) / len(self.ms)

    @property
    def variation(self) -> float:
        """Coefficient of variation: standard deviation over mean (0 for a mean of 0)."""
        mean = self.mean
        variance = math.fsum((v - mean) ** 2 for v in self.ms) / len(self.ms)
        return math.sqrt(variance) / mean if mean else 0.0

    def to_json(self, percentiles: Sequence[float]) -> dict[str, Any]:
        return {
            "min_ms": min(self.ms),
            "mean_ms": self.mean,
            "median_ms": self.median,
            "max_ms": max(self.ms),
            "coefficient_of_variation": self.variation,
            "percentiles_ms": {f"{p:g}": self.percentile(p) for p in percentiles},
        }


def runs_for(percent: float) -> int:
    """How many runs a percentile needs to be more than the maximum."""
    return math.ceil(1 / (1 - Fraction(str(percent)) / 100))


@dataclass(frozen=True)
class RunTimes:
    """One run of the engine, in milliseconds since some moment, as trtexec exports it.
    Enqueue is the host's own time in the calls; the other three are when the work was done."""

    start_enqueue: float
    end_enqueue: float
    start_h2d: float
    end_h2d: float
    start_compute: float
    end_compute: float
    start_d2h: float
    end_d2h: float

    @property
    def enqueue_ms(self) -> float:
        return self.end_enqueue - self.start_enqueue

    @property
    def h2d_ms(self) -> float:
        return self.end_h2d - self.start_h2d

    @property
    def compute_ms(self) -> float:
        return self.end_compute - self.start_compute

    @property
    def d2h_ms(self) -> float:
        return self.end_d2h - self.start_d2h

    @property
    def latency_ms(self) -> float:
        """The sum of the three, as trtexec defines it."""
        return self.h2d_ms + self.compute_ms + self.d2h_ms

    def to_trtexec(self) -> dict[str, float]:
        """The keys of trtexec's --exportTimes, all of them and no other."""
        return {
            "startEnqMs": self.start_enqueue,
            "endEnqMs": self.end_enqueue,
            "startH2dMs": self.start_h2d,
            "endH2dMs": self.end_h2d,
            "startComputeMs": self.start_compute,
            "endComputeMs": self.end_compute,
            "startD2hMs": self.start_d2h,
            "endD2hMs": self.end_d2h,
            "h2dMs": self.h2d_ms,
            "computeMs": self.compute_ms,
            "d2hMs": self.d2h_ms,
            "latencyMs": self.latency_ms,
        }


@dataclass(frozen=True)
class FrameTimes:
    """One run from image bytes to labels: its wall time, and what each stage took of it."""

    total_ms: float
    stages_ms: dict[str, float]


class Subject(Protocol):
    """What is measured: the engine alone, and a whole way from image bytes to labels. k counts
    the runs; what goes in changes with it."""

    @property
    def network(self) -> Size:
        """(H, W) of what goes into the engine."""
        ...

    @property
    def engine_boundary(self) -> str:
        """In words, for the result; `frame_boundary` likewise."""
        ...

    @property
    def frame_boundary(self) -> str: ...

    @property
    def enqueues(self) -> bool:
        """The engine's call returns before its work is done."""
        ...

    def engine_run(self, k: int, since: float) -> RunTimes:
        """One batch through the engine; times are milliseconds after perf_counter() == since."""
        ...

    def frame_run(self, k: int) -> FrameTimes:
        """One batch of frames, bytes to labels."""
        ...


@dataclass(frozen=True)
class WarmUp:
    """How the warm-up ended. stable None: none was asked for."""

    stable: bool | None
    runs: int
    seconds: float
    medians_ms: tuple[float, ...]  # of the last windows

    def to_json(self) -> dict[str, Any]:
        return {
            "criterion": CRITERION,
            "stable": self.stable,
            "runs": self.runs,
            "seconds": self.seconds,
            "last_medians_ms": list(self.medians_ms),
        }


def warm_up(
    run: Callable[[int], object], limit_s: float, clock: Clock = time.perf_counter
) -> WarmUp:
    """Run until the times are stable (CRITERION) or `limit_s` seconds have passed."""
    if limit_s <= 0:
        return WarmUp(None, 0, 0.0, ())
    started, runs = clock(), 0
    medians: list[float] = []
    while clock() - started < limit_s:
        window: list[float] = []
        window_start = clock()
        while not window or clock() - window_start < WINDOW_S:
            before = clock()
            run(runs)
            window.append((clock() - before) * 1e3)
            runs += 1
        medians = [*medians, Series(tuple(window)).median][-WINDOWS:]
        if is_stable(medians):
            return WarmUp(True, runs, clock() - started, tuple(medians))
    return WarmUp(False, runs, clock() - started, tuple(medians))


def is_stable(medians_ms: Sequence[float]) -> bool:
    return len(medians_ms) == WINDOWS and max(medians_ms) <= min(medians_ms) * (1 + SPREAD)


def repeated(
    run: Callable[[int], Taken],
    duration_s: float,
    iterations: int,
    each: Callable[[], object] = lambda: None,
    clock: Clock = time.perf_counter,
) -> tuple[list[Taken], float]:
    """run(k) for at least `duration_s` seconds and at least `iterations` times, as trtexec does:
    what every run gave, and the wall seconds of all."""
    taken: list[Taken] = []
    started = clock()
    while len(taken) < iterations or clock() - started < duration_s:
        taken.append(run(len(taken)))
        each()
    return taken, clock() - started
