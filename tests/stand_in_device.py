"""A stand-in for a GPU: memory of this process, streams that do nothing until somebody waits.

It keeps the contract of cada_deploy.device as far as an engine needs it (no kernels). Work is only
done when a stream or an event is waited for, so what is read too early is not there yet; touching
memory that was freed meanwhile is an error. `enqueue` and `memory_at` let the stand-in for TensorRT
take part.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cada_deploy.device import OutOfDeviceMemory
from cada_deploy.errors import RunFailed

Work = Callable[[], None]

_one_at_a_time = threading.RLock()
_listing = threading.Lock()  # nothing is added to _memory while it is looked through
_handles = itertools.count(0x1000)
_streams: weakref.WeakValueDictionary[int, LazyStream] = weakref.WeakValueDictionary()
_memory: weakref.WeakValueDictionary[int, HostMemory] = weakref.WeakValueDictionary()


class HostMemory:
    """A buffer; the address is that of a NumPy array."""

    def __init__(self, nbytes: int, pinned: bool) -> None:
        # Device memory starts as garbage that no test expects by chance.
        self.bytes = np.full(max(nbytes, 1), 0xCD, np.uint8)
        self.address = int(self.bytes.ctypes.data)
        self.nbytes = nbytes
        self.host = self.bytes if pinned else None
        with _listing:
            _memory[self.address] = self


def memory_at(address: int, nbytes: int) -> np.ndarray:
    """The live bytes at an address. Freed or foreign memory fails the test."""
    with _listing:
        living = list(_memory.values())
    for memory in living:
        if memory.address <= address and address + nbytes <= memory.address + len(memory.bytes):
            start = address - memory.address
            return memory.bytes[start : start + nbytes]
    raise AssertionError(f"{nbytes} bytes at {address:#x} are in no living buffer")


def enqueue(handle: int, work: Work) -> None:
    """What a library does with a stream's handle."""
    _streams[handle].add(work)


class LazyStream:
    def __init__(self) -> None:
        self.handle = next(_handles)
        self.pending: deque[Work] = deque()
        self.capturing: list[Work] | None = None
        _streams[self.handle] = self

    def add(self, work: Work) -> None:
        if self.capturing is not None:
            self.capturing.append(work)
        else:
            self.pending.append(work)

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        with _one_at_a_time:  # whoever waits does the work, and others may wait for the same
            while self.pending and not until():
                self.pending.popleft()()

    def synchronize(self) -> None:
        if self.capturing is not None:
            raise RunFailed("a stream that is captured cannot be waited for")
        self.run()

    def wait(self, event: LazyEvent) -> None:
        if event.captured is not None:  # as in CUDA: who waits for a captured point is captured
            if self.pending and self.capturing is None:
                raise RunFailed("a stream with work of its own joins a capture")
            self.capturing = event.captured
            return
        point, source = event.point, event.stream  # as they are now: it may be recorded again
        self.add(lambda: event.reach(point, source))


class LazyEvent:
    """Recorded again and again; each record is a point."""

    def __init__(self) -> None:
        self.handle = next(_handles)
        self.point = 0  # of the last record
        self.passed = 0
        self.stream: LazyStream | None = None
        self.captured: list[Work] | None = None  # recorded in this capture, not in time

    def record(self, stream: LazyStream) -> None:
        self.captured = stream.capturing
        if self.captured is not None:
            return
        self.point += 1
        self.stream, point = stream, self.point
        stream.add(lambda: setattr(self, "passed", max(self.passed, point)))

    def reach(self, point: int, source: LazyStream | None) -> None:
        if source is not None:
            source.run(lambda: self.passed >= point)

    def synchronize(self) -> None:
        self.reach(self.point, self.stream)

    @property
    def done(self) -> bool:
        return self.passed >= self.point

    def milliseconds_since(self, earlier: LazyEvent) -> float:
        raise RunFailed("a stand-in measures nothing")


@dataclass(frozen=True)
class LazyGraph:
    work: tuple[Work, ...]

    def launch(self, stream: LazyStream) -> None:
        for work in self.work:
            stream.add(work)


@dataclass(eq=False)
class StandInDevice:
    """limit_bytes: what `allocate` has. captures: "right", "refused", "empty" (replays do nothing)
    or "stale" (replays give zeros)."""

    ordinal: int = 0
    name: str = "Stand-in GPU"
    compute_capability: tuple[int, int] = (8, 7)
    driver_version: str = "13.0"
    layer: str = "stand-in"
    integrated: bool = False
    multiprocessors: int = 1
    limit_bytes: int = 1 << 30
    captures: str = "right"
    launched: list[str] = field(default_factory=list)
    streams: weakref.WeakSet[LazyStream] = field(default_factory=weakref.WeakSet)

    def stream(self) -> LazyStream:
        made = LazyStream()
        self.streams.add(made)
        return made

    def borrowed_stream(self, handle: int) -> LazyStream:
        return _streams[handle]

    def event(self, *, timing: bool = False) -> LazyEvent:
        return LazyEvent()

    def allocate(self, nbytes: int) -> HostMemory:
        if nbytes > self.limit_bytes:
            raise OutOfDeviceMemory(f"{nbytes} bytes wanted, {self.limit_bytes} there")
        return HostMemory(nbytes, pinned=False)

    def pinned(self, nbytes: int) -> HostMemory:
        return HostMemory(nbytes, pinned=True)

    def copy(self, target: int, source: int, nbytes: int, stream: LazyStream) -> None:
        def work() -> None:
            memory_at(target, nbytes)[:] = memory_at(source, nbytes)

        stream.add(work)

    def fill(self, target: int, byte: int, nbytes: int, stream: LazyStream) -> None:
        stream.add(lambda: memory_at(target, nbytes).fill(byte))

    def ordinal_at(self, address: int) -> int | None:
        held = any(m.address <= address < m.address + len(m.bytes) for m in list(_memory.values()))
        return self.ordinal if held else None

    def load(self, image: bytes) -> Any:
        raise RunFailed("a stand-in runs no kernels")

    def launch(self, *_: Any, **__: Any) -> None:
        raise RunFailed("a stand-in runs no kernels")

    def capture(self, stream: LazyStream, work: Work) -> LazyGraph:
        if self.captures == "refused":
            raise RunFailed("the work cannot be captured")
        stream.capturing = recorded = []
        try:
            work()
        finally:
            for other in list(_streams.values()):
                if other.capturing is recorded:
                    other.capturing = None
        return LazyGraph(() if self.captures == "empty" else tuple(recorded))

    def memory(self) -> tuple[int, int]:
        return self.limit_bytes, self.limit_bytes

    def synchronize(self) -> None:
        for stream in list(self.streams):
            if stream.capturing is None:
                stream.run()
