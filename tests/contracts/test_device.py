"""Every CUDA layer against the contract of cada_deploy.device.

In an ordinary run a layer needs a GPU: CADA_TEST_CUDA=cuda:0 in the environment. Without one,
test_device_on_stand_in.py runs this file again where libcuda.so.1 is the tests' stand-in, eager and
lazy; what plants errors or counts calls runs there alone.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_driver import build

from cada_deploy import cubins, device_arrays
from cada_deploy.device import (
    Device,
    Memory,
    Module,
    OutOfDeviceMemory,
    Stream,
    layer_module,
    layers,
    open_device,
)
from cada_deploy.device_arrays import DeviceArray
from cada_deploy.errors import EnvironmentLacks, RunFailed, UsageError

STAND_IN = os.environ.get("CADA_TEST_STAND_IN", "")  # "eager" or "lazy"
GPU = os.environ.get("CADA_TEST_CUDA", "")

if not (GPU or STAND_IN):
    pytest.skip(
        "not run: needs a GPU (CADA_TEST_CUDA=cuda:0); on the stand-in driver it runs in "
        "test_device_on_stand_in.py",
        allow_module_level=True,
    )

only_stand_in = pytest.mark.skipif(not STAND_IN, reason="not run: the stand-in driver's own")


@pytest.fixture(
    params=[os.environ["CADA_TEST_LAYER"]] if STAND_IN else sorted(layers()), scope="module"
)
def device(request: pytest.FixtureRequest) -> Device:
    try:
        return open_device(GPU or "cuda:0", request.param)
    except EnvironmentLacks as error:
        pytest.skip(f"not run: {error}")


@pytest.fixture(scope="module")
def module(device: Device) -> Module:
    if STAND_IN:
        return device.load(build.kernel_image())
    major, minor = device.compute_capability
    return device.load(cubins.compile_with_nvrtc(build.KERNELS, f"sm_{major}{minor}", {}))


class StandIn:
    """Knobs and counters of tests/cuda_driver."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.stand_in_count.restype = ctypes.c_long

    def set(self, knob: str, value: int) -> None:
        self._library.stand_in_set(knob.encode(), ctypes.c_long(value))

    def count(self, counter: str) -> int:
        return int(self._library.stand_in_count(counter.encode()))

    def forget_context(self) -> None:
        self._library.cuCtxSetCurrent(None)

    def has_context(self) -> bool:
        context = ctypes.c_void_p()
        self._library.cuCtxGetCurrent(ctypes.byref(context))
        return bool(context.value)


@pytest.fixture
def stand_in(device: Device) -> Iterator[StandIn]:
    if not STAND_IN:
        pytest.skip("not run: the stand-in driver's own")
    driver = StandIn()
    yield driver
    for knob in ("out_of_memory", "fault_at", "sleep_ms"):
        driver.set(knob, 0)


def given(device: Device, values: np.ndarray) -> Memory:
    """On the device; waits."""
    stream = device.stream()
    pinned, memory = device.pinned(values.nbytes), device.allocate(values.nbytes)
    pinned.host[:] = values.reshape(-1).view(np.uint8)  # type: ignore[index]
    device.copy(memory.address, pinned.address, values.nbytes, stream)
    stream.synchronize()
    return memory


def taken(device: Device, memory: Memory, dtype: type, stream: Stream | None = None) -> np.ndarray:
    """To the host, after what `stream` does."""
    stream = stream or device.stream()
    pinned = device.pinned(memory.nbytes)
    device.copy(pinned.address, memory.address, memory.nbytes, stream)
    stream.synchronize()
    return pinned.host.view(dtype).copy()  # type: ignore[union-attr]


def ramp(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.float32)


def add_arguments(a: Memory, b: Memory, out: Memory, n: int) -> list[np.generic]:
    return [*(np.uint64(m.address) for m in (a, b, out)), np.int32(n)]


# ---- what a device says of itself ----


def test_says_what_it_is(device: Device) -> None:
    assert device.layer in layers()
    assert device.name
    assert device.compute_capability >= (5, 0)
    assert device.multiprocessors >= 1
    assert float(device.driver_version) >= 12
    free, total = device.memory()
    assert 0 < free <= total
    assert layer_module(device.layer).version()
    assert f"cuda:{device.ordinal} {device.name}" in layer_module(device.layer).describe()


def test_a_device_that_is_not_there(device: Device) -> None:
    with pytest.raises(EnvironmentLacks, match=r"there is no cuda:99.*there is: cuda:0"):
        open_device("cuda:99", device.layer)


# ---- memory, copies, streams, events ----


def test_memory_is_aligned_and_comes_back_as_it_went(device: Device) -> None:
    for nbytes in (1, 4, 1000, 1 << 20):
        values = (np.arange(nbytes) * 7 % 251).astype(np.uint8)
        memory = given(device, values)
        assert memory.address % 256 == 0
        assert (memory.nbytes, memory.host) == (nbytes, None)
        assert np.array_equal(taken(device, memory, np.uint8), values)


def test_an_empty_buffer_has_an_address_and_no_bytes(device: Device) -> None:
    memory, pinned, stream = device.allocate(0), device.pinned(0), device.stream()
    assert memory.address and memory.nbytes == 0
    assert pinned.address and pinned.host is not None and pinned.host.shape == (0,)
    device.copy(memory.address, pinned.address, 0, stream)
    device.fill(memory.address, 1, 0, stream)
    stream.synchronize()


def test_a_fill_and_a_copy_at_offsets(device: Device) -> None:
    stream = device.stream()
    memory, other = device.allocate(64), device.allocate(64)
    device.fill(memory.address, 1, 64, stream)
    device.fill(memory.address + 8, 200, 16, stream)
    device.fill(other.address, 9, 64, stream)
    device.copy(other.address + 4, memory.address + 8, 20, stream)
    got = taken(device, other, np.uint8, stream)
    assert got.tolist() == [9] * 4 + [200] * 16 + [1] * 4 + [9] * 40


def test_pinned_memory_is_written_by_the_device_itself(device: Device, module: Module) -> None:
    stream = device.stream()
    a, out = given(device, ramp(8)), device.pinned(32)
    arguments = add_arguments(a, a, out, 8)
    device.launch(module.function("add"), (1, 1, 1), (8, 1, 1), arguments, stream)
    stream.synchronize()
    assert out.host is not None
    assert np.array_equal(out.host.view(np.float32), 2 * ramp(8))


def test_a_view_of_pinned_memory_outlives_the_memory(device: Device) -> None:
    pinned = device.pinned(64)
    assert pinned.host is not None
    view = pinned.host[8:16].view(np.float32)
    view[:] = 5
    del pinned
    gc.collect()
    assert view.tolist() == [5, 5]


def test_an_event_orders_two_streams(device: Device, module: Module) -> None:
    """On the lazy stand-in, without the wait the second stream reads garbage."""
    n = 1000
    first, second = device.stream(), device.stream()
    a, half, out = given(device, ramp(n)), device.allocate(4 * n), device.allocate(4 * n)
    add, event = module.function("add"), device.event()
    size = ((n + 127) // 128, 1, 1), (128, 1, 1)
    device.launch(add, *size, add_arguments(a, a, half, n), first)
    event.record(first)
    second.wait(event)
    device.launch(add, *size, add_arguments(half, half, out, n), second)
    assert np.array_equal(taken(device, out, np.float32, second), 4 * ramp(n))


@only_stand_in
@pytest.mark.skipif(STAND_IN != "lazy", reason="not run: only the lazy stand-in is late for sure")
def test_nothing_is_done_before_somebody_waits(device: Device, stand_in: StandIn) -> None:
    """So no call of the layer waits in secret, and a missing wait is seen."""
    stream, other, event = device.stream(), device.stream(), device.event()
    memory, pinned = device.allocate(16), device.pinned(16)
    assert pinned.host is not None
    before = stand_in.count("synchronisations")
    device.fill(memory.address, 3, 16, stream)
    device.copy(pinned.address, memory.address, 16, stream)
    event.record(stream)
    other.wait(event)
    assert stand_in.count("synchronisations") == before
    assert not event.done
    assert (pinned.host == 0xCD).all() or (pinned.host == 3).all()
    event.synchronize()
    assert (pinned.host == 3).all()


def test_events_pass_and_measure(device: Device) -> None:
    stream = device.stream()
    first, last = device.event(timing=True), device.event(timing=True)
    memory = device.allocate(1 << 20)
    first.record(stream)
    device.fill(memory.address, 1, memory.nbytes, stream)
    last.record(stream)
    last.synchronize()
    assert first.done and last.done
    assert last.milliseconds_since(first) >= 0
    assert device.event().done  # never recorded: nothing to wait for
    untimed = device.event()
    untimed.record(stream)
    stream.synchronize()
    with pytest.raises(RunFailed):
        untimed.milliseconds_since(first)


def test_an_event_is_done_some_time(device: Device) -> None:
    stream, event = device.stream(), device.event()
    memory = device.allocate(1 << 16)
    device.fill(memory.address, 1, memory.nbytes, stream)
    event.record(stream)
    until = time.monotonic() + 10
    while not event.done:
        assert time.monotonic() < until


def test_a_borrowed_stream_is_that_stream_and_is_not_destroyed(device: Device) -> None:
    stream = device.stream()
    memory = device.allocate(16)
    borrowed = device.borrowed_stream(stream.handle)
    assert borrowed.handle == stream.handle
    device.fill(memory.address, 4, 16, borrowed)
    del borrowed
    gc.collect()
    assert (taken(device, memory, np.uint8, stream) == 4).all()
    for default in (1, 2):  # the legacy stream and the thread's
        device.fill(memory.address, default, 16, device.borrowed_stream(default))
        got = taken(device, memory, np.uint8, device.borrowed_stream(default))
        assert (got == default).all()


def test_where_an_address_belongs(device: Device) -> None:
    memory, elsewhere = device.allocate(100), np.zeros(100, np.uint8)
    assert device.ordinal_at(memory.address) == device.ordinal
    assert device.ordinal_at(memory.address + 99) == device.ordinal
    assert device.ordinal_at(int(elsewhere.ctypes.data)) is None


# ---- kernels ----


def test_every_type_of_argument_arrives(device: Device, module: Module) -> None:
    out, stream = device.allocate(12 * 8), device.stream()
    values = [
        np.int8(-5), np.uint8(250), np.int16(-3000), np.uint16(60000), np.int32(-(2**31)),
        np.uint32(2**32 - 1), np.int64(-(2**40)), np.uint64(2**50), np.float32(0.1),
        np.float64(0.1), np.float16(1.5), np.bool_(True), np.uint64(out.address),
    ]  # fmt: skip
    device.launch(module.function("arguments"), (1, 1, 1), (1, 1, 1), values, stream)
    got = taken(device, out, np.float64, stream)
    half_bits = float(np.float16(1.5).view(np.uint16))
    assert got.tolist() == [*(float(v) for v in values[:10]), half_bits, 1.0]


def test_grid_and_block_arrive_in_their_order(device: Device, module: Module) -> None:
    grid, block = (2, 3, 2), (3, 2, 2)
    out, stream = device.allocate(4 * 12 * 12), device.stream()
    device.launch(module.function("places"), grid, block, [np.uint64(out.address)], stream)
    got = taken(device, out, np.int32, stream).reshape(12, 12)
    assert got[0, 0] == 0
    assert got[-1, -1] == 1 + 10 * 2 + 100 * 1 + 1000 * 2 + 10000 * 1 + 100000 * 1


def test_arguments_are_copied_at_the_launch(device: Device, module: Module) -> None:
    n, stream = 4, device.stream()
    a, out = given(device, ramp(n)), device.allocate(4 * n)
    arguments = add_arguments(a, a, out, n)
    device.launch(module.function("add"), (1, 1, 1), (4, 1, 1), arguments, stream)
    arguments[:] = [np.uint64(0)] * 4
    del arguments
    gc.collect()
    assert np.array_equal(taken(device, out, np.float32, stream), 2 * ramp(n))


def test_much_shared_memory_is_asked_for(device: Device, module: Module) -> None:
    n, stream = 4, device.stream()
    a, out = given(device, ramp(n)), device.allocate(4 * n)
    arguments, add = add_arguments(a, a, out, n), module.function("add")
    device.launch(add, (1, 1, 1), (4, 1, 1), arguments, stream, shared_bytes=60 * 1024)
    assert np.array_equal(taken(device, out, np.float32, stream), 2 * ramp(n))


def test_a_kernel_keeps_its_module(device: Device) -> None:
    if not STAND_IN:
        pytest.skip("not run: the stand-in driver's own")
    loaded = StandIn().count("modules")
    function = device.load(build.kernel_image()).function("add")
    gc.collect()
    assert StandIn().count("modules") == loaded + 1
    del function
    gc.collect()
    assert StandIn().count("modules") == loaded


def test_a_kernel_that_is_not_there(module: Module) -> None:
    with pytest.raises(RunFailed, match="no kernel 'nothing'"):
        module.function("nothing")


def test_an_image_that_the_driver_refuses(device: Device) -> None:
    with pytest.raises(RunFailed, match=r"sm_.*refuses these kernels"):
        device.load(b"this is no cubin, for certain" * 4)


# ---- graphs ----


def test_a_captured_graph_does_it_again(device: Device, module: Module) -> None:
    n = 256
    stream, side = device.stream(), device.stream()
    a, half, out = given(device, ramp(n)), device.allocate(4 * n), device.allocate(4 * n)
    add = module.function("add")
    forked, joined = device.event(), device.event()
    device.fill(out.address, 0, out.nbytes, stream)

    def work() -> None:
        device.launch(add, (2, 1, 1), (128, 1, 1), add_arguments(a, a, half, n), stream)
        forked.record(stream)
        side.wait(forked)  # the second stream joins the capture
        device.launch(add, (2, 1, 1), (128, 1, 1), add_arguments(half, a, out, n), side)
        joined.record(side)
        stream.wait(joined)

    graph = device.capture(stream, work)
    assert (taken(device, out, np.float32, stream) == 0).all()  # captured, not done
    graph.launch(stream)
    assert np.array_equal(taken(device, out, np.float32, stream), 3 * ramp(n))
    pinned = device.pinned(4 * n)
    pinned.host.view(np.float32)[:] = 1  # type: ignore[union-attr]
    device.copy(a.address, pinned.address, 4 * n, stream)
    graph.launch(stream)
    assert (taken(device, out, np.float32, stream) == 3).all()


def _waits(device: Device, stream: Stream) -> None:
    stream.synchronize()


def _allocates(device: Device, stream: Stream) -> None:
    device.allocate(16)


def _waits_for_all(device: Device, stream: Stream) -> None:
    device.synchronize()


@pytest.mark.parametrize("mistake", [_waits, _allocates, _waits_for_all])
def test_what_cannot_be_captured_is_said(
    device: Device, mistake: Callable[[Device, Stream], None]
) -> None:
    stream, memory = device.stream(), device.allocate(16)

    def work() -> None:
        device.fill(memory.address, 1, 16, stream)
        mistake(device, stream)

    with pytest.raises(RunFailed, match="cannot be captured"):
        device.capture(stream, work)
    device.fill(memory.address, 6, 16, stream)  # the stream is usable again
    assert (taken(device, memory, np.uint8, stream) == 6).all()


def test_a_side_stream_that_does_not_come_back(device: Device) -> None:
    stream, side, event = device.stream(), device.stream(), device.event()
    memory = device.allocate(16)

    def work() -> None:
        event.record(stream)
        side.wait(event)
        device.fill(memory.address, 1, 16, side)

    with pytest.raises(RunFailed, match="cannot be captured"):
        device.capture(stream, work)


def test_an_error_in_the_work_ends_the_capture(device: Device) -> None:
    stream, memory = device.stream(), device.allocate(16)

    def work() -> None:
        device.fill(memory.address, 1, 16, stream)
        raise KeyError("not CUDA's")

    with pytest.raises(KeyError):
        device.capture(stream, work)
    device.fill(memory.address, 7, 16, stream)
    assert (taken(device, memory, np.uint8, stream) == 7).all()


def test_what_dies_during_a_capture_is_freed_after_it(device: Device) -> None:
    stream, memory = device.stream(), device.allocate(16)
    dying = [device.allocate(1 << 20), device.pinned(64)]

    def work() -> None:
        device.fill(memory.address, 1, 16, stream)
        dying.clear()
        gc.collect()

    free_before = device.memory()[0]
    device.capture(stream, work)
    assert device.memory()[0] >= free_before


def test_another_thread_may_allocate_during_a_capture(device: Device) -> None:
    stream, memory = device.stream(), device.allocate(16)
    made: list[Memory] = []

    def work() -> None:
        device.fill(memory.address, 5, 16, stream)
        thread = threading.Thread(target=lambda: made.append(device.allocate(16)))
        thread.start()
        thread.join()

    device.capture(stream, work).launch(stream)
    assert len(made) == 1
    assert (taken(device, memory, np.uint8, stream) == 5).all()


# ---- arrays of others ----


def test_an_array_of_another_stream_is_waited_for(device: Device, module: Module) -> None:
    """Out and in again through both interfaces, each time to a stream that has to wait."""
    n, stream = 300, device.stream()
    a = given(device, ramp(n))
    made = device_arrays.empty(device, (n,), np.float32)
    ready = device.event()
    arguments = [*(np.uint64(p) for p in (a.address, a.address, made.address)), np.int32(n)]
    device.launch(module.function("add"), (3, 1, 1), (100, 1, 1), arguments, stream)
    ready.record(stream)
    lent = dataclasses.replace(made, ready=ready)
    interface = lent.__cuda_array_interface__
    for producer in (SimpleNamespace(__cuda_array_interface__=interface), Pack(lent)):
        array = device_arrays.borrowed(producer, device)
        assert array.address == made.address and array.ready is not None
        reader = device.stream()
        reader.wait(array.ready)
        got = taken(device, Taken(array.address, array.nbytes), np.float32, reader)
        assert np.array_equal(got, 2 * ramp(n))


class Pack:
    """A foreign producer with DLPack."""

    def __init__(self, array: DeviceArray) -> None:
        self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__


@dataclasses.dataclass
class Taken:
    address: int
    nbytes: int


def test_an_array_of_pycuda_comes_in(device: Device) -> None:
    gpuarray = pytest.importorskip("pycuda.gpuarray", reason="not run: needs PyCUDA itself")
    import pycuda.driver

    context = pycuda.driver.Device(device.ordinal).retain_primary_context()
    context.push()
    try:
        theirs = gpuarray.GPUArray((3, 4), np.float32)
        ours = device_arrays.borrowed(theirs, device)
        assert (ours.address, ours.shape, ours.dtype) == (int(theirs.ptr), (3, 4), np.float32)
        with pytest.raises(UsageError, match=r"strides of \(1, 4\) elements; expected C-cont"):
            device_arrays.borrowed(theirs.T, device)
        del theirs, ours
    finally:
        pycuda.driver.Context.pop()
        context.detach()


# ---- threads, lifetimes ----


def test_every_call_works_in_a_thread_that_never_saw_the_device(
    device: Device, module: Module
) -> None:
    """And where somebody else's context, or none, is current before each call."""
    stream, event, memory = device.stream(), device.event(timing=True), device.allocate(64)
    calls: list[Callable[[], object]] = [
        device.stream, device.event, device.memory, device.synchronize, stream.synchronize,
        lambda: device.allocate(8), lambda: device.pinned(8),
        lambda: device.copy(memory.address, memory.address + 32, 32, stream),
        lambda: device.fill(memory.address, 1, 64, stream),
        lambda: device.load(build.kernel_image()) if STAND_IN else None,
        lambda: module.function("add"),
        lambda: device.launch(
            module.function("places"), (1, 1, 1), (1, 1, 1), [np.uint64(memory.address)], stream
        ),
        lambda: device.ordinal_at(memory.address), lambda: event.record(stream),
        lambda: stream.wait(event), event.synchronize, lambda: event.done,
        lambda: event.milliseconds_since(event),
        lambda: device.capture(stream, lambda: device.fill(memory.address, 1, 8, stream)),
        lambda: device.borrowed_stream(stream.handle),
    ]  # fmt: skip
    borrows = len(calls) - 1  # calls nothing
    held: list[object] = []
    failed: list[tuple[int, BaseException]] = []

    def run() -> None:
        for index, call in enumerate(calls):
            if STAND_IN:
                StandIn().forget_context()
            try:
                held.append(call())  # its end would set the context, too
                # Left current, too: engines work on the thread's device after a call of ours.
                assert index == borrows or not STAND_IN or StandIn().has_context()
            except BaseException as error:
                failed.append((index, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failed


def test_memory_is_free_again_when_its_object_dies_in_any_thread(device: Device) -> None:
    device.synchronize()
    held = [device.allocate(8 << 20) for _ in range(4)]
    low = device.memory()[0]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    gc.collect()
    assert device.memory()[0] >= low + (32 << 20)


def _one_of_each(device: Device) -> list[object]:
    stream, memory = device.stream(), device.allocate(100)
    graph = device.capture(stream, lambda: device.fill(memory.address, 1, 8, stream))
    module = device.load(build.kernel_image())
    return [stream, memory, graph, module, device.pinned(50), device.event()]


@only_stand_in
def test_everything_is_freed(device: Device, stand_in: StandIn) -> None:
    kinds = ("device_bytes", "pinned_bytes", "streams", "events", "modules", "graphs")
    gc.collect()
    before = [stand_in.count(kind) for kind in kinds]
    held = _one_of_each(device)
    assert [stand_in.count(kind) for kind in kinds] != before
    held.clear()
    gc.collect()
    assert [stand_in.count(kind) for kind in kinds] == before


@only_stand_in
def test_a_thousand_launches_and_copies_allocate_nothing(
    device: Device, module: Module, stand_in: StandIn
) -> None:
    n, stream, event = 64, device.stream(), device.event()
    a, out, pinned = given(device, ramp(n)), device.allocate(4 * n), device.pinned(4 * n)
    add, arguments = module.function("add"), add_arguments(a, a, out, n)
    graph = device.capture(
        stream, lambda: device.launch(add, (1, 1, 1), (64, 1, 1), arguments, stream)
    )

    def frame() -> None:
        device.copy(a.address, a.address, 4 * n, stream)
        device.launch(add, (1, 1, 1), (64, 1, 1), arguments, stream)
        graph.launch(stream)
        device.copy(pinned.address, out.address, 4 * n, stream)
        event.record(stream)
        event.synchronize()

    frame()
    made = ("allocations", "pinned_allocations", "streams", "events", "modules", "graphs")
    before, waits = [stand_in.count(kind) for kind in made], stand_in.count("synchronisations")
    launches = stand_in.count("launches")
    for _ in range(1000):
        frame()
    assert stand_in.count("launches") == launches + 1000
    assert [stand_in.count(kind) for kind in made] == before
    assert stand_in.count("synchronisations") == waits + 1000  # the event's and no other


@only_stand_in
@pytest.mark.parametrize("way", ["stream", "event", "device"])
def test_other_threads_run_while_one_waits(device: Device, stand_in: StandIn, way: str) -> None:
    stream, event = device.stream(), device.event()
    event.record(stream)
    wait = {"stream": stream, "event": event, "device": device}[way].synchronize
    stand_in.set("sleep_ms", 300)
    thread = threading.Thread(target=wait)
    thread.start()
    ticks = 0
    while thread.is_alive():
        time.sleep(0.01)
        ticks += 1
    assert ticks >= 5  # with the GIL held, one or two


# ---- errors ----


def test_no_room_says_how_much_was_wanted_and_what_to_lower(device: Device) -> None:
    _, total = device.memory()
    with pytest.raises(OutOfDeviceMemory) as error:
        device.allocate(2 * total)
    for words in ("has no room for", "GB more of GPU memory", "are free", "--batch-size"):
        assert words in str(error.value)
    device.allocate(1024)  # the next one that fits is given


@only_stand_in
def test_a_full_device(device: Device, stand_in: StandIn) -> None:
    kept = [device.allocate(10), device.allocate(10)]
    stand_in.set("out_of_memory", 1)
    with pytest.raises(OutOfDeviceMemory, match="10 bytes more of GPU memory"):
        device.allocate(10)
    with pytest.raises(OutOfDeviceMemory, match="10 bytes more of page-locked host memory: lower"):
        device.pinned(10)
    stand_in.set("out_of_memory", 0)
    kept.append(device.allocate(10))


@only_stand_in
def test_a_copy_that_leaves_its_buffer_is_refused(device: Device, stand_in: StandIn) -> None:
    memory, stream = device.allocate(64), device.stream()
    with pytest.raises(RunFailed, match="CUDA_ERROR_INVALID_VALUE"):
        device.copy(memory.address + 32, memory.address, 33, stream)
    with pytest.raises(RunFailed, match="CUDA_ERROR_INVALID_VALUE"):
        device.fill(memory.address + 1, 0, 64, stream)


FAULTS = {700: "ILLEGAL_ADDRESS", 702: "LAUNCH_TIMEOUT", 710: "ASSERT", 719: "LAUNCH_FAILED",
          214: "ECC_UNCORRECTABLE", 46: "DEVICE_UNAVAILABLE"}  # fmt: skip

LOST = """
import ctypes, gc, sys
import numpy as np
from cuda_driver import build
from cada_deploy.device import DeviceLost, open_device
device = open_device("cuda:0", sys.argv[1])
add = device.load(build.kernel_image()).function("places")
memory, stream, event = device.allocate(64), device.stream(), device.event()
def launch():
    device.launch(add, (1, 1, 1), (1, 1, 1), [np.uint64(memory.address)], stream)
launch()
stream.synchronize()
driver = ctypes.CDLL("libcuda.so.1")
driver.stand_in_set(b"fault_code", ctypes.c_long(int(sys.argv[2])))
driver.stand_in_set(b"fault_at", ctypes.c_long(2))
try:
    launch()
    launch()
    event.record(stream)
    event.synchronize()
except DeviceLost as error:
    print("lost:", error)
for call in (launch, device.stream, lambda: device.allocate(8), device.synchronize, device.memory):
    try:
        call()
    except DeviceLost:
        print("still lost")
del memory, event
gc.collect()
print("clean")
"""


@only_stand_in
@pytest.mark.parametrize("code", sorted(FAULTS))
def test_a_fault_in_a_kernel_is_a_lost_device(device: Device, code: int) -> None:
    done = in_process(LOST, device.layer, str(code))
    assert done.returncode == 0, done.stderr
    assert f"CUDA_ERROR_{FAULTS[code]} ({code})" in done.stdout
    assert "the same command resumes" in done.stdout
    assert done.stdout.count("still lost") == 5
    assert done.stdout.endswith("clean\n")
    assert done.stderr == ""  # nothing fails aloud when memory of a lost device is freed


AT_EXIT = """
import atexit, ctypes, sys
def freed():  # registered first, so it runs last
    print("device bytes", ctypes.CDLL("libcuda.so.1").stand_in_count(b"device_bytes"))
atexit.register(freed)
from cuda_driver import build
from cada_deploy.device import open_device
device = open_device("cuda:0", sys.argv[1])
if sys.argv[2] == "device":
    sys.exit()
stream, event = device.stream(), device.event()
memory, pinned = device.allocate(9), device.pinned(9)
module = device.load(build.kernel_image())
graph = device.capture(stream, lambda: device.fill(memory.address, 1, 8, stream))
loop = [memory, pinned, stream, event, graph, module]
if sys.argv[2] == "loop":
    loop.append(loop)
    sys.modules["kept"] = loop
"""


@only_stand_in
@pytest.mark.parametrize("kept", ["loop", "globals", "device"])
def test_the_end_of_the_process_is_silent_and_frees_nothing(device: Device, kept: str) -> None:
    done = in_process(AT_EXIT, device.layer, kept)
    assert (done.returncode, done.stdout, done.stderr) == (
        0, f"device bytes {0 if kept == 'device' else 9}\n", "",
    )  # fmt: skip


OPEN = """
import sys
from cada_deploy.device import open_device
from cada_deploy.errors import CadaError
try:
    open_device(sys.argv[2], sys.argv[1])
except CadaError as error:
    print(type(error).__name__, error)
"""


@only_stand_in
@pytest.mark.parametrize(
    ("knob", "value", "words"),
    [
        ("DEVICES", 0, "sees no GPU"),
        ("DRIVER_VERSION", 11040, "driver is for CUDA 11.4; cada-deploy needs one for CUDA 12.0"),
        ("INIT", 803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"),
        ("RETAIN", 46, "cuda:0 (Stand-in GPU 0) cannot be opened: CUDA_ERROR_DEVICE_UNAVAILABLE"),
    ],
)
def test_a_driver_that_cannot_be_used(device: Device, knob: str, value: int, words: str) -> None:
    done = in_process(OPEN, device.layer, "cuda:0", **{f"CADA_STAND_IN_{knob}": str(value)})
    assert done.stdout.startswith("EnvironmentLacks"), done.stderr
    assert words in done.stdout
    assert done.stderr == ""


@only_stand_in
def test_the_second_device(device: Device) -> None:
    script = OPEN.replace("open_device(sys", "opened = open_device(sys", 1) + (
        "memory = opened.allocate(8)\nprint(opened, opened.ordinal_at(memory.address))\n"
    )
    done = in_process(script, device.layer, "cuda:1", CADA_STAND_IN_DEVICES="2")
    assert done.stdout == "cuda:1 (Stand-in GPU 1) 1\n", done.stderr
    hidden = {"CADA_STAND_IN_DEVICES": "2", "CUDA_VISIBLE_DEVICES": "3,5"}
    done = in_process(OPEN, device.layer, "cuda:2", **hidden)
    assert "no cuda:2 (CUDA_VISIBLE_DEVICES is '3,5'); there is: cuda:0, cuda:1" in done.stdout


def in_process(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh process with this one's driver: faults and knobs of the start stay in it."""
    tests = str(Path(__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([tests, *_paths()]), **environment},
        timeout=60,
    )


def _paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
