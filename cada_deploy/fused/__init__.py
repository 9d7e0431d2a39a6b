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

from cada_deploy.errors import ArtefactMismatch, UsageError, nearest
from cada_deploy.model_spec import Size
from cada_deploy.policies import Rule
from cada_deploy.scores import EncodedScores, Upsampling
from cada_deploy.statistics import ClassStatistics

KERNEL_VERSION = 1  # part of the run id: bump when any output bit may change
UNSELECTED = 255
MAX_CLASSES = 255
MAX_SIDE = (1 << 22) - 1  # as in kernels/pixel.h
# Positions are the numbers of the enums in kernels/cada_fused.h; so are MEASURES and COMPARATORS.
ORDERS = ("logits", "probs")
WEIGHTINGS = ("confidence", "mean")
MEANINGS = ("logits", "probabilities")
DTYPES = (np.dtype(np.float32), np.dtype(np.float16))

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


# ---- what compiled back ends check at their border ----


def check_raw(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Scores as an engine gives them. Raises ArtefactMismatch."""
    if len(shape) < 3:
        raise ArtefactMismatch(f"scores have shape {shape}; expected (..., C, h, w)")
    if dtype not in DTYPES:
        raise ArtefactMismatch(f"scores are {dtype}; expected float32 or float16")
    check_classes(shape[-3])


def check_classes(classes: int) -> None:
    if not 1 <= classes <= MAX_CLASSES:
        raise ArtefactMismatch(f"the scores have {classes} classes; expected 1 to {MAX_CLASSES}")


def check_encoded(
    shape: tuple[int, ...], dtype: np.dtype[Any], upsampling: Upsampling, size: Size
) -> None:
    """Encoded scores (C, h, w) and the size of the labels that they are to become.

    Raises ArtefactMismatch and UsageError."""
    if len(shape) != 3 or dtype != np.float16 or 0 in shape:
        raise ArtefactMismatch(
            f"encoded scores are {dtype} of shape {shape}; "
            "expected float16 (C, h, w) with no empty axis"
        )
    check_classes(shape[0])
    sides = (*shape[1:], *size)
    if len(size) != 2 or any(not 1 <= side <= MAX_SIDE for side in sides):
        raise UsageError(
            f"scores of {shape[1:]} (h, w) cannot become labels of {size} (H, W); "
            f"every side must be 1 to {MAX_SIDE}"
        )
    if size[0] * size[1] > np.iinfo(np.int32).max:
        raise UsageError(f"labels of {size} (H, W) have more than 2^31 - 1 pixels")
    position("upsample order", upsampling.order, ORDERS)


def check_mask(shape: tuple[int, ...], dtype: np.dtype[Any], size: Size) -> None:
    if shape != tuple(size) or dtype != np.uint8:
        raise ArtefactMismatch(
            f"the mask is {dtype} of shape {shape}; expected uint8 {tuple(size)}"
        )


def check_rule(rule: Rule, classes: int) -> None:
    if len(rule.thresholds) != classes:
        raise ArtefactMismatch(
            f"the rule has {len(rule.thresholds)} thresholds; the scores have {classes} classes"
        )


def position(what: str, word: str, known: tuple[str, ...]) -> int:
    """The number of a word in kernels/cada_fused.h. Raises UsageError."""
    if word not in known:
        raise UsageError(f"{what} is {word!r}; {nearest(word, known)}")
    return known.index(word)
