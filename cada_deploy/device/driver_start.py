"""What is said of CUDA's driver before a device is open, and the words for its errors and sizes."""

from __future__ import annotations

import os
from typing import Any

from cada_deploy.errors import EnvironmentLacks

OLDEST_DRIVER = 12000  # the first with every call that the layers make
MAJOR, MINOR = 75, 76  # CUdevice_attribute: the compute capability
_NO_DEVICE = 100


def start(calls: Any) -> int:
    """Start the driver; its CUDA version, 13000. Raises EnvironmentLacks."""
    try:
        _, version = calls.cuDriverGetVersion()
        (code,) = calls.cuInit(0)
    except (RuntimeError, OSError) as error:  # its library cannot be loaded, or lacks a call
        raise EnvironmentLacks(
            f"no usable NVIDIA driver ({error}); install one for CUDA 12.0 or later, or run with "
            "--device cpu"
        ) from error
    if 0 < version < OLDEST_DRIVER:
        raise EnvironmentLacks(
            f"the NVIDIA driver is for CUDA {version_text(version)}; cada-deploy needs one for "
            f"CUDA {version_text(OLDEST_DRIVER)} or later: update the driver, or run with "
            "--device cpu"
        )
    if code == _NO_DEVICE:
        raise EnvironmentLacks(
            f"the NVIDIA driver sees no GPU{visible()}; see what nvidia-smi says, or run with "
            "--device cpu"
        )
    if code:
        raise EnvironmentLacks(
            f"the NVIDIA driver does not start: {error_words(calls, int(code))}; see what "
            "nvidia-smi says (after an update of the driver, restart the machine), or run with "
            "--device cpu"
        )
    return int(version)


def describe(calls: Any) -> str:
    """The driver and its devices, without opening one. Raises EnvironmentLacks."""
    found = [f"driver for CUDA {version_text(start(calls))}"]
    for ordinal in range(int(calls.cuDeviceGetCount()[1])):
        device = int(calls.cuDeviceGet(ordinal)[1])
        attribute = calls.CUdevice_attribute
        major = calls.cuDeviceGetAttribute(attribute(MAJOR), device)[1]
        minor = calls.cuDeviceGetAttribute(attribute(MINOR), device)[1]
        found.append(f"cuda:{ordinal} {device_name(calls, device)} (sm_{major}{minor})")
    return ", ".join(found)


def visible() -> str:
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if devices is None else f" (CUDA_VISIBLE_DEVICES is {devices!r})"


def version_text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def device_name(calls: Any, device: int) -> str:
    text: bytes = calls.cuDeviceGetName(256, device)[1]
    return text.partition(b"\0")[0].decode(errors="replace")


def error_words(calls: Any, code: int) -> str:
    """`CUDA_ERROR_ILLEGAL_ADDRESS (700), an illegal memory access was encountered`."""
    try:
        result = calls.CUresult(code)
        name, text = calls.cuGetErrorName(result)[1], calls.cuGetErrorString(result)[1]
    except ValueError:  # a code that this version of the bindings does not know
        name = text = None
    known = f"{name.decode()} ({code})" if name else f"error {code}"
    return f"{known}, {text.decode()}" if text else known


def size_text(nbytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} bytes"
