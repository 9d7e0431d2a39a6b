"""DLPack capsules of GPU memory: made by NumPy and relabelled, read through ctypes.

NumPy writes the capsule, versioned (1.x) or not, since a consumer may end it in the middle of an
exception or in any thread, where no Python function of ours may run. Nothing is copied and nothing
is synchronised here; device_arrays does that.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from cada_deploy.errors import UsageError

CUDA, CUDA_PINNED, CUDA_MANAGED = 2, 3, 13
VERSION = (1, 0)
_KINDS = {0: "i", 1: "u", 2: "f", 5: "c", 6: "b"}  # NumPy's, by DLPack's type codes
_NAMES = (b"dltensor", b"dltensor_versioned")
_USED = (b"used_dltensor", b"used_dltensor_versioned")


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Old(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _DELETER))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", _DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


def _python(name: str, gives: Any, *takes: Any) -> Any:
    return ctypes.PYFUNCTYPE(gives, *takes)((name, ctypes.pythonapi))


_is_named = _python("PyCapsule_IsValid", ctypes.c_int, ctypes.py_object, ctypes.c_char_p)
_pointer = _python("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
_rename = _python("PyCapsule_SetName", ctypes.c_int, ctypes.py_object, ctypes.c_char_p)
for _name in _USED:  # a capsule keeps the address of its name, and may outlive this module
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_name))


@dataclass(frozen=True)
class _Lender:
    """What NumPy's array stands on. The host never touches the memory."""

    __array_interface__: dict[str, Any]
    owner: object


def capsule(
    address: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    device: tuple[int, int],
    owner: object,
    *,
    versioned: bool,
) -> object:
    """A C-contiguous array; `owner` lives until the consumer is done."""
    described = {"data": (address, False), "shape": shape, "typestr": dtype.str, "version": 3}
    array = np.asarray(_Lender(described, owner))
    try:
        made = array.__dlpack__(max_version=VERSION) if versioned else array.__dlpack__()
    except TypeError:  # a NumPy from before DLPack 1.0; consumers take both
        made = array.__dlpack__()
    managed, _ = _structure(made)
    managed.tensor.device_type, managed.tensor.device_id = device
    return made


def _structure(given: object) -> tuple[Any, int]:
    """Of a capsule that is not used up, and which of the kinds it is."""
    for which, kind in enumerate((_Old, _Versioned)):
        if _is_named(given, _NAMES[which]):
            return kind.from_address(_pointer(given, _NAMES[which])), which
    raise UsageError(f"a DLPack capsule was expected, found {given!r}; it may be used up")


@dataclass(frozen=True)
class Taken:
    """What a capsule held. owner keeps the producer's memory; strides are in elements."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: np.dtype[Any]
    device: tuple[int, int]
    owner: object


class _Owner:
    pass


def take(given: Any) -> Taken:
    """Consume a capsule. Raises UsageError for what is none, or has a type that NumPy lacks."""
    managed, which = _structure(given)
    _rename(given, _USED[which])
    owner = _Owner()
    if managed.deleter:
        weakref.finalize(owner, managed.deleter, ctypes.addressof(managed)).atexit = False
    if which and managed.major != VERSION[0]:
        raise UsageError(
            f"the array comes as DLPack {managed.major}.{managed.minor}; known is {VERSION[0]}.x"
        )
    tensor = managed.tensor
    return Taken(
        int(tensor.data or 0) + tensor.byte_offset,
        tuple(tensor.shape[: tensor.ndim]),
        tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None,
        _dtype(tensor),
        (tensor.device_type, tensor.device_id),
        owner,
    )


def _dtype(tensor: Any) -> np.dtype[Any]:
    kind, bits = _KINDS.get(tensor.code), int(tensor.bits)
    if kind is None or tensor.lanes != 1 or bits % 8 or (kind == "f" and bits < 16):
        raise UsageError(
            f"the array's DLPack type (code {tensor.code}, {bits} bits, {tensor.lanes} lanes) has "
            "no NumPy counterpart; convert it, for example to float16 or float32"
        )
    return np.dtype(f"{kind}{bits // 8}")
