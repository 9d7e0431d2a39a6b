"""The contract of a fused back end: encoded scores in; statistics, counts, labels out.

Each back end is one file with a class `Kernel` that satisfies FusedKernel and a module constant
NAME. One contract suite (tests/contracts/test_fused.py) runs over every file of this folder.
The definition of correct is `reference` (NumPy, float64); the bits are those of the scalar C++
kernel in the normative order (docs/mathematics.md).
"""

from __future__ import annotations

import pkgutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cada_deploy.errors import UsageError, nearest
from cada_deploy.model_spec import Size
from cada_deploy.policies import Rule
from cada_deploy.scores import EncodedScores
from cada_deploy.statistics import ClassStatistics

KERNEL_VERSION = 1  # part of the run id: bump when any output bit may change
UNSELECTED = 255

Labels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Evidence:
    """Of one frame: statistics, and full-size maps when they were asked for.

    labels (H, W) uint8: argmax class, 255 where invalid or masked. entropy (H, W) float32 in nats,
    NaN where invalid (masked pixels keep theirs).
    """

    statistics: ClassStatistics
    labels: Labels | None = None
    entropy: Floats | None = None


@dataclass(frozen=True)
class Selection:
    """Of one frame: labels (H, W) uint8 with 255 where not selected, invalid or masked; per class
    how many pixels were predicted and how many of these were kept, (C,) int64; entropy (nats) and
    confidence (H, W) float32 when asked for, NaN where invalid."""

    labels: Labels
    predicted: npt.NDArray[np.int64]
    selected: npt.NDArray[np.int64]
    invalid: int
    masked: int
    entropy: Floats | None = None
    confidence: Floats | None = None


class FusedKernel(Protocol):
    """What every back end does. size is (H, W) of the label or statistics grid; mask (H, W) uint8,
    nonzero = leave this pixel out. Thread-safe; the GIL is not held while a kernel runs."""

    name: str
    bit_exact: bool  # gives the normative bits (False: equal to them only within tolerance)

    def encode(self, scores: npt.NDArray[Any], meaning: str) -> npt.NDArray[np.float16]:
        """(..., C, h, w) float32 or float16 -> the same shape, centred fp16 (see scores.py)."""
        ...

    def accumulate(
        self,
        scores: EncodedScores,
        size: Size,
        weighting: str,
        mask: Labels | None = None,
        *,
        labels: bool = False,
        entropy: bool = False,
    ) -> Evidence: ...

    def count(
        self, scores: EncodedScores, size: Size, rules: Sequence[Rule], mask: Labels | None = None
    ) -> npt.NDArray[np.int64]:
        """(R, C): how many pixels each rule would keep of each class."""
        ...

    def select(
        self,
        scores: EncodedScores,
        size: Size,
        rule: Rule,
        mask: Labels | None = None,
        *,
        entropy: bool = False,
        confidence: bool = False,
    ) -> Selection: ...


def back_ends() -> list[str]:
    """Module names of this folder, one back end each. The compiled library lies here, too, and to
    Python it looks like a module of that name."""
    return [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("lib")]


def open_kernel(name: str, threads: int = 1) -> FusedKernel:
    """Open one back end by name. Raises UsageError for an unknown name and EnvironmentLacks when
    this installation cannot run it (no compiler at install time, no such device)."""
    if name not in back_ends():
        raise UsageError(f"no fused back end is called {name!r}; {nearest(name, back_ends())}")
    kernel: FusedKernel = import_module(f"{__name__}.{name}").Kernel(threads=threads)
    return kernel


def best_kernel(threads: int = 1) -> FusedKernel:
    """The compiled kernel; where it was not built at install time, NumPy, with a loud warning.
    A library that is there and cannot run as asked (CADA_FORCE_ISA) is an error, not a warning."""
    if import_module(f"{__name__}.native").is_built():
        return open_kernel("native", threads)
    warnings.warn(
        "this installation has no compiled kernel; labels come from the NumPy reference, which is "
        "some hundred times slower and not bit-identical to other machines. Install g++ and "
        "reinstall cada-deploy",
        RuntimeWarning,
        stacklevel=2,
    )
    return open_kernel("reference", threads)
