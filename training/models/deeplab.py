"""DeepLabV2 on ResNet-101 as BDL, AdaptSegNet, ADVENT, CLAN and their kin train it: one network.

Parameter names are those projects' own, so their files load as they are. Scores stand at 1/8 of the
input; a max pool in ceil mode makes them one larger than plain division says (512x1024 -> 65x129).
It upsamples nothing and loads nothing; `training/checkpoints.py` fills it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from cada_deploy.errors import UsageError, nearest

DILATIONS = (6, 12, 18, 24)  # one ASPP branch each
BLOCKS = (3, 4, 23, 3)  # ResNet-101
HEAD_STD = 0.01  # every branch begins as N(0, 0.01)
STYLE_BLOCKS = ("layer1", "layer2")  # the ends of the front sub-encoders E_c^1 and E_c^2


@dataclass(frozen=True)
class Head:
    """Classifiers by parameter name, each with its input channels, and those that are summed.

    A classifier on 1024 channels reads layer3, one on 2048 reads layer4. What is in `classifiers`
    and not in `main` is auxiliary: it helps training and has no part in the scores.
    """

    classifiers: Mapping[str, int]
    main: tuple[str, ...]


HEADS: Mapping[str, Head] = {
    # BDL, CRST, FDA, DACS, AdaptSegNet's Res_Deeplab
    "single": Head({"layer5": 2048}, ("layer5",)),
    # ADVENT with MULTI_LEVEL off: the auxiliary classifier does not exist
    "single-layer6": Head({"layer6": 2048}, ("layer6",)),
    # AdaptSegNet multi, ADVENT, IntraDA, ESL: forward gives (aux, main); MaxSquare: (main, aux)
    "multi": Head({"layer5": 1024, "layer6": 2048}, ("layer6",)),
    # CLAN: the prediction is the sum of both
    "clan": Head({"layer5": 2048, "layer6": 2048}, ("layer5", "layer6")),
}


@dataclass(frozen=True)
class DeepLabV2:
    """Which of these networks: its head, its categories, and how many ASPP branches are summed.

    All four branches exist in every file. Projects whose forward returns inside the loop sum only
    the first two (dilations 6 and 12): that is aspp_branches=2.
    """

    head: str = "single"
    classes: int = 19
    aspp_branches: int = 4

    output_stride: ClassVar[int] = 8

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise UsageError(
                f"no DeepLabV2 head is called {self.head!r}; {nearest(self.head, HEADS)}"
            )
        if self.classes < 1:
            raise UsageError(f"{self.classes} classes; expected at least 1")
        if self.aspp_branches not in (2, 4):
            raise UsageError(f"{self.aspp_branches} ASPP branches; expected 2 or 4")

    @property
    def name(self) -> str:
        """What `--arch` calls it."""
        return f"deeplabv2-{self.head}"

    def build(self) -> DeepLab:
        """The network with fresh weights; under `torch.device("meta")` it takes no memory."""
        return DeepLab(self)


def score_size(height: int, width: int) -> tuple[int, int]:
    """(h, w) of the scores for an input of (H, W), by the layers' own rounding."""
    h, w = (_halved_floor(_halved_ceil(_halved_floor(v))) for v in (height, width))
    return h, w


def _halved_floor(length: int) -> int:
    """conv1 (7x7, stride 2, padding 3) and the strided 1x1 of layer2: one output per even index."""
    return (length - 1) // 2 + 1


def _halved_ceil(length: int) -> int:
    """The 3x3 max pool, stride 2, padding 1, ceil mode; its last window may begin on the edge."""
    size = (length + 2 - 3 + 1) // 2 + 1
    return size - 1 if (size - 1) * 2 >= length + 1 else size


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1. The stride is on the first 1x1 (Caffe's ResNet), not on the 3x3."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, dilation: int, project: bool) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = nn.Conv2d(inputs, planes, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if project:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        summed: torch.Tensor = self.relu(out + shortcut)
        return summed


def _stage(inputs: int, planes: int, blocks: int, stride: int, dilation: int) -> nn.Sequential:
    """The first block always projects: here the widths, the stride or the dilation change."""
    width = planes * Bottleneck.expansion
    first = Bottleneck(inputs, planes, stride, dilation, project=True)
    rest = [Bottleneck(width, planes, 1, dilation, project=False) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


class Classifier(nn.Module):
    """ASPP: the sum of the first `branches` of four dilated 3x3 convolutions."""

    def __init__(self, inputs: int, classes: int, branches: int) -> None:
        super().__init__()
        self.branches = branches
        self.conv2d_list = nn.ModuleList(
            nn.Conv2d(inputs, classes, 3, padding=d, dilation=d) for d in DILATIONS
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.conv2d_list[0](x)
        for k in range(1, self.branches):
            scores = scores + self.conv2d_list[k](x)
        return scores


@dataclass(frozen=True)
class Outputs:
    """What training needs: the scores, and those of the auxiliary classifier where there is one.

    For CLAN `parts` holds its two classifiers' scores, whose difference its loss looks at.
    """

    scores: torch.Tensor  # (N, C, h, w)
    auxiliary: torch.Tensor | None
    parts: tuple[torch.Tensor, ...]


class DeepLab(nn.Module):
    """(N, 3, H, W) -> scores (N, C, h, w), the ones that the project's own evaluation uses."""

    def __init__(self, architecture: DeepLabV2) -> None:
        super().__init__()
        self.architecture = architecture
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.layer1 = _stage(64, 64, BLOCKS[0], stride=1, dilation=1)
        self.layer2 = _stage(256, 128, BLOCKS[1], stride=2, dilation=1)
        self.layer3 = _stage(512, 256, BLOCKS[2], stride=1, dilation=2)
        self.layer4 = _stage(1024, 512, BLOCKS[3], stride=1, dilation=4)
        for name, channels in self.head.classifiers.items():
            branches = architecture.aspp_branches
            setattr(self, name, Classifier(channels, architecture.classes, branches))
        self.initialise()

    @property
    def head(self) -> Head:
        return HEADS[self.architecture.head]

    @property
    def decoder(self) -> tuple[str, ...]:
        """The names of its parts that are no encoder: the classifiers."""
        return tuple(self.head.classifiers)

    @property
    def classes(self) -> int:
        return self.architecture.classes

    @property
    def output_stride(self) -> int:
        return self.architecture.output_stride

    def initialise(self) -> None:
        """These projects' initial values: convolutions N(0, 0.01), batch norms the identity, and
        the classifiers' biases as PyTorch makes them, uniform within 1/sqrt(fan in)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, HEAD_STD)
                if module.bias is not None:
                    bound = module.weight[0].numel() ** -0.5
                    nn.init.uniform_(module.bias, -bound, bound)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the classifiers read: layer3 (N, 1024, h, w) and layer4 (N, 2048, h, w)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        middle = self.layer3(self.layer2(self.layer1(x)))
        return middle, self.layer4(middle)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, deep = self.features(x)
        return self._sum(deep)[0]

    def forward_all(self, x: torch.Tensor) -> Outputs:
        """The scores and what only training looks at; named, so no project's order matters."""
        middle, deep = self.features(x)
        scores, parts = self._sum(deep)
        auxiliary = [n for n in self.head.classifiers if n not in self.head.main]
        extra = getattr(self, auxiliary[0])(middle) if auxiliary else None
        return Outputs(scores, extra, parts)

    def with_style(
        self, x: torch.Tensor, blocks: Sequence[str] = STYLE_BLOCKS
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The scores that forward gives, and what each of `blocks` gives after its last ReLU.

        blocks: of stem, layer1, layer2, layer3, layer4; E_c^1 is the stem with layer1.
        """
        seen = dict(self._blocks(x))
        unknown = [b for b in blocks if b not in seen]
        if unknown:
            raise UsageError(f"no block is called {unknown[0]!r}; {nearest(unknown[0], seen)}")
        return self._sum(seen["layer4"])[0], tuple(seen[b] for b in blocks)

    def _blocks(self, x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        yield "stem", x
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = getattr(self, name)(x)
            yield name, x

    def _sum(self, deep: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        parts = tuple(getattr(self, name)(deep) for name in self.head.main)
        scores: torch.Tensor = parts[0]
        for part in parts[1:]:
            scores = scores + part
        return scores, parts
