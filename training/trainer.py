"""One stage of training: Eq. 5 of the paper, with Eq. 6 in self-training, one step at a time.

A Trainer is the networks, their optimisers and the number of steps taken; every batch is a pure
function of the step, so a training that was killed and goes on from its checkpoint ends with the
bits of one that was not (on a CPU; on a GPU with deterministic algorithms).

Source and target go through the network one after the other, so that where batch norm trains, each
domain is normalised by its own statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from cada_deploy.errors import RunFailed, UsageError

from . import losses, processes, schedules
from .batches import Batch, Crops, ahead
from .datasets import DataSet
from .losses import Domain
from .models.discriminators import OutputDiscriminator, StyleDiscriminator
from .networks import Network
from .recipes import Augmentation, Recipe, Stage

Losses = dict[str, float]


@dataclass(frozen=True)
class Domains:
    """What a stage learns from. pseudo: the target's images with pseudo labels; judge: what chooses
    among its checkpoints."""

    source: DataSet
    target: DataSet
    pseudo: DataSet | None = None
    judge: DataSet | None = None


class _Batches(NamedTuple):
    source: Batch
    target: Batch | None
    pseudo: Batch | None


class Trainer:
    """Raises UsageError when the recipe cannot work on these data, RunFailed when a loss is not
    finite (nothing is stepped then)."""

    def __init__(
        self, recipe: Recipe, stage: Stage, domains: Domains, network: Network, device: str = "cpu"
    ) -> None:
        self.recipe = recipe
        self.stage = stage
        self.domains = domains
        self.step = 0
        self.device = torch.device(device)
        self.network = network
        self.model: nn.Module = network.module.to(self.device)
        self._crops = _crops(recipe, stage, domains)
        self.discriminators = nn.ModuleDict(_discriminators(recipe, stage, network)).to(self.device)
        network.train()  # before the optimiser, which takes what is trainable
        self._plan = replace(recipe.optimiser, poly_steps=stage.poly_steps or stage.steps)
        self.optimisers = {"network": self._plan.optimiser(self.model)}
        for name, module in self.discriminators.items():
            self.optimisers[name] = recipe.discriminators.optimiser([module])
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "float16")
        processes.same_start([*self.model.parameters(), *self.discriminators.parameters()])

    # -- a step

    def batches(self) -> Iterator[_Batches]:
        """Those of the steps that are left; the next few are made by threads."""
        return ahead(self._batches, self.step * self.recipe.accumulate, self._last_batch)

    @property
    def _last_batch(self) -> int:
        return self.stage.steps * self.recipe.accumulate

    def _batches(self, number: int) -> _Batches:
        rank, world = processes.rank(), processes.count()
        made = [c.batch(number, rank, world) if c else None for c in self._crops]
        assert made[0] is not None
        return _Batches(made[0], made[1], made[2])

    def take_step(self, batches: Iterator[_Batches]) -> Losses:
        """One step of the network and of each discriminator; returns what each term was."""
        self._schedule()
        self.network.train()
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        seen: Losses = {}
        for _ in range(self.recipe.accumulate):
            for name, value in self._backward(next(batches)).items():
                seen[name] = seen.get(name, 0.0) + value / self.recipe.accumulate
        self._refuse_nonfinite(seen)
        for optimiser in self.optimisers.values():
            processes.average_gradients(optimiser)
            self._scaler.step(optimiser)
        self._scaler.update()
        self.step += 1
        return seen

    def _backward(self, batches: _Batches) -> Losses:
        """Adds one batch's gradients."""
        stage = self.stage
        source = self._forward(batches.source)
        terms = {"segmentation": self._cross_entropy(source.scores, batches.source)}
        weights = vars(stage.weights)
        probabilities: list[torch.Tensor] = []
        target: _Seen | None = None
        with self._frozen_discriminators():
            if batches.target is not None:
                target = self._forward(batches.target)
                if stage.weights.output:
                    probabilities = [
                        self._probabilities(source.scores, batches.source),
                        self._probabilities(target.scores, batches.target),
                    ]
                    logits = self.discriminators["output"](probabilities[1])
                    terms["output"] = losses.adversarial(logits, Domain.TARGET)
                if stage.styles:
                    terms["style"] = self._style(source, target)
            if batches.pseudo is not None:
                pseudo = self._forward(batches.pseudo)
                terms["self_supervised"] = self._cross_entropy(pseudo.scores, batches.pseudo)
            total = sum((weights[name] * term for name, term in terms.items()), torch.zeros(()))
            self._scale(total).backward()  # type: ignore[no-untyped-call]
        if target is not None:
            terms |= self._discriminate(source, target, probabilities)
        return {name: float(term.detach()) for name, term in terms.items()}

    def _discriminate(
        self, source: _Seen, target: _Seen, probabilities: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Gradients of the discriminators, from the same maps, which are constants here."""
        terms = {}
        if probabilities:
            look = self.discriminators["output"]
            terms["D output"] = losses.discrimination(*(look(p.detach()) for p in probabilities))
        if "style" in self.discriminators:
            terms["D style"] = losses.style_discrimination(
                self._style_discriminators, source.style, target.style
            )
        for term in terms.values():
            self._scale(term).backward()  # type: ignore[no-untyped-call]
        return terms

    def _style(self, source: _Seen, target: _Seen) -> torch.Tensor:
        direction: Any = self.stage.style_direction
        if self.stage.style_kind == "gram":
            return losses.style_gram(source.style, target.style, direction)
        if self.stage.style_kind == "mean-std":
            return losses.style_mean_std(source.style, target.style, direction)
        return losses.style_adversarial(
            self._style_discriminators, source.style, target.style, direction
        )

    @property
    def _style_discriminators(self) -> list[nn.Module]:
        return list(self.discriminators["style"].children())

    def _forward(self, batch: Batch) -> _Seen:
        images = batch.images.to(self.device, memory_format=torch.channels_last)
        with self._autocast():
            scores, style = self.model.with_style(images)  # type: ignore[operator]
        return _Seen(scores, tuple(features.float() for features in style))

    def _cross_entropy(self, scores: torch.Tensor, batch: Batch) -> torch.Tensor:
        assert batch.labels is not None
        weights = None if batch.weights is None else batch.weights.to(self.device)
        return losses.segmentation(
            scores, batch.labels.to(self.device), self.network.upsampling, weights=weights
        )

    def _probabilities(self, scores: torch.Tensor, batch: Batch) -> torch.Tensor:
        rows, columns = batch.images.shape[2:]
        share = self.recipe.network.output_shrink
        return self.network.upsampling.probabilities(scores, (rows // share, columns // share))

    # -- around it

    def _schedule(self) -> None:
        factor = self.stage.learning_rate_factor
        for name, optimiser in self.optimisers.items():
            plan = self._plan if name == "network" else self.recipe.discriminators
            rate = plan.rate_at(self.step)
            schedules.set_rate(optimiser, rate * factor if name == "network" else rate)

    def _refuse_nonfinite(self, seen: Losses) -> None:
        bad = [name for name, value in seen.items() if not math.isfinite(value)]
        if bad:
            raise RunFailed(
                f"the {bad[0]} loss became {seen[bad[0]]} at step {self.step} of "
                f"{self.stage.steps}; the last checkpoint is untouched. Usual causes: a learning "
                f"rate that is too high (optimiser.learning_rate is "
                f"{self.recipe.optimiser.learning_rate}), or float16 without enough range "
                f"(precision is {self.recipe.precision})"
            )

    def _frozen_discriminators(self) -> Any:
        return _frozen(self.discriminators)

    def _autocast(self) -> Any:
        if self.recipe.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.recipe.precision))

    def _scale(self, loss: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = self._scaler.scale(loss / self.recipe.accumulate)
        return scaled

    # -- what is kept

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that decides the steps to come, by name."""
        kept = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        kept |= {f"discriminators.{k}": v for k, v in self.discriminators.state_dict().items()}
        for name, optimiser in self.optimisers.items():
            for index, state in optimiser.state_dict()["state"].items():
                for key, value in state.items():
                    kept[f"optimiser.{name}.{index}.{key}"] = torch.as_tensor(value)
        for key, value in self._scaler.state_dict().items():
            kept[f"scaler.{key}"] = torch.as_tensor(value)
        return {name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}

    def restore(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        """Go on from there. Raises UsageError when they are of another network or stage."""
        try:
            self.model.load_state_dict(_below(tensors, "model."))
            self.discriminators.load_state_dict(_below(tensors, "discriminators."))
        except RuntimeError as error:
            raise UsageError(f"the checkpoint is of another network: {error}") from error
        for name, optimiser in self.optimisers.items():
            found: dict[int, dict[str, torch.Tensor]] = {}
            for key, value in _below(tensors, f"optimiser.{name}.").items():
                index, _, what = key.partition(".")
                found.setdefault(int(index), {})[what] = value
            optimiser.load_state_dict({**optimiser.state_dict(), "state": found})
        scaler = {key: value.item() for key, value in _below(tensors, "scaler.").items()}
        if scaler:
            self._scaler.load_state_dict(scaler)
        self.step = step


class _Seen(NamedTuple):
    """One batch through the network: scores (N, C, h, w), features of the front sub-encoders."""

    scores: torch.Tensor
    style: tuple[torch.Tensor, ...]


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _crops(recipe: Recipe, stage: Stage, domains: Domains) -> tuple[Crops | None, ...]:
    source = Crops(domains.source, recipe, 0)
    target = Crops(domains.target, recipe, 1) if stage.uses_target else None
    if not stage.weights.self_supervised:
        return source, target, None
    if domains.pseudo is None:
        raise UsageError("a stage with a self_supervised weight needs pseudo labels; label first")
    plain = Augmentation(scale=recipe.augmentation.scale, mirror=recipe.augmentation.mirror)
    own = recipe.augmentation if stage.strong_target else plain
    return source, target, Crops(domains.pseudo, recipe, 2, own)


def _discriminators(recipe: Recipe, stage: Stage, network: Network) -> dict[str, nn.Module]:
    made: dict[str, nn.Module] = {}
    if stage.weights.output:
        made["output"] = OutputDiscriminator(network.classes, recipe.network.output_stride)
    if stage.styles and stage.style_kind == "adversarial":
        made["style"] = nn.ModuleList(StyleDiscriminator() for _ in range(2))
    return made


class _frozen:
    """Inside, a loss goes through the modules without a gradient for their parameters."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = list(module.parameters())

    def __enter__(self) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(True)
