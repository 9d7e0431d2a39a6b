"""What style is: numbers that say how a feature map looks and not what stands where.

The paper takes the mean of every channel; the Gram matrix and the means with standard deviations
are the descriptions it compares with (Table 3).
"""

from __future__ import annotations

import torch

# Keeps the root's gradient finite where a channel is constant; AdaIN's value.
_EPSILON = 1e-5


def style_vector(features: torch.Tensor) -> torch.Tensor:
    """(N, C, h, w) -> (N, C): global average pooling, the paper's S."""
    return features.mean((2, 3))


def gram_matrix(features: torch.Tensor) -> torch.Tensor:
    """(N, C, h, w) -> (N, C, C): correlations of channels, divided by C h w."""
    count, channels, height, width = features.shape
    rows = features.reshape(count, channels, height * width)
    return rows @ rows.transpose(1, 2) / (channels * height * width)


def mean_std(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, C, h, w) -> means and standard deviations over each map, (N, C) each."""
    variance, mean = torch.var_mean(features, (2, 3), correction=0)
    return mean, (variance + _EPSILON).sqrt()
