"""ClassStatistics: integer evidence about each class; merging is addition, so order cannot matter.

Per class l, over valid and unmasked pixels predicted as l: how many there are, and the weighted
sums S_l[c] of every class's probability in units of 2^-23 (docs/mathematics.md, "Statistics").
From the sums alone follow the category centroid f_l and its entropy (paper, Eq. 1 and 2).
"""

from __future__ import annotations

import decimal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy.errors import ArtefactMismatch

CENTROIDS = ("confidence", "mean", "literal")
# 8 bins an octave from 2^-13 to 2^3 nats; bin 0 also holds everything below. For plots only.
HISTOGRAM_BINS = 128
HISTOGRAM_LOWEST_OCTAVE = -13
UNIT = 1 << 23  # a probability of 1 in the sums

_DIGITS = decimal.Context(prec=34, rounding=decimal.ROUND_HALF_EVEN)

Integers = npt.NDArray[Any]  # object arrays of Python int: no overflow over any number of frames


def _integers(values: Any, shape: tuple[int, ...]) -> Integers:
    array = np.array(values, dtype=object)
    if array.shape != shape:
        raise ArtefactMismatch(f"statistics have shape {array.shape}; expected {shape}")
    array = np.vectorize(int, otypes=[object])(array) if array.size else array
    array.setflags(write=False)
    return array


@dataclass(frozen=True, eq=False)
class ClassStatistics:
    """pixels (C,), sums (C, C) with row l = S_l, histogram (C, HISTOGRAM_BINS) of entropy.

    weighting is "confidence" or "mean": what a pixel's probabilities were multiplied with.
    invalid and masked pixels are counted and are in nothing else.
    """

    weighting: str
    pixels: Integers
    sums: Integers
    histogram: Integers
    invalid: int
    masked: int

    def __post_init__(self) -> None:
        count = len(self.pixels)
        object.__setattr__(self, "pixels", _integers(self.pixels, (count,)))
        object.__setattr__(self, "sums", _integers(self.sums, (count, count)))
        object.__setattr__(self, "histogram", _integers(self.histogram, (count, HISTOGRAM_BINS)))

    @classmethod
    def zero(cls, classes: int, weighting: str) -> ClassStatistics:
        return cls(
            weighting,
            np.zeros(classes, np.int64),
            np.zeros((classes, classes), np.int64),
            np.zeros((classes, HISTOGRAM_BINS), np.int64),
            0,
            0,
        )

    def __add__(self, other: ClassStatistics) -> ClassStatistics:
        if self.weighting != other.weighting or len(self.pixels) != len(other.pixels):
            raise ArtefactMismatch(
                f"cannot merge statistics of {len(self.pixels)} classes ({self.weighting}) with "
                f"{len(other.pixels)} classes ({other.weighting})"
            )
        return ClassStatistics(
            self.weighting,
            self.pixels + other.pixels,
            self.sums + other.sums,
            self.histogram + other.histogram,
            self.invalid + other.invalid,
            self.masked + other.masked,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassStatistics) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def to_json(self) -> dict[str, Any]:
        """Sums as strings: they pass 2^53 after a few frames."""
        return {
            "weighting": self.weighting,
            "pixels": [str(n) for n in self.pixels],
            "sums": [[str(n) for n in row] for row in self.sums],
            "histogram": [[int(n) for n in row] for row in self.histogram],
            "invalid_pixels": self.invalid,
            "masked_pixels": self.masked,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ClassStatistics:
        try:
            return cls(
                str(data["weighting"]),
                data["pixels"],
                data["sums"],
                data["histogram"],
                int(data["invalid_pixels"]),
                int(data["masked_pixels"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactMismatch(f"these are not class statistics: {error!r}") from error


def merged(parts: Iterable[ClassStatistics], classes: int, weighting: str) -> ClassStatistics:
    """The sum of any number of parts; zero of none."""
    return sum(parts, ClassStatistics.zero(classes, weighting))


def weighting_of(centroid: str) -> str:
    """What the kernel multiplies with. `literal` (Eq. 1 as printed) needs the plain means."""
    return "confidence" if centroid == "confidence" else "mean"


def centroid_entropies(statistics: ClassStatistics, centroid: str) -> list[float | None]:
    """E(f_l) in nats for every class, None for a class that nobody predicted (paper, Eq. 2).

    Computed from the integers with 34 decimal digits and rounded once to float64, because
    NumPy's log differs between machines.
    """
    if centroid == "literal":
        return [_literal(int(s[k]), int(n)) for k, (n, s) in enumerate(_rows(statistics))]
    return [_entropy([int(v) for v in s]) for _, s in _rows(statistics)]


def _rows(statistics: ClassStatistics) -> Iterable[tuple[int, Sequence[int]]]:
    return zip(statistics.pixels, statistics.sums)


def _entropy(sums: Sequence[int]) -> float | None:
    """ln N - (1/N) sum S ln S, N = sum S."""
    total = sum(sums)
    if total == 0:
        return None
    d = _DIGITS
    weighted = decimal.Decimal(0)
    for s in sums:
        if s:
            weighted = d.add(weighted, d.multiply(decimal.Decimal(s), d.ln(decimal.Decimal(s))))
    n = decimal.Decimal(total)
    return float(d.subtract(d.ln(n), d.divide(weighted, n)))


def _literal(own: int, pixels: int) -> float | None:
    """-m ln m of the mean confidence m: Eq. 1 read to the letter gives one number per class."""
    if pixels == 0:
        return None
    d = _DIGITS
    mean = d.divide(decimal.Decimal(own), decimal.Decimal(pixels * UNIT))
    return float(d.minus(d.multiply(mean, d.ln(mean))))
