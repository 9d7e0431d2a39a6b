"""How good label maps are: IoU as cityscapesScripts defines it, coverage and precision.

Counts are integers and add up over images, shards and machines. Void truth is ignored. A pixel
without a prediction (255: not selected) on labelled ground counts as a miss, as the official
script counts predictions of void; the figures "on selected pixels" leave it out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cada_deploy.classes import ClassSet
from cada_deploy.errors import ArtefactMismatch

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ConfusionMatrix:
    """counts (C, C + 1) int64, read-only: row = true class, column = predicted class, the last
    column = no prediction. Pixels whose truth is void are not counted. `a + b` merges."""

    counts: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        counts = np.array(self.counts, np.int64)
        if counts.ndim != 2 or counts.shape[1] != counts.shape[0] + 1 or (counts < 0).any():
            raise ValueError(f"expected (C, C + 1) counts, none negative; found {counts.shape}")
        counts.setflags(write=False)
        object.__setattr__(self, "counts", counts)

    def __add__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        if self.counts.shape != other.counts.shape:
            raise ArtefactMismatch(
                f"cannot add a confusion matrix of {len(other.counts)} classes to one of "
                f"{len(self.counts)}"
            )
        return ConfusionMatrix(self.counts + other.counts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfusionMatrix) and np.array_equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment]

    @property
    def labelled(self) -> npt.NDArray[np.int64]:
        """(C,) pixels whose truth is each class."""
        return np.asarray(self.counts.sum(axis=1))

    @property
    def iou(self) -> Floats:
        """(C,) TP / (TP + FP + FN), unpredicted pixels among the FN; NaN for a class that is
        neither in the truth nor predicted on labelled ground."""
        return _iou(self.counts[:, :-1], self.labelled)

    @property
    def iou_selected(self) -> Floats:
        """(C,) the same on the pixels that have a prediction."""
        selected = self.counts[:, :-1]
        return _iou(selected, selected.sum(axis=1))

    @property
    def mean_iou(self) -> float:
        """Mean over the classes that have an IoU; NaN when none has."""
        return _mean(self.iou)

    @property
    def pixel_accuracy(self) -> float:
        """Correct / labelled pixels; an unpredicted pixel is not correct."""
        return _ratio(self._correct, self.counts.sum())

    @property
    def coverage(self) -> float:
        """Share of the labelled pixels that have a prediction."""
        return _ratio(self.counts[:, :-1].sum(), self.counts.sum())

    @property
    def coverage_per_class(self) -> Floats:
        """(C,) the same among the pixels whose truth is each class; NaN where there are none."""
        return _divided(self.counts[:, :-1].sum(axis=1), self.labelled)

    @property
    def precision(self) -> float:
        """Correct / predicted labelled pixels: accuracy on selected pixels."""
        return _ratio(self._correct, self.counts[:, :-1].sum())

    @property
    def precision_per_class(self) -> Floats:
        """(C,) correct / pixels predicted as each class on labelled ground; NaN where none are."""
        selected = self.counts[:, :-1]
        return _divided(np.diagonal(selected), selected.sum(axis=0))

    @property
    def _correct(self) -> np.int64:
        return np.int64(np.trace(self.counts[:, :-1]))


def confusion_matrix(
    prediction: npt.NDArray[np.uint8],
    truth: npt.NDArray[np.uint8],
    classes: ClassSet,
    *,
    prediction_name: str = "the prediction",
    truth_name: str = "the truth",
) -> ConfusionMatrix:
    """Counts of one image from two (H, W) uint8 maps of train ids.

    classes.ignore_id (255) means "not selected" in the prediction and "void" in the truth. The
    names stand in messages. Raises ArtefactMismatch for another value outside the class set, or
    when the maps differ in size.
    """
    for array, name in ((prediction, prediction_name), (truth, truth_name)):
        if array.ndim != 2 or array.dtype != np.uint8:
            raise ArtefactMismatch(f"{name} is {array.dtype} {array.shape}; expected (H, W) uint8")
    if prediction.shape != truth.shape:
        raise ArtefactMismatch(
            f"{prediction_name} is {_size(prediction)} but {truth_name} is {_size(truth)} (HxW); "
            "make the labels at the size of the truth (--label-size)"
        )
    # One pass makes all 65,536 pairs of bytes: foreign values show without a pass of their own.
    pairs = truth.astype(np.uint16).ravel() << np.uint16(8) | prediction.ravel()
    table = np.bincount(pairs, minlength=65536).reshape(256, 256)
    _no_foreign(table.sum(axis=0), classes, prediction_name)
    _no_foreign(table.sum(axis=1), classes, truth_name)
    columns = [*range(len(classes)), classes.ignore_id]
    return ConfusionMatrix(table[: len(classes), columns])


def empty_matrix(classes: ClassSet) -> ConfusionMatrix:
    """The matrix of no image: where a sum begins."""
    return ConfusionMatrix(np.zeros((len(classes), len(classes) + 1), np.int64))


@dataclass(frozen=True)
class TableRow:
    """One class of a result table, figures 0..1, NaN where a class is absent. In the last row iou
    and iou_selected are means over classes, precision and coverage are over all pixels."""

    name: str
    iou: float
    iou_selected: float
    precision: float
    coverage: float
    labelled_pixels: int


def iou_table(matrix: ConfusionMatrix, classes: ClassSet) -> list[TableRow]:
    """Rows in class order (for cityscapes-19 the paper's column order), then the row 'mean'."""
    if len(matrix.counts) != len(classes):
        raise ArtefactMismatch(
            f"the matrix has {len(matrix.counts)} classes, but class set {classes.name!r} has "
            f"{len(classes)}"
        )
    columns = zip(
        classes.names,
        matrix.iou.tolist(),
        matrix.iou_selected.tolist(),
        matrix.precision_per_class.tolist(),
        matrix.coverage_per_class.tolist(),
        matrix.labelled.tolist(),
    )
    mean = TableRow(
        "mean",
        matrix.mean_iou,
        _mean(matrix.iou_selected),
        matrix.precision,
        matrix.coverage,
        int(matrix.labelled.sum()),
    )
    return [*(TableRow(*column) for column in columns), mean]


def _iou(selected: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> Floats:
    correct = np.diagonal(selected)
    return _divided(correct, rows + selected.sum(axis=0) - correct)


def _divided(part: npt.NDArray[np.int64], whole: npt.NDArray[np.int64]) -> Floats:
    result = np.full(len(part), np.nan)
    np.divide(part, whole, out=result, where=whole > 0)
    return result


def _ratio(part: np.int64, whole: np.int64) -> float:
    return float(part) / float(whole) if whole else float("nan")


def _mean(values: Floats) -> float:
    present = values[~np.isnan(values)]
    return float(present.sum() / len(present)) if len(present) else float("nan")


def _no_foreign(pixels: npt.NDArray[np.int64], classes: ClassSet, name: str) -> None:
    """pixels (256,): how often each value occurs."""
    foreign = [v for v in np.flatnonzero(pixels) if v >= len(classes) and v != classes.ignore_id]
    if foreign:
        raise ArtefactMismatch(
            f"{name} holds the value {foreign[0]} in {pixels[foreign[0]]} pixels; class set "
            f"{classes.name!r} has 0..{len(classes) - 1} and {classes.ignore_id}. Are these label "
            "ids of the data set instead of train ids, or is it another class set?"
        )


def _size(array: npt.NDArray[np.uint8]) -> str:
    return f"{array.shape[0]}x{array.shape[1]}"
