"""Self-training uses the product: a round exports the network, and `cada-deploy pseudo-label`
itself writes the labels that the next stage learns from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from cada_deploy import durable
from cada_deploy.classes import IGNORE_ID, ClassSet
from cada_deploy.errors import ArtefactMismatch
from cada_deploy.images import read_bytes
from cada_deploy.labelling import ModelChoice, RunOptions, Work, pseudo_label, select_again
from cada_deploy.labels import read_label_png
from cada_deploy.metrics import ConfusionMatrix, confusion_matrix, empty_matrix
from cada_deploy.outputs import LabelFiles
from cada_deploy.pipeline import Sizes
from cada_deploy.policies import fixed
from cada_deploy.selection import Selecting

from . import processes
from .datasets import DataSet, Sample
from .export import export_checkpoint
from .recipes import Recipe, SelfTraining
from .run_files import key_of
from .stages import Trained, Workplace, class_set

_HALVINGS = 10  # of the confidence threshold that must give a coverage: within 0.1 %


@dataclass(frozen=True)
class PseudoLabelled:
    """A target set with the labels of a run; where the run rejected an image, nothing is learnt."""

    target: DataSet
    run: Path
    soft: bool = False
    kind: str = "pseudo-labels"
    labelled: bool = True

    @property
    def classes(self) -> ClassSet:
        return self.target.classes

    @property
    def names(self) -> tuple[str, ...]:
        return self.target.names

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, k: int) -> Sample:
        sample = self.target[k]
        labels = self.labels(k, (sample.image.shape[0], sample.image.shape[1]))
        weights = None
        if self.soft:
            path = self.run / "confidence" / f"{_name(k)}.png"
            stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            if stored is None:
                raise ArtefactMismatch(f"{path} cannot be read; label again")
            weights = (stored / np.float32(65535)).astype(np.float32)
        return Sample(sample.name, sample.image, labels, weights)

    def labels(self, k: int, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
        """(H, W), 255 where not selected."""
        path = self.run / "labels" / f"{_name(k)}.png"
        if not path.exists():  # a rejected image
            return np.full(size, IGNORE_ID, np.uint8)
        found = read_label_png(read_bytes(path), path.name)
        if found.shape != size:
            raise ArtefactMismatch(f"{path} is {found.shape}; its image is {size} (H, W)")
        return found

    def fingerprint(self) -> str:
        thresholds = durable.read_json(self.run / "thresholds.json")
        return key_of([self.target.fingerprint(), self.soft, thresholds])

    def facts(self) -> dict[str, Any]:
        return {"target": self.target.facts(), "run": str(self.run)}


def label(
    recipe: Recipe, trained: Trained, target: DataSet, work: Workplace, chosen: SelfTraining
) -> PseudoLabelled:
    """Export the network and label the target with it; both are found when they are there."""
    decides = [trained.facts["key"], target.fingerprint(), list(recipe.target_sizes[0])]
    folder = work.folder / f"labels-{key_of(decides)[:16]}"
    adaptive = dataclasses.replace(chosen, policy="category-adaptive")
    run = folder / f"run-{key_of(dataclasses.asdict(adaptive))[:8]}"
    files = LabelFiles(confidence=chosen.soft_weights)
    selecting = Selecting(delta=chosen.delta)
    if processes.is_first() and not _finished(run):
        model = folder / "model.onnx"
        if not model.exists():
            durable.make_folder(folder)
            export_checkpoint(trained.model, model, classes=class_set(recipe))
        images = linked_images(target, folder / "images")
        size = recipe.target_sizes[0] if recipe.target_sizes[0][0] else None
        options = RunOptions(
            ModelChoice(model), images, run, selecting, Sizes(input=size), files=files,
            work=Work(quiet=work.quiet),
        )  # fmt: skip
        pseudo_label(options, work.say)
    processes.wait()
    if chosen.policy != fixed.NAME:
        return PseudoLabelled(target, run, chosen.soft_weights)
    threshold = _same_coverage(run, folder / "fixed", files, work)
    return PseudoLabelled(target, folder / "fixed" / threshold, chosen.soft_weights)


def quality(pseudo: PseudoLabelled, truth: DataSet) -> ConfusionMatrix:
    """The selected labels against the truth of those frames that have one. For reports: no stage
    and no choice ever looks at it."""
    numbers = {name: k for k, name in enumerate(pseudo.names)}
    matrix = empty_matrix(pseudo.classes)
    for k in range(len(truth)):
        sample = truth[k]
        if sample.name in numbers and sample.labels is not None:
            size = (sample.labels.shape[0], sample.labels.shape[1])
            found = pseudo.labels(numbers[sample.name], size)
            matrix = matrix + confusion_matrix(found, sample.labels, pseudo.classes)
    return matrix


def linked_images(data: DataSet, folder: Path) -> Path:
    """A folder with one image a frame, named by its number: links to the set's own files, or PNG
    files where it draws its frames."""
    durable.make_folder(folder)
    paths: Iterable[Path | None] = getattr(data, "image_paths", [None] * len(data))
    for k, path in enumerate(paths):
        if path is not None:
            link = folder / f"{_name(k)}{path.suffix}"
            if not link.is_symlink():
                link.symlink_to(path.resolve())
            continue
        drawn = folder / f"{_name(k)}.png"
        if not drawn.exists():
            _, png = cv2.imencode(".png", np.ascontiguousarray(data[k].image[..., ::-1]))
            durable.write_file(drawn, png.tobytes())
    return folder


def _same_coverage(run: Path, folder: Path, files: LabelFiles, work: Workplace) -> str:
    """The name of the run of policy `fixed` whose coverage is that of `run`, found by halving."""
    wanted = _selected(run)
    low, high = 0.0, 1.0
    best = ""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        name = f"{middle:.6f}"
        if processes.is_first() and not _finished(folder / name):
            options = Selecting(policy=fixed.NAME, threshold=middle)
            select_again(run, folder / name, options, files, Work(quiet=True), work.say)
        processes.wait()
        best = name
        if _selected(folder / name) > wanted:
            low = middle
        else:
            high = middle
    return best


def _selected(run: Path) -> int:
    """Pixels that a run kept."""
    thresholds = durable.read_json(run / "thresholds.json")
    return sum(int(row["selected"]) for row in thresholds["classes"])


def _finished(run: Path) -> bool:
    path = run / "run.json"
    return path.exists() and bool(durable.read_json(path).get("status") == "done")


def _name(k: int) -> str:
    return f"{k:06d}"
