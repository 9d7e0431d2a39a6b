"""The order of calls and the sums of a run on a GPU, on a stand-in whose stream is a list and
whose clock is counted: 2 ms a copy, 7 ms a network. No GPU was behind any of this."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cada_deploy.bench.cuda import device_json, open_on_device
from cada_deploy.bench.frames import drawn
from cada_deploy.bench.host import open_host
from cada_deploy.bench.session import open_pipeline
from cada_deploy.demo import DEMO_MODEL
from cada_deploy.device_arrays import DeviceArray
from cada_deploy.labelling import ModelChoice
from cada_deploy.scores import Scores

COPY_MS, NETWORK_MS = 2.0, 7.0


class Event:
    handle = 0

    def __init__(self, timing: bool) -> None:
        self.timing = timing
        self.at: float | None = None

    def record(self, stream: Stream) -> None:
        self.at = stream.now
        stream.log.append("event")

    def synchronize(self) -> None:
        assert self.at is not None

    def milliseconds_since(self, earlier: Event) -> float:
        assert self.timing and earlier.timing and self.at is not None and earlier.at is not None
        return self.at - earlier.at


class Stream:
    handle = 0

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def wait(self, event: Event) -> None:
        self.log.append("wait")


class Gpu:
    layer, name, compute_capability = "stand-in", "no GPU", (9, 0)
    driver_version, integrated, multiprocessors = "13.0", False, 132

    def __init__(self) -> None:
        self.made = Stream()
        self.held: dict[int, np.ndarray[Any, Any]] = {}

    def stream(self) -> Stream:
        return self.made

    def event(self, *, timing: bool = False) -> Event:
        return Event(timing)

    def pinned(self, nbytes: int) -> Any:
        host = np.zeros(nbytes, np.uint8)
        self.held[host.ctypes.data] = host
        return SimpleNamespace(address=host.ctypes.data, nbytes=nbytes, host=host)

    allocate = pinned

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        self.held[target][:nbytes] = self.held[source][:nbytes]
        stream.now += COPY_MS
        stream.log.append("copy")

    def memory(self) -> tuple[int, int]:
        return 1, 2


class Engine:
    device, name, version, classes = "cuda:0", "stand-in", "1", 19

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.seen: list[bytes] = []

    def infer(self, batch: Any) -> Scores:
        raise AssertionError("the engine's own copies would be measured")

    def infer_on(self, batch: DeviceArray, stream: Stream) -> Scores:
        self.seen.append(self.gpu.held[batch.address].tobytes())
        stream.now += NETWORK_MS
        stream.log.append("network")
        memory = self.gpu.allocate(64)
        array = DeviceArray(batch.device, memory.address, (16,), np.dtype(np.float32), memory)
        return Scores(array, "cuda:0", Event(False))


@pytest.fixture
def subject() -> Any:
    _, pipeline = open_pipeline(ModelChoice(DEMO_MODEL), (32, 64))
    host = open_host(pipeline, drawn((32, 64)), 2, False)
    gpu: Any = Gpu()
    return open_on_device(host, gpu, Engine(gpu))


def test_a_run_copies_in_enqueues_waits_copies_out(subject: Any) -> None:
    run = subject.engine_run(0, 0.0)
    assert subject.gpu.made.log == [
        "event", "copy", "event", "network", "wait", "event", "copy", "event",
    ]  # fmt: skip
    assert (run.h2d_ms, run.compute_ms, run.d2h_ms) == pytest.approx((2, 7, 2), abs=1e-6)
    assert run.latency_ms == pytest.approx(11, abs=1e-6)
    assert run.start_h2d <= run.start_enqueue <= run.end_enqueue


def test_every_run_gets_the_next_batch(subject: Any) -> None:
    for k in range(5):
        subject.engine_run(k, 0.0)
    seen = subject.engine.seen
    assert len(set(seen)) == 4 and seen[0] == seen[4]
    assert seen[1] == subject.host.batches[1].tobytes()


def test_it_says_what_the_boundary_is(subject: Any) -> None:
    assert subject.enqueues and "copy in, compute, copy out" in subject.engine_boundary
    assert "decode" in subject.frame_boundary and subject.network == (32, 64)
    assert device_json(subject.gpu)["compute_capability"] == "9.0"
