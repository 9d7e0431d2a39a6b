"""Supervised training of the small network on the source scenes: where every adaptation begins.

    python -m cada_deploy.training.source --out DIR --minutes 10

Plain cross-entropy, AdamW, a poly schedule, crops, flips and a mild change of light. Every batch is
a pure function of (seed, step), so a run that was stopped goes on from its last checkpoint to the
same bits as one that was not. Prints its budget before it starts. It adapts nothing.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional

from cada_deploy import scenes
from cada_deploy.classes import CITYSCAPES_19, IGNORE_ID
from cada_deploy.errors import ArtefactMismatch, CadaError, RunFailed, UsageError

from .batches import network_input
from .models.small import SmallDeepLab

CHECKPOINT = "checkpoint.safetensors"

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Recipe:
    """All that decides the trained bits, next to the data and the machine's arithmetic."""

    steps: int
    seed: int = 1
    batch: int = 4
    crop: tuple[int, int] = (256, 256)
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    warmup: int = 100
    data: str = ""  # name and digest of the set it learns from

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or min(self.crop) < 16:
            raise UsageError(
                f"recipe: {self.steps} steps, batch {self.batch}, crop {self.crop}; expected at "
                "least one step, one image a batch and 16 pixels a side"
            )


@dataclass(frozen=True)
class Frames:
    """Images and labels of one size, held in memory."""

    images: Bytes  # (count, H, W, 3) RGB
    labels: Bytes  # (count, H, W) train ids

    @classmethod
    def of(cls, source: Iterable[scenes.Scene]) -> Frames:
        images, labels = zip(*source)
        return cls(np.stack(images), np.stack(labels))


def batch_at(step: int, frames: Frames, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of that step: crops, some mirrored, each under a slightly different light."""
    draw = np.random.default_rng([recipe.seed, step])
    rows, cols = recipe.crop
    height, width = frames.labels.shape[1:]
    if rows > height or cols > width:
        raise UsageError(f"crop {recipe.crop} is larger than the frames, {height}x{width}")
    images, labels = [], []
    for k in draw.integers(len(frames.labels), size=recipe.batch):
        y, x = draw.integers(height - rows + 1), draw.integers(width - cols + 1)
        turn = 1 if draw.random() < 0.5 else -1
        image = frames.images[k, y : y + rows, x : x + cols][:, ::turn].astype(np.float32)
        image = (image - 128) * draw.uniform(0.85, 1.15) + 128 + draw.uniform(-16, 16)
        image = np.clip(image * draw.uniform(0.95, 1.05, size=3), 0, 255)
        images.append(image.astype(np.uint8))
        labels.append(frames.labels[k, y : y + rows, x : x + cols][:, ::turn])
    return network_input(np.stack(images)), torch.from_numpy(np.stack(labels).astype(np.int64))


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """A linear start, then poly with power 0.9."""
    start = min((step + 1) / max(recipe.warmup, 1), 1.0)
    left = 1 - step / recipe.steps
    return recipe.learning_rate * start * math.pow(left, 0.9)


class Training:
    """A network, its optimiser and the number of steps taken; nothing else is carried over."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.step = 0
        torch.manual_seed(recipe.seed)
        self.model = SmallDeepLab(len(CITYSCAPES_19))
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )

    def take_step(self, frames: Frames) -> float:
        """One optimisation step; returns its loss. Raises RunFailed when the loss is not finite."""
        image, truth = batch_at(self.step, frames, self.recipe)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate_at(self.step, self.recipe)
        self.model.train()
        scores = self.model(image.contiguous(memory_format=torch.channels_last))
        scores = functional.interpolate(
            scores, size=truth.shape[1:], mode="bilinear", align_corners=False
        )
        loss = functional.cross_entropy(scores, truth, ignore_index=IGNORE_ID)
        value = loss.item()
        if not math.isfinite(value):
            raise RunFailed(
                f"the loss became {value} at step {self.step} of {self.recipe.steps}; the last "
                f"checkpoint is untouched. Try a smaller --lr than {self.recipe.learning_rate}"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.step += 1
        return value

    def save(self, folder: Path) -> None:
        """Writes CHECKPOINT whole or not at all, and the same facts as JSON for people."""
        tensors = {f"model.{k}": v.contiguous() for k, v in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"optimiser.{name}.{key}"] = value.contiguous()
        facts = json.dumps(self._facts(), sort_keys=True, indent=1)
        folder.mkdir(parents=True, exist_ok=True)
        half = folder / f"{CHECKPOINT}.part"
        save_file(tensors, half, metadata={"cada_deploy": facts})
        _replace_durably(half, folder / CHECKPOINT)
        (folder / "checkpoint.json").write_text(facts + "\n")

    def _facts(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "kind": "cada-deploy source checkpoint",
            "network": "small",
            "step": self.step,
            "recipe": asdict(self.recipe),
            "torch": torch.__version__,
        }

    @classmethod
    def load(cls, folder: Path) -> Training:
        """The state at the last saved step. Raises ArtefactMismatch for a file of another kind."""
        try:
            with safe_open(folder / CHECKPOINT, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["cada_deploy"])
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            facts["recipe"]["crop"] = tuple(facts["recipe"]["crop"])
            training = cls(Recipe(**facts["recipe"]))
            training.step = int(facts["step"])
            training._restore(tensors)
        except CadaError:
            raise
        except Exception as error:  # the border: whatever the file holds, say which file it is
            raise ArtefactMismatch(
                f"{folder / CHECKPOINT} is not a checkpoint of this trainer: {error}"
            ) from error
        return training

    def _restore(self, tensors: dict[str, torch.Tensor]) -> None:
        prefix = "model."
        weights = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        self.model.load_state_dict(weights)
        for name, parameter in self.model.named_parameters():
            start = f"optimiser.{name}."
            state = {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
            if state:  # there is none before the first step
                like = {"memory_format": torch.channels_last} if parameter.ndim == 4 else {}
                self.optimiser.state[parameter] = {
                    k: v.contiguous(**like) if v.ndim == 4 else v for k, v in state.items()
                }


def _replace_durably(part: Path, final: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def train(
    training: Training,
    frames: Frames,
    folder: Path,
    save_every: int = 200,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Takes the steps that are left, saving now and then and at the end."""
    while training.step < training.recipe.steps:
        loss = training.take_step(frames)
        if training.step % save_every == 0:
            training.save(folder)
        if progress:
            progress(training.step, loss)
    training.save(folder)


def iou_per_class(model: torch.nn.Module, source: Iterable[scenes.Scene]) -> list[float]:
    """IoU of each class over all scenes together; nan for a class that is in neither."""
    count = len(CITYSCAPES_19)
    confusion = np.zeros((count, count), np.int64)  # truth, prediction
    model.eval()
    with torch.inference_mode():
        for image, truth in source:
            scores = model(network_input(image[None]))
            scores = functional.interpolate(
                scores, size=truth.shape, mode="bilinear", align_corners=False
            )
            guess = scores[0].argmax(0).numpy()
            known = truth != IGNORE_ID
            pairs = truth[known].astype(np.int64) * count + guess[known]
            confusion += np.bincount(pairs, minlength=count * count).reshape(count, count)
    hit = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - hit
    return [float(h / u) if u else math.nan for h, u in zip(hit, union)]


def mean_iou(ious: list[float]) -> float:
    return float(np.nanmean(ious))


def steps_in(minutes: float, recipe: Recipe, frames: Frames) -> int:
    """How many steps fit, from ten rehearsed ones that are then thrown away."""
    rehearsal = Training(recipe)
    for _ in range(3):
        rehearsal.take_step(frames)
    start = time.perf_counter()
    for _ in range(10):
        rehearsal.take_step(frames)
    return max(int(minutes * 600 / (time.perf_counter() - start)), 1)


def _started_or_resumed(folder: Path, recipe: Recipe, fixed: bool) -> Training:
    """The training in that folder if there is one; its plan stands, and another one is refused."""
    if not (folder / CHECKPOINT).exists():
        return Training(recipe)
    training = Training.load(folder)
    wanted = recipe if fixed else replace(recipe, steps=training.recipe.steps)
    if training.recipe != wanted:
        raise ArtefactMismatch(
            f"{folder} holds another training: {training.recipe}; asked for {wanted}. "
            "Use another --out, or the same options to resume"
        )
    return training


@click.command(help="Train the small network on the source scenes.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
@click.option("--minutes", default=10.0, show_default=True, help="Plan as many steps as fit.")
@click.option("--steps", type=int, help="Steps in all; instead of --minutes.")
@click.option("--batch", default=4, show_default=True)
@click.option("--crop", default=256, show_default=True, help="Side of the square crops, pixels.")
@click.option("--lr", default=2e-3, show_default=True, help="Learning rate.")
@click.option("--seed", default=1, show_default=True)
@click.option("--threads", default=1, show_default=True, help="CPU threads; changes the last bits.")
def main(
    out: Path,
    minutes: float,
    steps: int | None,
    batch: int,
    crop: int,
    lr: float,
    seed: int,
    threads: int,
) -> None:
    try:
        _run(out, minutes, steps, (batch, crop, lr, seed), threads)
    except CadaError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from error


def _run(
    out: Path,
    minutes: float,
    steps: int | None,
    choices: tuple[int, int, float, int],
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    console = Console()
    data = scenes.SOURCE_TRAIN
    batch, crop, lr, seed = choices
    recipe = Recipe(
        steps=steps or 1,
        seed=seed,
        batch=batch,
        crop=(crop, crop),
        learning_rate=lr,
        data=f"{data.name} {data.sha256}",
    )
    console.print(f"drawing {data.count} scenes of {data.name} ...")
    frames = Frames.of(data)
    if steps is None and not (out / CHECKPOINT).exists():
        recipe = replace(recipe, steps=steps_in(minutes, recipe, frames))
    training = _started_or_resumed(out, recipe, fixed=steps is not None)
    budget = training.recipe
    console.print(
        f"budget: steps {training.step} to {budget.steps}, {budget.batch} crops of "
        f"{budget.crop[0]}x{budget.crop[1]} a step, {threads} thread(s), "
        f"about {frames.images.nbytes * 4 // 3 / 1e6:.0f} MB of scenes in memory"
        + (f", about {minutes:g} minutes" if steps is None else "")
    )
    with Progress(console=console) as bar:
        task = bar.add_task("training", total=budget.steps, completed=training.step)
        train(
            training,
            frames,
            out,
            progress=lambda step, loss: bar.update(
                task, completed=step, description=f"loss {loss:.3f}"
            ),
        )
    for name, evaluated in (("source", scenes.SOURCE_VAL), ("target", scenes.TARGET_DEMO)):
        score = 100 * mean_iou(iou_per_class(training.model, evaluated))
        console.print(f"mIoU on {evaluated.name} ({name}): {score:.2f} %")


if __name__ == "__main__":
    main()
