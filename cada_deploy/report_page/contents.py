"""ReportData: everything the report of one run tells, as plain values; nothing here makes HTML.

Texts may hold anything, hostile file names too: they are escaped where they are written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy.statistics import HISTOGRAM_BINS

MOST_FRAMES = 8
NO_LABEL = 255

Pairs = tuple[tuple[str, str], ...]  # name and value, in the order to show them


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(f"report: {message}")


@dataclass(frozen=True)
class ClassRow:
    """One category. predicted and selected count pixels of the label grid.

    centroid_entropy is E(f_l) in nats; threshold T_l is in the unit of the rule's measure. Both are
    None where there is none: nobody predicted the class, or every image has its own threshold.
    flags are extra remarks; that nothing was kept and the like is found out by the report itself.
    """

    id: int
    name: str
    colour: tuple[int, int, int]
    predicted: int
    selected: int
    centroid_entropy: float | None = None
    threshold: float | None = None
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(
            0 <= self.selected <= self.predicted,
            f"class {self.name!r}: {self.selected} of {self.predicted} pixels selected",
        )
        _check(all(0 <= v <= 255 for v in self.colour), f"class {self.name!r}: {self.colour=}")

    @property
    def coverage(self) -> float | None:
        """Selected share of what was predicted as this class; None when that is nothing."""
        return self.selected / self.predicted if self.predicted else None


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame to look at: image (H, W, 3) uint8 RGB; predicted and selected (H', W') uint8 train
    ids, 255 = none; entropy (H', W') float32 in nats, NaN = invalid."""

    name: str
    image: npt.NDArray[np.uint8]
    predicted: npt.NDArray[np.uint8]
    selected: npt.NDArray[np.uint8]
    entropy: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        shape = self.image.shape
        _check(
            len(shape) == 3 and shape[2] == 3 and min(shape) > 0 and self.image.dtype == np.uint8,
            f"frame image is {shape} {self.image.dtype}; expected (H, W, 3) uint8",
        )
        shapes = {m.shape for m in (self.predicted, self.selected, self.entropy)}
        _check(
            len(shapes) == 1 and len(self.predicted.shape) == 2 and self.predicted.size > 0,
            f"frame maps have shapes {sorted(shapes)}; expected one (H, W) for all",
        )

    @property
    def share_selected(self) -> float | None:
        """Of the pixels that have a prediction."""
        predicted = int(np.count_nonzero(self.predicted != NO_LABEL))
        selected = int(np.count_nonzero(self.selected != NO_LABEL))
        return selected / predicted if predicted else None


@dataclass(frozen=True)
class Agreement:
    """How well one set of labels agrees with the truth. All shares are 0..1, None = undefined.

    precision: of the labelled pixels, the share that is right; coverage: of the truth's pixels,
    the share that is labelled. iou and class_precision have one entry per class.
    """

    miou: float | None
    precision: float | None
    coverage: float | None
    iou: tuple[float | None, ...]
    class_precision: tuple[float | None, ...]


@dataclass(frozen=True)
class Evaluation:
    """Against a truth that the run did not see: every prediction, and the selected ones."""

    truth: str
    full: Agreement
    selected: Agreement


@dataclass(frozen=True)
class Rejected:
    """An input that was not labelled; reason is from the fixed list of rejected.jsonl."""

    path: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Stage:
    """Seconds one stage took, added up over all workers."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Link:
    """An output file, relative to the report's folder; a folder ends with '/'."""

    path: str
    what: str


OUTPUT_LINKS = (
    Link("labels/", "pseudo labels, one 8-bit PNG per image; 255 = not selected"),
    Link("thresholds.json", "thresholds and coverage of every class"),
    Link("statistics.json", "the integer evidence they come from"),
    Link("run.json", "settings, versions and digests of this run"),
    Link("rejected.jsonl", "inputs that were left out, one per line"),
)


@dataclass(frozen=True, eq=False)
class ReportData:
    """The whole report.

    measure, comparator: of the policy's Rule. options: of the policy, in words of the command line
    (("delta", "0.1"), ("centroid", "confidence"), ("scope", "dataset")).
    histograms: (C, HISTOGRAM_BINS) counts of entropy in the order of classes, or None.
    notices: how many inputs were converted on the way in ("16-bit", 12).
    """

    title: str
    model: str
    policy: str
    measure: str
    comparator: str
    images_labelled: int
    wall_s: float
    classes: tuple[ClassRow, ...]
    options: Pairs = ()
    invalid_pixels: int = 0
    masked_pixels: int = 0
    histograms: npt.NDArray[Any] | None = None
    frames: tuple[Frame, ...] = ()
    evaluation: Evaluation | None = None
    rejected: tuple[Rejected, ...] = ()
    notices: tuple[tuple[str, int], ...] = ()
    stages: tuple[Stage, ...] = ()
    cores: int | None = None
    command_line: str = ""
    provenance: Pairs = ()
    links: tuple[Link, ...] = OUTPUT_LINKS
    look_first: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(len(self.classes) > 0, "a run has at least one class")
        _check(
            len(self.frames) <= MOST_FRAMES,
            f"{len(self.frames)} frames; the page holds at most {MOST_FRAMES}",
        )
        if self.histograms is not None:
            expected = (len(self.classes), HISTOGRAM_BINS)
            _check(
                self.histograms.shape == expected,
                f"histograms are {self.histograms.shape}; expected {expected}",
            )
        if self.evaluation is not None:
            for part in (self.evaluation.full, self.evaluation.selected):
                _check(
                    len(part.iou) == len(part.class_precision) == len(self.classes),
                    f"evaluation has {len(part.iou)} classes; expected {len(self.classes)}",
                )

    @property
    def predicted(self) -> int:
        return sum(row.predicted for row in self.classes)

    @property
    def selected(self) -> int:
        return sum(row.selected for row in self.classes)

    @property
    def selected_fraction(self) -> float | None:
        """Of the pixels that have a prediction."""
        return self.selected / self.predicted if self.predicted else None

    @property
    def images_per_s(self) -> float | None:
        return self.images_labelled / self.wall_s if self.wall_s > 0 else None
