"""The plan: a sorted list of images cut by order and count into shards, the unit of work and
of commit. Workers, batches and machines do not enter it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cada_deploy.image_files import ImageRef

DEFAULT_SHARD_SIZE = 64


@dataclass(frozen=True)
class Shard:
    index: int
    images: tuple[ImageRef, ...]

    @property
    def name(self) -> str:
        """Six digits, the stem of its manifests and of its score file."""
        return f"{self.index:06d}"


def plan(images: Sequence[ImageRef], shard_size: int) -> list[Shard]:
    """images must be sorted by relative path (find_images does that)."""
    return [
        Shard(index, tuple(images[start : start + shard_size]))
        for index, start in enumerate(range(0, len(images), shard_size))
    ]
