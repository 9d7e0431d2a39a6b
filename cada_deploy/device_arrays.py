"""DeviceArray: an array in a GPU's memory, C-contiguous, with the point at which it is ready.

It goes out through __cuda_array_interface__ (version 3) and DLPack; arrays of PyCUDA, CuPy and
torch come in the same ways (`borrowed`). It owns nothing but a reference to whoever does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy.device import Device, Event


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
            "version": 3,
        }


def empty(device: Device, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
    """A new array, contents undefined. Raises OutOfDeviceMemory."""
    kind = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    memory = device.allocate(max(nbytes, 1))
    return DeviceArray(device, memory.address, shape, kind, memory)
