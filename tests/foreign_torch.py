"""The colour model of foreign_models.py as an exported PyTorch program (.pt2), for tests."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from foreign_models import SHARPNESS, linear_scores
from torch import nn


class ColourModel(nn.Module):
    """Every `stride`-th pixel, then a score per colour. (torch.export refuses ceil-mode averages of
    any size.)"""

    def __init__(self, colours: np.ndarray, stride: int, sharpness: float, norm: bool) -> None:
        super().__init__()
        weight, bias = linear_scores(colours, sharpness)
        self.stride = stride
        self.norm = nn.BatchNorm2d(3) if norm else nn.Identity()
        self.scores = nn.Conv2d(3, len(colours), 1)
        with torch.no_grad():
            self.scores.weight.copy_(torch.from_numpy(weight)[:, :, None, None])
            self.scores.bias.copy_(torch.from_numpy(bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.scores(self.norm(x[:, :, :: self.stride, :: self.stride]))
        return scores


def save_colour_program(
    path: Path,
    colours: np.ndarray,
    *,
    stride: int = 8,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    sharpness: float = SHARPNESS,
    training: bool = False,
) -> Path:
    """training: with a batch norm in training mode, which changes its own state as it runs."""
    network = ColourModel(colours, stride, sharpness, norm=training).train(training)
    dynamic: dict[int, object] = {} if batch else {0: torch.export.Dim("N")}
    if size is None:
        # torch.export guards against a side of one score.
        least = {"min": stride + 1}
        dynamic |= {2: torch.export.Dim("H", **least), 3: torch.export.Dim("W", **least)}
    image = torch.zeros(batch or 2, 3, *(size or (17, 23)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network, (image,), dynamic_shapes=(dynamic,))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.export.save(program, path)
    return path
