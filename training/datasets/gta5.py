"""GTA5 ("Playing for Data", 24,966 frames): images and palette PNGs of Cityscapes label ids.

A label PNG's indices are the ids; its 256-entry palette is only for looking at, and a PNG that was
converted to RGB is refused. Frames are mostly 1914x1052 pixels, some 1914x1046. Downloads of 24,941
pairs are known: 25 frames are missing there.
"""

from __future__ import annotations

from pathlib import Path

from ..label_ids import CITYSCAPES_LABEL_IDS
from ..labelled_images import (
    Chosen,
    Folder,
    LabelledImages,
    Reading,
    Tolerance,
    open_images,
    require_folders,
)

KIND = "gta5"
LAYOUT = """
ROOT/images/00001.png ... 24966.png
ROOT/labels/00001.png ... 24966.png    palette PNGs of label ids, as downloaded
"""
ABOUT_MISSING = (
    "One download of GTA5 has 24,941 pairs of 24,966: max_missing = 0.002 leaves its 25 out."
)
ABOUT_MISMATCHED = (
    "Published GTA5 training lists leave out 15188 and 17705 as invalid: so does max_mismatched "
    "= 2, if they are the ones."
)


def open(
    root: Path,
    list: Path | None = None,
    limit: int = 0,
    max_missing: float = 0.0,
    max_mismatched: int = 0,
) -> LabelledImages:
    require_folders(root, [root / "images", root / "labels"], LAYOUT)
    return open_images(
        KIND,
        Folder(root / "images"),
        Folder(root / "labels"),
        Reading(CITYSCAPES_LABEL_IDS),
        Chosen(root, list, limit),
        Tolerance(max_missing, max_mismatched, ABOUT_MISSING, ABOUT_MISMATCHED),
    )
