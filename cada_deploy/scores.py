"""Scores: what an engine gives, and the fp16 form from which everything after is computed.

The normative encoding (docs/mathematics.md, "Scores"): in float32, s_c = max(z_c - max z, -65504),
rounded once to fp16, nearest even. A low-resolution pixel with a NaN or +inf class, or with no
finite class, is invalid: all its fp16 scores are NaN. Nothing here computes; kernels do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

SCORE_ENCODING = 1  # part of the run id: bump when the encoding changes


@dataclass(frozen=True)
class Scores:
    """The network's raw output: array (N, C, h, w), float32 or float16, on `device`.

    `ready` is None on the host; on a device it is the event or stream after which the array holds
    the values (the array then offers DLPack and __cuda_array_interface__).
    """

    array: Any
    device: str = "cpu"
    ready: Any = None


@dataclass(frozen=True)
class Upsampling:
    """How low-resolution scores become full-size probabilities: order "logits" or "probs"."""

    order: str
    align_corners: bool


@dataclass(frozen=True)
class EncodedScores:
    """Centred fp16 scores of one frame, array (C, h, w) float16, with the way to upsample them."""

    array: npt.NDArray[np.float16]
    upsampling: Upsampling

    @property
    def classes(self) -> int:
        return int(self.array.shape[0])
