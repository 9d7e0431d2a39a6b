"""What fused_gpu.py times: a plan of the product on torch's memory and stream, and a bare loop of
its arithmetic. Everything is compiled, allocated and uploaded before the first timed launch; that
the host's own time stays out of a time is gpu_timing.py's care.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from harness import REPOSITORY

from cada_deploy import cubins
from cada_deploy.device import Device, Stream
from cada_deploy.device_arrays import DeviceArray, empty
from cada_deploy.fused import Evidence
from cada_deploy.fused.cuda import Kernel, Plan
from cada_deploy.scores import Upsampling

BARE = REPOSITORY / "benchmarks" / "bare_loop.cu"
BARE_THREADS = 128  # a block
BARE_ROWS = 16  # pixels a thread of the bare loop takes


@dataclass(frozen=True, eq=False)
class Accumulate:
    """Statistics, labels and entropy of a batch, as the runtime makes them."""

    plan: Plan
    scores: DeviceArray  # (N, C, h, w) float16, encoded
    size: tuple[int, int]
    upsampling: Upsampling
    stream: Stream

    def launch(self) -> None:
        """One fill and one launch (two for the order `probs`)."""
        self.plan.accumulate(
            self.scores, "confidence", None, self.stream, labels=True, entropy=True
        )

    def results(self) -> list[Evidence]:
        """Launches on results of other scores, so that nothing right can be left from before."""
        others = torch.zeros(self.scores.shape, dtype=torch.float16, device=_where(self.scores))
        for scores in (of_torch(self.scores.device, others), self.scores):
            self.plan.accumulate(scores, "confidence", None, self.stream, labels=True, entropy=True)
        self.plan.fetch(self.stream)
        self.stream.synchronize()
        return [self.plan.evidence(n) for n in range(self.scores.shape[0])]


def accumulate(
    device: Device, stream: Stream, scores: torch.Tensor, size: tuple[int, int], order: str
) -> Accumulate:
    """scores (N, C, h, w) float16, encoded and on the device."""
    frames, classes, height, width = scores.shape
    upsampling = Upsampling(order, align_corners=True)
    plan = Kernel(device=device).plan((frames, classes, height, width), size, upsampling)
    return Accumulate(plan, of_torch(device, scores), size, upsampling, stream)


def bare_loop(device: Device, stream: Stream, pixels: int) -> Callable[[], None]:
    """The same arithmetic for so many pixels of 19 classes, without memory."""
    major, minor = device.compute_capability
    module = device.load(cubins.compiled(BARE, f"sm_{major}{minor}", {}))
    kernel = module.function("cada_bare_loop")
    blocks = pixels // (BARE_THREADS * BARE_ROWS)
    out = empty(device, (blocks * BARE_THREADS,), np.float32)
    arguments = [np.uint64(out.address), np.int32(BARE_ROWS), np.float32(-1e-4)]

    def launch(keep: tuple[object, ...] = (module, out)) -> None:
        device.launch(kernel, (blocks, 1, 1), (BARE_THREADS, 1, 1), arguments, stream)

    return launch


def of_torch(device: Device, tensor: torch.Tensor) -> DeviceArray:
    """Used on the stream that torch works on, so there is nothing to wait for."""
    kind = np.dtype(str(tensor.dtype).removeprefix("torch."))
    return DeviceArray(device, tensor.data_ptr(), tuple(tensor.shape), kind, tensor)


def _where(array: DeviceArray) -> torch.device:
    assert isinstance(array.owner, torch.Tensor)
    return array.owner.device
