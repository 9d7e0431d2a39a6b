"""SYNTHIA-RAND-CITYSCAPES (9,400 frames): RGB and 16-bit label PNGs of SYNTHIA's own 23 ids.

A label PNG has the category in its first channel and the instance in the second. Readers that
reduce it to 8 bits show categories 0 to 3 at most; here all 16 bits are read. 8-bit grey PNGs of
the first channel (`parsed_LABELS`) are read too. Train ids are Cityscapes-19; `classes` says which
of them count: the 16 or 13 of the literature, or all 19.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from cada_deploy.errors import ArtefactMismatch, UsageError, nearest
from cada_deploy.images import examine
from cada_deploy.labels import read_label_png
from cada_deploy.rejections import ImageRejected

from ..label_ids import LabelIds, named_ids
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

KIND = "synthia"
LAYOUT = """
ROOT/RGB/0000000.png ... 0009399.png    ROOT: RAND_CITYSCAPES, or the folder that holds it
ROOT/GT/LABELS/0000000.png ...          16 bits, two or three channels
"""

# Not among them: 0 void, 13 parking slot, 14 road works, 22 lane marking.
SYNTHIA_IDS = {
    1: "sky", 2: "building", 3: "road", 4: "sidewalk", 5: "fence", 6: "vegetation", 7: "pole",
    8: "car", 9: "traffic sign", 10: "person", 11: "bicycle", 12: "motorcycle",
    15: "traffic light", 16: "terrain", 17: "rider", 18: "truck", 19: "bus", 20: "train",
    21: "wall",
}  # fmt: skip
_LAST_ID = 22
WITHOUT = {
    "synthia-16": {"terrain", "truck", "train"},
    "synthia-13": {"terrain", "truck", "train", "wall", "fence", "pole"},
    "cityscapes-19": set[str](),
}


def open(
    root: Path,
    classes: str = "synthia-16",
    labels: Path | None = None,
    list: Path | None = None,
    limit: int = 0,
    max_missing: float = 0.0,
    max_mismatched: int = 0,
) -> LabelledImages:
    """labels: another folder of label PNGs below ROOT, such as parsed_LABELS."""
    if classes not in WITHOUT:
        raise UsageError(f"{KIND}: classes is {classes!r}; {nearest(classes, WITHOUT)}")
    images = existing(root / "RGB", root / "RAND_CITYSCAPES" / "RGB")
    truth = images.parent / (labels or Path("GT/LABELS"))
    require_folders(root, [images, truth], LAYOUT)
    return open_images(
        KIND,
        Folder(images),
        Folder(truth),
        Reading(ids_of(classes), read_categories),
        Chosen(root, list, limit),
        Tolerance(max_missing, max_mismatched),
    )


def ids_of(classes: str) -> LabelIds:
    """SYNTHIA's ids; those outside the chosen classes are ignored."""
    counted = {k: name for k, name in SYNTHIA_IDS.items() if name not in WITHOUT[classes]}
    ignored = frozenset(range(_LAST_ID + 1)) - counted.keys()
    return LabelIds(f"ids of SYNTHIA ({classes})", named_ids(counted), ignored)


def read_categories(data: bytes, name: str) -> npt.NDArray[np.uint8]:
    """(H, W) SYNTHIA ids of a label PNG. Raises ArtefactMismatch."""
    try:
        found = examine(data)
    except ImageRejected as error:
        raise ArtefactMismatch(f"{name} cannot be read as a label PNG: {error}") from error
    if found.format != "PNG" or "sixteen-bit" not in found.notices:
        return read_label_png(data, name)
    stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if stored is None or stored.dtype != np.uint16:
        raise ArtefactMismatch(f"{name}: OpenCV cannot decode this 16-bit PNG; get it again")
    # OpenCV gives BGR, and two channels as BGRA with B = G = R: the first of the file is the third.
    categories = stored if stored.ndim == 2 else stored[..., 2]
    if categories.max() > 255:
        raise ArtefactMismatch(
            f"{name} holds the category {categories.max()}; SYNTHIA's end at {_LAST_ID}. Expected "
            "the category in the first of two or three 16-bit channels (GT/LABELS)"
        )
    return np.ascontiguousarray(categories, np.uint8)
