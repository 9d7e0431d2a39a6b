"""Class sets: the names, ids and colours of the categories a model predicts.

A train id is a position in the set (0 .. C-1) and is what label PNGs hold; a label id is the
number the data set's own files use (Cityscapes labelIds: road is 7).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy.errors import UsageError, nearest

IGNORE_ID = 255


@dataclass(frozen=True)
class ClassSet:
    """C categories in train-id order.

    label_ids[k] is the data set's own id of category k; palette[k] its RGB colour (0..255).
    Raises UsageError when lengths differ, names repeat or a value is out of range.
    """

    name: str
    names: tuple[str, ...]
    label_ids: tuple[int, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_id: int = IGNORE_ID

    def __post_init__(self) -> None:
        count = len(self.names)
        if not 1 <= count <= 255:
            raise UsageError(f"class set {self.name!r} has {count} classes; expected 1 to 255")
        if len(self.label_ids) != count or len(self.palette) != count:
            raise UsageError(
                f"class set {self.name!r}: {count} names, {len(self.label_ids)} label ids and "
                f"{len(self.palette)} colours; give one of each per class"
            )
        if len(set(self.names)) != count or len(set(self.label_ids)) != count:
            raise UsageError(f"class set {self.name!r} repeats a name or a label id")
        if any(not 0 <= i <= 255 for i in self.label_ids):
            raise UsageError(f"class set {self.name!r}: label ids must lie in 0..255 (8-bit PNG)")
        if any(len(c) != 3 or any(not 0 <= v <= 255 for v in c) for c in self.palette):
            raise UsageError(f"class set {self.name!r}: colours are three numbers in 0..255")
        if not count <= self.ignore_id <= 255:
            raise UsageError(f"class set {self.name!r}: ignore id must lie in {count}..255")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def colours(self) -> npt.NDArray[np.uint8]:
        """(256, 3) uint8 lookup table by train id; ids outside the set are black."""
        table = np.zeros((256, 3), np.uint8)
        table[: len(self)] = self.palette
        return table

    @property
    def label_id_table(self) -> npt.NDArray[np.uint8]:
        """(256,) uint8 lookup table train id -> label id; ids outside the set become 0."""
        table = np.zeros(256, np.uint8)
        table[: len(self)] = self.label_ids
        return table

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "names": list(self.names),
            "label_ids": list(self.label_ids),
            "palette": [list(c) for c in self.palette],
            "ignore_id": self.ignore_id,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ClassSet:
        try:
            return cls(
                name=str(data["name"]),
                names=tuple(str(n) for n in data["names"]),
                label_ids=tuple(int(i) for i in data["label_ids"]),
                palette=tuple(tuple(int(v) for v in c) for c in data["palette"]),  # type: ignore[misc]
                ignore_id=int(data.get("ignore_id", IGNORE_ID)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"this is not a class set: {error!r}") from error


# Names, labelIds and colours as defined by the Cityscapes benchmark (cityscapesScripts labels.py).
_CITYSCAPES: tuple[tuple[str, int, tuple[int, int, int]], ...] = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)

# The eleven classes of CamVid as the SegNet tutorial numbers them, void being 11 there.
_CAMVID: tuple[tuple[str, int, tuple[int, int, int]], ...] = (
    ("sky", 0, (128, 128, 128)),
    ("building", 1, (128, 0, 0)),
    ("pole", 2, (192, 192, 128)),
    ("road", 3, (128, 64, 128)),
    ("pavement", 4, (60, 40, 222)),
    ("tree", 5, (128, 128, 0)),
    ("sign symbol", 6, (192, 128, 128)),
    ("fence", 7, (64, 64, 128)),
    ("car", 8, (64, 0, 128)),
    ("pedestrian", 9, (64, 64, 0)),
    ("bicyclist", 10, (0, 128, 192)),
)


def _built_in(name: str, rows: tuple[tuple[str, int, tuple[int, int, int]], ...]) -> ClassSet:
    return ClassSet(
        name=name,
        names=tuple(r[0] for r in rows),
        label_ids=tuple(r[1] for r in rows),
        palette=tuple(r[2] for r in rows),
    )


BUILT_IN = {
    "cityscapes-19": _built_in("cityscapes-19", _CITYSCAPES),
    "camvid-11": _built_in("camvid-11", _CAMVID),
}
CITYSCAPES_19 = BUILT_IN["cityscapes-19"]


def anonymous(count: int) -> ClassSet:
    """For a model whose class names nobody gave: class-0 .. class-(C-1), evenly spread hues."""
    hues = [(int(v * 255) for v in _hue(k / count)) for k in range(count)]
    return ClassSet(
        name=f"unnamed-{count}",
        names=tuple(f"class-{k}" for k in range(count)),
        label_ids=tuple(range(count)),
        palette=tuple(tuple(h) for h in hues),  # type: ignore[misc]
    )


def _hue(turn: float) -> tuple[float, float, float]:
    import colorsys

    return colorsys.hsv_to_rgb(turn, 0.75, 0.9)


def class_set(name: str) -> ClassSet:
    """The built-in set of that name. Raises UsageError with the nearest known name."""
    if name not in BUILT_IN:
        raise UsageError(f"no class set is called {name!r}; {nearest(name, BUILT_IN)}")
    return BUILT_IN[name]
