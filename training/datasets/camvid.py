"""CamVid, 701 frames of five videos around Cambridge, four by day and one (0001TP) at dusk.

Two layouts. By domain (splits `day`, `dusk`, `dusk-dev`): labels are Cityscapes train ids already.
As the SegNet tutorial published it (splits `train`, `val`, `test`): the eleven classes that
`camvid-11` names, void being 11; they become Cityscapes train ids here. CamVid puts cars, trucks
and buses into one class and riders into another, so of the 19 categories eleven occur: wall,
traffic light, terrain, rider, truck, bus, train and motorcycle never do.

Neighbouring frames of a video are near-copies: split by `sequences` or by `fold`, a block of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cada_deploy.classes import class_set
from cada_deploy.errors import UsageError, nearest

from ..label_ids import CITYSCAPES_TRAIN_IDS, LabelIds, named_ids
from ..labelled_images import (
    Chosen,
    Folder,
    LabelledImages,
    Reading,
    Tolerance,
    open_images,
    require_folders,
)

KIND = "camvid"
LAYOUT = """
ROOT/day/images/0006R0_f00930.jpg     ROOT/day/labels/0006R0_f00930.png          split = "day"
ROOT/dusk/images/0001TP_006690.jpg                                               split = "dusk"
ROOT/dusk/images/0001TP_006690.jpg    ROOT/dusk/dev_labels/0001TP_006690.png     split = "dusk-dev"
    or the SegNet tutorial's
ROOT/train/0001TP_006690.png          ROOT/trainannot/0001TP_006690.png          split = "train"
    and val, valannot, test, testannot
"""
DOMAINS = {"day": ("day", "labels"), "dusk": ("dusk", None), "dusk-dev": ("dusk", "dev_labels")}
TUTORIAL = ("train", "val", "test")
VOID = 11

# Every class of camvid-11 by its Cityscapes name.
CITYSCAPES_NAMES = {
    "sky": "sky",
    "building": "building",
    "pole": "pole",
    "road": "road",
    "pavement": "sidewalk",
    "tree": "vegetation",
    "sign symbol": "traffic sign",
    "fence": "fence",
    "car": "car",
    "pedestrian": "person",
    "bicyclist": "bicycle",
}
CAMVID_IDS = LabelIds(
    "ids of camvid-11",
    named_ids({k: CITYSCAPES_NAMES[n] for k, n in enumerate(class_set("camvid-11").names)}),
    frozenset({VOID, 255}),
)


def open(
    root: Path,
    split: str,
    sequences: str = "",
    fold: str = "",
    list: Path | None = None,
    limit: int = 0,
    max_missing: float = 0.0,
    max_mismatched: int = 0,
) -> LabelledImages:
    """sequences: names of videos with commas between them, such as "0006R0,Seq05VD"; fold: "2/3" is
    the second of three blocks of consecutive frames, of what the other options leave."""
    splits = (*DOMAINS, *TUTORIAL)
    if split not in splits:
        raise UsageError(f"{KIND}: split is {split!r}; {nearest(split, splits)}")
    if split in DOMAINS:
        domain, folder = DOMAINS[split]
        images, ids = root / domain / "images", CITYSCAPES_TRAIN_IDS
        truth = None if folder is None else root / domain / folder
    else:
        images, truth, ids = root / split, root / f"{split}annot", CAMVID_IDS
    require_folders(root, [p for p in (images, truth) if p is not None], LAYOUT)
    wanted, block = [s.strip() for s in sequences.split(",") if s.strip()], _block(fold)
    return open_images(
        KIND,
        Folder(images),
        None if truth is None else Folder(truth),
        None if truth is None else Reading(ids),
        Chosen(root, list, limit, lambda names: _kept(names, wanted, block)),
        Tolerance(max_missing, max_mismatched),
        expected="labels" if split == "dusk-dev" else "either",
    )


def _kept(names: Sequence[str], sequences: Sequence[str], block: tuple[int, int]) -> Sequence[str]:
    known = {n.partition("_")[0] for n in names}
    for sequence in sequences:
        if sequence not in known:
            raise UsageError(
                f"{KIND}: no frame of sequence {sequence!r}; {nearest(sequence, known)}"
            )
    left = sorted(n for n in names if not sequences or n.partition("_")[0] in sequences)
    number, blocks = block
    return left[len(left) * (number - 1) // blocks : len(left) * number // blocks]


def _block(fold: str) -> tuple[int, int]:
    number, _, blocks = (fold or "1/1").partition("/")
    if not (number.isdecimal() and blocks.isdecimal() and 1 <= int(number) <= int(blocks)):
        raise UsageError(f'{KIND}: fold is {fold!r}; expected "K/N" with K from 1 to N')
    return int(number), int(blocks)
