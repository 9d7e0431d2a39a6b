"""CUDA through PyCUDA, 2025.1 or later: it owns memory and streams, in the primary context.

PyCUDA knows no graphs, gives no handles of events and kernels, and takes no stream but its own, so
everything else goes straight to the driver that PyCUDA has loaded, through ctypes. Its own stack of
contexts is left as it was found: it has to be empty when a thread ends.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from cada_deploy import device as contract
from cada_deploy.device import Device
from cada_deploy.device.driver import DriverDevice, DriverMemory, DriverStream
from cada_deploy.device.driver_start import describe as described
from cada_deploy.errors import EnvironmentLacks, RunFailed

NAME = "pycuda"
INSTALL = "pip install 'cada-deploy[pycuda]'"
_NON_BLOCKING = 1


def version() -> str:
    """Of the package, with or without a driver. Raises EnvironmentLacks."""
    try:
        return importlib.metadata.version("pycuda")
    except importlib.metadata.PackageNotFoundError as error:
        raise EnvironmentLacks(
            f"the package pycuda is not installed; {INSTALL} (builds it: needs g++ and the CUDA "
            "toolkit)"
        ) from error


def describe() -> str:
    """The driver and its devices. Raises EnvironmentLacks."""
    _pycuda()
    return described(DriverCalls())


def open(ordinal: int) -> Device:
    """Raises EnvironmentLacks: no package, no driver, an old one, no such device."""
    return PyCudaDevice(ordinal, _pycuda())


def _pycuda() -> Any:
    version()
    try:
        import pycuda.driver
    except ImportError as error:
        if "libcuda.so" in str(error):
            raise EnvironmentLacks(
                f"no usable NVIDIA driver ({error}); install one for CUDA 12.0 or later, or run "
                "with --device cpu"
            ) from error
        raise EnvironmentLacks(f"pycuda cannot be imported ({error}); {INSTALL}") from error
    return pycuda.driver


class PyCudaDevice(DriverDevice):
    """What PyCUDA makes is held until it may be released with PyCUDA's context current, in
    whatever thread that is. Otherwise PyCUDA would leak it with a warning (another thread), or fail
    aloud (a lost GPU, or the end of the process: it detaches a primary context, an error)."""

    def __init__(self, ordinal: int, pycuda: Any) -> None:
        super().__init__(NAME, ordinal, DriverCalls())
        self._pycuda = pycuda
        pycuda.init()
        self._primary = pycuda.Device(ordinal).retain_primary_context()
        _keep(self._primary)

    def stream(self) -> contract.Stream:
        with self._pushed():
            made = self._pycuda.Stream(_NON_BLOCKING)
            stream = DriverStream(self, int(made.handle))
            self._goes_with(stream, made)
            return stream

    def allocate(self, nbytes: int) -> contract.Memory:
        with self._room_for(nbytes, "GPU"), self._pushed():
            made = self._pycuda.mem_alloc(max(nbytes, 1))
            memory = DriverMemory(int(made), nbytes)
            self._goes_with(memory, made)
            return memory

    def _goes_with(self, owner: object, made: object) -> None:
        _keep(made)
        self.dispose(owner, partial(self._release, [made]))

    def _release(self, held: list[object]) -> None:
        with suppress(RunFailed), self._pushed():
            ctypes.pythonapi.Py_DecRef(ctypes.py_object(held[0]))
            held.clear()  # the last reference: PyCUDA destroys it here

    @contextmanager
    def _pushed(self) -> Iterator[None]:
        """PyCUDA's stack of contexts holds ours for a moment; our context stays the current one."""
        try:
            self._primary.push()
            try:
                yield
            finally:
                self._pycuda.Context.pop()
        except self._pycuda.Error as error:
            raise self._failure_of(str(error)) from error
        finally:
            self._calls.cuCtxSetCurrent(self._context)

    def _failure_of(self, text: str) -> RunFailed:
        """PyCUDA's errors carry the driver's text and no code: `cuMemAlloc failed: out of memory`.
        The code is looked up by its text."""
        name, _, words = text.partition(" failed: ")
        for code in range(1, 1000):
            known = self._calls.cuGetErrorString(code)[1]
            if known and words == known.decode():
                return self._failure(code, name)
        return RunFailed(f"{self}: {text}")


def _keep(made: object) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))


# ---- the driver through ctypes, in the shape of cuda.bindings.driver ----

_int, _uint, _size = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t
_address, _handle = ctypes.c_uint64, ctypes.c_void_p

# Name: the exported symbol, what it gives (these pointers come first), what it takes.
_SIGNATURES: dict[str, tuple[str, tuple[Any, ...], tuple[Any, ...]]] = {
    "cuInit": ("cuInit", (), (_uint,)),
    "cuDriverGetVersion": ("cuDriverGetVersion", (_int,), ()),
    "cuDeviceGetCount": ("cuDeviceGetCount", (_int,), ()),
    "cuDeviceGet": ("cuDeviceGet", (_int,), (_int,)),
    "cuDeviceGetAttribute": ("cuDeviceGetAttribute", (_int,), (_int, _int)),
    "cuDevicePrimaryCtxRetain": ("cuDevicePrimaryCtxRetain", (_handle,), (_int,)),
    "cuCtxSetCurrent": ("cuCtxSetCurrent", (), (_handle,)),
    "cuCtxSynchronize": ("cuCtxSynchronize", (), ()),
    "cuMemGetInfo": ("cuMemGetInfo_v2", (_size, _size), ()),
    "cuMemHostAlloc": ("cuMemHostAlloc", (_handle,), (_size, _uint)),
    "cuMemFreeHost": ("cuMemFreeHost", (), (_handle,)),
    "cuMemHostGetDevicePointer": ("cuMemHostGetDevicePointer_v2", (_address,), (_handle, _uint)),
    "cuPointerGetAttribute": ("cuPointerGetAttribute", (_int,), (_int, _address)),
    "cuMemcpyAsync": ("cuMemcpyAsync", (), (_address, _address, _size, _handle)),
    "cuMemsetD8Async": ("cuMemsetD8Async", (), (_address, ctypes.c_ubyte, _size, _handle)),
    "cuStreamSynchronize": ("cuStreamSynchronize", (), (_handle,)),
    "cuStreamWaitEvent": ("cuStreamWaitEvent", (), (_handle, _handle, _uint)),
    "cuEventCreate": ("cuEventCreate", (_handle,), (_uint,)),
    "cuEventDestroy": ("cuEventDestroy_v2", (), (_handle,)),
    "cuEventRecord": ("cuEventRecord", (), (_handle, _handle)),
    "cuEventQuery": ("cuEventQuery", (), (_handle,)),
    "cuEventSynchronize": ("cuEventSynchronize", (), (_handle,)),
    "cuEventElapsedTime": ("cuEventElapsedTime", (ctypes.c_float,), (_handle, _handle)),
    "cuModuleLoadData": ("cuModuleLoadData", (_handle,), (ctypes.c_char_p,)),
    "cuModuleUnload": ("cuModuleUnload", (), (_handle,)),
    "cuModuleGetFunction": ("cuModuleGetFunction", (_handle,), (_handle, ctypes.c_char_p)),
    "cuFuncSetAttribute": ("cuFuncSetAttribute", (), (_handle, _int, _int)),
    "cuStreamBeginCapture": ("cuStreamBeginCapture_v2", (), (_handle, _int)),
    "cuGraphInstantiate": ("cuGraphInstantiateWithFlags", (_handle,), (_handle, ctypes.c_uint64)),
    "cuGraphLaunch": ("cuGraphLaunch", (), (_handle, _handle)),
    "cuGraphDestroy": ("cuGraphDestroy", (), (_handle,)),
    "cuGraphExecDestroy": ("cuGraphExecDestroy", (), (_handle,)),
}


class DriverCalls:
    """Every call gives (code, *results); the GIL is free meanwhile."""

    CUresult = CUdevice_attribute = CUpointer_attribute = CUfunction_attribute = int
    CUstreamCaptureMode = int

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        for name, signature in _SIGNATURES.items():
            setattr(self, name, self._shaped(*signature))

    def _shaped(
        self, symbol: str, gives: tuple[Any, ...], takes: tuple[Any, ...]
    ) -> Callable[..., tuple[Any, ...]]:
        function = getattr(self._library, symbol)
        function.argtypes = [*map(ctypes.POINTER, gives), *takes]

        def call(*arguments: Any) -> tuple[Any, ...]:
            results = [kind() for kind in gives]
            code = function(*map(ctypes.byref, results), *arguments)
            return (code, *(result.value or 0 for result in results))

        return call

    def cuDeviceGetName(self, nbytes: int, device: int) -> tuple[int, bytes]:
        text = ctypes.create_string_buffer(nbytes)
        return self._library.cuDeviceGetName(text, nbytes, device), text.raw

    def cuGetErrorName(self, code: int) -> tuple[int, bytes | None]:
        text = ctypes.c_char_p()
        return self._library.cuGetErrorName(code, ctypes.byref(text)), text.value

    def cuGetErrorString(self, code: int) -> tuple[int, bytes | None]:
        text = ctypes.c_char_p()
        return self._library.cuGetErrorString(code, ctypes.byref(text)), text.value

    def cuStreamEndCapture(self, stream: int) -> tuple[int, int]:
        graph = _handle()
        code = self._library.cuStreamEndCapture(_handle(stream), ctypes.byref(graph))
        return code, graph.value or 0

    def cuLaunchKernel(self, function: int, *rest: Any) -> tuple[int]:
        """Grid, block, shared bytes, stream, (values, their ctypes types), 0."""
        *sizes, stream, (values, types), _ = rest
        boxes = [kind(value) for kind, value in zip(types, values, strict=True)]
        pointers = (_handle * len(boxes))(*map(ctypes.addressof, boxes))
        code = self._library.cuLaunchKernel(
            _handle(function), *map(_uint, sizes), _handle(stream), pointers, None
        )
        return (code,)
