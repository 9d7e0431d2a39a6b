"""ACDC: driving in fog, at night, in rain and in snow, with Cityscapes' categories."""

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
    existing,
    open_images,
    require_folders,
)

KIND = "acdc"
CONDITIONS = ("fog", "night", "rain", "snow")
IDS = {"labelTrainIds": CITYSCAPES_TRAIN_IDS, "labelIds": CITYSCAPES_LABEL_IDS}
LAYOUT = """
ROOT/rgb_anon/CONDITION/SPLIT/GOPR0475/GOPR0475_frame_000041_rgb_anon.png
ROOT/gt/CONDITION/SPLIT/GOPR0475/GOPR0475_frame_000041_gt_labelTrainIds.png
    (or both as unpacked, below rgb_anon_trainvaltest and gt_trainval; gt not with labelled = false)
"""


def open(
    root: Path,
    split: str = "train",
    condition: str = "all",
    labelled: bool = True,
    ids: str = "labelTrainIds",
    list: Path | None = None,
    limit: int = 0,
    max_missing: float = 0.0,
    max_mismatched: int = 0,
) -> LabelledImages:
    if condition not in (*CONDITIONS, "all"):
        raise UsageError(
            f"{KIND}: condition is {condition!r}; {nearest(condition, (*CONDITIONS, 'all'))}"
        )
    if ids not in IDS:
        raise UsageError(f"{KIND}: ids is {ids!r}; {nearest(ids, IDS)}")
    conditions = CONDITIONS if condition == "all" else (condition,)
    within = tuple(f"{c}/{split}" for c in conditions)
    pictures = existing(root / "rgb_anon", root / "rgb_anon_trainvaltest" / "rgb_anon")
    truth = existing(root / "gt", root / "gt_trainval" / "gt")
    require_folders(root, [pictures / w for w in within], LAYOUT)
    if labelled:
        remedy = "Without labels (the test split) it is opened with labelled = false."
        require_folders(root, [truth / w for w in within], LAYOUT, remedy)
    return open_images(
        KIND,
        Folder(pictures, "_rgb_anon", within),
        Folder(truth, f"_gt_{ids}", within) if labelled else None,
        Reading(IDS[ids]) if labelled else None,
        Chosen(root, list, limit),
        Tolerance(max_missing, max_mismatched),
    )
