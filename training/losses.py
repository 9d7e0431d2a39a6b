"""The losses of the paper, one function each: Eq. 4, 5 and 6, the two adversarial terms, and the
MSE style constraints of Table 3. Functions of tensors alone; they step and schedule nothing.

Domains are labelled source 0 and target 1. The adversarial loss is the original GAN's in its
non-saturating form, binary cross-entropy with logits, as BDL has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from cada_deploy.classes import IGNORE_ID
from cada_deploy.errors import UsageError, nearest

from .style import gram_matrix, mean_std, style_vector
from .upsampling import Upsampling

DivideBy = Literal["valid", "all"]
Direction = Literal["target", "source", "both"]
Features = Sequence[torch.Tensor]  # of E_c^1 and E_c^2, (N, C_n, h_n, w_n) each

DIRECTIONS = ("target", "source", "both")


class Domain(Enum):
    """Values are the discriminators' labels."""

    SOURCE = 0.0
    TARGET = 1.0

    @property
    def other(self) -> Domain:
        return Domain.TARGET if self is Domain.SOURCE else Domain.SOURCE


@dataclass(frozen=True)
class Weights:
    """The lambdas of Eq. 5, and that of Eq. 6 beside them in self-training."""

    segmentation: float = 1.0
    output: float = 1e-3
    style: float = 1e-3
    self_supervised: float = 1.0

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"weight {name} is {value}; expected a finite number from 0 up")


def segmentation(
    scores: torch.Tensor,
    labels: torch.Tensor,
    upsampling: Upsampling,
    *,
    weights: torch.Tensor | None = None,
    divide_by: DivideBy = "valid",
    ignore: int = IGNORE_ID,
) -> torch.Tensor:
    """Eq. 4: L_seg = -1/(H W) sum_hw sum_c y^hwc ln p^hwc.

    scores (N, C, h, w), labels (N, H, W) int64, weights (N, H, W). The mean is over the pixels that
    are not ignored, each counted by its weight, so that weight 0 is the same as being ignored;
    divide_by="all" divides by N H W, as printed. Where nothing counts it is 0, with a gradient of
    0. Every label must be a class or `ignore`; data sets see to that.
    """
    log_p = upsampling.log_probabilities(scores, (labels.shape[1], labels.shape[2]))
    # Reduced by hand: nll_loss's own reductions are not deterministic on a GPU, and give NaN for
    # an empty set.
    costs = functional.nll_loss(log_p, labels, ignore_index=ignore, reduction="none")
    counted = (labels != ignore).to(costs.dtype)
    if weights is not None:
        # A selection, not a product: what is ignored may have any weight, NaN too.
        counted = torch.where(labels != ignore, weights.to(costs.dtype), 0.0)
    if divide_by == "all":
        return (counted * costs).sum() / labels.numel()
    if divide_by != "valid":
        raise UsageError(f"divide_by is {divide_by!r}; {nearest(divide_by, ('valid', 'all'))}")
    total = counted.sum()
    return (counted * costs).sum() / torch.where(total > 0, total, 1.0)


def self_supervised(
    scores: torch.Tensor,
    pseudo_labels: torch.Tensor,
    upsampling: Upsampling,
    *,
    weights: torch.Tensor | None = None,
    divide_by: DivideBy = "valid",
    ignore: int = IGNORE_ID,
) -> torch.Tensor:
    """Eq. 6: L_ssl = -1/(H W) sum_hw sum_c m^hwc y^hwc ln P^hwc.

    The pseudo labels y come from an earlier network and are constants; m is 0 where they are
    `ignore`. Averages and the empty set are as in `segmentation`.
    """
    return segmentation(
        scores, pseudo_labels, upsampling, weights=weights, divide_by=divide_by, ignore=ignore
    )


def adversarial(logits: torch.Tensor, domain: Domain = Domain.TARGET) -> torch.Tensor:
    """What the network pays when the discriminator knows where its map came from:
    L_adv = -mean ln D(x is of the other domain), x of `domain`.

    Its gradient also reaches the discriminator's parameters, which must not step by it: freeze
    them, or clear their gradients before `discrimination`.
    """
    return functional.binary_cross_entropy_with_logits(
        logits, torch.full_like(logits, domain.other.value)
    )


def discrimination(of_source: torch.Tensor, of_target: torch.Tensor) -> torch.Tensor:
    """What the discriminator pays: L_D = -1/2 [mean ln(1 - D(x_s)) + mean ln D(x_t)].

    The arguments are its logits for maps that were detached from the network.
    """
    pairs = ((of_source, Domain.SOURCE), (of_target, Domain.TARGET))
    costs = [
        functional.binary_cross_entropy_with_logits(x, torch.full_like(x, domain.value))
        for x, domain in pairs
    ]
    return (costs[0] + costs[1]) / 2


def style_adversarial(
    discriminators: Sequence[nn.Module],
    source: Features,
    target: Features,
    direction: Direction = "target",
) -> torch.Tensor:
    """L_style = sum_n L_adv(D_f^n(S_n)), S_n the global average pool of the n-th sub-encoder.

    direction: whose style moves. `target` (BDL's habit) makes target style look like the source's;
    `source` the other way round; `both` is the mean of the two.
    """
    _check_direction(direction)
    moving = {"target": [(target, Domain.TARGET)], "source": [(source, Domain.SOURCE)]}
    sides = moving.get(direction, [*moving["target"], *moving["source"]])
    terms = [
        adversarial(discriminator(style_vector(features)), domain)
        for side, domain in sides
        for discriminator, features in zip(discriminators, side, strict=True)
    ]
    return _sum(terms) / len(sides)


def style_discrimination(
    discriminators: Sequence[nn.Module], source: Features, target: Features
) -> torch.Tensor:
    """sum_n L_D of the style discriminators; no gradient of it reaches the features."""
    return _sum(
        [
            discrimination(
                discriminator(style_vector(of_source.detach())),
                discriminator(style_vector(of_target.detach())),
            )
            for discriminator, of_source, of_target in zip(
                discriminators, source, target, strict=True
            )
        ]
    )


def style_gram(source: Features, target: Features, direction: Direction = "target") -> torch.Tensor:
    """Table 3: sum_n mean (G(F_s^n) - G(F_t^n))^2, G the Gram matrix divided by C h w."""
    return _style_mse(source, target, direction, lambda f: (gram_matrix(f),))


def style_mean_std(
    source: Features, target: Features, direction: Direction = "target"
) -> torch.Tensor:
    """Table 3: sum_n mean (mu_s^n - mu_t^n)^2 + mean (sigma_s^n - sigma_t^n)^2, by channel."""
    return _style_mse(source, target, direction, mean_std)


def domain_adaptation(
    segmentation: torch.Tensor,
    output: torch.Tensor | None = None,
    style: torch.Tensor | None = None,
    weights: Weights = Weights(),
) -> torch.Tensor:
    """Eq. 5: L = l_seg L_seg + l_adv_seg L_adv_seg + l_style L_style; None is a term left out."""
    total = weights.segmentation * segmentation
    if output is not None:
        total = total + weights.output * output
    if style is not None:
        total = total + weights.style * style
    return total


def self_training(
    adaptation: torch.Tensor, self_supervised: torch.Tensor, weights: Weights = Weights()
) -> torch.Tensor:
    """L + l_ssl L_ssl: self-training keeps the whole of Eq. 5, as BDL does."""
    return adaptation + weights.self_supervised * self_supervised


def _style_mse(
    source: Features,
    target: Features,
    direction: Direction,
    describe: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
) -> torch.Tensor:
    """Descriptions are averaged over a batch before they are compared: its images are no pairs, and
    matching them one by one would also press every image of a domain to the same style."""
    _check_direction(direction)
    terms = []
    for of_source, of_target in zip(source, target, strict=True):
        for s, t in zip(describe(of_source), describe(of_target), strict=True):
            s, t = s.mean(0), t.mean(0)
            terms.append(
                functional.mse_loss(
                    s.detach() if direction == "target" else s,
                    t.detach() if direction == "source" else t,
                )
            )
    return _sum(terms)


def _sum(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    if not terms:
        raise UsageError("a style loss over no blocks; expected the features of at least one")
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _check_direction(direction: str) -> None:
    if direction not in DIRECTIONS:
        raise UsageError(f"style direction {direction!r}; {nearest(direction, DIRECTIONS)}")
