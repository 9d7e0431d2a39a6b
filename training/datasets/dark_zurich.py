"""Dark Zurich: the same streets by day, at twilight and at night. Only `val` has labels."""

from __future__ import annotations

from pathlib import Path

from cada_deploy.errors import UsageError, nearest

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

KIND = "dark-zurich"
TIMES = ("day", "twilight", "night")
LAYOUT = """
ROOT/rgb_anon/train/night/GOPR0351/GOPR0351_frame_000159_rgb_anon.png
ROOT/rgb_anon/val/night/GOPR0356/GOPR0356_frame_000321_rgb_anon.png
ROOT/gt/val/night/GOPR0356/GOPR0356_frame_000321_gt_labelTrainIds.png    (with labelled = true)
    (or as unpacked, below Dark_Zurich_train_anon and Dark_Zurich_val_anon)
"""


def open(
    root: Path,
    split: str = "train",
    time: str = "night",
    labelled: bool = False,
    list: Path | None = None,
    limit: int = 0,
    max_missing: float = 0.0,
    max_mismatched: int = 0,
) -> LabelledImages:
    if time not in TIMES:
        raise UsageError(f"{KIND}: time is {time!r}; {nearest(time, TIMES)}")
    unpacked = root / f"Dark_Zurich_{split}_anon"
    within = Path(split) / time
    pictures = existing(root / "rgb_anon" / within, unpacked / "rgb_anon" / within)
    truth = existing(root / "gt" / within, unpacked / "gt" / within)
    require_folders(root, [pictures], LAYOUT)
    if labelled:
        require_folders(root, [truth], LAYOUT, "Only val has labels: use labelled = false.")
    return open_images(
        KIND,
        Folder(pictures, "_rgb_anon"),
        Folder(truth, "_gt_labelTrainIds") if labelled else None,
        Reading(CITYSCAPES_TRAIN_IDS) if labelled else None,
        Chosen(root, list, limit),
        Tolerance(max_missing, max_mismatched),
    )
