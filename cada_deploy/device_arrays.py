"""DeviceArray: an array in a GPU's memory, C-contiguous, with the point at which it is ready.

It goes out through __cuda_array_interface__ (version 3) and DLPack; arrays of PyCUDA, CuPy and
torch come in the same ways (`borrowed`). It owns nothing but a reference to whoever does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy import dlpack
from cada_deploy.device import Device, Event, Stream
from cada_deploy.errors import UsageError

_LEGACY_STREAM = 1  # of __cuda_array_interface__ and DLPack; 2 is the thread's default stream


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """address: of the first element. ready: the event after which the values are there; None when
    they are there already, or when only the stream that makes them will read them."""

    device: Device
    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object
    ready: Event | None = None

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "stream": None if self._ready_stream is None else self._ready_stream.handle,
            "version": 3,
        }

    @cached_property
    def _ready_stream(self) -> Stream | None:
        """The interface says with a stream what we say with an event."""
        if self.ready is None:
            return None
        stream = self.device.stream()
        stream.wait(self.ready)
        return stream

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.device.ordinal

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """`stream` is the consumer's, which will wait for us; -1 asks for nothing."""
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("a DeviceArray is lent where it is; copy it on the consumer's side")
        if stream == 0:
            raise BufferError("stream 0 is ambiguous; DLPack wants 1 or 2 for a default stream")
        if stream != -1 and self.ready is not None:
            handle = _LEGACY_STREAM if stream is None else stream
            self.device.borrowed_stream(handle).wait(self.ready)
        versioned = max_version is not None and max_version[0] >= dlpack.VERSION[0]
        return dlpack.capsule(
            self.address, self.shape, self.dtype, self.__dlpack_device__(), self.owner,
            versioned=versioned,
        )  # fmt: skip


def empty(device: Device, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
    """A new array, contents undefined. Raises OutOfDeviceMemory."""
    kind = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    memory = device.allocate(max(nbytes, 1))
    return DeviceArray(device, memory.address, shape, kind, memory)


def borrowed(array: Any, device: Device) -> DeviceArray:
    """Someone else's array on our device, as it is: nothing is copied and the host does not wait.

    The result's `ready` comes after what the producer has enqueued so far, as far as its interface
    says it: DLPack always does, __cuda_array_interface__ if it names a stream. Raises UsageError
    for an array of another device or of the host, one that is not C-contiguous, or an empty one.
    """
    if isinstance(array, DeviceArray) and array.device is device:
        return array
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        taken, ready = _through_dlpack(array, device)
    elif hasattr(array, "__cuda_array_interface__"):
        taken, ready = _through_interface(array, device)
    else:
        raise UsageError(
            f"{_what(array)} offers neither __dlpack__ nor __cuda_array_interface__; give an array "
            "of torch, CuPy or PyCUDA, or a NumPy array where the CPU is meant"
        )
    _check(array, taken, device)
    return DeviceArray(device, taken.address, taken.shape, taken.dtype, taken.owner, ready)


def _through_dlpack(array: Any, device: Device) -> tuple[dlpack.Taken, Event | None]:
    where, ordinal = array.__dlpack_device__()
    if where not in (dlpack.CUDA, dlpack.CUDA_PINNED, dlpack.CUDA_MANAGED):
        raise UsageError(
            f"{_what(array)} is on DLPack's device type {int(where)}; expected CUDA: move it to "
            f"cuda:{device.ordinal}"
        )
    if where == dlpack.CUDA and ordinal != device.ordinal:
        raise _elsewhere(array, int(ordinal), device)
    stream, ready = device.stream(), device.event()
    try:
        capsule = array.__dlpack__(stream=stream.handle, max_version=dlpack.VERSION)
    except TypeError:  # a producer from before DLPack 1.0
        capsule = array.__dlpack__(stream=stream.handle)
    except BufferError as error:
        raise UsageError(f"{_what(array)} cannot be lent: {error}") from error
    ready.record(stream)
    return dlpack.take(capsule), ready


def _through_interface(array: Any, device: Device) -> tuple[dlpack.Taken, Event | None]:
    given = array.__cuda_array_interface__
    if given.get("mask") is not None:
        raise UsageError(f"{_what(array)} has a mask; give the array without it")
    dtype = np.dtype(given["typestr"])
    strides = given.get("strides")
    if strides is not None:
        size = dtype.itemsize
        strides = tuple(step / size if step % size else step // size for step in strides)
    taken = dlpack.Taken(
        int(given["data"][0] or 0), tuple(given["shape"]), strides, dtype,
        (dlpack.CUDA, device.ordinal), array,
    )  # fmt: skip
    stream, ready = given.get("stream"), None
    if stream == 0:
        raise UsageError(f"{_what(array)} names stream 0, which is ambiguous; expected 1, 2, ...")
    if stream is not None:
        ready = device.event()
        ready.record(device.borrowed_stream(int(stream)))
    return taken, ready


def _check(array: Any, taken: dlpack.Taken, device: Device) -> None:
    if not all(taken.shape):
        raise UsageError(f"{_what(array)} of shape {taken.shape} has no elements")
    if taken.dtype.kind not in "biuf" or not taken.dtype.isnative:
        raise UsageError(
            f"{_what(array)} is {taken.dtype}; expected numbers in this machine's byte order"
        )
    expected = 1
    for size, step in zip(reversed(taken.shape), reversed(taken.strides or ())):
        if size != 1 and step != expected:
            raise UsageError(
                f"{_what(array)} of shape {taken.shape} has strides of {taken.strides} elements; "
                "expected C-contiguous: make a contiguous copy first"
            )
        expected *= size
    ordinal = device.ordinal_at(taken.address) if taken.address else None
    if ordinal is None:
        raise UsageError(
            f"{_what(array)} is at {taken.address:#x}, where CUDA knows no memory; expected an "
            f"array on cuda:{device.ordinal} that still lives"
        )
    if ordinal != device.ordinal:
        raise _elsewhere(array, ordinal, device)


def _elsewhere(array: Any, ordinal: int, device: Device) -> UsageError:
    return UsageError(
        f"{_what(array)} is on cuda:{ordinal}; expected cuda:{device.ordinal}: copy it there, or "
        f"open the model on cuda:{ordinal}"
    )


def _what(array: Any) -> str:
    kind = type(array)
    return f"the array ({kind.__module__}.{kind.__qualname__})"
