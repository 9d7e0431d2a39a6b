"""The segmentation network of a recipe, with what training must know of it beside its forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from cada_deploy.classes import ClassSet

from . import batch_norm
from .checkpoints import load_backbone
from .models.deeplab import DeepLab, DeepLabV2
from .models.small import SmallDeepLab
from .recipes import NetworkChoice
from .upsampling import Upsampling


@dataclass(eq=False)
class Network:
    """module has `forward`, `with_style` and `decoder` (names of its parts that are no encoder)."""

    module: nn.Module
    classes: int
    upsampling: Upsampling
    batch_norm: str

    def train(self) -> None:
        """Training mode, batch norm by its policy."""
        batch_norm.train(self.module, self.batch_norm)


def segmentation_network(choice: NetworkChoice, classes: ClassSet, seed: int) -> Network:
    """The network with fresh weights, drawn from `seed`, or with the backbone that the recipe
    names. Raises UsageError and ArtefactMismatch for a file that does not hold one."""
    torch.manual_seed(seed)
    count = len(classes)
    module: nn.Module
    if choice.kind == "small":
        module = SmallDeepLab(count)
    else:
        module = DeepLab(DeepLabV2(classes=count, aspp_branches=choice.aspp_branches))
    if choice.weights:
        load_backbone(choice.weights, module)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    upsampling = Upsampling(align_corners=choice.upsampling == "align-corners")
    return Network(module, count, upsampling, choice.batch_norm)
