"""Pixels that enter no statistic and get no label: a mask image, bands of rows, or both.

Car hoods, rectified borders, burnt-in dates. A mask is given at the size of the images it is for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy.errors import UsageError
from cada_deploy.model_spec import Size

Mask = npt.NDArray[np.uint8]


class MaskSizeError(Exception):
    """An image has another size than the ignore mask."""


@dataclass(frozen=True, eq=False)
class IgnoredArea:
    """mask (H, W) uint8, nonzero = ignored, or None; rows: (start, stop) as in a Python slice."""

    mask: Mask | None = None
    rows: tuple[tuple[int | None, int | None], ...] = ()

    def on_grid(self, image: Size, grid: Size) -> Mask | None:
        """The area on a label or statistics grid (H, W), by nearest neighbour; None if empty.

        Raises MaskSizeError when the mask is of another size than the image.
        """
        if self.mask is None and not self.rows:
            return None
        area = self._on_image(image)
        if image == grid:
            return area
        return np.ascontiguousarray(area[np.ix_(*map(_nearest, image, grid))])

    def _on_image(self, image: Size) -> Mask:
        if self.mask is None:
            area = np.zeros(image, np.uint8)
        elif self.mask.shape != image:
            raise MaskSizeError(
                f"the image is {image[0]}x{image[1]} (HxW) but the ignore mask is "
                f"{self.mask.shape[0]}x{self.mask.shape[1]}; give a mask of the images' size"
            )
        else:
            area = self.mask.copy()
        for start, stop in self.rows:
            area[start:stop] = 1
        return area

    def to_json(self) -> dict[str, Any]:
        """For the run id."""
        digest = None
        if self.mask is not None:
            digest = hashlib.sha256((self.mask != 0).tobytes()).hexdigest()
            digest = f"{self.mask.shape[0]}x{self.mask.shape[1]} {digest}"
        return {"mask": digest, "rows": [list(r) for r in self.rows]}


def _nearest(source: int, target: int) -> npt.NDArray[np.intp]:
    """Index of the source pixel whose area holds the target pixel's centre, in exact integers."""
    return (2 * np.arange(target, dtype=np.intp) + 1) * source // (2 * target)


def parse_rows(texts: tuple[str, ...]) -> tuple[tuple[int | None, int | None], ...]:
    """`0:16` or `-120:` as Python slices over image rows. Raises UsageError for anything else."""
    return tuple(_rows(text) for text in texts)


def _rows(text: str) -> tuple[int | None, int | None]:
    start, colon, stop = text.partition(":")
    try:
        if not colon or not (start or stop):
            raise ValueError
        return int(start) if start else None, int(stop) if stop else None
    except ValueError:
        raise UsageError(
            f"--ignore-rows {text!r}: expected START:STOP in image rows, such as 0:16 (the top 16) "
            "or -120: (the lowest 120)"
        ) from None
