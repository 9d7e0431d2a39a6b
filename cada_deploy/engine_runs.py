"""The passes of a built engine on a GPU: contexts, buffers, padding, and CUDA graphs that were
proven. What executes a context is handed in; nothing here knows TensorRT.

One batch shape is fixed in the engine. A longer batch runs in parts, what is left over is padded
with copies of its last row. A pass runs plainly first (the runtime allocates late), its second run
is captured, and once a replay into poisoned memory has given the same bits the graph serves.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cada_deploy import device_arrays
from cada_deploy.device import Device, Event, Graph, Memory, Stream
from cada_deploy.device_arrays import DeviceArray
from cada_deploy.engine_plans import Profile, shown
from cada_deploy.errors import ArtefactMismatch, RunFailed
from cada_deploy.model_spec import Size

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

# Two contexts overlap the copies of one frame with the network of another; each holds the
# activations of a whole pass, so there are no more.
CONTEXTS = 2
MOST_SHAPES = 4
MOST_SLOTS = 8  # of one shape; more callers than that run without a graph of their own for long
POISON = 0xFF  # NaN in every float: a graph that writes nothing is seen


class Context(Protocol):
    """One input shape, one set of activations."""

    scores: Shape  # of a whole batch

    def execute(self, image: int, scores: int, stream: Stream) -> None:
        """Enqueue a pass over the batch at address `image`. Raises RunFailed."""
        ...


class Contexts(Protocol):
    def context(self, shape: Shape, stream: Stream) -> Context:
        """A new one. Raises RunFailed when the GPU has no room for it."""
        ...


@dataclass(frozen=True)
class Network:
    """What the engine takes and gives."""

    layout: str  # NCHW or NHWC
    input_dtype: np.dtype[Any]
    output_dtype: np.dtype[Any]
    profile: Profile


def image_shape(batch: int, size: Size, layout: str) -> Shape:
    return (batch, 3, *size) if layout == "NCHW" else (batch, *size, 3)


def size_of(shape: Shape, layout: str) -> Size:
    return (shape[2], shape[3]) if layout == "NCHW" else (shape[1], shape[2])


@dataclass(eq=False)
class _Shared:
    """A context and the point after its last pass: the next one, on whichever stream, waits."""

    context: Context
    passed: Event
    slots: int = 0


@dataclass(eq=False)
class _Slot:
    """A batch at one address: its output, and the graph once that is proven."""

    shared: _Shared
    image: DeviceArray
    output: DeviceArray
    tail: tuple[Memory, Memory] | None  # a whole batch, in and out, where rows are left over
    ready: Event
    runs: int = 0
    graph: Graph | None = None

    @property
    def rows(self) -> int:
        return self.image.shape[0]


@dataclass(eq=False)
class _Kept:
    """What is kept of one batch shape."""

    contexts: list[_Shared]
    slots: OrderedDict[int, _Slot]  # by address


class EngineRuns:
    """Thread-safe: one lock around every enqueue, which takes microseconds.

    exclusive: all passes share activations, whatever their shape, so each waits for the one before.
    """

    def __init__(
        self,
        gpu: Device,
        contexts: Contexts,
        network: Network,
        name: str,
        *,
        exclusive: bool = False,
    ) -> None:
        self._gpu = gpu
        self._contexts = contexts
        self._network = network
        self._name = name
        self._passed = gpu.event() if exclusive else None  # after the last pass of all
        self._lock = threading.Lock()
        self._here = threading.local()
        self._shapes: OrderedDict[Shape, _Kept] = OrderedDict()
        self._lanes: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        for _ in range(CONTEXTS):
            self._lanes.put(_Lane(gpu, self))
        self.graphs = 0  # proven
        self.graphs_refused = 0  # could not be captured, or the replay differed

    @property
    def batch(self) -> int:
        return self._network.profile.batch

    def on_host(self, batch: Array) -> Array:
        """(N, ...) -> scores (N, C, h, w), both in host memory."""
        lane = self._lanes.get()
        try:
            return lane.run(batch)
        finally:
            self._lanes.put(lane)

    def probed_classes(self) -> int:
        """The class count of an engine that does not state it, from a grey frame."""
        network = self._network
        shape = image_shape(self.batch, network.profile.minimum, network.layout)
        return int(self.on_host(np.zeros(shape, network.input_dtype)).shape[1])

    def on_device(self, batch: DeviceArray, stream: Stream) -> DeviceArray:
        """Enqueue (N, ...) on `stream`; scores (N, C, h, w) and the event after which they are
        there. They stay until the next call with a batch of this address and shape."""
        self.check(batch.shape, batch.dtype)
        self._make_current()
        with self._lock:
            slot = self._slot(batch, stream)
            if batch.ready is not None:
                stream.wait(batch.ready)
            stream.wait(slot.shared.passed)
            self._pass(slot, stream)
            slot.shared.passed.record(stream)
            slot.ready.record(stream)
        return replace(slot.output, ready=slot.ready)

    def check(self, shape: Shape, dtype: np.dtype[Any]) -> None:
        """Raises ArtefactMismatch for a batch that the engine was not built for."""
        network = self._network
        if len(shape) != 4 or shape[0] < 1 or dtype != network.input_dtype:
            raise ArtefactMismatch(
                f"{self._name} takes a batch of images of {network.input_dtype}; got {shape} "
                f"{dtype}"
            )
        size = size_of(shape, network.layout)
        if shape != image_shape(shape[0], size, network.layout):
            raise ArtefactMismatch(f"{self._name} takes {network.layout}; got {shape}")
        if not network.profile.covers(size):
            raise ArtefactMismatch(
                f"a frame enters the network at {shown(size)} (HxW), but the engine of "
                f"{self._name} was built for {network.profile.text}; give --size within that, or "
                "build it for this size (export --size, or --min-size and --max-size)"
            )

    def _make_current(self) -> None:
        """The engine works on the thread's current device; a Device's calls set it and leave it."""
        if not getattr(self._here, "current", False):
            self._gpu.synchronize()
            self._here.current = True

    # -- what is kept

    def _slot(self, batch: DeviceArray, stream: Stream) -> _Slot:
        kept = self._kept(batch.shape)
        slot = kept.slots.get(batch.address)
        if slot is None:
            if len(kept.slots) >= MOST_SLOTS:
                _, old = kept.slots.popitem(last=False)
                old.ready.synchronize()  # its graph may be running
                old.shared.slots -= 1
            slot = kept.slots[batch.address] = self._new_slot(kept, batch, stream)
        kept.slots.move_to_end(batch.address)
        return slot

    def _kept(self, shape: Shape) -> _Kept:
        if shape not in self._shapes:
            if len(self._shapes) >= MOST_SHAPES:
                _, old = self._shapes.popitem(last=False)
                for shared in old.contexts:
                    shared.passed.synchronize()
            self._shapes[shape] = _Kept([], OrderedDict())
        self._shapes.move_to_end(shape)
        return self._shapes[shape]

    def _new_slot(self, kept: _Kept, batch: DeviceArray, stream: Stream) -> _Slot:
        shared = self._shared(kept, (self.batch, *batch.shape[1:]), stream)
        rows = batch.shape[0]
        output = device_arrays.empty(
            self._gpu, (rows, *shared.context.scores[1:]), self._network.output_dtype
        )
        tail = None
        if rows % self.batch:
            tail = (
                self._gpu.allocate(batch.nbytes // rows * self.batch),
                self._gpu.allocate(output.nbytes // rows * self.batch),
            )
        shared.slots += 1
        return _Slot(shared, batch, output, tail, self._gpu.event())

    def _shared(self, kept: _Kept, shape: Shape, stream: Stream) -> _Shared:
        if len(kept.contexts) < (CONTEXTS if self._passed is None else 1):
            context = self._contexts.context(shape, stream)
            scores = context.scores
            if len(scores) != 4 or any(d < 1 for d in scores) or scores[0] != self.batch:
                raise ArtefactMismatch(
                    f"{self._name} gives scores of shape {scores} for a batch of shape {shape}; "
                    f"expected ({self.batch}, C, h, w)"
                )
            kept.contexts.append(_Shared(context, self._passed_event(stream)))
        return min(kept.contexts, key=lambda shared: shared.slots)

    def _passed_event(self, stream: Stream) -> Event:
        if self._passed is not None:
            return self._passed
        passed = self._gpu.event()
        passed.record(stream)
        return passed

    # -- one pass

    def _pass(self, slot: _Slot, stream: Stream) -> None:
        slot.runs += 1
        if slot.graph is not None:
            slot.graph.launch(stream)
            return
        self._work(slot, stream)
        if slot.runs == 2:
            slot.graph = self._proven(slot, stream)

    def _work(self, slot: _Slot, stream: Stream) -> None:
        row_in, row_out = slot.image.nbytes // slot.rows, slot.output.nbytes // slot.rows
        whole = slot.rows - slot.rows % self.batch
        for first in range(0, whole, self.batch):
            image = slot.image.address + first * row_in
            slot.shared.context.execute(image, slot.output.address + first * row_out, stream)
        if slot.tail is not None:
            self._padded(slot, whole, row_in, row_out, stream)

    def _padded(self, slot: _Slot, whole: int, row_in: int, row_out: int, stream: Stream) -> None:
        """The rows that are left, and copies of the last of them up to a batch."""
        assert slot.tail is not None
        staged, result = slot.tail
        for k in range(self.batch):
            source = slot.image.address + min(whole + k, slot.rows - 1) * row_in
            self._gpu.copy(staged.address + k * row_in, source, row_in, stream)
        slot.shared.context.execute(staged.address, result.address, stream)
        target, nbytes = slot.output.address + whole * row_out, (slot.rows - whole) * row_out
        self._gpu.copy(target, result.address, nbytes, stream)

    def _proven(self, slot: _Slot, stream: Stream) -> Graph | None:
        """A CUDA graph of the pass that was just run, if its replay gives the same bits. A context
        that was made on another device captures an empty graph, and replays stale output."""
        expected = self._fetched(slot, stream)
        try:
            graph = self._gpu.capture(stream, lambda: self._work(slot, stream))
            self._gpu.fill(slot.output.address, POISON, slot.output.nbytes, stream)
            graph.launch(stream)
            if self._fetched(slot, stream) == expected and set(expected) != {POISON}:
                self.graphs += 1
                return graph
        except RunFailed:
            stream.synchronize()
        self.graphs_refused += 1
        self._work(slot, stream)  # the caller's scores are the plain run's
        return None

    def _fetched(self, slot: _Slot, stream: Stream) -> bytes:
        memory = self._gpu.pinned(slot.output.nbytes)
        assert memory.host is not None
        self._gpu.copy(memory.address, slot.output.address, slot.output.nbytes, stream)
        stream.synchronize()
        return memory.host[: slot.output.nbytes].tobytes()


class _Lane:
    """Batches that come from the host: a stream, and buffers for the last few shapes."""

    def __init__(self, gpu: Device, runs: EngineRuns) -> None:
        self._gpu = gpu
        self._runs = runs
        self._stream: Stream | None = None
        self._inputs: OrderedDict[Shape, tuple[Memory, DeviceArray]] = OrderedDict()
        self._back: Memory | None = None

    def run(self, batch: Array) -> Array:
        self._runs.check(batch.shape, batch.dtype)
        stream = self._stream = self._stream or self._gpu.stream()
        pinned, image = self._input(batch.shape, batch.dtype)
        assert pinned.host is not None
        pinned.host[: batch.nbytes] = np.ascontiguousarray(batch).reshape(-1).view(np.uint8)
        self._gpu.copy(image.address, pinned.address, batch.nbytes, stream)
        scores = self._runs.on_device(image, stream)
        back = self._back = self._returned(scores.nbytes)
        self._gpu.copy(back.address, scores.address, scores.nbytes, stream)
        stream.synchronize()
        assert back.host is not None
        return back.host[: scores.nbytes].view(scores.dtype).reshape(scores.shape).copy()

    def _input(self, shape: Shape, dtype: np.dtype[Any]) -> tuple[Memory, DeviceArray]:
        if shape not in self._inputs:
            if len(self._inputs) >= MOST_SHAPES:
                self._inputs.popitem(last=False)
            image = device_arrays.empty(self._gpu, shape, dtype)
            self._inputs[shape] = (self._gpu.pinned(image.nbytes), image)
        self._inputs.move_to_end(shape)
        return self._inputs[shape]

    def _returned(self, nbytes: int) -> Memory:
        if self._back is not None and self._back.nbytes >= nbytes:
            return self._back
        return self._gpu.pinned(nbytes)
