"""The definition of correct: NumPy, float64, slow and obvious. Not bit-identical to the kernels.

It is also what runs where no compiler was there at install time (best_kernel says so aloud).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy.fused import UNSELECTED, Evidence, Labels, Selection
from cada_deploy.model_spec import Size
from cada_deploy.policies import Rule
from cada_deploy.scores import EncodedScores
from cada_deploy.statistics import (
    HISTOGRAM_BINS,
    HISTOGRAM_LOWEST_OCTAVE,
    UNIT,
    ClassStatistics,
)

NAME = "reference"
_LEAST = -65504.0

Doubles = npt.NDArray[np.float64]


def axis_taps(out: int, low: int, align_corners: bool) -> tuple[Any, Any, Doubles]:
    """(i0, i1, f) of every output position: i0 + f is where it lies on the low-resolution axis."""
    first, second, fraction = [], [], []
    for o in range(out):
        if align_corners:
            position = Fraction(o * (low - 1), out - 1) if out > 1 else Fraction(0)
        else:
            position = max(Fraction((2 * o + 1) * low - out, 2 * out), Fraction(0))
        i = min(int(position), low - 1)
        first.append(i)
        second.append(min(i + 1, low - 1))
        fraction.append(float(np.float32(float(position - i))) if i < low - 1 else 0.0)
    return np.array(first), np.array(second), np.array(fraction)


def upsampled(planes: Doubles, size: Size, align_corners: bool) -> Doubles:
    """(C, h, w) -> (C, H, W), bilinear; NaN wherever a tap is NaN, even one of weight 0."""
    y0, y1, fy = axis_taps(size[0], planes.shape[1], align_corners)
    x0, x1, fx = axis_taps(size[1], planes.shape[2], align_corners)
    rows = planes[:, y0] + fy[:, None] * (planes[:, y1] - planes[:, y0])
    return np.asarray(rows[:, :, x0] + fx * (rows[:, :, x1] - rows[:, :, x0]))


def softmax(scores: Doubles) -> Doubles:
    e = np.exp(scores - scores.max(axis=0))
    return np.asarray(e / e.sum(axis=0))


def probabilities(scores: EncodedScores, size: Size) -> Doubles:
    """(C, H, W) float64; NaN in every class where a pixel is invalid."""
    low = scores.array.astype(np.float64)
    with np.errstate(invalid="ignore"):
        if scores.upsampling.order == "logits":
            return softmax(upsampled(low, size, scores.upsampling.align_corners))
        return upsampled(softmax(low), size, scores.upsampling.align_corners)


def entropies(p: Doubles) -> Doubles:
    """(H, W) in nats; NaN where invalid."""
    return np.asarray(-np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), p * 0.0).sum(axis=0))


def measured(p: Doubles, rule: Rule) -> tuple[Labels, Doubles]:
    """Label and the rule's measure of every pixel (NaN where invalid)."""
    if rule.measure == "ratio":
        assert rule.class_weights is not None
        ratios = p / np.asarray(rule.class_weights)[:, None, None]
        return ratios.argmax(axis=0).astype(np.uint8), ratios.max(axis=0)
    labels = p.argmax(axis=0).astype(np.uint8)
    if rule.measure == "entropy":
        return labels, entropies(p)
    ordered = np.sort(p, axis=0)
    if rule.measure == "confidence":
        return labels, ordered[-1]
    second = ordered[-2] if len(p) > 1 else np.zeros_like(ordered[-1])
    return labels, ordered[-1] - second


_COMPARE = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}


@dataclass(frozen=True)
class Kernel:
    threads: int = 1
    name: str = NAME
    bit_exact: bool = False

    def encode(self, scores: npt.NDArray[Any], meaning: str) -> npt.NDArray[np.float16]:
        z = scores.astype(np.float32)
        with np.errstate(invalid="ignore", divide="ignore"):
            if meaning == "probabilities":
                z = np.where(
                    np.isnan(z) | np.isposinf(z), z, np.log(np.maximum(z, np.float32(1e-30)))
                )
            top = z.max(axis=-3, keepdims=True)
            invalid = np.isnan(z).any(axis=-3, keepdims=True) | ~np.isfinite(top)
            centred = np.maximum(z - top, np.float32(_LEAST)).astype(np.float16)
        return np.where(invalid, np.float16(np.nan), centred)

    def accumulate(
        self,
        scores: EncodedScores,
        size: Size,
        weighting: str,
        mask: Labels | None = None,
        *,
        labels: bool = False,
        entropy: bool = False,
    ) -> Evidence:
        p = probabilities(scores, size)
        e = entropies(p)
        valid, used = _valid(p, mask)
        y = p.argmax(axis=0).astype(np.uint8)
        classes = scores.classes
        weight = p.max(axis=0) if weighting == "confidence" else np.ones(size)
        quanta = np.rint(np.where(valid, p * weight, 0.0) * UNIT).astype(np.int64)
        bins = _bins(e)
        pixels = np.array([(used & (y == k)).sum() for k in range(classes)])
        sums = np.array([quanta[:, used & (y == k)].sum(axis=1) for k in range(classes)])
        histogram = np.array(
            [np.bincount(bins[used & (y == k)], minlength=HISTOGRAM_BINS) for k in range(classes)]
        )
        statistics = ClassStatistics(
            weighting, pixels, sums, histogram, int((~valid & ~_masked(mask, size)).sum()),
            int(_masked(mask, size).sum()),
        )  # fmt: skip
        return Evidence(
            statistics,
            np.where(used, y, np.uint8(UNSELECTED)) if labels else None,
            e.astype(np.float32) if entropy else None,
        )

    def count(
        self, scores: EncodedScores, size: Size, rules: Sequence[Rule], mask: Labels | None = None
    ) -> npt.NDArray[np.int64]:
        kept = [self.select(scores, size, rule, mask).selected for rule in rules]
        return np.array(kept, np.int64).reshape(len(rules), scores.classes)

    def select(
        self,
        scores: EncodedScores,
        size: Size,
        rule: Rule,
        mask: Labels | None = None,
        *,
        entropy: bool = False,
        confidence: bool = False,
    ) -> Selection:
        p = probabilities(scores, size)
        valid, used = _valid(p, mask)
        y, measure = measured(p, rule)
        thresholds = np.array([np.nan if t is None else t for t in rule.thresholds])
        with np.errstate(invalid="ignore"):
            keep = used & _COMPARE[rule.comparator](measure, thresholds[y])
        own = np.take_along_axis(p, y[None].astype(np.intp), axis=0)[0]
        return Selection(
            np.where(keep, y, np.uint8(UNSELECTED)),
            np.bincount(y[used], minlength=scores.classes).astype(np.int64),
            np.bincount(y[keep], minlength=scores.classes).astype(np.int64),
            int((~valid & ~_masked(mask, size)).sum()),
            int(_masked(mask, size).sum()),
            entropies(p).astype(np.float32) if entropy else None,
            own.astype(np.float32) if confidence else None,
        )


def _masked(mask: Labels | None, size: Size) -> npt.NDArray[np.bool_]:
    return np.zeros(size, bool) if mask is None else np.asarray(mask != 0)


def _valid(p: Doubles, mask: Labels | None) -> tuple[Any, Any]:
    valid = ~np.isnan(p[0])
    return valid, valid & ~_masked(mask, (p.shape[1], p.shape[2]))


def _bins(entropy: Doubles) -> npt.NDArray[np.int64]:
    bits = entropy.astype(np.float32).view(np.int32) >> 20
    return np.clip(bits - ((127 + HISTOGRAM_LOWEST_OCTAVE) << 3), 0, HISTOGRAM_BINS - 1)
