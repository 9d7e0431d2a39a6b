"""The frames a bench runs on, as the bytes of image files: a folder's, or scenes drawn for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cada_deploy.errors import UsageError
from cada_deploy.image_files import find_images, shown
from cada_deploy.images import decode, read_bytes
from cada_deploy.labels import encode_rgb_png
from cada_deploy.model_spec import Size
from cada_deploy.rejections import ImageRejected
from cada_deploy.scenes import TARGET, scene

DRAWN = 8  # distinct scenes; runs go through them in turn
MOST_FILES = 64  # of --images: their bytes stay in memory
_FIRST_SEED = 60_000  # apart from every set of `scenes`


@dataclass(frozen=True)
class Frames:
    """data: the files' bytes; sizes: (H, W) of each, decoded."""

    source: str  # "drawn" or "files"
    data: tuple[bytes, ...]
    sizes: tuple[Size, ...]
    found: int
    rejected: tuple[tuple[str, str], ...] = ()  # (name, why)

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "found": self.found,
            "used": len(self.data),
            "mean_bytes": sum(map(len, self.data)) / len(self.data),
            "sizes": [list(size) for size in sorted(set(self.sizes))],
            "rejected": [{"name": name, "reason": why} for name, why in self.rejected],
        }


def drawn(size: Size) -> Frames:
    """Street scenes as PNG bytes."""
    scenes = (scene(_FIRST_SEED + k, TARGET, size).image for k in range(DRAWN))
    data = tuple(encode_rgb_png(image) for image in scenes)
    return Frames("drawn", data, (size,) * DRAWN, DRAWN)


def from_files(source: Path) -> Frames:
    """The first MOST_FILES images of a folder or list. Those that cannot be decoded are named;
    raises UsageError when none can."""
    refs = find_images(source)
    data, sizes, rejected = [], [], []
    for ref in refs[:MOST_FILES]:
        try:
            content = read_bytes(ref.path)
            height, width, _ = decode(content).image.shape
        except ImageRejected as error:
            rejected.append((shown(ref.relative), f"{error.reason}: {error.detail}"))
            continue
        data.append(content)
        sizes.append((height, width))
    if not data:
        raise UsageError(f"--images {source}: none of {len(refs)} images can be decoded")
    return Frames("files", tuple(data), tuple(sizes), len(refs), tuple(rejected))
