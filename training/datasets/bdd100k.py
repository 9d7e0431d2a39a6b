"""BDD100K's 10,000 frames with semantic labels in Cityscapes train ids: both archives' layouts."""

from __future__ import annotations

from pathlib import Path

from ..label_ids import CITYSCAPES_TRAIN_IDS
from ..labelled_images import (
    Chosen,
    Folder,
    LabelledImages,
    Reading,
    Tolerance,
    existing,
    open_images,
    require_folders,
)

KIND = "bdd100k"
LAYOUT = """
ROOT/images/10k/SPLIT/0004a4c0-d4dff0ad.jpg
ROOT/labels/sem_seg/masks/SPLIT/0004a4c0-d4dff0ad.png    (not with labelled = false)
    or, in the older archive,
ROOT/seg/images/SPLIT/0004a4c0-d4dff0ad.jpg
ROOT/seg/labels/SPLIT/0004a4c0-d4dff0ad_train_id.png
"""


def open(
    root: Path,
    split: str = "train",
    labelled: bool = True,
    list: Path | None = None,
    limit: int = 0,
    max_missing: float = 0.0,
    max_mismatched: int = 0,
) -> LabelledImages:
    pictures = existing(root / "images" / "10k" / split, root / "seg" / "images" / split)
    older = pictures.parent.parent.name == "seg"
    masks = Folder(root / "labels" / "sem_seg" / "masks" / split)
    truth = Folder(root / "seg" / "labels" / split, "_train_id") if older else masks
    require_folders(root, [pictures], LAYOUT)
    if labelled:
        remedy = "Without labels (the test split) it is opened with labelled = false."
        require_folders(root, [truth.path], LAYOUT, remedy)
    return open_images(
        KIND,
        Folder(pictures),
        truth if labelled else None,
        Reading(CITYSCAPES_TRAIN_IDS) if labelled else None,
        Chosen(root, list, limit),
        Tolerance(max_missing, max_mismatched),
    )
