"""Which files a selection writes for each image, and their names below OUT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy import labels
from cada_deploy.classes import ClassSet
from cada_deploy.errors import UsageError, nearest
from cada_deploy.fused import Selection
from cada_deploy.image_files import output_stem

IDS = ("train", "label")


@dataclass(frozen=True)
class LabelFiles:
    """labels/<stem>.png always; overlay/, confidence/ and entropy/<stem>.png when asked for.

    ids "train" writes train ids and 255 for what is not selected, "label" the data set's own ids
    and 0 (Cityscapes labelIds, as CBST's loaders expect).
    """

    ids: str = "train"
    overlay: bool = False
    confidence: bool = False
    entropy: bool = False

    def __post_init__(self) -> None:
        if self.ids not in IDS:
            raise UsageError(f"--ids is {self.ids!r}; {nearest(self.ids, IDS)}")

    @property
    def needs_image(self) -> bool:
        return self.overlay

    @property
    def unwanted(self) -> tuple[str, ...]:
        """Folders below OUT that this choice does not write; an earlier one may have."""
        return tuple(k for k in ("overlay", "confidence", "entropy") if not getattr(self, k))

    def encode(
        self,
        relative: bytes,
        image: npt.NDArray[np.uint8] | None,
        selection: Selection,
        classes: ClassSet,
    ) -> Iterator[tuple[bytes, bytes]]:
        """(path below OUT, PNG bytes) for every file of one image."""
        name = output_stem(relative) + b".png"
        ids = selection.labels
        if self.ids == "label":
            ids = classes.label_id_table[ids]
        yield b"labels/" + name, labels.encode_label_png(ids)
        if self.overlay and image is not None:
            shown = labels.overlay(image, selection.labels, classes)
            yield b"overlay/" + name, labels.encode_rgb_png(shown)
        if selection.confidence is not None:
            yield b"confidence/" + name, labels.encode_confidence_png16(selection.confidence)
        if selection.entropy is not None:
            yield b"entropy/" + name, labels.encode_entropy_png16(selection.entropy, len(classes))

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))
