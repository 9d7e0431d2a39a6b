"""Batches as pure functions of (seed, domain, step): crops of a data set, mirrored and relit.

So a training that was stopped goes on to the same bits, any worker can make any batch, and the next
ones can be made ahead by threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from cada_deploy.errors import UsageError

from .datasets import DataSet, Sample
from .recipes import Augmentation, Recipe

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, as the preset `imagenet-rgb` has them
STD = (0.229, 0.224, 0.225)
IGNORE = 255

_AHEAD = 3  # batches
_HELD_BYTES = 2 << 30  # of decoded images, by all data sets of a training together

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Batch:
    """images (N, 3, h, w) float32, normalised; labels (N, h, w) int64, 255 = ignored; weights
    (N, h, w) float32 or None."""

    images: torch.Tensor
    labels: torch.Tensor | None
    weights: torch.Tensor | None = None


def network_input(images: Pixels) -> torch.Tensor:
    """(N, H, W, 3) RGB bytes -> (N, 3, H, W) as the spec of our networks asks for it."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


class Crops:
    """Crops of one data set. `number` keeps the draws of several sets of a training apart; 0 is the
    source."""

    def __init__(
        self, data: DataSet, recipe: Recipe, number: int, augmentation: Augmentation | None = None
    ) -> None:
        if len(data) == 0:
            raise UsageError(f"the data set {data.kind} is empty; nothing can be learnt from it")
        self._data = data
        self._recipe = recipe
        self._number = number
        self._augmentation = augmentation or recipe.augmentation
        sizes = (recipe.image_size, recipe.crop) if number == 0 else recipe.target_sizes
        self._image_size, self._crop_size = sizes
        held = _HELD_BYTES // 4 // max(1, _bytes(self._read(0)))
        self._frame: Callable[[int], Sample] = lru_cache(maxsize=max(8, held))(self._read)

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """The batch of a step; with several processes, the part of one of them."""
        recipe = self._recipe
        draw = np.random.default_rng([recipe.seed, self._number, step, part, parts])
        crops = [self._crop(draw) for _ in range(recipe.batch)]
        images, labels, weights = zip(*crops)
        return Batch(
            network_input(np.stack(images)),
            None if labels[0] is None else torch.from_numpy(np.stack(labels).astype(np.int64)),
            None if weights[0] is None else torch.from_numpy(np.stack(weights)),
        )

    def _read(self, k: int) -> Sample:
        sample = self._data[k]
        height, width = self._image_size
        if not height or sample.image.shape[:2] == (height, width):
            return sample
        size, nearest = (width, height), cv2.INTER_NEAREST
        return Sample(
            sample.name,
            np.asarray(cv2.resize(sample.image, size, interpolation=cv2.INTER_LINEAR), np.uint8),
            _resized(sample.labels, size, nearest),
            _resized(sample.weights, size, nearest),
        )

    def _crop(self, draw: np.random.Generator) -> tuple[Any, Any, Any]:
        sample = self._frame(int(draw.integers(len(self._data))))
        rows, columns = self._crop_size
        height, width = sample.image.shape[:2]
        scale = draw.uniform(*self._augmentation.scale)
        h, w = min(height, round(rows / scale)), min(width, round(columns / scale))
        y, x = int(draw.integers(height - h + 1)), int(draw.integers(width - w + 1))
        turn = -1 if self._augmentation.mirror and draw.random() < 0.5 else 1
        here = (slice(y, y + h), slice(x, x + w))
        size = (columns, rows)
        image = cv2.resize(sample.image[here], size, interpolation=cv2.INTER_LINEAR)
        image = relit(np.asarray(image, np.uint8), self._augmentation, draw)
        maps = [
            None if m is None else _resized(m[here], size, cv2.INTER_NEAREST)
            for m in (sample.labels, sample.weights)
        ]
        labels, weights = (None if m is None else m[:, ::turn] for m in maps)
        return image[:, ::turn], labels, weights


def relit(image: Pixels, augmentation: Augmentation, draw: np.random.Generator) -> Pixels:
    """The same place in another light, through another camera."""
    a = augmentation
    x: npt.NDArray[Any] = image.astype(np.float32)
    if a.gamma != (1.0, 1.0):
        x = 255 * (x / 255) ** np.float32(draw.uniform(*a.gamma))
    if a.contrast or a.brightness:
        x = (x - 128) * draw.uniform(1 - a.contrast, 1 + a.contrast) + 128
        x = x + draw.uniform(-a.brightness, a.brightness)
    if a.tint:
        x = x * draw.uniform(1 - a.tint, 1 + a.tint, size=3)
    if draw.random() < a.grey:
        x = 0.5 * x + 0.5 * x.mean(2, keepdims=True)
    if draw.random() < a.blur:
        x = np.asarray(cv2.GaussianBlur(x, (0, 0), draw.uniform(0.3, 1.2)))
    if a.noise:
        x = x + draw.normal(0, draw.uniform(0, a.noise), x.shape)
    return np.asarray(np.clip(x, 0, 255), np.uint8)


def ahead(make: Callable[[int], Any], first: int, end: int, workers: int = 1) -> Iterator[Any]:
    """make(first), make(first + 1), ... up to `end`, the next few made by threads meanwhile."""
    with ThreadPoolExecutor(workers, thread_name_prefix="cada-batches") as pool:
        coming: deque[Future[Any]] = deque()
        try:
            for step in range(first, end):
                coming.append(pool.submit(make, step))
                if len(coming) > _AHEAD:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()


def _resized(values: Any, size: tuple[int, int], how: int) -> Any:
    return None if values is None else cv2.resize(values, size, interpolation=how)


def _bytes(sample: Sample) -> int:
    maps = (sample.image, sample.labels, sample.weights)
    return sum(m.nbytes for m in maps if m is not None)
