"""The definition of correct: the fused kernel in NumPy float64, slow and obvious.

It follows docs/mathematics.md without the float32 roundings, so its labels may differ from the
kernels' where two classes are equal to about 1e-6, and its sums by rounding. It also stands in
where no compiler was there at install time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy.errors import ArtefactMismatch, UsageError, nearest
from cada_deploy.fused import (
    UNSELECTED,
    Evidence,
    Labels,
    Selection,
    check_classes,
    check_rule,
)
from cada_deploy.model_spec import Size
from cada_deploy.policies import Rule
from cada_deploy.scores import EncodedScores
from cada_deploy.statistics import (
    HISTOGRAM_BINS,
    HISTOGRAM_LOWEST_OCTAVE,
    UNIT,
    ClassStatistics,
    weighting_of,
)

NAME = "reference"

_ROWS_AT_ONCE = 32  # of the output: bounds memory to 32 * W * C * 8 bytes, a few times over
_LEAST_SCORE = np.float32(-65504)  # the least finite float16
_LEAST_PROBABILITY = 1e-30
_CUT = -25 * np.log(2)  # e^d counts as nothing at and below it
_PROBABILITY_CUT = 2.0**-25

Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Rows:
    """Some output rows, (R, W) pixels. Probabilities of invalid pixels are NaN."""

    where: slice
    probabilities: Doubles  # (C, R, W)
    label: Indices  # (R, W)
    confidence: Doubles  # (R, W) probability of the label
    entropy: Doubles  # (R, W) nats
    valid: Bools
    masked: Bools

    @property
    def live(self) -> Bools:
        return self.valid & ~self.masked


class Kernel:
    """A fused back end (see FusedKernel). `threads` is accepted and has no effect."""

    name = NAME
    bit_exact = False

    def __init__(self, threads: int = 1) -> None:
        if threads < 1:
            raise UsageError(f"threads is {threads}; expected 1 or more")

    def encode(self, scores: npt.NDArray[Any], meaning: str) -> npt.NDArray[np.float16]:
        if scores.ndim < 3:
            raise ArtefactMismatch(f"scores have shape {scores.shape}; expected (..., C, h, w)")
        if scores.dtype not in (np.float32, np.float16):
            raise ArtefactMismatch(f"scores are {scores.dtype}; expected float32 or float16")
        check_classes(scores.shape[-3])
        with np.errstate(invalid="ignore", over="ignore"):
            z, valid = _logits(scores.astype(np.float32), meaning)
            highest = z.max(axis=-3, keepdims=True)
            valid &= highest > -np.inf
            centred = np.maximum(z - highest, _LEAST_SCORE).astype(np.float16)
        return np.where(valid, centred, np.float16(np.nan))

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
        if weighting_of(weighting) != weighting:
            raise UsageError(f"weighting is {weighting!r}; {nearest(weighting, _WEIGHTINGS)}")
        classes = scores.classes
        label_map = np.full(size, UNSELECTED, np.uint8)
        entropy_map = np.full(size, np.nan, np.float32)
        pixels = np.zeros(classes, np.int64)
        sums = np.zeros((classes, classes), np.int64)
        histogram = np.zeros((classes, HISTOGRAM_BINS), np.int64)
        invalid = masked = 0
        for rows in _rows(scores, size, mask):
            live = rows.live
            label_map[rows.where][live] = rows.label[live]
            entropy_map[rows.where] = rows.entropy
            invalid += int(np.sum(~rows.valid & ~rows.masked))
            masked += int(np.sum(rows.masked))

            label = rows.label[live]
            weight = rows.confidence[live] if weighting == "confidence" else 1.0
            units = np.rint(rows.probabilities[:, live] * weight * UNIT).astype(np.int64)
            np.add.at(pixels, label, 1)
            np.add.at(sums, label, units.T)
            np.add.at(histogram, (label, _bins(rows.entropy[live])), 1)
        return Evidence(
            ClassStatistics(weighting, pixels, sums, histogram, invalid, masked),
            label_map if labels else None,
            entropy_map if entropy else None,
        )

    def count(
        self, scores: EncodedScores, size: Size, rules: Sequence[Rule], mask: Labels | None = None
    ) -> npt.NDArray[np.int64]:
        for rule in rules:
            check_rule(rule, scores.classes)
        selected = np.zeros((len(rules), scores.classes), np.int64)
        for rows in _rows(scores, size, mask):
            for counts, rule in zip(selected, rules):
                label, measure, _ = _judge(rows, rule)
                counts += _count(label[rows.live & _passes(rule, label, measure)], scores.classes)
        return selected

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
        check_rule(rule, scores.classes)
        labels = np.full(size, UNSELECTED, np.uint8)
        entropy_map = np.full(size, np.nan, np.float32)
        confidence_map = np.full(size, np.nan, np.float32)
        predicted = np.zeros(scores.classes, np.int64)
        selected = np.zeros(scores.classes, np.int64)
        invalid = masked = 0
        for rows in _rows(scores, size, mask):
            label, measure, chosen = _judge(rows, rule)
            kept = rows.live & _passes(rule, label, measure)
            labels[rows.where][kept] = label[kept]
            entropy_map[rows.where] = rows.entropy
            confidence_map[rows.where] = chosen
            predicted += _count(label[rows.live], scores.classes)
            selected += _count(label[kept], scores.classes)
            invalid += int(np.sum(~rows.valid & ~rows.masked))
            masked += int(np.sum(rows.masked))
        return Selection(
            labels,
            predicted,
            selected,
            invalid,
            masked,
            entropy_map if entropy else None,
            confidence_map if confidence else None,
        )


_WEIGHTINGS = ("confidence", "mean")
_ORDERS = ("logits", "probs")
_MEANINGS = ("logits", "probabilities")


def _logits(raw: npt.NDArray[np.float32], meaning: str) -> tuple[npt.NDArray[np.float32], Bools]:
    """Log-probabilities or logits, float32, and which low-resolution pixels are valid so far."""
    if meaning not in _MEANINGS:
        raise UsageError(f"meaning is {meaning!r}; {nearest(meaning, _MEANINGS)}")
    valid = np.asarray(np.all(raw < np.inf, axis=-3, keepdims=True))  # false for NaN, too
    if meaning == "probabilities":
        return np.log(np.fmax(raw.astype(np.float64), _LEAST_PROBABILITY)).astype(np.float32), valid
    return raw, valid


def _rows(scores: EncodedScores, size: Size, mask: Labels | None) -> Iterator[_Rows]:
    """The whole image, a few output rows at a time."""
    order, align_corners = scores.upsampling.order, scores.upsampling.align_corners
    if order not in _ORDERS:
        raise UsageError(f"upsample order is {order!r}; {nearest(order, _ORDERS)}")
    low = scores.array.astype(np.float64)  # (C, h, w)
    if low.ndim != 3 or scores.array.dtype != np.float16 or 0 in low.shape:
        raise ArtefactMismatch(
            f"encoded scores are {scores.array.dtype} of shape {low.shape}; "
            "expected float16 (C, h, w) with no empty axis"
        )
    check_classes(low.shape[0])
    if len(size) != 2 or min(size) < 1:
        raise UsageError(f"labels of {size} (H, W) cannot be made; every side must be 1 or more")
    if mask is None:
        mask = np.zeros(size, np.uint8)
    if mask.shape != tuple(size) or mask.dtype != np.uint8:
        raise ArtefactMismatch(
            f"the mask is {mask.dtype} of shape {mask.shape}; expected uint8 {tuple(size)}"
        )
    low = np.where(np.isfinite(low).all(axis=0), low, np.nan)
    if order == "probs":
        low = _softmax(low)
    y0, y1, fy = _taps(size[0], low.shape[1], align_corners)
    x0, x1, fx = _taps(size[1], low.shape[2], align_corners)
    for start in range(0, size[0], _ROWS_AT_ONCE):
        where = slice(start, start + _ROWS_AT_ONCE)
        upper, lower = low[:, y0[where]], low[:, y1[where]]
        above = upper[:, :, x0] + fx * (upper[:, :, x1] - upper[:, :, x0])
        below = lower[:, :, x0] + fx * (lower[:, :, x1] - lower[:, :, x0])
        between = above + fy[where, None] * (below - above)
        yield _pixels(where, between if order == "probs" else _softmax(between), mask[where] != 0)


def _taps(size: int, low_size: int, align_corners: bool) -> tuple[Indices, Indices, Doubles]:
    """Lower tap, upper tap and the upper tap's weight of every output index of one axis."""
    lower, weight = [], []
    for o in range(size):
        if align_corners:
            position = Fraction(o * (low_size - 1), size - 1) if size > 1 else Fraction(0)
        else:
            position = max(Fraction((2 * o + 1) * low_size, 2 * size) - Fraction(1, 2), Fraction(0))
        whole = min(int(position), low_size - 1)
        lower.append(whole)
        weight.append(float(position - whole) if whole < low_size - 1 else 0.0)
    first = np.array(lower, np.int64)
    return first, np.minimum(first + 1, low_size - 1), np.array(weight, np.float64)


def _softmax(scores: Doubles) -> Doubles:
    d = scores - scores.max(axis=0)
    e: Doubles = np.where(d <= _CUT, 0.0, np.exp(d))
    p: Doubles = e / e.sum(axis=0)
    return p


def _pixels(where: slice, p: Doubles, masked: Bools) -> _Rows:
    valid: Bools = ~np.isnan(p[0])
    label = p.argmax(axis=0)  # the first largest
    counted = np.where(p >= _PROBABILITY_CUT, p, 1.0)
    entropy = np.where(valid, -(counted * np.log(counted)).sum(axis=0), np.nan)
    confidence = np.take_along_axis(p, label[None], axis=0)[0]
    return _Rows(where, p, label, confidence, np.maximum(entropy, 0.0), valid, masked)


def _bins(entropy: Doubles) -> Indices:
    """8 linear bins an octave, as exponent and three more bits of a float32 say them."""
    bits = entropy.astype(np.float32).view(np.int32).astype(np.int64)
    bins: Indices = (bits >> 20) - ((127 + HISTOGRAM_LOWEST_OCTAVE) << 3)
    return np.clip(bins, 0, HISTOGRAM_BINS - 1)


def _judge(rows: _Rows, rule: Rule) -> tuple[Indices, Doubles, Doubles]:
    """Label, what the rule measures, and the label's probability."""
    if rule.measure == "entropy":
        return rows.label, rows.entropy, rows.confidence
    if rule.measure == "confidence":
        return rows.label, rows.confidence, rows.confidence
    if rule.measure == "margin":
        return rows.label, rows.confidence - _runner_up(rows.probabilities), rows.confidence
    assert rule.class_weights is not None  # a Rule's own promise
    ratio = rows.probabilities / np.array(rule.class_weights)[:, None, None]
    label = ratio.argmax(axis=0)
    measure = np.take_along_axis(ratio, label[None], axis=0)[0]
    return label, measure, np.take_along_axis(rows.probabilities, label[None], axis=0)[0]


def _runner_up(p: Doubles) -> Doubles:
    """The second largest value, equal to the largest on a tie; 0 where there is one class."""
    if len(p) == 1:
        return np.zeros_like(p[0])
    second: Doubles = np.sort(p, axis=0)[-2]
    return second


def _passes(rule: Rule, label: Indices, measure: Doubles) -> Bools:
    threshold = rule.float32_thresholds.astype(np.float64)[label]  # NaN never passes
    compare = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}
    passed: Bools = compare[rule.comparator](measure.astype(np.float32), threshold)
    return passed


def _count(labels: Indices, classes: int) -> npt.NDArray[np.int64]:
    return np.bincount(labels, minlength=classes).astype(np.int64)
