"""The discriminators of the paper: D_c on segmentation maps, D_f on style vectors.

Both are PatchGAN: a map of logits, each judging its own part of the input, no norm and no sigmoid
(the losses take logits). They know nothing of labels or losses.
"""

from __future__ import annotations

import torch
from torch import nn

from cada_deploy.errors import UsageError

STRIDES = (16, 32)
_SLOPE = 0.2  # of LeakyReLU
_LEAST_SIDE = 32  # four halvings, and the last 4x4 kernel with its padding still needs two pixels
_LEAST_LENGTH = 16  # four halvings


class OutputDiscriminator(nn.Module):
    """D_c: probabilities (N, C, H, W) at full size -> logits (N, 1, ~H/stride, ~W/stride).

    Names and shapes are those of FCDiscriminator in AdaptSegNet and BDL, so their `_D.pth` files
    load. Theirs has stride 32; the paper states 16, which is the last convolution with stride 1.
    """

    def __init__(self, classes: int = 19, stride: int = 16) -> None:
        super().__init__()
        if stride not in STRIDES:
            raise UsageError(f"output discriminator: stride {stride}; expected 16 or 32 (BDL's)")
        self.conv1 = nn.Conv2d(classes, 64, 4, 2, 1)
        self.conv2 = nn.Conv2d(64, 128, 4, 2, 1)
        self.conv3 = nn.Conv2d(128, 256, 4, 2, 1)
        self.conv4 = nn.Conv2d(256, 512, 4, 2, 1)
        self.classifier = nn.Conv2d(512, 1, 4, stride // 16, 1)
        self.leaky_relu = nn.LeakyReLU(_SLOPE, inplace=True)

    def forward(self, probabilities: torch.Tensor) -> torch.Tensor:
        height, width = probabilities.shape[-2:]
        if min(height, width) < _LEAST_SIDE:
            raise UsageError(
                f"output discriminator: a map of {height}x{width}; expected at least "
                f"{_LEAST_SIDE}x{_LEAST_SIDE}. Train on larger crops"
            )
        x = probabilities
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = self.leaky_relu(layer(x))
        logits: torch.Tensor = self.classifier(x)
        return logits


class StyleDiscriminator(nn.Module):
    """D_f: a style vector (N, L) -> logits (N, L // 16), by four 1-D convolutions of kernel 4.

    The vector is read as a signal of one channel, so one layout serves every length.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, 64, 4, 2, 1)
        self.conv2 = nn.Conv1d(64, 128, 4, 2, 1)
        self.conv3 = nn.Conv1d(128, 256, 4, 2, 1)
        self.classifier = nn.Conv1d(256, 1, 4, 2, 1)
        self.leaky_relu = nn.LeakyReLU(_SLOPE, inplace=True)

    def forward(self, style: torch.Tensor) -> torch.Tensor:
        if style.ndim != 2 or style.shape[1] < _LEAST_LENGTH:
            raise UsageError(
                f"style discriminator: style of shape {tuple(style.shape)}; expected (N, L) with L "
                f"of at least {_LEAST_LENGTH}. Take the style of a block with more channels"
            )
        x = style.unsqueeze(1)
        for layer in (self.conv1, self.conv2, self.conv3):
            x = self.leaky_relu(layer(x))
        logits: torch.Tensor = self.classifier(x)
        return logits.squeeze(1)
