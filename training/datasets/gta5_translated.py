"""GTA5 whose images a network has drawn again in the target's style, as BDL's first step does.

The images lie elsewhere and keep their names; the labels are GTA5's own. Not every frame was
published translated, so a fifth of the set may be missing.
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
from . import gta5

KIND = "gta5-translated"
LAYOUT = """
IMAGES/00001.png ...         translated; below ROOT or anywhere
ROOT/labels/00001.png ...    GTA5's palette PNGs
"""
ABOUT_MISMATCHED = (
    "Images that were translated at another size: fit_labels = true brings the labels to theirs "
    f"where the shape agrees within 2 %. {gta5.ABOUT_MISMATCHED}"
)


def open(
    root: Path,
    images: Path,
    list: Path | None = None,
    limit: int = 0,
    fit_labels: bool = False,
    max_missing: float = 0.2,
    max_mismatched: int = 0,
) -> LabelledImages:
    """root: of GTA5; images: the folder of the translated ones, below root or from here."""
    translated = next((p for p in (root / images, images) if p.is_dir()), root / images)
    require_folders(root, [translated, root / "labels"], LAYOUT)
    return open_images(
        KIND,
        Folder(translated),
        Folder(root / "labels"),
        Reading(CITYSCAPES_LABEL_IDS, fit=fit_labels),
        Chosen(root, list, limit),
        Tolerance(max_missing, max_mismatched, gta5.ABOUT_MISSING, ABOUT_MISMATCHED),
    )
