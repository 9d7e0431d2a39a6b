"""What a user would run in PyTorch in place of the fused kernel: one frame's or one batch's
upsampling, softmax, label, entropy and per-class sums, on any device, eager or compiled.

Two ways to sum per class; a benchmark takes the faster (`faster`), so that the rival is the best
that a user would write, and not a straw man.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

CLASSES, LOW, SIZE = 19, (129, 257), (1024, 2048)

Outputs = tuple[torch.Tensor, ...]
Work = Callable[[torch.Tensor], Outputs]
ClassSums = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def scores(batch: int = 1, seed: int = 0) -> torch.Tensor:
    """(N, C, h, w) logits: smooth regions with noise; four taps of 65 % of the cells share their
    winner, as in street scenes (65 to 79 %)."""
    torch.manual_seed(seed)
    coarse = torch.randn(batch, CLASSES, 9, 17) * 6
    smooth = torch.nn.functional.interpolate(coarse, LOW, mode="bicubic", align_corners=True)
    return (smooth + 0.7 * torch.randn(batch, CLASSES, *LOW)).contiguous()


def upsampled(z: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(z, SIZE, mode="bilinear", align_corners=True)


def by_index_add(label: torch.Tensor, weighted: torch.Tensor) -> torch.Tensor:
    """label (N, H, W), weighted (N, C, H, W) -> sums (N, C, C), a frame at a time: no copy."""
    sums = weighted.new_zeros(len(label), CLASSES, CLASSES)
    for n in range(len(label)):
        sums[n].index_add_(0, label[n].reshape(-1), weighted[n].reshape(CLASSES, -1).T)
    return sums


def by_matrix_product(label: torch.Tensor, weighted: torch.Tensor) -> torch.Tensor:
    """The same by one product a frame, of one-hot labels with the probabilities."""
    one_hot = torch.nn.functional.one_hot(label.flatten(1), CLASSES).to(weighted.dtype)
    return one_hot.transpose(1, 2) @ weighted.flatten(2).transpose(1, 2)


def pixel_counts(label: torch.Tensor) -> torch.Tensor:
    """(N, H, W) -> (N, C); `bincount` would make a GPU wait for the host."""
    if not label.is_cuda:
        return torch.stack([torch.bincount(one.reshape(-1), minlength=CLASSES) for one in label])
    ones = torch.ones((), dtype=torch.int64, device=label.device).expand(label[0].numel())
    counts = torch.zeros(len(label), CLASSES, dtype=torch.int64, device=label.device)
    return counts.scatter_add_(1, label.flatten(1), ones.expand(len(label), -1))


def work(order: str, class_sums: ClassSums) -> Work:
    """scores -> label (N, H, W) uint8, entropy (N, H, W), sums (N, C, C), pixels (N, C)."""

    def run(z: torch.Tensor) -> Outputs:
        p = upsampled(z).softmax(1) if order == "logits" else upsampled(z.softmax(1))
        entropy = -(p * torch.log(p + 1e-12)).sum(1)
        confidence, label = p.max(1)
        sums = class_sums(label, p * confidence[:, None])
        return label.to(torch.uint8), entropy, sums, pixel_counts(label)

    return run


WAYS: tuple[ClassSums, ...] = (by_index_add, by_matrix_product)


def eager(order: str, z: torch.Tensor) -> list[Callable[[], Outputs]]:
    """Both ways, ready to run."""
    return [partial(work(order, way), z) for way in WAYS]


def compiled(order: str, z: torch.Tensor) -> list[Callable[[], Outputs]]:
    """Both ways through torch.compile, compiled at their first run."""
    return [partial(torch.compile(work(order, way)), z) for way in WAYS]
