"""What PyCUDA does behind those names, its traps too: a stack of contexts per thread that must be
balanced, objects that can only be freed where their context is on top of it, errors with a text and
no code."""

from __future__ import annotations

import atexit
import ctypes
import gc
import sys
import threading
from typing import Any

_cuda = ctypes.CDLL("libcuda.so.1")
_here = threading.local()
_frozen = False


class Error(Exception):
    pass


class MemoryError(Error):
    pass


class LogicError(Error):
    pass


def _check(name: str, code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        _cuda.cuGetErrorString(code, ctypes.byref(text))
        kind = MemoryError if code == 2 else LogicError
        raise kind(f"{name} failed: {(text.value or b'').decode()}")


def _stack() -> list[Context]:
    if not hasattr(_here, "stack"):
        _here.stack = []
    return _here.stack


def init(flags: int = 0) -> None:
    _check("cuInit", _cuda.cuInit(flags))


class Device:
    def __init__(self, ordinal: int) -> None:
        self._handle = ctypes.c_int()
        _check("cuDeviceGet", _cuda.cuDeviceGet(ctypes.byref(self._handle), ordinal))

    def retain_primary_context(self) -> Context:
        handle = ctypes.c_void_p()
        code = _cuda.cuDevicePrimaryCtxRetain(ctypes.byref(handle), self._handle)
        _check("cuDevicePrimaryCtxRetain", code)
        return Context(handle)


class Context:
    def __init__(self, handle: ctypes.c_void_p) -> None:
        self._handle = handle

    def push(self) -> None:
        if _stack():
            _check("cuCtxPopCurrent", _cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())))
        _check("cuCtxPushCurrent", _cuda.cuCtxPushCurrent_v2(self._handle))
        _stack().append(self)

    @staticmethod
    def pop() -> None:
        _check("cuCtxPopCurrent", _cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())))
        _stack().pop()
        if _stack():
            _check("cuCtxPushCurrent", _cuda.cuCtxPushCurrent_v2(_stack()[-1]._handle))

    def __del__(self) -> None:
        print("cuCtxDetach failed: invalid device context", file=sys.stderr)


class _Owned:
    def __init__(self) -> None:
        if not _stack():
            raise LogicError(
                "explicit_context_dependent failed: invalid device context - no currently active "
                "context?"
            )
        self._context = _stack()[-1]

    def _free(self) -> int:
        raise NotImplementedError

    def __del__(self) -> None:
        if not hasattr(self, "_handle") or _frozen:
            return
        if not _stack() or _stack()[-1] is not self._context:
            print("object in out-of-thread context could not be cleaned up", file=sys.stderr)
        elif self._free():
            print("PyCUDA WARNING: a clean-up operation failed", file=sys.stderr)


class Stream(_Owned):
    def __init__(self, flags: int = 0) -> None:
        super().__init__()
        handle = ctypes.c_void_p()
        _check("cuStreamCreate", _cuda.cuStreamCreate(ctypes.byref(handle), flags))
        self._handle = handle

    @property
    def handle(self) -> int:
        return int(self._handle.value or 0)

    def _free(self) -> int:
        return int(_cuda.cuStreamDestroy_v2(self._handle))


class DeviceAllocation(_Owned):
    def __init__(self, nbytes: int) -> None:
        super().__init__()
        address = ctypes.c_uint64()
        take: Any = _cuda.cuMemAlloc_v2
        code = take(ctypes.byref(address), ctypes.c_size_t(nbytes))
        if code == 2:  # it tries again after a collection
            gc.collect()
            code = take(ctypes.byref(address), ctypes.c_size_t(nbytes))
        _check("cuMemAlloc", code)
        self._handle = address

    def __int__(self) -> int:
        return int(self._handle.value)

    def _free(self) -> int:
        return int(_cuda.cuMemFree_v2(self._handle))


mem_alloc = DeviceAllocation


@atexit.register
def _at_exit() -> None:
    global _frozen
    if _stack():
        print("PyCUDA ERROR: The context stack was not empty", file=sys.stderr)
    _frozen = True
