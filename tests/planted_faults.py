"""Faults that the stand-in for TensorRT can be built with, by the name in STAND_IN_TRT_FAULT."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

# What a gate must find, by the gate.
BY_GATE = {
    "shift": "parity",
    "batch": "parity",  # NVIDIA/TensorRT#4853
    "not-finite": "parity",
    "position": "neighbours",
    "neighbour": "neighbours",
    "place-value": "order",
    "random": "repeat",
    "leak": "nan",
    "wide": "precision",
}


def planted() -> str:
    return os.environ.get("STAND_IN_TRT_FAULT", "")


def broken(scores: Any, rows: Any, fault: str, run: int) -> Any:
    """What a fault makes of the right scores (N, C, h, w) of rows (N, ...)."""
    kind = scores.dtype.type
    if fault == "shift":
        return np.roll(scores, 1, axis=1)
    if fault == "batch":
        scores[1:] = scores[1:, ::-1]
    elif fault == "not-finite":
        scores[:, :, 0, 0] = np.nan
    elif fault in ("position", "place-value"):
        scores *= (1 + np.arange(len(scores)) * 1e-2)[:, None, None, None].astype(kind)
    elif fault == "neighbour":
        scores[:-1] += kind(1e-2) * scores[1:]
    elif fault == "random":
        scores += kind(1e-4) * kind(run % 7)
    elif fault == "leak" and np.isnan(rows).any():
        scores[:] = np.nan
    return scores
