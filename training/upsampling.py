"""How scores at 1/8 become predictions at the labels' size: the choices of the model's spec."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from cada_deploy.errors import UsageError, nearest

ORDERS = ("logits", "probs")
_LEAST_PROBABILITY = 1e-30  # before a logarithm, as scores.py has it


@dataclass(frozen=True)
class Upsampling:
    """Bilinear. order: `logits` upsamples and then takes the softmax; `probs` takes the softmax
    first and upsamples probabilities. Both fields mean what they mean in OutputSpec."""

    align_corners: bool
    order: str = "logits"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise UsageError(f"upsampling order {self.order!r}; {nearest(self.order, ORDERS)}")

    def _to(self, size: tuple[int, int], values: torch.Tensor) -> torch.Tensor:
        if values.shape[-2:] == size:
            return values
        return functional.interpolate(
            values, size=size, mode="bilinear", align_corners=self.align_corners
        )

    def log_probabilities(self, scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Scores (N, C, h, w) -> ln p (N, C, H, W), in float32 at least."""
        scores = _wide(scores)
        if self.order == "logits":
            return functional.log_softmax(self._to(size, scores), 1)
        probabilities = self._to(size, functional.softmax(scores, 1))
        return probabilities.clamp_min(_LEAST_PROBABILITY).log()

    def probabilities(self, scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Scores (N, C, h, w) -> p (N, C, H, W), in float32 at least: what D_c looks at."""
        scores = _wide(scores)
        if self.order == "logits":
            return functional.softmax(self._to(size, scores), 1)
        return self._to(size, functional.softmax(scores, 1))


def _wide(scores: torch.Tensor) -> torch.Tensor:
    """Under mixed precision scores arrive in 16 bits; a softmax over them needs more."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
