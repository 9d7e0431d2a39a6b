"""The contract of a selection policy: evidence in, a Rule out. One file per policy.

A policy module has NAME (its name on the command line), a frozen dataclass Options, and
`rule(statistics, options) -> Rule`, a pure function. Policies are found by listing this folder.
"""

from __future__ import annotations

import math
import pkgutil
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy.errors import UsageError, nearest

MEASURES = ("entropy", "confidence", "margin", "ratio")
COMPARATORS = ("<", "<=", ">", ">=")


@dataclass(frozen=True)
class Rule:
    """Keep a pixel with label y where `measure comparator thresholds[y]` (paper, Eq. 3).

    measure: entropy in nats; confidence = p_y; margin = p_y - runner-up's p; ratio = p_c / k_c,
    whose argmax is then the label (CBST), k being `class_weights`. thresholds are float64, None for
    a class of which nothing may be selected. A value equal to NaN never passes.
    """

    measure: str
    comparator: str
    thresholds: tuple[float | None, ...]
    class_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise UsageError(f"measure is {self.measure!r}; {nearest(self.measure, MEASURES)}")
        if self.comparator not in COMPARATORS:
            raise UsageError(f"comparator is {self.comparator!r}; known: {COMPARATORS}")
        if any(t is not None and math.isnan(t) for t in self.thresholds):
            raise UsageError("a threshold is NaN; None stands for 'select nothing of this class'")
        if (self.measure == "ratio") != (self.class_weights is not None):
            raise UsageError("class weights go with the measure 'ratio', and only with it")
        if self.class_weights is not None and (
            len(self.class_weights) != len(self.thresholds)
            or not all(w > 0 and math.isfinite(w) for w in self.class_weights)
        ):
            raise UsageError("class weights are one positive number per class")

    @property
    def float32_thresholds(self) -> npt.NDArray[np.float32]:
        """(C,) float32 that decide exactly as the float64 ones do; NaN for None.

        For a float32 value v: v < T and v >= T agree with the smallest float32 >= T, v <= T and
        v > T with the largest float32 <= T.
        """
        up = self.comparator in ("<", ">=")
        return np.array([_round_towards(t, up) for t in self.thresholds], np.float32)


def _round_towards(threshold: float | None, up: bool) -> np.float32:
    if threshold is None:
        return np.float32(np.nan)
    with np.errstate(over="ignore"):
        nearest32 = np.float32(threshold)
    if up and float(nearest32) < threshold:
        return np.float32(np.nextafter(nearest32, np.float32(np.inf)))
    if not up and float(nearest32) > threshold:
        return np.float32(np.nextafter(nearest32, np.float32(-np.inf)))
    return nearest32


@cache
def policies() -> dict[str, ModuleType]:
    """Every policy by its command-line name, read from the folder."""
    modules = [import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return {module.NAME: module for module in modules}


def policy(name: str) -> Any:
    """The policy module of that name. Raises UsageError with the nearest known name."""
    if name not in policies():
        raise UsageError(f"no policy is called {name!r}; {nearest(name, policies())}")
    return policies()[name]
