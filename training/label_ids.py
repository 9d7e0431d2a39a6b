"""What the numbers in a data set's label files mean: the train id of each, or that there is none.

A number that a data set does not define is an error and not "ignored": it means another data set,
another encoding or a damaged file, and a network would learn from the rest of it without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt

from cada_deploy.classes import CITYSCAPES_19, IGNORE_ID, ClassSet
from cada_deploy.errors import ArtefactMismatch

LabelMap = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class LabelIds:
    """train_ids: file id -> train id; ignored: file ids that become 255; remedy: for the error."""

    name: str
    train_ids: Mapping[int, int]
    ignored: frozenset[int]
    remedy: str = ""

    def to_train_ids(self, labels: LabelMap, where: str) -> LabelMap:
        """(H, W) file ids -> (H, W) train ids. Raises ArtefactMismatch, with `where` and values."""
        # calcHist and LUT: 3 and 1.4 ms for 1052x1914, half of what NumPy's counterparts take.
        counts = cv2.calcHist([labels], [0], None, [256], [0, 256]).ravel()
        known = self.train_ids.keys() | self.ignored
        strange = [int(v) for v in np.flatnonzero(counts) if int(v) not in known]
        if strange:
            pixels = int(sum(counts[v] for v in strange))
            values = ", ".join(map(str, strange[:8])) + (", ..." if len(strange) > 8 else "")
            raise ArtefactMismatch(
                f"{where} holds the values {values} ({pixels} pixels), which are no {self.name}; "
                f"expected {_ranges(known)}. {self.remedy}".rstrip()
            )
        return cast(LabelMap, cv2.LUT(labels, self._table()))

    def _table(self) -> LabelMap:
        table = np.full(256, IGNORE_ID, np.uint8)
        table[list(self.train_ids)] = list(self.train_ids.values())
        return table

    def description(self) -> str:
        """Everything that decides what is read, for fingerprints."""
        return f"{self.name} {sorted(self.train_ids.items())} ignored {sorted(self.ignored)}"


def named_ids(names: Mapping[int, str]) -> dict[int, int]:
    """file id -> Cityscapes train id, from the Cityscapes name of each file id."""
    return {k: CITYSCAPES_19.names.index(name) for k, name in names.items()}


def train_ids_of(classes: ClassSet) -> LabelIds:
    """Files that hold train ids themselves; 255 is ignored."""
    count = len(classes)
    return LabelIds(
        f"train ids of {classes.name}",
        {k: k for k in range(count)},
        frozenset({classes.ignore_id}),
        f"Are these label ids? Train ids end at {count - 1}",
    )


def label_ids_of(classes: ClassSet) -> LabelIds:
    """Files that hold the data set's own ids; an id of no class is ignored."""
    known = {label_id: k for k, label_id in enumerate(classes.label_ids)}
    return LabelIds(f"label ids of {classes.name}", known, frozenset(range(256)) - known.keys())


# Cityscapes numbers its categories 0 to 33, GTA5 adds 34 (licence plate); 255 is what tools write
# for Cityscapes' -1. Files of the two cannot be told apart, and need not be.
CITYSCAPES_LABEL_IDS = LabelIds(
    "label ids of Cityscapes",
    {label_id: k for k, label_id in enumerate(CITYSCAPES_19.label_ids)},
    (frozenset(range(35)) | {255}) - frozenset(CITYSCAPES_19.label_ids),
    "Is this another data set, or a map of colours or instances?",
)
CITYSCAPES_TRAIN_IDS = train_ids_of(CITYSCAPES_19)


def _ranges(values: Iterable[int]) -> str:
    """{0, 1, 2, 255} -> '0 to 2, 255'."""
    spans: list[list[int]] = []
    for value in sorted(values):
        if spans and value == spans[-1][1] + 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in spans)
