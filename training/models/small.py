"""A small DeepLab-like network for one CPU core: scores at 1/8 of the input, 0.37 million weights.

Two shallow stages (`stem`, `front`) that carry the style come first; a dilated trunk and the
classifier of DeepLab V2 (a sum of dilated convolutions) follow. It is for the demo, the tests and
short experiments; it is not the network of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from cada_deploy.errors import UsageError, nearest

STYLE_BLOCKS = ("stem", "front")  # the front sub-encoders E_c^1 and E_c^2


def _unit(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Residual(nn.Module):
    """Two 3x3 convolutions, the first dilated, around a shortcut."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.first = _unit(channels, channels, dilation=dilation)
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(self.first(x)))


class SmallDeepLab(nn.Module):
    """(N, 3, H, W) -> logits (N, categories, ceil(H / 8), ceil(W / 8))."""

    stride = 8
    decoder = ("classifier",)  # the names of its parts that are no encoder

    def __init__(self, categories: int = 19) -> None:
        super().__init__()
        self.stem = nn.Sequential(_unit(3, 16, stride=2), _unit(16, 32, stride=2), _unit(32, 32))
        self.front = nn.Sequential(_unit(32, 64, stride=2), Residual(64, 1))
        self.trunk = nn.Sequential(Residual(64, 2), Residual(64, 4), Residual(64, 8))
        self.classifier = nn.ModuleList(
            nn.Conv2d(64, categories, 3, padding=d, dilation=d) for d in (1, 3, 6, 12)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._classified(self.trunk(self.front(self.stem(x))))

    def with_style(
        self, x: torch.Tensor, blocks: Sequence[str] = STYLE_BLOCKS
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The scores that forward gives, and what each of `blocks` gives after its last ReLU.

        blocks: of stem, front, trunk.
        """
        stem = self.stem(x)
        front = self.front(stem)
        trunk = self.trunk(front)
        seen = {"stem": stem, "front": front, "trunk": trunk}
        unknown = [b for b in blocks if b not in seen]
        if unknown:
            raise UsageError(f"no block is called {unknown[0]!r}; {nearest(unknown[0], seen)}")
        return self._classified(trunk), tuple(seen[b] for b in blocks)

    def _classified(self, features: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.classifier[0](features)
        for branch in self.classifier[1:]:
            scores = scores + branch(features)
        return scores
