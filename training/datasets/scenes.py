"""Procedural street scenes as a data set: `source` is daylight, `target` a rainy dusk.

The same seeds give the same bytes on every machine (cada_deploy.scenes). A scene takes about 70 ms
to draw at 256x512, so each is kept as PNG: in memory, or in `cache`, a folder for later runs too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cada_deploy import durable, scenes
from cada_deploy.classes import CITYSCAPES_19, ClassSet
from cada_deploy.errors import UsageError, nearest
from cada_deploy.images import decode, read_bytes
from cada_deploy.labels import encode_label_png, encode_rgb_png, read_label_png

from . import Sample

KIND = "scenes"
DOMAINS = (scenes.SOURCE, scenes.TARGET)
SETS = {s.name: s for s in vars(scenes).values() if isinstance(s, scenes.SceneSet)}


@dataclass(frozen=True, eq=False)
class Scenes:
    """`drawn` may hold labels although the data set gives none: both are kept together."""

    drawn: scenes.SceneSet
    labelled: bool
    cache: Path | None = None
    kind: str = KIND
    classes: ClassSet = CITYSCAPES_19
    _memory: dict[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{self.drawn.style}_{seed:06d}" for seed in self.drawn.seeds)

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, k: int) -> Sample:
        seed = self.drawn.seeds[k]
        name = f"{self.drawn.style}_{seed:06d}"
        new: list[scenes.Scene] = []  # drawn at most once, and only if something is not kept yet

        def scene() -> scenes.Scene:
            if not new:
                new.append(scenes.scene(seed, self.drawn.style, self.drawn.size))
            return new[0]

        image = self._kept(f"images/{name}.png", lambda: encode_rgb_png(scene().image))
        labels = None
        if self.labelled:
            png = self._kept(f"labels/{name}.png", lambda: encode_label_png(scene().labels))
            labels = read_label_png(png, name)
        return Sample(name, decode(image).image, labels)

    def _kept(self, key: str, make: Callable[[], bytes]) -> bytes:
        if self.cache is None:
            if key not in self._memory:  # two threads may both draw it: the bytes are equal
                self._memory[key] = make()
            return self._memory[key]
        height, width = self.drawn.size
        # The generator's digest is in the path: after a change of it, old files are not found.
        path = self.cache / f"{self._generator[:12]}-{height}x{width}" / key
        if not path.exists():
            durable.make_folder(path.parent)
            durable.write_file(path, make())
        return read_bytes(path)

    @cached_property
    def _generator(self) -> str:
        """Changes when the first scene of this set would come out otherwise."""
        image, labels = scenes.scene(self.drawn.first_seed, self.drawn.style, self.drawn.size)
        return hashlib.sha256(image.tobytes() + labels.tobytes()).hexdigest()

    def fingerprint(self) -> str:
        d = self.drawn
        text = f"{KIND} {d.style} {d.seeds} {d.size} {self.labelled} {self._generator}"
        return hashlib.sha256(text.encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        d = self.drawn
        return {"kind": KIND, "frames": len(self), "domain": d.style, "size": list(d.size),
                "seeds": [d.seeds.start, d.seeds.stop], "labels": self.labelled}  # fmt: skip


def open(
    set: str = "",
    domain: str = "",
    seeds: tuple[int, int] = (0, 0),
    size: tuple[int, int] = (0, 0),
    labelled: bool = True,
    limit: int = 0,
    cache: Path | None = None,
) -> Scenes:
    """set: a frozen set by name; or domain, seeds = [first, end) and size = [H, W], 256x512."""
    if bool(set) == bool(domain):
        raise UsageError(f"{KIND}: give either set (a name) or domain and seeds")
    if set:
        if set not in SETS:
            raise UsageError(f"{KIND}: no set of scenes is called {set!r}; {nearest(set, SETS)}")
        if seeds != (0, 0) or size != (0, 0):
            raise UsageError(f"{KIND}: set {set!r} has its seeds and size; leave them out")
        drawn = SETS[set]
    else:
        drawn = _drawn(domain, seeds, size if size != (0, 0) else (256, 512))
    if limit < 0:
        raise UsageError(f"{KIND}: limit is {limit}; expected a number of frames, or 0 for all")
    count = min(limit or drawn.count, drawn.count)
    part = scenes.SceneSet(drawn.name, drawn.style, drawn.first_seed, count, drawn.size)
    return Scenes(part, labelled, cache)


def _drawn(domain: str, seeds: tuple[int, int], size: tuple[int, int]) -> scenes.SceneSet:
    if domain not in DOMAINS:
        raise UsageError(f"{KIND}: domain is {domain!r}; {nearest(domain, DOMAINS)}")
    first, end = seeds
    if not 0 <= first < end or min(size) < 1 or max(size) > 8192:
        raise UsageError(
            f"{KIND}: seeds {list(seeds)}, size {list(size)}; expected seeds = [first, end) with "
            "at least one between them, and size = [H, W], each 1 to 8192"
        )
    return scenes.SceneSet(f"{domain}-{first}-{end}", domain, first, end - first, size)
