"""The kernels launched as they stand, on torch's memory and stream, for timing: no Python of the
runtime between an event and the launch. What the kernel's arguments are is written in
kernels/fused_cuda.cu; that the results are right is checked by whoever times them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from cuda_sources import cubin_of
from harness import REPOSITORY

from cada_deploy.device import Device, Function, Module, Stream
from cada_deploy.statistics import HISTOGRAM_BINS

FUSED = REPOSITORY / "kernels" / "fused_cuda.cu"
BARE = REPOSITORY / "benchmarks" / "bare_loop.cu"
MOST_ROWS = 15  # of a row group
ROWS_BARE = 16  # pixels a thread of the bare loop takes


def architecture(device: Device) -> str:
    major, minor = device.compute_capability
    return f"sm_{major}{minor}"


def module(device: Device, source: Path, classes: int) -> Module:
    return device.load(cubin_of(source, architecture(device), classes))


def taps(size: int, low_size: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """(lower, weight) of every output index, align_corners, as tap_of in kernels/pixel.h."""
    numerator = np.arange(size, dtype=np.int64) * (low_size - 1)
    denominator = size - 1
    lower = numerator // denominator
    weight = np.float32(numerator - lower * denominator) / np.float32(denominator)
    last = lower >= low_size - 1
    return (
        np.where(last, low_size - 1, lower).astype(np.int32),
        np.where(last, np.float32(0), weight).astype(np.float32),
    )


def row_groups(lower: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """First rows of the groups and, last, the number of rows."""
    starts = [0]
    for y in range(1, len(lower)):
        if lower[y] != lower[y - 1] or y - starts[-1] == MOST_ROWS:
            starts.append(y)
    return np.array([*starts, len(lower)], np.int32)


@dataclass(eq=False)
class Accumulate:
    """Statistics, labels and entropy of a batch: one launch (two for the order `probs`)."""

    scores: torch.Tensor  # (N, C, h, w) float16, encoded
    size: tuple[int, int]
    order: str
    labels: torch.Tensor  # (N, H, W) uint8
    entropy: torch.Tensor  # (N, H, W) float32
    counts: torch.Tensor  # N x (C x C sums, C x BINS histogram, 2 left out), one after another
    launch: Callable[[], None]

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """sums (N, C, C), histogram (N, C, BINS), left out (N, 2: invalid, masked), int64."""
        n, classes = self.scores.shape[:2]
        sizes = [n * classes * classes, n * classes * HISTOGRAM_BINS, n * 2]
        sums, histogram, left_out = self.counts.split(sizes)
        return (
            sums.view(n, classes, classes),
            histogram.view(n, classes, HISTOGRAM_BINS),
            left_out.view(n, 2),
        )


def accumulate(
    device: Device, stream: Stream, scores: torch.Tensor, size: tuple[int, int], order: str
) -> Accumulate:
    """Ready to launch. Everything is allocated here."""
    n, classes, low_height, low_width = scores.shape
    height, width = size
    loaded = module(device, FUSED, classes)
    axes = [_on_gpu(part) for low, whole in ((low_height, height), (low_width, width))
            for part in taps(whole, low)]  # fmt: skip
    groups = row_groups(taps(height, low_height)[0])
    starts = _on_gpu(groups)
    made = Accumulate(
        scores, size, order,
        torch.empty((n, height, width), dtype=torch.uint8, device="cuda"),
        torch.empty((n, height, width), dtype=torch.float32, device="cuda"),
        torch.zeros(n * (classes * classes + classes * HISTOGRAM_BINS + 2), dtype=torch.int64,
                    device="cuda"),
        lambda: None,
    )  # fmt: skip
    soft = torch.empty(scores.shape, dtype=torch.float32, device="cuda")
    threads = 128 if classes <= 32 else 64
    blocks = n * (len(groups) - 1) * -(-width // threads)
    sums, histogram, left_out = made.parts
    probs = order == "probs"
    arguments = [
        _address(scores), _address(soft if probs else None), _address(None),
        *(np.int32(v) for v in (classes, low_height, low_width, height, width)),
        *(_address(axis) for axis in axes), _address(starts), np.int32(len(groups) - 1),
        np.int32(1), _address(sums), _address(histogram), _address(left_out),
        _address(made.labels), _address(made.entropy),
    ]  # fmt: skip
    kernel, soften = loaded.function("cada_accumulate"), loaded.function("cada_soften")
    pixels = low_height * low_width
    soft_arguments = [
        _address(scores), np.int64(n), np.int32(classes), np.int64(pixels), _address(soft),
    ]  # fmt: skip

    def launch(
        keep: tuple[object, ...] = (loaded, axes, starts, soft), kernel: Function = kernel
    ) -> None:
        device.fill(made.counts.data_ptr(), 0, made.counts.nbytes, stream)
        if probs:
            grid = -(-n * pixels // 256), 1, 1
            device.launch(soften, grid, (256, 1, 1), soft_arguments, stream)
        device.launch(kernel, (blocks, 1, 1), (threads, 1, 1), arguments, stream)

    made.launch = launch
    return made


def bare_loop(device: Device, stream: Stream, pixels: int) -> Callable[[], None]:
    """The same arithmetic for so many pixels of 19 classes, without memory."""
    loaded = module(device, BARE, 19)
    kernel = loaded.function("cada_bare_loop")
    blocks = pixels // (128 * ROWS_BARE)
    out = torch.empty(blocks * 128, dtype=torch.float32, device="cuda")
    arguments = [_address(out), np.int32(ROWS_BARE), np.float32(-1e-4)]

    def launch(keep: tuple[object, ...] = (loaded, out)) -> None:
        device.launch(kernel, (blocks, 1, 1), (128, 1, 1), arguments, stream)

    return launch


def _on_gpu(values: npt.NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(values).cuda()


def _address(tensor: torch.Tensor | None) -> np.uint64:
    return np.uint64(0 if tensor is None else tensor.data_ptr())
