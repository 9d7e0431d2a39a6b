"""The engine's own measurement on a GPU, by events of `cada_deploy.device`.

One run: copy a preprocessed batch in, enqueue the network, copy its scores back, wait. Frames from
bytes to labels go through the same pipeline as a run's do, which is measured as on the CPU.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy.bench.host import Host
from cada_deploy.bench.measuring import FrameTimes, RunTimes
from cada_deploy.device import Device, Event, Memory, Stream
from cada_deploy.device_arrays import DeviceArray, empty
from cada_deploy.engines import DeviceEngine
from cada_deploy.model_spec import Size


@dataclass(eq=False)
class _Slot:
    """One batch, in pinned memory and on the device."""

    pinned: Memory
    image: DeviceArray


@dataclass(eq=False)
class OnDevice:
    """A pipeline with its engine on a GPU as a Subject. One run is in flight at a time."""

    host: Host
    gpu: Device
    engine: DeviceEngine
    stream: Stream
    slots: tuple[_Slot, ...]
    marks: tuple[Event, ...]  # before copy in, after it, after the network, after copy out
    enqueues: bool = True
    back: Memory | None = field(default=None)

    engine_boundary: str = (
        "from a preprocessed batch in pinned host memory to the network's scores in pinned host "
        "memory: copy in, compute, copy out, one run in flight; latency is the sum of the three "
        "between events on one stream, enqueue is the host's time in the engine's call"
    )

    @property
    def network(self) -> Size:
        return self.host.network

    @property
    def frame_boundary(self) -> str:
        return self.host.frame_boundary

    def frame_run(self, k: int) -> FrameTimes:
        return self.host.frame_run(k)

    def engine_run(self, k: int, since: float) -> RunTimes:
        slot = self.slots[k % len(self.slots)]
        before, copied, computed, done = self.marks
        start = _ms(since)
        before.record(self.stream)
        self.gpu.copy(slot.image.address, slot.pinned.address, slot.image.nbytes, self.stream)
        copied.record(self.stream)
        enqueue = _ms(since)
        scores = self.engine.infer_on(slot.image, self.stream)
        enqueued = _ms(since)
        if scores.ready is not None:
            self.stream.wait(scores.ready)
        computed.record(self.stream)
        back = self._back(scores.array.nbytes)
        self.gpu.copy(back.address, scores.array.address, scores.array.nbytes, self.stream)
        done.record(self.stream)
        done.synchronize()
        # Durations are taken between neighbours: a distance from the first event of a session
        # is a float32 of milliseconds, microseconds wide after seconds.
        end_h2d = start + copied.milliseconds_since(before)
        end_compute = end_h2d + computed.milliseconds_since(copied)
        end_d2h = end_compute + done.milliseconds_since(computed)
        return RunTimes(
            enqueue, enqueued, start, end_h2d, end_h2d, end_compute, end_compute, end_d2h
        )

    def _back(self, nbytes: int) -> Memory:
        if self.back is None or self.back.nbytes < nbytes:
            self.back = self.gpu.pinned(nbytes)
        return self.back


def open_on_device(host: Host, gpu: Device, engine: DeviceEngine) -> OnDevice:
    slots = tuple(_slot(gpu, batch) for batch in host.batches)
    marks = tuple(gpu.event(timing=True) for _ in range(4))
    return OnDevice(host, gpu, engine, gpu.stream(), slots, marks)


def device_json(gpu: Device) -> dict[str, Any]:
    """What the CUDA layer tells of the GPU."""
    major, minor = gpu.compute_capability
    return {
        "name": gpu.name,
        "layer": gpu.layer,
        "compute_capability": f"{major}.{minor}",
        "cuda_driver": gpu.driver_version,
        "multiprocessors": gpu.multiprocessors,
        "integrated": gpu.integrated,
        "memory_bytes": gpu.memory()[1],
    }


def _slot(gpu: Device, batch: npt.NDArray[Any]) -> _Slot:
    pinned = gpu.pinned(batch.nbytes)
    assert pinned.host is not None
    pinned.host[: batch.nbytes] = np.ascontiguousarray(batch).reshape(-1).view(np.uint8)
    return _Slot(pinned, empty(gpu, batch.shape, batch.dtype))


def _ms(since: float) -> float:
    return (time.perf_counter() - since) * 1e3
