"""Cityscapes: leftImg8bit and gtFine as downloaded. As a target it needs no labels.

The download has labelIds only; labelTrainIds appear after `csCreateTrainIdLabelImgs`.
"""

from __future__ import annotations

from pathlib import Path

from cada_deploy.errors import UsageError, nearest

from ..label_ids import CITYSCAPES_LABEL_IDS, CITYSCAPES_TRAIN_IDS
from ..labelled_images import (
    Chosen,
    Folder,
    LabelledImages,
    Reading,
    Tolerance,
    open_images,
    require_folders,
)

KIND = "cityscapes"
IDS = {"labelIds": CITYSCAPES_LABEL_IDS, "labelTrainIds": CITYSCAPES_TRAIN_IDS}
LAYOUT = """
ROOT/leftImg8bit/SPLIT/CITY/CITY_000000_000019_leftImg8bit.png
ROOT/gtFine/SPLIT/CITY/CITY_000000_000019_gtFine_labelIds.png    (not with labelled = false)
"""


def open(
    root: Path,
    split: str = "train",
    labelled: bool = True,
    ids: str = "labelIds",
    list: Path | None = None,
    limit: int = 0,
    max_missing: float = 0.0,
    max_mismatched: int = 0,
) -> LabelledImages:
    if ids not in IDS:
        raise UsageError(f"{KIND}: ids is {ids!r}; {nearest(ids, IDS)}")
    images = Folder(root / "leftImg8bit" / split, "_leftImg8bit")
    labels = Folder(root / "gtFine" / split, f"_gtFine_{ids}") if labelled else None
    require_folders(root, [images.path], LAYOUT)
    if labels is not None:
        remedy = "A target without labels is opened with labelled = false."
        require_folders(root, [labels.path], LAYOUT, remedy)
        _require_ids(labels.path, ids)
    return open_images(
        KIND,
        images,
        labels,
        Reading(IDS[ids]) if labelled else None,
        Chosen(root, list, limit),
        Tolerance(max_missing, max_mismatched),
    )


def _require_ids(folder: Path, ids: str) -> None:
    """Raises UsageError when the folder has the other encoding only."""
    if any(folder.rglob(f"*_gtFine_{ids}.png")):
        return
    (other,) = IDS.keys() - {ids}
    if any(folder.rglob(f"*_gtFine_{other}.png")):
        raise UsageError(
            f"{folder} has no _gtFine_{ids}.png but _gtFine_{other}.png: ids = {other!r}"
        )
