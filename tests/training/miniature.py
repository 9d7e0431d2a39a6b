"""Miniature copies of data sets: their exact layout, names and encodings, our own pixels.

Every builder writes two to four frames below the folder that it is given and returns nothing; the
labels of every frame are KNOWN in the set's own ids, so that a test can say which train id each
pixel must have. No pixel of a real data set is here.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cada_deploy.classes import CITYSCAPES_19

HEIGHT, WIDTH = 12, 20

Bytes = npt.NDArray[np.uint8]


def picture(seed: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def label_map(ids: Sequence[int], size: tuple[int, int] = (HEIGHT, WIDTH)) -> Bytes:
    """Columns of the ids, left to right."""
    columns = np.arange(size[1]) * len(ids) // size[1]
    return np.broadcast_to(np.array(ids, np.uint8)[columns], size).copy()


def write_image(path: Path, seed: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed, size)).save(path)


def write_grey(path: Path, labels: Bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)


def write_palette(path: Path, labels: Bytes) -> None:
    """As GTA5 has it: mode P, 256 entries."""
    path.parent.mkdir(parents=True, exist_ok=True)
    palette = np.zeros((256, 3), np.uint8)
    palette[list(CITYSCAPES_19.label_ids)] = CITYSCAPES_19.palette
    image = Image.fromarray(labels).convert("L")
    image.putpalette(palette.tobytes())
    image.save(path)


def png16(channels: npt.NDArray[np.integer]) -> bytes:
    """(H, W, C) of C = 1 to 3 -> a 16-bit PNG of that many channels, which Pillow cannot write."""
    height, width, count = channels.shape
    kind = {1: 0, 2: 4, 3: 2}[count]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in channels)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )


# --- the sets -----------------------------------------------------------------------------------

GTA5_KNOWN = (0, 7, 8, 26, 33, 34)  # unlabelled, road, sidewalk, car, bicycle, licence plate
GTA5_TRAIN = (255, 0, 1, 13, 18, 255)


def gta5(root: Path, frames: int = 3) -> None:
    for k in range(1, frames + 1):
        size = (HEIGHT, WIDTH) if k < 3 else (HEIGHT - 2, WIDTH)  # GTA5 has several sizes
        write_image(root / f"images/{k:05d}.png", k, size)
        write_palette(root / f"labels/{k:05d}.png", label_map(GTA5_KNOWN, size))


CITYSCAPES_KNOWN = (3, 7, 11, 24, 31, 33)  # out of roi, road, building, person, train, bicycle
CITYSCAPES_TRAIN = (255, 0, 2, 11, 16, 18)
CITYSCAPES_STEMS = {
    "train": ("aachen/aachen_000000_000019", "aachen/aachen_000001_000019",
              "zurich/zurich_000000_000019"),
    "val": ("frankfurt/frankfurt_000000_000294", "munster/munster_000000_000019"),
}  # fmt: skip


def cityscapes(root: Path, labelled: bool = True, train_ids: bool = False) -> None:
    for split, stems in CITYSCAPES_STEMS.items():
        for k, stem in enumerate(stems):
            write_image(root / f"leftImg8bit/{split}/{stem}_leftImg8bit.png", k)
            if not labelled:
                continue
            start = f"gtFine/{split}/{stem}_gtFine"
            write_grey(root / f"{start}_labelIds.png", label_map(CITYSCAPES_KNOWN))
            if train_ids:
                write_grey(root / f"{start}_labelTrainIds.png", label_map(CITYSCAPES_TRAIN))
            # What else is in the download and must not be read.
            write_image(root / f"{start}_color.png", k)
            (root / f"{start}_instanceIds.png").write_bytes(
                png16(label_map(CITYSCAPES_KNOWN)[..., None].astype(np.uint16) * 1000)
            )
            (root / f"{start}_polygons.json").write_text("{}")


SYNTHIA_KNOWN = (0, 3, 16, 21, 12, 22)  # void, road, terrain, wall, motorcycle, lane marking
SYNTHIA_TRAIN = {
    "synthia-16": (255, 0, 255, 3, 17, 255),
    "synthia-13": (255, 0, 255, 255, 17, 255),
    "cityscapes-19": (255, 0, 9, 3, 17, 255),
}


def synthia(root: Path, channels: int = 3) -> None:
    """Categories in the first channel, instances of up to 700 in the second."""
    for k in range(2):
        write_image(root / f"RGB/{k:07d}.png", k)
        labels = np.zeros((HEIGHT, WIDTH, channels), np.uint16)
        labels[..., 0] = label_map(SYNTHIA_KNOWN)
        labels[..., 1] = 700
        path = root / f"GT/LABELS/{k:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png16(labels))


TRAIN_KNOWN = (0, 2, 13, 18, 255)


def acdc(root: Path) -> None:
    for condition in ("fog", "night", "rain", "snow"):
        for split in ("train", "val", "test"):
            for k in (41, 47):
                stem = f"{condition}/{split}/GOPR0475/GOPR0475_frame_{k:06d}"
                write_image(root / f"rgb_anon/{stem}_rgb_anon.png", k)
                if split == "test":
                    continue
                write_grey(root / f"gt/{stem}_gt_labelTrainIds.png", label_map(TRAIN_KNOWN))
                write_grey(root / f"gt/{stem}_gt_labelIds.png", label_map(CITYSCAPES_KNOWN))
                write_grey(root / f"gt/{stem}_gt_invIds.png", label_map((0, 1)))


def dark_zurich(root: Path) -> None:
    for time in ("day", "twilight", "night"):
        for k in (159, 160):
            stem = f"train/{time}/GOPR0351/GOPR0351_frame_{k:06d}"
            write_image(root / f"rgb_anon/{stem}_rgb_anon.png", k)
    for k in (321, 322):
        stem = f"val/night/GOPR0356/GOPR0356_frame_{k:06d}"
        write_image(root / f"rgb_anon/{stem}_rgb_anon.png", k)
        write_grey(root / f"gt/{stem}_gt_labelTrainIds.png", label_map(TRAIN_KNOWN))
        write_grey(root / f"gt/{stem}_gt_invGray.png", label_map((0, 255)))


def bdd100k(root: Path, older: bool = False) -> None:
    images, labels, ending = ("images/10k", "labels/sem_seg/masks", "")
    if older:
        images, labels, ending = ("seg/images", "seg/labels", "_train_id")
    for split in ("train", "val", "test"):
        for k, stem in enumerate(("0004a4c0-d4dff0ad", "7b5d2f1e-00a1b2c3")):
            write_image(root / f"{images}/{split}/{stem}.jpg", k)
            if split != "test":
                write_grey(root / f"{labels}/{split}/{stem}{ending}.png", label_map(TRAIN_KNOWN))


CAMVID_KNOWN = (0, 3, 4, 8, 10, 11)  # sky, road, pavement, car, bicyclist, void
CAMVID_TRAIN = (10, 0, 1, 13, 18, 255)
CAMVID_DAY = ("0006R0_f00930", "0006R0_f00960", "0016E5_00390", "Seq05VD_f00000")
CAMVID_DUSK = ("0001TP_006690", "0001TP_006720", "0001TP_006750", "0001TP_006780")


def camvid(root: Path) -> None:
    """Two domains in Cityscapes train ids; every other dusk frame has development labels."""
    for k, stem in enumerate(CAMVID_DAY):
        write_image(root / f"day/images/{stem}.jpg", k)
        write_grey(root / f"day/labels/{stem}.png", label_map(TRAIN_KNOWN))
    for k, stem in enumerate(CAMVID_DUSK):
        write_image(root / f"dusk/images/{stem}.jpg", k)
        if k % 2 == 0:
            write_grey(root / f"dusk/dev_labels/{stem}.png", label_map(TRAIN_KNOWN))


def camvid_tutorial(root: Path) -> None:
    for k, split in enumerate(("train", "val", "test")):
        write_image(root / f"{split}/0016E5_{k:05d}.png", k)
        write_grey(root / f"{split}annot/0016E5_{k:05d}.png", label_map(CAMVID_KNOWN))


def pairs(root: Path) -> None:
    """Images of two kinds, one in a folder of its own, and what pseudo-label writes of them."""
    for k, name in enumerate(("a.png", "deep/b.jpg")):
        write_image(root / "images" / name, k)
        stem = name.rpartition(".")[0]
        write_grey(root / f"run/labels/{stem}.png", label_map(TRAIN_KNOWN))
        confidence = np.full((HEIGHT, WIDTH, 1), 65535, np.uint16)
        confidence[:, 0] = 0
        path = root / f"run/confidence/{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png16(confidence))
