"""Arrays go in and out where they are, with what says when they are ready; wrong ones are named.

The GPU is a stand-in whose streams are lazy (stand_in_device): a missing wait reads garbage.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from stand_in_device import StandInDevice

from cada_deploy import device_arrays, dlpack
from cada_deploy.device_arrays import DeviceArray, borrowed
from cada_deploy.errors import UsageError

VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def gpu() -> StandInDevice:
    return StandInDevice()


def on_device(gpu: StandInDevice, values: np.ndarray = VALUES, stream: Any = None) -> DeviceArray:
    """Copied on `stream` and not waited for; the pinned source is kept."""
    pinned = gpu.pinned(values.nbytes)
    pinned.host[:] = values.reshape(-1).view(np.uint8)  # type: ignore[index]
    array = device_arrays.empty(gpu, values.shape, values.dtype)  # type: ignore[arg-type]
    stream, ready = stream or gpu.stream(), gpu.event()
    gpu.copy(array.address, pinned.address, values.nbytes, stream)
    ready.record(stream)
    owner = (array.owner, pinned, stream)
    return replace(array, ready=ready, owner=owner)  # type: ignore[arg-type]


def read(array: DeviceArray) -> np.ndarray:
    """As a kernel on another stream would."""
    gpu: Any = array.device
    stream, pinned = gpu.stream(), gpu.pinned(array.nbytes)
    if array.ready is not None:
        stream.wait(array.ready)
    gpu.copy(pinned.address, array.address, array.nbytes, stream)
    stream.synchronize()
    return pinned.host.view(array.dtype).reshape(array.shape)


class Interface:
    """A producer with __cuda_array_interface__ only, as PyCUDA's GPUArray."""

    def __init__(self, array: DeviceArray, **other: Any) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape, "typestr": array.dtype.str, "version": 3,
            "data": (array.address, False), **other,
        }  # fmt: skip


class Pack:
    """A producer with DLPack. before_1: knows no max_version."""

    def __init__(
        self, array: DeviceArray, device: tuple[int, int] = (2, 0), *, before_1: bool = False
    ) -> None:
        self.array, self.device, self.before_1 = array, device, before_1
        self.streams: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int, **asked: Any) -> object:
        if self.before_1 and asked:
            raise TypeError("unexpected keyword argument 'max_version'")
        self.streams.append(stream)
        return self.array.__dlpack__(stream=stream, **asked)


# ---- in ----


@pytest.mark.parametrize("before_1", [False, True])
def test_dlpack_comes_in_and_is_waited_for(gpu: StandInDevice, before_1: bool) -> None:
    source = Pack(on_device(gpu), before_1=before_1)
    array = borrowed(source, gpu)  # type: ignore[arg-type]
    assert (array.address, array.shape, array.dtype) == (
        source.array.address, VALUES.shape, VALUES.dtype,
    )  # fmt: skip
    assert np.array_equal(read(array), VALUES)
    assert source.streams[0] > 2


def test_an_interface_with_a_stream_is_waited_for(gpu: StandInDevice) -> None:
    stream = gpu.stream()
    source = on_device(gpu, stream=stream)
    array = borrowed(Interface(source, stream=stream.handle), gpu)  # type: ignore[arg-type]
    assert array.ready is not None
    assert np.array_equal(read(array), VALUES)


@pytest.mark.parametrize("default", [1, 2])
def test_an_interface_names_a_default_stream(
    gpu: StandInDevice, monkeypatch: pytest.MonkeyPatch, default: int
) -> None:
    asked, stream = [], gpu.stream()
    monkeypatch.setattr(gpu, "borrowed_stream", lambda h: asked.append(h) or stream)
    source = on_device(gpu, stream=stream)
    array = borrowed(Interface(source, stream=default), gpu)  # type: ignore[arg-type]
    assert asked == [default]
    assert np.array_equal(read(array), VALUES)


@pytest.mark.parametrize("other", [{}, {"stream": None}, {"version": 2, "strides": (16, 4)}])
def test_an_interface_without_a_stream_is_ready(gpu: StandInDevice, other: dict[str, Any]) -> None:
    source = on_device(gpu)
    gpu.synchronize()
    array = borrowed(Interface(source, **other), gpu)  # type: ignore[arg-type]
    assert array.ready is None
    assert np.array_equal(read(array), VALUES)


@pytest.mark.parametrize("kind", [Interface, Pack])
def test_the_producer_lives_as_long_as_the_borrowed_array(gpu: StandInDevice, kind: Any) -> None:
    source = on_device(gpu)
    memory = weakref.ref(source.owner[0])  # type: ignore[index]
    gpu.synchronize()
    array = borrowed(kind(source), gpu)  # type: ignore[arg-type]
    del source
    gc.collect()
    assert memory() is not None
    del array
    gc.collect()
    assert memory() is None


def test_our_own_array_comes_back_as_it_is(gpu: StandInDevice) -> None:
    source = on_device(gpu)
    assert borrowed(source, gpu) is source  # type: ignore[arg-type]


def _refusals(gpu: StandInDevice) -> dict[str, tuple[Any, str]]:
    array = on_device(gpu)
    outside = np.zeros((3, 4), np.float32)
    at = {"data": (int(outside.ctypes.data), False)}
    return {
        "neither": (object(), "neither __dlpack__ nor __cuda_array_interface__"),
        "the host's": (np.zeros(3), "is on DLPack's device type 1; expected CUDA: move it to"),
        "another GPU's": (Pack(array, (2, 1)), r"is on cuda:1; expected cuda:0: copy it there"),
        "transposed": (Interface(array, strides=(4, 16)), "expected C-contiguous: make a cont"),
        "every other": (Interface(array, strides=(32, 8)), "expected C-contiguous"),
        "odd strides": (Interface(array, strides=(16, 3)), "expected C-contiguous"),
        "null": (Interface(array, data=(0, False)), "is at 0x0, where CUDA knows no memory"),
        "none": (Interface(array, data=(None, False)), "is at 0x0, where CUDA knows no memory"),
        "nowhere": (Interface(array, **at), "where CUDA knows no memory"),
        "empty": (Interface(array, shape=(3, 0)), r"of shape \(3, 0\) has no elements"),
        "masked": (Interface(array, mask=array), "has a mask"),
        "stream 0": (Interface(array, stream=0), "names stream 0, which is ambiguous"),
        "foreign bytes": (Interface(array, typestr=">f4"), "in this machine's byte order"),
        "records": (Interface(array, typestr="|V4"), "expected numbers"),
    }


@pytest.mark.parametrize("case", list(_refusals(StandInDevice())))
def test_a_wrong_array_is_named(gpu: StandInDevice, case: str) -> None:
    array, words = _refusals(gpu)[case]
    with pytest.raises(UsageError, match=words):
        borrowed(array, gpu)  # type: ignore[arg-type]


def test_an_interface_on_another_gpu(gpu: StandInDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not say so itself: the driver does."""
    source = on_device(gpu)
    monkeypatch.setattr(gpu, "ordinal_at", lambda address: 1)
    with pytest.raises(UsageError, match="open the model on cuda:1"):
        borrowed(Interface(source), gpu)  # type: ignore[arg-type]


def test_a_producer_that_cannot_lend(gpu: StandInDevice) -> None:
    class NeedsGradient(Pack):
        def __dlpack__(self, **asked: Any) -> object:
            raise BufferError("requires gradient")

    with pytest.raises(UsageError, match="cannot be lent: requires gradient"):
        borrowed(NeedsGradient(on_device(gpu)), gpu)  # type: ignore[arg-type]


def test_strides_of_an_axis_of_one_do_not_matter(gpu: StandInDevice) -> None:
    source = on_device(gpu, VALUES[:1])
    array = borrowed(Interface(source, strides=(999, 4)), gpu)  # type: ignore[arg-type]
    assert array.shape == (1, 4)


# ---- out ----


def test_the_interface_says_with_a_stream_when_it_is_ready(gpu: StandInDevice) -> None:
    source = on_device(gpu)
    given = source.__cuda_array_interface__
    assert given["version"] == 3 and given["strides"] is None
    assert (given["shape"], given["typestr"]) == (VALUES.shape, "<f4")
    assert given["data"] == (source.address, False)
    consumer, pinned = gpu.stream(), gpu.pinned(VALUES.nbytes)
    passed = gpu.event()
    passed.record(gpu.borrowed_stream(given["stream"]))
    consumer.wait(passed)
    gpu.copy(pinned.address, source.address, VALUES.nbytes, consumer)
    consumer.synchronize()
    assert np.array_equal(pinned.host.view(np.float32), VALUES.ravel())  # type: ignore[union-attr]
    assert source.__cuda_array_interface__["stream"] == given["stream"]
    assert replace(source, ready=None).__cuda_array_interface__["stream"] is None


def test_dlpack_makes_the_consumers_stream_wait(gpu: StandInDevice) -> None:
    source, consumer = on_device(gpu), gpu.stream()
    taken = dlpack.take(source.__dlpack__(stream=consumer.handle))
    assert taken.device == source.__dlpack_device__() == (2, 0)
    pinned = gpu.pinned(VALUES.nbytes)
    gpu.copy(pinned.address, taken.address, VALUES.nbytes, consumer)
    consumer.synchronize()
    assert np.array_equal(pinned.host.view(np.float32), VALUES.ravel())  # type: ignore[union-attr]


@pytest.mark.parametrize(("stream", "asked"), [(None, [1]), (1, [1]), (2, [2]), (-1, [])])
def test_dlpack_streams_with_a_meaning(
    gpu: StandInDevice, monkeypatch: pytest.MonkeyPatch, stream: int | None, asked: list[int]
) -> None:
    seen: list[int] = []
    source = on_device(gpu)
    monkeypatch.setattr(gpu, "borrowed_stream", lambda h: seen.append(h) or gpu.stream())
    source.__dlpack__(stream=stream)
    assert seen == asked


def test_dlpack_is_versioned_when_asked(gpu: StandInDevice) -> None:
    source = on_device(gpu)
    for asked, name in ((None, "dltensor"), ((0, 8), "dltensor"), ((1, 1), "dltensor_versioned")):
        assert f'"{name}"' in repr(source.__dlpack__(stream=-1, max_version=asked))


@pytest.mark.parametrize("asked", [{"copy": True}, {"dl_device": (1, 0)}, {"stream": 0}])
def test_dlpack_refuses_what_it_does_not_do(gpu: StandInDevice, asked: dict[str, Any]) -> None:
    with pytest.raises(BufferError):
        on_device(gpu).__dlpack__(**asked)
    same = on_device(gpu).__dlpack__(stream=-1, dl_device=(2, 0), copy=False)
    assert dlpack.take(same).shape == VALUES.shape


def test_lent_memory_outlives_the_device_array(gpu: StandInDevice) -> None:
    source = on_device(gpu)
    memory = weakref.ref(source.owner[0])  # type: ignore[index]
    gpu.synchronize()
    taken: Any = dlpack.take(source.__dlpack__(stream=-1))
    del source
    gc.collect()
    assert memory() is not None
    del taken
    gc.collect()
    assert memory() is None
