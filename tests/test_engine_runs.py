"""The passes of an engine on a stand-in for a GPU whose streams do nothing until they are waited
for: padding, slots, CUDA graphs that were proven, and what is kept of many shapes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from stand_in_device import StandInDevice, enqueue, memory_at

from cada_deploy import device_arrays, engine_runs
from cada_deploy.device import OutOfDeviceMemory
from cada_deploy.device_arrays import DeviceArray
from cada_deploy.engine_plans import Profile
from cada_deploy.engine_runs import EngineRuns, Network
from cada_deploy.errors import ArtefactMismatch, RunFailed

SIZE = (4, 6)
FLOAT = np.dtype(np.float32)


def network(batch: int = 2, layout: str = "NCHW") -> Network:
    return Network(layout, FLOAT, FLOAT, Profile(SIZE, SIZE, (8, 12), batch))


def expected(rows: np.ndarray) -> np.ndarray:
    """Two classes: the mean of the colours, and its negative."""
    mean = rows.mean(1, keepdims=True)
    return np.concatenate([mean, -mean], 1)


@dataclass
class Doubling:
    """A context that computes `expected` on the stream."""

    shape: tuple[int, ...]
    busy: threading.Lock = field(default_factory=threading.Lock)
    passes: int = 0

    @property
    def scores(self) -> tuple[int, ...]:
        return (self.shape[0], 2, *self.shape[2:])

    def execute(self, image: int, scores: int, stream: Any) -> None:
        assert self.busy.acquire(blocking=False), "a context has one set of activations"
        self.busy.release()
        enqueue(stream.handle, lambda: self._run(image, scores))

    def _run(self, image: int, scores: int) -> None:
        self.passes += 1
        rows = memory_at(image, int(np.prod(self.shape)) * 4).view(FLOAT).reshape(self.shape)
        found = expected(rows).astype(FLOAT)
        memory_at(scores, found.nbytes)[:] = found.reshape(-1).view(np.uint8)


@dataclass
class Maker:
    made: list[Doubling] = field(default_factory=list)
    give: Any = None  # scores' shape, when not the right one

    def context(self, shape: tuple[int, ...], stream: Any) -> Any:
        context = Doubling(shape)
        self.made.append(context)
        if self.give is not None:
            return type("Odd", (), {"scores": self.give})()
        return context


def rows(count: int, size: tuple[int, int] = SIZE, seed: int = 0) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.normal(0, 1, (count, 3, *size)).astype(np.float32)


def uploaded(gpu: StandInDevice, batch: np.ndarray, stream: Any) -> tuple[DeviceArray, Any]:
    pinned = gpu.pinned(batch.nbytes)
    assert pinned.host is not None
    pinned.host[:] = batch.reshape(-1).view(np.uint8)
    image = device_arrays.empty(gpu, batch.shape, batch.dtype)  # type: ignore[arg-type]
    gpu.copy(image.address, pinned.address, batch.nbytes, stream)
    return image, pinned


def fetched(scores: DeviceArray) -> np.ndarray:
    assert scores.ready is not None
    scores.ready.synchronize()
    found = memory_at(scores.address, scores.nbytes).view(scores.dtype)
    return found.reshape(scores.shape).copy()


def runs(gpu: StandInDevice, maker: Maker, what: Network) -> EngineRuns:
    return EngineRuns(gpu, maker, what, "m.engine")  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_rows_goes_through_one_batch_shape(batch: int, count: int) -> None:
    maker = Maker()
    engine = runs(StandInDevice(), maker, network(batch))
    for seed in range(4):  # plain, captured, replayed, replayed
        given = rows(count, seed=seed)
        assert (engine.on_host(given) == expected(given)).all()
    assert {context.shape[0] for context in maker.made} == {batch}
    assert engine.graphs_refused == 0


def test_a_graph_serves_from_the_third_run_of_a_slot() -> None:
    gpu, maker = StandInDevice(), Maker()
    engine = runs(gpu, maker, network())
    stream = gpu.stream()
    image, pinned = uploaded(gpu, rows(2), stream)
    for run in range(1, 6):
        again = rows(2, seed=run)
        pinned.host[:] = again.reshape(-1).view(np.uint8)
        gpu.copy(image.address, pinned.address, again.nbytes, stream)
        found = fetched(engine.on_device(image, stream))
        assert (found == expected(again)).all()
        assert engine.graphs == (run >= 2)


@pytest.mark.parametrize("captures", ["refused", "empty"])
def test_a_graph_that_is_not_proven_is_not_used(captures: str) -> None:
    """An empty graph leaves what was there before; poison tells it from a right replay."""
    gpu = StandInDevice(captures=captures)
    engine = runs(gpu, Maker(), network())
    stream = gpu.stream()
    image, pinned = uploaded(gpu, rows(3), stream)
    for seed in range(5):
        again = rows(3, seed=seed)
        pinned.host[:] = again.reshape(-1).view(np.uint8)
        gpu.copy(image.address, pinned.address, again.nbytes, stream)
        assert (fetched(engine.on_device(image, stream)) == expected(again)).all()
    assert engine.graphs == 0 and engine.graphs_refused == 1


def test_nothing_is_read_before_the_batch_is_ready() -> None:
    gpu, engine = StandInDevice(), runs(StandInDevice(), Maker(), network())
    copying, running = gpu.stream(), gpu.stream()
    given = rows(2)
    image, _pinned = uploaded(gpu, given, copying)
    ready = gpu.event()
    ready.record(copying)
    late = DeviceArray(image.device, image.address, image.shape, FLOAT, image.owner, ready)
    assert (fetched(engine.on_device(late, running)) == expected(given)).all()


def test_a_context_is_never_on_two_streams_at_once() -> None:
    gpu, maker = StandInDevice(), Maker()
    engine = runs(gpu, maker, network())
    pairs = []
    for seed in range(6):
        stream = gpu.stream()
        given = rows(2, seed=seed)
        image, pinned = uploaded(gpu, given, stream)
        pairs.append((engine.on_device(image, stream), given, image, pinned))
    assert len(maker.made) == engine_runs.CONTEXTS
    for scores, given, *_ in reversed(pairs):  # waiting for the last runs what it depends on
        assert (fetched(scores) == expected(given)).all()


def test_what_is_kept_has_a_limit_and_evicted_shapes_come_back() -> None:
    gpu, maker = StandInDevice(), Maker()
    engine = runs(gpu, maker, network())
    sizes = [(4, 6), (5, 7), (6, 8), (7, 9), (8, 10), (8, 12)]
    for _ in range(3):
        for size in sizes:
            for seed in range(3):
                given = rows(2, size, seed)
                assert (engine.on_host(given) == expected(given)).all()
    assert len(engine._shapes) == engine_runs.MOST_SHAPES
    stream = gpu.stream()
    kept = []
    for seed in range(engine_runs.MOST_SLOTS + 3):
        given = rows(2, seed=seed)
        image, pinned = uploaded(gpu, given, stream)
        kept.append((image, pinned))
        assert (fetched(engine.on_device(image, stream)) == expected(given)).all()
    (shape,) = [s for s in engine._shapes if s[2:] == SIZE]
    assert len(engine._shapes[shape].slots) == engine_runs.MOST_SLOTS


def test_many_threads_get_their_own_scores() -> None:
    engine = runs(StandInDevice(), Maker(), network(3))
    batches = [rows(k % 4 + 1, seed=k) for k in range(24)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(engine.on_host, batches))
    assert all((f == expected(b)).all() for f, b in zip(found, batches))


@pytest.mark.parametrize(
    ("shape", "dtype", "said"),
    [
        ((2, 3, 3, 6), np.float32, r"at 3x6 \(HxW\).*4x6 to 8x12, batch 2.*--size"),
        ((2, 3, 8, 13), np.float32, "at 8x13"),
        ((2, 3, 4, 6), np.float16, "float32; got"),
        ((2, 4, 6, 3), np.float32, "NCHW"),
        ((3, 4, 6), np.float32, "batch of images"),
        ((0, 3, 4, 6), np.float32, "batch of images"),
    ],
)
def test_a_batch_that_the_engine_was_not_built_for(
    shape: tuple[int, ...], dtype: type, said: str
) -> None:
    engine = runs(StandInDevice(), Maker(), network())
    with pytest.raises(ArtefactMismatch, match=said):
        engine.on_host(np.zeros(shape, dtype))


@pytest.mark.parametrize("give", [(2, 2, 4), (1, 2, 4, 6), (2, -1, 4, 6), (2, 0, 4, 6)])
def test_scores_of_another_shape_are_refused(give: tuple[int, ...]) -> None:
    engine = runs(StandInDevice(), Maker(give=give), network())
    with pytest.raises(ArtefactMismatch, match="scores of shape"):
        engine.on_host(rows(2))


def test_no_room_on_the_device_and_a_failed_pass_are_told() -> None:
    with pytest.raises(OutOfDeviceMemory):
        runs(StandInDevice(limit_bytes=100), Maker(), network()).on_host(rows(2))

    class Failing(Doubling):
        def execute(self, image: int, scores: int, stream: Any) -> None:
            raise RunFailed("could not run")

    maker = Maker()
    maker.context = lambda shape, stream: Failing(shape)  # type: ignore[method-assign]
    engine = runs(StandInDevice(), maker, network())
    for _ in range(engine_runs.CONTEXTS + 2):  # a lane that failed goes back to the others
        with pytest.raises(RunFailed, match="could not run"):
            engine.on_host(rows(2))


def test_the_class_count_of_an_engine_that_does_not_state_it() -> None:
    assert runs(StandInDevice(), Maker(), network()).probed_classes() == 2
