"""Runs the stages of a recipe, each in a folder named by what decides it.

So arms of an ablation that share a stage share its folder and train it once; a stage that is done
is not done again, and one that was stopped goes on.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from cada_deploy.classes import ClassSet
from cada_deploy.command_options import named_classes
from cada_deploy.errors import UsageError
from cada_deploy.metrics import ConfusionMatrix, confusion_matrix, empty_matrix
from cada_deploy.progress import progress

from . import batch_norm, processes, recipes, run_files
from .batches import network_input
from .datasets import DataSet, open_dataset
from .networks import Network, segmentation_network
from .recipes import Recipe, Stage
from .run_files import StageFolder
from .scalars import Scalars
from .trainer import Domains, Trainer

Say = Callable[[str], None]

_LOSS_EVERY = 10  # steps between two points of a curve


@dataclass(frozen=True)
class Workplace:
    """Where and how stages run. folder holds one subfolder a stage."""

    folder: Path
    device: str = "cpu"
    quiet: bool = False
    say: Say = print


@dataclass(frozen=True)
class Data:
    """A recipe's data sets, opened."""

    source: DataSet
    target: DataSet
    validation: DataSet
    evaluation: DataSet
    upper_bounds: tuple[tuple[DataSet, DataSet], ...]  # what is learnt from, and judged on

    @classmethod
    def of(cls, recipe: Recipe) -> Data:
        opened = [
            open_dataset(table)
            for table in (recipe.source, recipe.target, recipe.validation, recipe.evaluation)
        ]
        for name, data in zip(("source", "validation", "evaluation"), (opened[0], *opened[2:])):
            if not data.labelled:
                raise UsageError(f"{name} ({data.kind}) has no labels; it needs them")
        source, target, validation, evaluation = opened
        upper = _upper_bounds(recipe, evaluation)
        return cls(source, target, validation, evaluation, upper)


def _upper_bounds(recipe: Recipe, evaluation: DataSet) -> tuple[tuple[DataSet, DataSet], ...]:
    """folds = 2: the halves of one labelled set, in blocks of time, teach and judge each other."""
    table = dict(recipe.upper_bound)
    if not table:
        return ()
    folds = table.pop("folds", 1)
    if folds == 1:
        return ((open_dataset(table), evaluation),)
    if folds != 2:
        raise UsageError(f"upper_bound.folds is {folds!r}; expected 2, or nothing")
    halves = [open_dataset({**table, "fold": f"{k}/2"}) for k in (1, 2)]
    return ((halves[0], halves[1]), (halves[1], halves[0]))


def class_set(recipe: Recipe) -> ClassSet:
    found = named_classes(recipe.classes)
    assert found is not None
    return found


@dataclass(frozen=True)
class Trained:
    """A network that a stage made."""

    model: Path  # model.safetensors
    facts: dict[str, Any]


def run_stage(
    recipe: Recipe,
    name: str,
    domains: Domains,
    work: Workplace,
    *,
    start: Trained | None = None,
    stage: Stage | None = None,
) -> Trained:
    """Train one stage to its end, or find it done. start: whose weights it begins with."""
    stage = stage or recipe.stage(name)
    decides = _decides(recipe, stage, domains, start)
    key = run_files.key_of(decides)
    folder = StageFolder(work.folder / f"{name}-{key[:16]}", key)
    if folder.is_done():
        return Trained(folder.model, folder.facts())
    network = segmentation_network(recipe.network, class_set(recipe), recipe.seed)
    if start is not None:
        load_model(network, start.model)
    trainer = Trainer(recipe, stage, domains, network, work.device)
    rows, columns = recipe.crop
    work.say(
        f"{name}: budget {stage.steps} steps of {recipe.batch} crops of {rows}x{columns}, "
        f"{sum(p.numel() for p in trainer.model.parameters()) / 1e6:.2f} million weights on "
        f"{work.device}; a checkpoint every {recipe.save_every} steps in {folder.root.name}"
    )
    if (saved := folder.state()) is not None:
        trainer.restore(*saved)
        work.say(f"{name}: resuming at step {trainer.step} of {stage.steps}")
    facts = {"stage": name, "decides": decides, "torch": torch.__version__}
    snapshots = Snapshots(folder.root, recipe, network, domains)
    seconds = _train(trainer, name, folder, facts, work, snapshots)
    facts |= snapshots.restore_best()
    if stage.reestimate:
        batch_norm.reestimate(trainer.model, input_batches(recipe, domains.target))
    model = {f"model.{k}": v.detach().cpu().contiguous()
             for k, v in trainer.model.state_dict().items()}  # fmt: skip
    if processes.is_first():
        folder.finish(model, {**facts, "seconds": round(seconds, 1)})
    processes.wait()
    return Trained(folder.model, folder.facts())


def reestimated(recipe: Recipe, start: Trained, target: DataSet, work: Workplace) -> Trained:
    """The control that every table carries: nothing but batch norm statistics of the target."""
    decides = {"reestimate": target.fingerprint(), "start": start.facts["key"]}
    key = run_files.key_of(decides)
    folder = StageFolder(work.folder / f"statistics-{key[:16]}", key)
    if processes.is_first() and not folder.is_done():
        network = load_model(
            segmentation_network(recipe.network, class_set(recipe), recipe.seed), start.model
        )
        batch_norm.reestimate(network.module, input_batches(recipe, target))
        model = {f"model.{k}": v.contiguous() for k, v in network.module.state_dict().items()}
        folder.finish(model, {"stage": "statistics", "decides": decides})
    processes.wait()
    return Trained(folder.model, folder.facts())


def load_model(network: Network, path: Path) -> Network:
    """Raises UsageError for a checkpoint of another network."""
    tensors, _ = run_files.read(path)
    found = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    try:
        network.module.load_state_dict(found)
    except RuntimeError as error:
        text = str(error).partition("\n")[0]
        raise UsageError(f"{path} is a checkpoint of another network: {text}") from error
    return network


def input_batches(recipe: Recipe, data: DataSet) -> list[torch.Tensor]:
    """Every image of a set, once, as batches of the network's input."""
    batches = []
    for first in range(0, len(data), recipe.batch):
        rows = [_sized(recipe, data[k].image)
                for k in range(first, min(first + recipe.batch, len(data)))]  # fmt: skip
        same = {row.shape for row in rows}
        groups = [[row for row in rows if row.shape == shape] for shape in sorted(same)]
        batches += [network_input(np.stack(group)) for group in groups]
    return batches


def evaluate(recipe: Recipe, model: Path, data: DataSet, *, quiet: bool = True) -> ConfusionMatrix:
    """The network's labels at the truth's size against the truth."""
    classes = class_set(recipe)
    network = load_model(segmentation_network(recipe.network, classes, recipe.seed), model)
    return judged(recipe, network, data, quiet=quiet)


def judged(
    recipe: Recipe, network: Network, data: DataSet, *, quiet: bool = True
) -> ConfusionMatrix:
    """As evaluate, of a network in memory; leaves it in inference mode."""
    classes = class_set(recipe)
    device = next(network.module.parameters()).device
    network.module.eval()
    matrix = empty_matrix(classes)
    with torch.inference_mode(), progress("evaluating", len(data), quiet=quiet) as bar:
        for k in range(len(data)):
            sample = data[k]
            assert sample.labels is not None
            given = network_input(_sized(recipe, sample.image)[None]).to(device)
            scores = network.module(given)
            size = (sample.labels.shape[0], sample.labels.shape[1])
            labels = network.upsampling.probabilities(scores, size)[0].argmax(0)
            found = labels.cpu().numpy().astype(np.uint8)
            matrix = matrix + confusion_matrix(found, sample.labels, classes)
            bar.advance(1)
    return matrix


class Snapshots:
    """Keeps the checkpoint that the judge likes best; without a judge the last one stands."""

    def __init__(self, folder: Path, recipe: Recipe, network: Network, domains: Domains) -> None:
        self._path = folder / "best.safetensors"
        self._recipe, self._network, self._judge = recipe, network, domains.judge
        self._best = run_files.read(self._path)[1] if self._path.exists() else None

    def look(self, step: int) -> None:
        if self._judge is None:
            return
        found = judged(self._recipe, self._network, self._judge).mean_iou
        if self._best is None or found > self._best["mean_iou"]:
            self._best = {"step": step, "mean_iou": found}
            run_files.write(self._path, dict(self._network.module.state_dict()), self._best)

    def restore_best(self) -> dict[str, Any]:
        """Put the best one into the network; what is worth telling of it."""
        if self._best is None:
            return {}
        self._network.module.load_state_dict(run_files.read(self._path)[0])
        self._path.unlink()
        return {"snapshot": self._best}


def preview(recipe: Recipe, network: Network, target: DataSet) -> Any:
    """(H, 2 W, 3) uint8: a frame of the target, and what the network says of it now."""
    image = target[0].image
    network.module.eval()
    with torch.inference_mode():
        given = network_input(_sized(recipe, image)[None])
        scores = network.module(given.to(next(network.module.parameters()).device))
        labels = network.upsampling.probabilities(scores, image.shape[:2])[0].argmax(0)
    palette = np.array(class_set(recipe).palette, np.uint8)
    return np.concatenate([image, palette[labels.cpu().numpy()]], 1)


def _sized(recipe: Recipe, image: Any) -> Any:
    height, width = recipe.target_sizes[0]
    if not height or image.shape[:2] == (height, width):
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def _decides(
    recipe: Recipe, stage: Stage, domains: Domains, start: Trained | None
) -> dict[str, Any]:
    """Everything that the result depends on, and nothing else: what arms share they share."""
    plain = recipes.to_json(recipe)
    used = ("network", "augmentation", "optimiser", "discriminators", "classes", "seed", "batch",
            "accumulate", "crop", "image_size", "target_crop", "target_image_size",
            "precision")  # fmt: skip
    data = {"source": domains.source.fingerprint()}
    if stage.uses_target or stage.reestimate:
        data["target"] = domains.target.fingerprint()
    if domains.pseudo is not None:
        data["pseudo"] = domains.pseudo.fingerprint()
    if domains.judge is not None:
        data["judge"] = domains.judge.fingerprint()
    return {
        **{name: plain[name] for name in used},
        "stage": dataclasses.asdict(stage),
        "data": data,
        "start": start.facts["key"] if start else None,
        "processes": processes.count(),
    }


def _train(
    trainer: Trainer,
    name: str,
    folder: StageFolder,
    facts: dict[str, Any],
    work: Workplace,
    snapshots: Snapshots,
) -> float:
    recipe, stage, domains = trainer.recipe, trainer.stage, trainer.domains
    began, first = time.monotonic(), trainer.step
    batches = trainer.batches()
    scalars = Scalars(folder.root if processes.is_first() else None, first)
    quiet = work.quiet or not processes.is_first()
    with progress(name, stage.steps - first, quiet=quiet, unit="steps") as bar, scalars:
        while trainer.step < stage.steps:
            seen = trainer.take_step(batches)
            if trainer.step % _LOSS_EVERY == 0:
                scalars.add(trainer.step, seen)
            last = trainer.step == stage.steps
            if (trainer.step % recipe.save_every == 0 or last) and processes.is_first():
                snapshots.look(trainer.step)
                scalars.picture(trainer.step, preview(recipe, trainer.network, domains.target))
                if not last:
                    folder.save_state(trainer.tensors(), trainer.step, facts)
            processes.wait()
            bar.advance(1)
    return time.monotonic() - began
