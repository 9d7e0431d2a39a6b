"""A Device on CUDA's driver API, whichever library makes the calls.

A layer gives `calls`: an object with the driver's functions, spelled and shaped as in
cuda.bindings.driver (`cuMemAlloc(nbytes) -> (code, address)`), and the enumerations they take.
Nothing here allocates or waits behind a caller's back: memory comes and goes with its object,
copies and launches only enqueue, and streams do not synchronise with the default stream.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy import device as contract
from cada_deploy.device import DeviceLost, Grid, OutOfDeviceMemory
from cada_deploy.device.driver_start import (
    MAJOR,
    MINOR,
    device_name,
    error_words,
    size_text,
    start,
    version_text,
    visible,
)
from cada_deploy.errors import EnvironmentLacks, RunFailed

_INVALID_VALUE, _OUT_OF_MEMORY, _NOT_FOUND, _NOT_READY = 1, 2, 500, 600
# After these every call fails until the process ends, or the machine needs care: unavailable, ECC,
# NVLink, contained; faults in kernels; a destroyed context; MPS lost; unknown (off the bus).
_LOST = {46, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 810, 999}
_REFUSED_IMAGE = {200, 209, 218, 222, 300}
_REFUSED_CAPTURE = range(900, 909)

_INTEGRATED, _MULTIPROCESSORS = 18, 16  # CUdevice_attribute
_POINTER_ORDINAL = 9
_MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute
_FREE_SHARED = 48 * 1024  # bytes that a kernel may have without asking
_NON_BLOCKING, _NO_TIMING, _THREAD_LOCAL = 1, 2, 1
_PORTABLE_AND_MAPPED = 1 | 2

_CTYPES: dict[str, Any] = {
    "?": ctypes.c_bool, "b": ctypes.c_int8, "B": ctypes.c_uint8, "h": ctypes.c_int16,
    "H": ctypes.c_uint16, "i": ctypes.c_int32, "I": ctypes.c_uint32, "l": ctypes.c_int64,
    "L": ctypes.c_uint64, "q": ctypes.c_int64, "Q": ctypes.c_uint64, "e": ctypes.c_uint16,
    "f": ctypes.c_float, "d": ctypes.c_double,
}  # fmt: skip


class _Here(threading.local):
    """later: what died while this thread captures; freeing it then would break the capture."""

    later: list[Callable[[], None]] | None = None


_here = _Here()


# ---- the objects of the contract ----


class DriverStream:
    def __init__(self, device: DriverDevice, handle: int) -> None:
        self._device = device
        self.handle = handle

    def synchronize(self) -> None:
        self._device.call("cuStreamSynchronize", self.handle)

    def wait(self, event: contract.Event) -> None:
        self._device.call("cuStreamWaitEvent", self.handle, event.handle, 0)


class DriverEvent:
    def __init__(self, device: DriverDevice, handle: int) -> None:
        self._device = device
        self.handle = handle

    def record(self, stream: contract.Stream) -> None:
        self._device.call("cuEventRecord", self.handle, stream.handle)

    def synchronize(self) -> None:
        self._device.call("cuEventSynchronize", self.handle)

    @property
    def done(self) -> bool:
        return bool(self._device.call("cuEventQuery", self.handle, allowed=_NOT_READY) == 0)

    def milliseconds_since(self, earlier: contract.Event) -> float:
        return float(self._device.call("cuEventElapsedTime", earlier.handle, self.handle))


class DriverMemory:
    def __init__(
        self, address: int, nbytes: int, host: npt.NDArray[np.uint8] | None = None
    ) -> None:
        self.address = address
        self.nbytes = nbytes
        self.host = host


class DriverFunction:
    def __init__(self, module: DriverModule, name: str, handle: int) -> None:
        self._module = module  # lives as long as its kernels
        self.name = name
        self.handle = handle
        self.shared_bytes = _FREE_SHARED  # that were asked for


class DriverModule:
    def __init__(self, device: DriverDevice, handle: int) -> None:
        self._device = device
        self.handle = handle

    def function(self, name: str) -> DriverFunction:
        found = self._device.call(
            "cuModuleGetFunction", self.handle, name.encode(), allowed=_NOT_FOUND
        )
        if found == _NOT_FOUND:
            raise RunFailed(f"the loaded module has no kernel {name!r}; reinstall cada-deploy")
        return DriverFunction(self, name, int(found))


class DriverGraph:
    def __init__(self, device: DriverDevice, handle: int) -> None:
        self._device = device
        self.handle = handle

    def launch(self, stream: contract.Stream) -> None:
        self._device.call("cuGraphLaunch", self.handle, stream.handle)


class DriverDevice:
    """The primary context is kept until the process ends: torch and ONNX Runtime share it.

    Freeing device memory waits for the whole device (cuMemFree), so what is used again is kept.
    """

    def __init__(self, layer: str, ordinal: int, calls: Any) -> None:
        self.layer = layer
        self.ordinal = ordinal
        self.driver_version = version_text(start(calls))
        self._calls = calls
        self._lost = False
        count = int(calls.cuDeviceGetCount()[1])
        if ordinal >= count:
            there = ", ".join(f"cuda:{k}" for k in range(count))
            raise EnvironmentLacks(f"there is no cuda:{ordinal}{visible()}; there is: {there}")
        self._handle = int(calls.cuDeviceGet(ordinal)[1])
        self.name = device_name(calls, self._handle)
        self.compute_capability = (self._attribute(MAJOR), self._attribute(MINOR))
        self.integrated = bool(self._attribute(_INTEGRATED))
        self.multiprocessors = self._attribute(_MULTIPROCESSORS)
        code, context = calls.cuDevicePrimaryCtxRetain(self._handle)
        if code:
            raise EnvironmentLacks(
                f"{self} cannot be opened: {error_words(calls, int(code))}; see in nvidia-smi who "
                "uses it, or choose another --device"
            )
        self._context = int(context)

    def __str__(self) -> str:
        return f"cuda:{self.ordinal} ({self.name})"

    def _attribute(self, number: int) -> int:
        attribute = self._calls.CUdevice_attribute(number)
        return int(self._calls.cuDeviceGetAttribute(attribute, self._handle)[1])

    # ---- one call of the driver ----

    def call(self, name: str, *arguments: Any, allowed: int = 0) -> Any:
        """A driver call with our context current: its result, or the code `allowed`. Raises
        DeviceLost, OutOfDeviceMemory, RunFailed."""
        (code,) = self._calls.cuCtxSetCurrent(self._context)
        if not code:
            code, *results = getattr(self._calls, name)(*arguments)
            if not code:
                return results[0] if len(results) == 1 else tuple(results) or 0
            if code == allowed:
                return allowed
        raise self._failure(int(code), name)

    def _failure(self, code: int, name: str) -> RunFailed:
        words = f"{name}: {error_words(self._calls, code)}"
        if code in _LOST:
            self._lost = True
            return DeviceLost(
                f"{self} cannot be used any more ({words}). What was committed is safe: the same "
                "command resumes. If it happens again, `dmesg` names the GPU's fault (Xid)"
            )
        if code == _OUT_OF_MEMORY:
            return OutOfDeviceMemory(f"{self} has no memory left ({words}); {self._lower()}")
        if code in _REFUSED_IMAGE:
            major, minor = self.compute_capability
            return RunFailed(
                f"{self}, sm_{major}{minor}, driver for CUDA {self.driver_version}, refuses these "
                f"kernels ({words}): they were compiled for another GPU or a later CUDA; update "
                "the driver, or remove ~/.cache/cada-deploy/kernels"
            )
        if code in _REFUSED_CAPTURE:
            return RunFailed(f"this work cannot be captured into a CUDA graph ({words})")
        return RunFailed(f"{self}: {words}")

    def _lower(self) -> str:
        code, free, total = self._calls.cuMemGetInfo()
        state = "" if code else f"{size_text(int(free))} of {size_text(int(total))} are free; "
        return state + "lower --batch-size, or end other programs on this GPU (nvidia-smi)"

    def dispose(self, owner: object, free: Callable[[], object]) -> None:
        """Call `free`, with our context current, when `owner` dies; never when the process ends,
        since the driver may be gone by then and frees everything itself."""
        weakref.finalize(owner, self._free, free).atexit = False

    def _free(self, free: Callable[[], object]) -> None:
        if _here.later is not None:
            _here.later.append(lambda: self._free(free))
        elif not self._lost:
            self._calls.cuCtxSetCurrent(self._context)
            free()  # its code has no reader: what it would say, the next call says, too

    def _owned(self, owner: Any, name: str) -> Any:
        function, handle = getattr(self._calls, name), owner.handle
        self.dispose(owner, lambda: function(handle))
        return owner

    # ---- the contract ----

    def stream(self) -> contract.Stream:
        handle = int(self.call("cuStreamCreate", _NON_BLOCKING))
        made: DriverStream = self._owned(DriverStream(self, handle), "cuStreamDestroy")
        return made

    def borrowed_stream(self, handle: int) -> contract.Stream:
        return DriverStream(self, handle)

    def event(self, *, timing: bool = False) -> contract.Event:
        handle = int(self.call("cuEventCreate", 0 if timing else _NO_TIMING))
        made: DriverEvent = self._owned(DriverEvent(self, handle), "cuEventDestroy")
        return made

    def allocate(self, nbytes: int) -> contract.Memory:
        with self._room_for(nbytes, "GPU"):
            address = int(self.call("cuMemAlloc", max(nbytes, 1)))
        memory = DriverMemory(address, nbytes)
        self.dispose(memory, lambda: self._calls.cuMemFree(address))
        return memory

    def pinned(self, nbytes: int) -> contract.Memory:
        with self._room_for(nbytes, "page-locked host", "lower --batch-size, or free host memory"):
            first = int(self.call("cuMemHostAlloc", max(nbytes, 1), _PORTABLE_AND_MAPPED))
        buffer = (ctypes.c_uint8 * max(nbytes, 1)).from_address(first)
        # The array and every view of it hold the buffer, so views may outlive the Memory.
        self.dispose(buffer, lambda: self._calls.cuMemFreeHost(first))
        address = int(self.call("cuMemHostGetDevicePointer", first, 0))
        return DriverMemory(address, nbytes, np.frombuffer(memoryview(buffer), np.uint8)[:nbytes])

    @contextmanager
    def _room_for(self, nbytes: int, kind: str, advice: str = "") -> Iterator[None]:
        try:
            yield
        except OutOfDeviceMemory as error:
            raise OutOfDeviceMemory(
                f"{self} has no room for {size_text(nbytes)} more of {kind} memory: "
                f"{advice or self._lower()}"
            ) from error

    def copy(self, target: int, source: int, nbytes: int, stream: contract.Stream) -> None:
        if nbytes:
            self.call("cuMemcpyAsync", target, source, nbytes, stream.handle)

    def fill(self, target: int, byte: int, nbytes: int, stream: contract.Stream) -> None:
        if nbytes:
            self.call("cuMemsetD8Async", target, byte, nbytes, stream.handle)

    def ordinal_at(self, address: int) -> int | None:
        attribute = self._calls.CUpointer_attribute(_POINTER_ORDINAL)
        (code,) = self._calls.cuCtxSetCurrent(self._context)
        code, *ordinal = (code,) if code else self._calls.cuPointerGetAttribute(attribute, address)
        if code == _INVALID_VALUE:  # memory that CUDA does not know
            return None
        if code:
            raise self._failure(int(code), "cuPointerGetAttribute")
        return int(ordinal[0])

    def load(self, image: bytes) -> contract.Module:
        handle = int(self.call("cuModuleLoadData", image))
        made: DriverModule = self._owned(DriverModule(self, handle), "cuModuleUnload")
        return made

    def launch(
        self,
        function: contract.Function,
        grid: Grid,
        block: Grid,
        arguments: Sequence[np.generic],
        stream: contract.Stream,
        shared_bytes: int = 0,
    ) -> None:
        assert isinstance(function, DriverFunction)
        if shared_bytes > function.shared_bytes:
            attribute = self._calls.CUfunction_attribute(_MAX_DYNAMIC_SHARED)
            self.call("cuFuncSetAttribute", function.handle, attribute, shared_bytes)
            function.shared_bytes = shared_bytes
        packed = (tuple(map(_plain, arguments)), tuple(_CTYPES[a.dtype.char] for a in arguments))
        self.call(
            "cuLaunchKernel", function.handle, *grid, *block, shared_bytes, stream.handle, packed, 0
        )

    def capture(self, stream: contract.Stream, work: Callable[[], None]) -> contract.Graph:
        """Other threads may go on with the device meanwhile: the capture is this thread's."""
        with self._frees_after():
            mode = self._calls.CUstreamCaptureMode(_THREAD_LOCAL)
            self.call("cuStreamBeginCapture", stream.handle, mode)
            try:
                work()
            except BaseException:
                _, graph = self._calls.cuStreamEndCapture(stream.handle)
                if graph is not None and int(graph):
                    self._calls.cuGraphDestroy(int(graph))
                raise
            graph = int(self.call("cuStreamEndCapture", stream.handle))
            try:
                handle = int(self.call("cuGraphInstantiate", graph, 0))
            finally:
                self._calls.cuGraphDestroy(graph)
        made: DriverGraph = self._owned(DriverGraph(self, handle), "cuGraphExecDestroy")
        return made

    @contextmanager
    def _frees_after(self) -> Iterator[None]:
        outer, _here.later = _here.later, []
        try:
            yield
        finally:
            waiting, _here.later = _here.later, outer
            for free in waiting:
                free()

    def memory(self) -> tuple[int, int]:
        free, total = self.call("cuMemGetInfo")
        return int(free), int(total)

    def synchronize(self) -> None:
        self.call("cuCtxSynchronize")


def _plain(value: np.generic) -> Any:
    """A Python number; a half goes as its bits."""
    return value.view(np.uint16).item() if value.dtype.char == "e" else value.item()
