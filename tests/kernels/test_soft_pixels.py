"""A few pixels computed here, in NumPy float32 and exact fused operations, step by step as
docs/mathematics.md says; the oracle must give the same bits. Nothing of the C++ is used."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from cada_deploy.fused import native
from cada_deploy.scores import EncodedScores, Upsampling

from .test_pixel_maths import _nearest_float32

F = np.float32
EXP = [F(v) for v in (8.290306010e-03, 4.189797544e-02, 1.666763658e-01, 4.999914919e-01)]
EXP_1 = F(9.999997070e-01)
LN = [
    F(v)
    for v in (
        7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
        -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
    )
]  # fmt: skip


def _fused(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    return _nearest_float32(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))


def _exp(d: np.float32) -> np.float32:
    if not d > F(-17.3286796):
        return F(0)
    n = _fused(d, F(1.44269504), F(12582912)) - F(12582912)
    r = _fused(n, F(-0.693147182), d)
    p = EXP[0]
    for coefficient in (*EXP[1:], EXP_1, F(1)):
        p = _fused(p, r, coefficient)
    return F(math.ldexp(float(p), int(n)))


def _ln(x: np.float32) -> np.float32:
    mantissa, exponent = math.frexp(float(x))  # in [1/2, 1)
    if mantissa < float(np.array(0x3F3504F3, np.uint32).view(np.float32)):
        mantissa, exponent = 2 * mantissa, exponent - 1
    t, k = F(mantissa) - F(1), F(exponent)
    y = LN[0]
    for coefficient in LN[1:]:
        y = _fused(y, t, coefficient)
    y = y * t * (t * t)
    y = _fused(k, F(-2.12194440e-4), y)
    y = _fused(F(-0.5), t * t, y)
    return _fused(k, F(0.693359375), t + y)


def _between(low: np.float32, high: np.float32, weight: np.float32) -> np.float32:
    return _fused(weight, high - low, low)


def test_a_few_pixels_to_the_bit() -> None:
    if not native.is_built():
        pytest.skip("not run: no compiled kernel here")
    rng = np.random.default_rng(5)
    raw = (rng.normal(size=(5, 2, 2)) * 4).astype(np.float32)
    kernel = native.Kernel()
    scores = EncodedScores(kernel.encode(raw, "logits"), Upsampling("logits", False))
    size = (3, 5)
    found = kernel.accumulate(scores, size, "confidence", labels=True, entropy=True)
    assert found.labels is not None and found.entropy is not None

    low = scores.array.astype(np.float32)
    sums = np.zeros((5, 5), np.int64)
    for row in range(size[0]):
        for column in range(size[1]):
            y, x = _position(row, size[0]), _position(column, size[1])
            u = [
                _between(
                    _between(s[y[0], x[0]], s[y[0], x[1]], x[2]),
                    _between(s[y[1], x[0]], s[y[1], x[1]], x[2]),
                    y[2],
                )
                for s in low
            ]
            label = max(range(5), key=lambda c: u[c])
            s0 = s1 = F(0)
            e = []
            for c in range(5):
                d = u[c] - u[label]
                e.append(_exp(d))
                s0 = s0 + e[c]
                s1 = _fused(d, e[c], s1)
            inv = F(1) / s0
            k = inv * inv * F(2**23)
            for c in range(5):
                sums[label, c] += int(_fused(e[c], k, F(2**23)).view(np.uint32)) - 0x4B000000
            assert found.labels[row, column] == label
            assert found.entropy[row, column] == _fused(-s1, inv, _ln(s0))
    assert np.array_equal(found.statistics.sums.astype(np.int64), sums)


def _position(o: int, size: int) -> tuple[int, int, np.float32]:
    """Taps of output index o on an axis of two low-resolution samples."""
    exact = max(Fraction((2 * o + 1) * 2, 2 * size) - Fraction(1, 2), Fraction(0))
    if exact >= 1:
        return 1, 1, F(0)
    return 0, 1, _nearest_float32(exact)
