"""Any folder of images and a folder of label PNGs of the same names: your own data.

Also what `cada-deploy pseudo-label` writes: `run = OUT` takes OUT/labels, and OUT/confidence as the
weights of the pixels where `weighted = true`. An image that the run rejected has no labels there,
and counts as missing.
"""

from __future__ import annotations

from pathlib import Path

from cada_deploy.classes import class_set
from cada_deploy.errors import UsageError, nearest

from ..label_ids import CITYSCAPES_LABEL_IDS, LabelIds, label_ids_of, train_ids_of
from ..labelled_images import (
    Chosen,
    Folder,
    LabelledImages,
    Reading,
    Tolerance,
    open_images,
    require_folders,
)

KIND = "pairs"
LAYOUT = """
IMAGES/any/path/frame.png    any image format, any depth
LABELS/any/path/frame.png    8-bit grey or palette PNG of ids; IMAGES alone is a set without labels
WEIGHTS/any/path/frame.png   16-bit grey PNG: 65535 counts a pixel as 1
"""


def open(
    images: Path,
    labels: Path | None = None,
    weights: Path | None = None,
    run: Path | None = None,
    weighted: bool = False,
    root: Path = Path(),
    classes: str = "cityscapes-19",
    ids: str = "train",
    list: Path | None = None,
    limit: int = 0,
    max_missing: float = 0.0,
    max_mismatched: int = 0,
) -> LabelledImages:
    """images, labels, weights and run lie below root, where one is given. ids: `train` or `label`,
    what the label files hold."""
    if run is not None and (labels is not None or weights is not None):
        raise UsageError(f"{KIND}: run stands for labels and weights; give it or them")
    if run is not None:
        labels, weights = run / "labels", run / "confidence" if weighted else None
    elif weighted and weights is None:
        raise UsageError(f"{KIND}: weighted = true needs run, or give weights")
    if weights is not None and labels is None:
        raise UsageError(f"{KIND}: weights of pixels need labels")
    there = [root / p for p in (images, labels, weights) if p is not None]
    remedy = "Confidence maps are written by `pseudo-label --confidence`." if weights else ""
    require_folders(root, there, LAYOUT, remedy)
    return open_images(
        KIND,
        Folder(root / images),
        None if labels is None else Folder(root / labels),
        None if labels is None else Reading(_ids(ids, classes)),
        Chosen(root, list, limit),
        Tolerance(max_missing, max_mismatched),
        weights=None if weights is None else Folder(root / weights),
        classes=class_set(classes),
    )


def _ids(ids: str, classes: str) -> LabelIds:
    known = class_set(classes)
    if ids == "train":
        return train_ids_of(known)
    if ids != "label":
        raise UsageError(f"{KIND}: ids is {ids!r}; {nearest(ids, ('train', 'label'))}")
    return CITYSCAPES_LABEL_IDS if classes == "cityscapes-19" else label_ids_of(known)
