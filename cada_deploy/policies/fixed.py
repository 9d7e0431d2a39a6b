"""One confidence threshold for every class: keep a pixel whose p_y is at least that much."""

from __future__ import annotations

from dataclasses import dataclass

from cada_deploy.errors import UsageError
from cada_deploy.policies import Rule
from cada_deploy.statistics import ClassStatistics

NAME = "fixed"


@dataclass(frozen=True)
class Options:
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise UsageError(
                f"--threshold is {self.threshold}; expected a confidence from 0 (keep every "
                "pixel) to 1"
            )


def rule(statistics: ClassStatistics, options: Options) -> Rule:
    return every_class(len(statistics.pixels), options.threshold)


def every_class(classes: int, threshold: float) -> Rule:
    return Rule("confidence", ">=", (threshold,) * classes)
