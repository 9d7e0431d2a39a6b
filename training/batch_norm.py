"""Batch norm in adaptation: which of its parts training may move, and statistics re-estimated on
the target, which is the control (AdaBN) that an adaptation has to beat.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cada_deploy.errors import RunFailed, UsageError, nearest


@dataclass(frozen=True)
class Policy:
    """batch_statistics: a batch is normalised by itself, and the running statistics follow; if not,
    it is normalised by these, which stay. affine: scale and shift are trained."""

    batch_statistics: bool
    affine: bool


POLICIES: Mapping[str, Policy] = {
    "train": Policy(batch_statistics=True, affine=True),
    "frozen": Policy(batch_statistics=False, affine=False),  # CRST
    "frozen-stats": Policy(batch_statistics=False, affine=True),
    # What AdaptSegNet, BDL, ADVENT and CLAN do: no gradient, and model.train() all the same.
    "frozen-affine": Policy(batch_statistics=True, affine=False),
}


def norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]


def train(network: nn.Module, policy: str) -> None:
    """network.train(), with its batch norms as POLICIES[policy] has them.

    Instead of network.train() whenever that is called: it would undo the freezing. Before the
    optimiser is made too, which takes what is trainable.
    """
    if policy not in POLICIES:
        raise UsageError(f"no batch-norm policy is called {policy!r}; {nearest(policy, POLICIES)}")
    chosen = POLICIES[policy]
    network.train()
    for norm in norms(network):
        norm.train(chosen.batch_statistics)
        for parameter in norm.parameters(recurse=False):
            parameter.requires_grad_(chosen.affine)


def reestimate(network: nn.Module, images: Iterable[torch.Tensor]) -> int:
    """Sets running means and variances to those of all these batches together; returns how many
    images they were. No label is looked at and no weight is changed.

    images: (N, 3, H, W) batches as the network takes them, on its device. Every pixel counts alike,
    however the images were batched; sums are float64. A norm's input has passed the earlier norms
    under its own batch's statistics, so large batches come nearest to the whole set's. The variance
    is the biased one that a batch is normalised by, so that one batch re-estimated is inferred as
    it was normalised; PyTorch's own running variance is unbiased. Raises UsageError for no images,
    RunFailed when a statistic is not finite; either way the network is as it was.
    """
    moments = {norm: _Moments() for norm in norms(network)}
    count = batches = 0
    with torch.no_grad(), _observed(network, moments):
        for batch in images:
            network(batch)
            count, batches = count + len(batch), batches + 1
    if not count:
        raise UsageError("no images to re-estimate batch norm on; expected at least one")
    used = {norm: m for norm, m in moments.items() if m.count}
    if not all(m.finite() for m in used.values()):
        raise RunFailed(
            "batch norm statistics came out NaN or infinite; the network is unchanged. Are its "
            "weights or the images finite?"
        )
    for norm, m in used.items():
        norm.running_mean.copy_(m.mean)  # type: ignore[union-attr]
        norm.running_var.copy_(m.squares / m.count)  # type: ignore[union-attr]
        norm.num_batches_tracked.fill_(batches)  # type: ignore[union-attr]
    return count


class _Moments:
    """Count, mean and summed squared distance from it, by channel; merged batch by batch."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())

    def add(self, x: torch.Tensor) -> None:  # (N, C, h, w)
        rows = x.double()
        variance, mean = torch.var_mean(rows, (0, 2, 3), correction=0)
        count = rows.numel() // rows.shape[1]
        if not self.count:
            self.count, self.mean, self.squares = count, mean, variance * count
            return
        whole, shift = self.count + count, mean - self.mean
        self.squares = self.squares + variance * count + shift**2 * (self.count * count / whole)
        self.mean = self.mean + shift * (count / whole)
        self.count = whole

    def finite(self) -> bool:
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self.squares).all())


@contextmanager
def _observed(network: nn.Module, moments: Mapping[nn.BatchNorm2d, _Moments]) -> Iterator[None]:
    """Inside, batch norms normalise by their batch, tell `moments` what they see and store nothing;
    everything else infers. Modes are restored, whatever happens."""
    modes = [(module, module.training) for module in network.modules()]
    tracked = [(norm, norm.track_running_stats) for norm in moments]
    with ExitStack() as stack:
        for norm in moments:
            handle = norm.register_forward_pre_hook(_watching(moments[norm]))
            stack.callback(handle.remove)
        try:
            network.eval()
            for norm in moments:
                norm.train()
                norm.track_running_stats = False  # in training: use the batch, touch no buffer
            yield
        finally:
            for norm, was in tracked:
                norm.track_running_stats = was
            for module, was in modes:
                module.training = was


def _watching(moments: _Moments) -> Any:
    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        moments.add(inputs[0])

    return hook
