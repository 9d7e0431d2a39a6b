"""Checkpoints in each project's own layout, for tests: random trunks, heads that know colours.

make_checkpoint writes a whole network that gives confident, varied predictions on the frames it was
made from. hollow_checkpoint writes the same names and shapes with a trunk of constants: a file of a
few megabytes for tests that only read. No project's code or weights are in here.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cada_deploy.training.models.deeplab import DILATIONS, HEADS, DeepLab, DeepLabV2

from cada_deploy.presets import preset

State = OrderedDict[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """How a project writes its file. counters: has num_batches_tracked (since PyTorch 0.4.1)."""

    architecture: DeepLabV2
    preset: str
    file_name: str
    legacy: bool = True
    counters: bool = True
    prefix: str = ""
    wrapped: str = ""  # the key that the state dict lies under, with an optimiser's state beside it


FAMILIES: Mapping[str, Layout] = {
    "bdl": Layout(DeepLabV2("single"), "bdl", "gta5_80000.pth", counters=False),
    "bdl-2019": Layout(
        DeepLabV2("single", aspp_branches=2), "bdl", "gta5_80000.pth", counters=False
    ),
    "crst": Layout(DeepLabV2("single"), "crst", "cityscapes_epoch_2.pth", counters=False),
    "fda": Layout(DeepLabV2("single"), "caffe-bgr", "gta5_110000.pth", legacy=False),
    "dacs": Layout(
        DeepLabV2("single", aspp_branches=2), "caffe-bgr", "checkpoint-iter250000.pth",
        legacy=False, wrapped="model",
    ),
    "adaptsegnet-single": Layout(
        DeepLabV2("single", aspp_branches=2), "caffe-bgr", "GTA5_150000.pth", counters=False
    ),
    "adaptsegnet-multi": Layout(
        DeepLabV2("multi", aspp_branches=2), "caffe-bgr", "GTA5_150000.pth", counters=False
    ),
    "maxsquare": Layout(
        DeepLabV2("multi", aspp_branches=2), "caffe-bgr", "gta52cityscapesbest.pth",
        prefix="module.", wrapped="state_dict",
    ),
    "advent": Layout(DeepLabV2("multi"), "caffe-bgr", "model_120000.pth"),
    "advent-single": Layout(DeepLabV2("single-layer6"), "caffe-bgr", "model_120000.pth"),
    "clan": Layout(DeepLabV2("clan"), "caffe-bgr", "GTA5_100000.pth"),
}  # fmt: skip

FIT_POSITIONS = 4500  # score positions that a head is fitted on; the cost grows with the cube
FIT_PIXELS = 600_000  # pixels that pass through the trunk once, about 15 s on a core
TARGET_LOGIT = 20.0  # frames it was not fitted on reach a mean confidence of about 0.75


def make_checkpoint(path: Path, family: str, frames: Sequence[np.ndarray], seed: int = 0) -> Path:
    """Writes a checkpoint of FAMILIES[family] to `path`; frames (H, W, 3) RGB bytes of one size.

    Batch-norm statistics are those of the frames; the branches that the family sums are fitted to
    k-means classes of colour, the others are left at N(0, 0.01) as its training would leave them.
    """
    layout = FAMILIES[family]
    network = fitted_network(layout.architecture, frames, layout.preset, seed)
    save(path, layout, OrderedDict(network.state_dict()))
    return path


def hollow_checkpoint(path: Path, family: str, seed: int = 0, classes: int = 19) -> Path:
    """The same layout with a trunk of constants and a head as training leaves one: a small file."""
    layout = FAMILIES[family]
    save(path, layout, hollow_state(layout.architecture, seed, classes))
    return path


def save(path: Path, layout: Layout, state: State) -> None:
    tensors = OrderedDict(
        (layout.prefix + name, tensor)
        for name, tensor in state.items()
        if layout.counters or not name.endswith("num_batches_tracked")
    )
    # state_dict() hangs each module's version on the dictionary; batch norm's is 2 once it counts.
    version = 2 if layout.counters else 1
    tensors._metadata = OrderedDict({"": {"version": 1}, "bn1": {"version": version}})  # type: ignore[attr-defined]
    whole: Mapping[str, Any] = tensors
    if layout.wrapped:
        momentum = {0: {"momentum_buffer": torch.zeros(64, 3, 7, 7)}}
        whole = {
            "iteration": 250000,
            "epoch": 12,
            "optimizer": {"state": momentum, "param_groups": [{"lr": 2.5e-4, "params": [0]}]},
            "best_MIou": np.float64(0.43),
            layout.wrapped: tensors,
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(whole, path, _use_new_zipfile_serialization=not layout.legacy)


def hollow_state(architecture: DeepLabV2, seed: int = 0, classes: int = 19) -> State:
    """Every name and shape of the network; the trunk's tensors are one number seen many times."""
    draw = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = DeepLabV2(architecture.head, classes).build().state_dict()
    state: State = OrderedDict()
    for name, tensor in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(80000)
        elif not name.startswith(("layer5", "layer6")):
            value = 1.0 if "running_var" in name else 0.01
            state[name] = torch.tensor([value]).expand(tensor.shape)
    for head, channels in HEADS[architecture.head].classifiers.items():
        for k in range(len(DILATIONS)):
            trained = k < architecture.aspp_branches
            weight, bias = branch(draw, classes, channels, energy=1.0 if trained else 0.0)
            state[f"{head}.conv2d_list.{k}.weight"] = weight
            state[f"{head}.conv2d_list.{k}.bias"] = bias
    return state


def branch(
    draw: torch.Generator,
    classes: int,
    channels: int,
    *,
    energy: float = 0.0,
    rank: int = 8,
    kept: float = 1.0,
    tap_likeness: float = 0.5,
    balanced: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, bias) of one ASPP branch: its initial values, shrunk to `kept`, and an update.

    energy is the update's over that of the shrunk initial values; 0 leaves it untrained. The update
    is what a softmax loss makes: of low rank, summing to zero over classes, a product of class
    signals with features that are not negative, and `tap_likeness` of which all nine taps share.
    balanced: each class saw as much push as pull, so that the features' mean has cancelled; with a
    high rank this is the update that is hardest to see.
    """
    weight = torch.randn(classes, channels, 3, 3, generator=draw) * 0.01 * kept
    bound = 1 / math.sqrt(channels * 9)
    bias = (torch.rand(classes, generator=draw) * 2 - 1) * bound * kept
    if energy:
        signals = torch.randn(classes, rank, generator=draw)
        signals -= signals.mean(0)
        shared = torch.rand(rank, channels, 1, 1, generator=draw) ** 2
        own = torch.rand(rank, channels, 3, 3, generator=draw) ** 2
        features = math.sqrt(tap_likeness) * shared + math.sqrt(1 - tap_likeness) * own
        if balanced:
            features -= features.mean()
        features *= torch.randn(rank, 1, 1, 1, generator=draw)
        update = torch.einsum("cr,rkij->ckij", signals, features)
        weight += update * (math.sqrt(energy) * 0.01 * kept / update.pow(2).mean().sqrt())
    return weight, bias


def network_input(frames: Sequence[np.ndarray], name: str) -> torch.Tensor:
    """(N, 3, H, W) as the preset asks for it, at the frames' own size."""
    spec = preset(name)[0]
    x = np.stack(frames).astype(np.float32)
    x = x[..., ::-1] if spec.colour == "BGR" else x
    x = (x * np.float32(spec.scale) - np.float32(spec.mean)) / np.float32(spec.std)
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def fitted_network(
    architecture: DeepLabV2, frames: Sequence[np.ndarray], preset_name: str, seed: int
) -> DeepLab:
    most = max(1, FIT_PIXELS // (frames[0].shape[0] * frames[0].shape[1]))
    step = max(1, -(-len(frames) // most))
    chosen = list(frames)[::step][:most]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = architecture.build()
        _lively(network)
        middle, deep = _features_with_norms(network, network_input(chosen, preset_name))
        fitted = max(1, FIT_POSITIONS // (deep.shape[2] * deep.shape[3]))
        owners = _colour_classes(chosen[:fitted], deep.shape[2:], architecture.classes, seed)
        main = network.head.main
        _fit([getattr(network, n) for n in main], deep[:fitted], owners, architecture.aspp_branches)
        for name in set(network.head.classifiers) - set(main):
            _fit([getattr(network, name)], middle[:fitted], owners, architecture.aspp_branches)
    return network.eval()


def _lively(network: DeepLab) -> None:
    """Convolutions that keep variance, and batch norms that are no identities: folding shows."""
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d) and "conv2d_list" not in name:
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, torch.nn.BatchNorm2d):
            # The last norm of a block is weak, so that colour gets through a hundred layers.
            low, high = (0.1, 0.3) if name.endswith("bn3") else (0.7, 1.3)
            module.weight.uniform_(low, high)
            module.bias.uniform_(-0.2, 0.2)


def _features_with_norms(network: DeepLab, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The trunk's features; its batch norms keep this batch's statistics."""
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    middle, deep = network.train().features(x)
    for norm in norms:
        norm.momentum = 0.1
        norm.num_batches_tracked.fill_(80000)
    network.eval()
    return middle, deep


def _colour_classes(
    frames: Sequence[np.ndarray], size: Sequence[int], classes: int, seed: int
) -> torch.Tensor:
    """(n * h * w,) the nearest of `classes` k-means colours, of the frames averaged to (h, w)."""
    pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255
    colours = torch.nn.functional.adaptive_avg_pool2d(pixels, tuple(size))
    points = colours.permute(0, 2, 3, 1).reshape(-1, 3)
    draw = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(len(points), generator=draw)[:classes]]
    for _ in range(10):
        owner = torch.cdist(points, centres).argmin(1)
        for k in range(classes):
            if (owner == k).any():
                centres[k] = points[owner == k].mean(0)
    return torch.cdist(points, centres).argmin(1)


def _fit(
    heads: Sequence[torch.nn.Module], features: torch.Tensor, owners: torch.Tensor, branches: int
) -> None:
    """Kernel ridge regression of the summed branches towards one-hot logits.

    The solution is a sum of features times class signals, as gradient descent's is. All heads get
    the same update on top of their own initial values. features (n, channels, h, w).
    """
    n, channels, h, w = features.shape
    classes = heads[0].conv2d_list[0].out_channels
    for head in heads:
        for conv in head.conv2d_list[:branches]:
            conv.weight.mul_(0.5)  # weight decay
    start = sum(head(features) for head in heads)
    wanted = torch.nn.functional.one_hot(owners, classes).float() * TARGET_LOGIT
    rest = wanted - start.permute(0, 2, 3, 1).reshape(-1, classes)
    rows = features.permute(0, 2, 3, 1).reshape(n * h * w, channels)
    gram = (rows @ rows.T).view(n, h, w, n, h, w)
    kernel = torch.full_like(gram, float(branches))  # the biases' part
    taps = [(d * i, d * j) for d in DILATIONS[:branches] for i in (-1, 0, 1) for j in (-1, 0, 1)]
    for dy, dx in taps:
        here, there = _overlap(dy, h), _overlap(-dy, h)
        this, that = _overlap(dx, w), _overlap(-dx, w)
        kernel[:, here, this, :, here, this] += gram[:, there, that, :, there, that]
    kernel = kernel.view(n * h * w, n * h * w) * len(heads)
    kernel.diagonal().add_(1e-2 * kernel.diagonal().mean())
    alpha = torch.cholesky_solve(rest, torch.linalg.cholesky(kernel))
    signals = alpha.view(n, h, w, classes)
    for k, (dy, dx) in enumerate(taps):
        here, there, this, that = (
            _overlap(dy, h),
            _overlap(-dy, h),
            _overlap(dx, w),
            _overlap(-dx, w),
        )
        update = torch.einsum("nhwc,nkhw->ck", signals[:, here, this], features[:, :, there, that])
        for head in heads:
            head.conv2d_list[k // 9].weight[:, :, k % 9 // 3, k % 3] += update
    for head in heads:
        for conv in head.conv2d_list[:branches]:
            conv.bias += alpha.sum(0)


def _overlap(shift: int, length: int) -> slice:
    """Positions p with p + shift inside the axis."""
    return slice(max(0, -shift), max(0, min(length, length - shift)))
