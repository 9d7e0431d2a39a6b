"""Whose network a file holds, told from its tensors' names and shapes alone; reads no file.

Names and shapes cannot say how images were prepared: BDL and CRST share all of them. `presets`
lists what a family's projects use, for a person to choose from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from cada_deploy.errors import ArtefactMismatch, UsageError, nearest

from .models.deeplab import HEADS, DeepLabV2
from .models.small import SmallDeepLab

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Small:
    """This project's own small network (training/models/small.py)."""

    classes: int = 19

    name: ClassVar[str] = "deeplab-small"
    output_stride: ClassVar[int] = 8

    def build(self) -> nn.Module:
        return SmallDeepLab(self.classes)


Architecture = DeepLabV2 | Small

ARCHITECTURES: tuple[str, ...] = (*(f"deeplabv2-{head}" for head in HEADS), Small.name)


@dataclass(frozen=True)
class Family:
    """The projects that write such files. presets: how they prepare images, to be chosen from."""

    name: str
    projects: str
    presets: tuple[str, ...]
    note: str = ""


# By head and number of summed branches. CRST's preset is among those of `single`, 4.
_FAMILIES: Mapping[tuple[str, int], Family] = {
    ("single", 2): Family(
        "deeplabv2-single/2", "AdaptSegNet single-level, DACS, BDL as published in 2019",
        ("caffe-bgr", "bdl"),
    ),
    ("single", 4): Family(
        "deeplabv2-single/4", "BDL since July 2020, CRST, FDA", ("bdl", "caffe-bgr", "crst")
    ),
    ("single-layer6", 2): Family("deeplabv2-single-layer6/2", "none that is known", ("caffe-bgr",)),
    ("single-layer6", 4): Family(
        "deeplabv2-single-layer6/4", "ADVENT with MULTI_LEVEL off", ("caffe-bgr",)
    ),
    ("multi", 2): Family(
        "deeplabv2-multi/2", "AdaptSegNet multi-level, MaxSquare", ("caffe-bgr",),
        "MaxSquare's forward gives (main, aux), the others' (aux, main): layer6 is main in both",
    ),
    ("multi", 4): Family("deeplabv2-multi/4", "ADVENT, IntraDA, ESL", ("caffe-bgr",)),
    ("clan", 2): Family("deeplabv2-clan/2", "none that is known", ("caffe-bgr",)),
    ("clan", 4): Family(
        "deeplabv2-clan/4", "CLAN", ("caffe-bgr",), "the scores are the sum of layer5 and layer6"
    ),
}  # fmt: skip


def family_of(architecture: Architecture) -> Family:
    if isinstance(architecture, Small):
        return Family("deeplab-small", "cada-deploy's own training", ("imagenet-rgb",))
    return _FAMILIES[architecture.head, architecture.aspp_branches]


@dataclass(frozen=True)
class Stranger:
    """A family that is known by name and cannot be run here; why, and what to do instead."""

    name: str
    matches: Callable[[Shapes], bool]
    why: str


def _has(*patterns: str) -> Callable[[Shapes], bool]:
    """Every pattern is found in some tensor's name."""
    expressions = [re.compile(p) for p in patterns]
    return lambda shapes: all(any(e.search(name) for name in shapes) for e in expressions)


def _is_discriminator(shapes: Shapes) -> bool:
    """FCDiscriminator: 4x4 kernels only, ending in one channel (conv1..conv4 or 0, 2, 4, 6, 8)."""
    kernels = [s for n, s in shapes.items() if n.endswith("weight")]
    return len(kernels) >= 3 and all(s[2:] == (4, 4) for s in kernels) and kernels[-1][0] == 1


def _is_group_norm_head(shapes: Shapes) -> bool:
    return _has(r"layer[56]\.conv2d_list\.0\.0\.weight", r"layer[56]\.bottleneck\.")(shapes)


_OWN_NET = "its network is not part of cada-deploy"

# In this order: the first match names the file.
STRANGERS: tuple[Stranger, ...] = (
    Stranger("a discriminator (…_D.pth)", _is_discriminator, ""),
    Stranger(
        "Seg-Uncertainty (DeepLabV2 with a group- or batch-normed head on two levels)",
        lambda s: _is_group_norm_head(s) and any(n.startswith("layer6.") for n in s),
        _OWN_NET,
    ),
    Stranger("ProDA (DeepLabV2 with a GroupNorm head)", _is_group_norm_head, _OWN_NET),
    Stranger(
        "CAG_UDA (DeepLabV3+, output stride 16)",
        _has(r"^backbone\.", r"^aspp\.", r"^decoder\."),
        _OWN_NET,
    ),
    Stranger(
        "HRDA or MIC (mmcv, multi-resolution)",
        _has(r"decode_head\.", r"scale_attention"),
        "its network is built by mmsegmentation from a configuration that the file does not hold",
    ),
    Stranger(
        "DAFormer, or another mmsegmentation model",
        _has(r"(^|\.)backbone\.", r"(^|\.)decode_head\."),
        "its network is built by mmsegmentation from a configuration that the file does not hold",
    ),
    Stranger(
        "BDL's VGG-16 FCN8s", _has(r"conv1_1\.weight", r"(fc6|score_pool3|score_fr)"), _OWN_NET
    ),
    Stranger(
        "DeepLabV2 on VGG-16 (AdaptSegNet, CLAN)",
        _has(r"^features\.0\.weight", r"^classifier\.conv2d_list"),
        _OWN_NET,
    ),
    Stranger("SegFormer of transformers", _has(r"^segformer\.encoder\."), _OWN_NET),
    Stranger(
        "torchvision's DeepLabV3 or FCN",
        _has(r"^backbone\.layer4\.", r"^classifier\.(0\.convs|4)\."),
        _OWN_NET,
    ),
)

_ONNX_ADVICE = (
    "Export it to ONNX in the environment of that project, with per-class scores as its output "
    "(torch.onnx.export(model.eval(), image, 'model.onnx', opset_version=18, "
    "input_names=['image'], output_names=['scores'])), then run cada-deploy with --engine ort "
    "--model model.onnx and --preset or --spec, which say how it is fed"
)


def refuse_strangers(shapes: Shapes, path: object) -> None:
    """Raises ArtefactMismatch for a family that is known and cannot be run."""
    for stranger in STRANGERS:
        if not stranger.matches(shapes):
            continue
        if stranger.matches is _is_discriminator:
            raise ArtefactMismatch(
                f"{path} holds {stranger.name}: it tells source from target during training and "
                "labels nothing. Expected the segmentation network; give the file beside it "
                "without _D, _D1, _D2, _D_aux or _D_main in its name"
            )
        raise ArtefactMismatch(
            f"{path} holds {stranger.name}; expected one of {', '.join(ARCHITECTURES)}: "
            f"{stranger.why}. {_ONNX_ADVICE}"
        )


def detect(shapes: Shapes, path: object, arch: str = "auto") -> Architecture:
    """The architecture that these tensors are, its branches still to be decided.

    Raises ArtefactMismatch for one that is not known, cannot be run or is not the `arch` asked for;
    UsageError for an `arch` that does not exist.
    """
    if arch != "auto" and arch not in ARCHITECTURES:
        raise UsageError(
            f"no architecture is called {arch!r}; {nearest(arch, ['auto', *ARCHITECTURES])}"
        )
    found = _detected(shapes, path)
    if found is None:
        refuse_strangers(shapes, path)
        raise ArtefactMismatch(_unknown(shapes, path))
    if arch not in ("auto", found.name):
        raise ArtefactMismatch(
            f"{path} holds {found.name} ({_heads(shapes)}); expected {arch}, which was asked for. "
            f"Leave --arch away, or give --arch {found.name}"
        )
    return found


def _detected(shapes: Shapes, path: object) -> Architecture | None:
    if "stem.0.0.weight" in shapes and "classifier.0.weight" in shapes:
        return Small(_class_count({n: s for n, s in shapes.items() if _SMALL.match(n)}, path))
    channels = _channels(shapes)
    for head, wanted in HEADS.items():
        if channels == wanted.classifiers:
            classes = _class_count({n: s for n, s in shapes.items() if _BRANCH.match(n)}, path)
            return DeepLabV2(head, classes)
    if channels:
        known = "; ".join(f"{k}: {dict(v.classifiers)}" for k, v in HEADS.items())
        raise ArtefactMismatch(
            f"{path} has DeepLabV2 classifiers on {channels} channels; expected {known}. "
            f"{_ONNX_ADVICE}"
        )
    return None


_BRANCH = re.compile(r"(layer[56])\.conv2d_list\.\d\.(weight|bias)$")
_SMALL = re.compile(r"classifier\.\d\.(weight|bias)$")


def _channels(shapes: Shapes) -> dict[str, int]:
    """Input channels of layer5 and layer6, of those that are DeepLabV2 classifiers."""
    found: dict[str, int] = {}
    for name, shape in shapes.items():
        branch = _BRANCH.match(name)
        if branch and len(shape) == 4:
            found.setdefault(branch[1], shape[1])
    return dict(sorted(found.items()))


def _class_count(heads: Shapes, path: object) -> int:
    counts = {shape[0] for shape in heads.values() if shape}
    if len(counts) != 1:
        seen = ", ".join(f"{n} {tuple(s)}" for n, s in sorted(heads.items()))
        raise ArtefactMismatch(
            f"{path}: the branches of its head have {sorted(counts)} classes; expected one number "
            f"for all. Was the file put together from two? {seen}"
        )
    return counts.pop()


def _heads(shapes: Shapes) -> str:
    channels = _channels(shapes)
    return ", ".join(f"{n} on {c} channels" for n, c in channels.items()) or "no DeepLabV2 head"


def is_headless_trunk(shapes: Shapes) -> bool:
    """A ResNet without a segmentation head: initial weights at most."""
    return "layer4.2.conv3.weight" in shapes and not _channels(shapes)


def _unknown(shapes: Shapes, path: object) -> str:
    if is_headless_trunk(shapes):
        return (
            f"{path} holds a ResNet without a segmentation head; expected one of "
            f"{', '.join(ARCHITECTURES)}. Such a file gives initial weights for a training, "
            "not a model that can label"
        )
    first = ", ".join(list(shapes)[:5])
    return (
        f"{path} holds {len(shapes)} tensors of no family that is known ({first}, ...); expected "
        f"one of {', '.join(ARCHITECTURES)}. {_ONNX_ADVICE}"
    )
