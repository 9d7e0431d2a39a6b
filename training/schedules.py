"""Learning rates as pure functions of the step, and the optimisers of section 3.2 of the paper.

A step counts from 0. Nothing here remembers one, so a training that is resumed has its rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cada_deploy.errors import UsageError, nearest

POLY_STEPS = 250_000
DECAY_STEPS = 50_000
DISCRIMINATOR_BETAS = (0.9, 0.99)
KINDS = ("sgd", "adamw")


def poly(step: int, steps: int, base: float, power: float = 0.9) -> float:
    """base (1 - step / steps)^power, and 0 from `steps` on."""
    return base * math.pow(max(0.0, 1 - step / steps), power)


def staircase(step: int, base: float, rate: float = 0.1, every: int = DECAY_STEPS) -> float:
    """base rate^floor(step / every): exponential decay as BDL's code has it."""
    return base * math.pow(rate, step // every)


def continuous(step: int, base: float, rate: float = 0.1, every: int = DECAY_STEPS) -> float:
    """base rate^(step / every): exponential decay as TensorFlow has it by default."""
    return base * math.pow(rate, step / every)


def warm_up(step: int, steps: int) -> float:
    """A factor that rises linearly to 1 within `steps` steps; 1 throughout where they are 0."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


@dataclass(frozen=True)
class NetworkPlan:
    """How the segmentation network is optimised. decoder_factor: of the decoder's learning rate
    over the encoder's. The defaults are the paper's; it gives no weight decay, 5e-4 is BDL's."""

    kind: str = "sgd"
    learning_rate: float = 2.5e-4
    decoder_factor: float = 10.0
    weight_decay: float = 5e-4
    momentum: float = 0.9  # of sgd
    poly_steps: int = POLY_STEPS
    poly_power: float = 0.9
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"no optimiser is called {self.kind!r}; {nearest(self.kind, KINDS)}")
        if self.poly_steps < 1 or self.warmup < 0 or not self.learning_rate > 0:
            raise UsageError(
                f"optimiser: learning rate {self.learning_rate}, {self.poly_steps} poly steps, "
                f"{self.warmup} of warm-up; expected a positive rate and at least 1 poly step"
            )

    def optimiser(self, network: nn.Module) -> torch.optim.Optimizer:
        """Over what is trainable now, so set the batch-norm policy first."""
        groups = parameter_groups(network, self.decoder_factor)
        start = self.rate_at(0)
        if self.kind == "adamw":
            return torch.optim.AdamW(groups, lr=start, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            groups, lr=start, momentum=self.momentum, weight_decay=self.weight_decay
        )

    def rate_at(self, step: int) -> float:
        """The encoder's; a group's own is this times its `factor`."""
        rate = poly(step, self.poly_steps, self.learning_rate, self.poly_power)
        return rate * warm_up(step, self.warmup)


PAPER = NetworkPlan()
# The small network's weights begin at random, so its decoder needs no larger steps.
SMALL = NetworkPlan("adamw", 2e-3, 1.0, 1e-2, poly_steps=2_000, warmup=50)


@dataclass(frozen=True)
class DiscriminatorPlan:
    """How D_c and the two D_f are optimised: Adam, and a rate that falls by `decay_rate` every
    `decay_steps` steps, at once or continuously."""

    learning_rate: float = 1e-4
    betas: tuple[float, float] = DISCRIMINATOR_BETAS
    decay_rate: float = 0.1
    decay_steps: int = DECAY_STEPS
    stairs: bool = True

    def optimiser(self, discriminators: Iterable[nn.Module]) -> torch.optim.Optimizer:
        parameters = [p for d in discriminators for p in d.parameters()]
        return torch.optim.Adam(parameters, lr=self.rate_at(0), betas=self.betas)

    def rate_at(self, step: int) -> float:
        decay = staircase if self.stairs else continuous
        return decay(step, self.learning_rate, self.decay_rate, self.decay_steps)


def parameter_groups(network: nn.Module, decoder_factor: float) -> list[dict[str, Any]]:
    """The trainable parameters of encoder and decoder, each with its `factor` of the rate.

    `network.decoder` names the parts that are the decoder.
    """
    decoder: tuple[str, ...] = network.decoder  # type: ignore[assignment]
    groups: list[dict[str, Any]] = [
        {"name": "encoder", "factor": 1.0, "params": []},
        {"name": "decoder", "factor": decoder_factor, "params": []},
    ]
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups[name.partition(".")[0] in decoder]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Gives every group `rate` times its own factor."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)
