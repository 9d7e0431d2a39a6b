"""The demo: 48 procedural street scenes at dusk, labelled by a model that only knew daylight.

The model and the scenes come with the package; nothing is downloaded and no torch is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cada_deploy.classes import CITYSCAPES_19
from cada_deploy.evaluation import Comparison, compare_folders
from cada_deploy.labelling import ModelChoice, Outcome, RunOptions, Say, Work, predict, pseudo_label
from cada_deploy.metrics import ConfusionMatrix
from cada_deploy.policies import fixed
from cada_deploy.progress import progress
from cada_deploy.report_page.contents import Agreement, Evaluation
from cada_deploy.reporting import publish_report
from cada_deploy.scenes import TARGET_DEMO, write_set
from cada_deploy.selection import Selecting

DEMO_MODEL = Path(__file__).parent / "demo_model" / "scenes19.onnx"


@dataclass(frozen=True)
class DemoResult:
    """The pseudo-label run, and how its labels and every prediction compare with the truth."""

    outcome: Outcome
    selected: Comparison
    everything: Comparison

    def verdict(self) -> str:
        chosen, full = self.selected.matrix, self.everything.matrix
        return (
            f"of all predictions {full.precision:.1%} are right (mIoU {full.mean_iou:.1%}); of the "
            f"{chosen.coverage:.1%} that were selected, {chosen.precision:.1%}"
        )


def run_demo(out: Path, selecting: Selecting, quiet: bool, say: Say) -> DemoResult:
    """Write the scenes and their truth below `out`, label them, evaluate, draw the report."""
    scenes = out / "scenes"
    with progress("drawing scenes", TARGET_DEMO.count, quiet=quiet) as bar:
        write_set(scenes, TARGET_DEMO, lambda done, total: bar.advance(1))
    options = RunOptions(
        ModelChoice(DEMO_MODEL),
        scenes / "images",
        out / "pseudo-labels",
        selecting,
        work=Work(quiet=quiet),
    )
    outcome = pseudo_label(options, say)
    everything = RunOptions(
        ModelChoice(DEMO_MODEL),
        scenes / "images",
        out / "predictions",
        Selecting(policy=fixed.NAME, threshold=0.0),
        work=Work(quiet=quiet),
    )
    predict(everything, say)
    selected = _compared(out / "pseudo-labels" / "labels", scenes, quiet)
    full = _compared(out / "predictions" / "labels", scenes, quiet)
    publish_report(
        outcome,
        Evaluation("the scenes' own labels", _agreement(full.matrix), _agreement(selected.matrix)),
    )
    return DemoResult(outcome, selected, full)


def _compared(labels: Path, scenes: Path, quiet: bool) -> Comparison:
    return compare_folders(labels, scenes / "labels", CITYSCAPES_19, quiet=quiet)


def _agreement(matrix: ConfusionMatrix) -> Agreement:
    iou: Sequence[float] | npt.NDArray[np.float64] = matrix.iou_selected
    return Agreement(
        miou=_defined(float(np.nanmean(iou)) if np.isfinite(iou).any() else math.nan),
        precision=_defined(matrix.precision),
        coverage=_defined(matrix.coverage),
        iou=tuple(_defined(float(v)) for v in iou),
        class_precision=tuple(_defined(float(v)) for v in matrix.precision_per_class),
    )


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
