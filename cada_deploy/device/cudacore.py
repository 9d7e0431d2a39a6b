"""CUDA through NVIDIA's own Python packages: cuda-core and the cuda-bindings that it stands on.

The calls are those of cuda.bindings.driver. cuda.core's objects on top of them are not used: its
memory is a stream-ordered pool and its errors carry no code, while the contract wants plain
addresses and has to tell a lost GPU from a full one. A cuda.core Stream comes in all the same, as
`borrowed_stream(int(stream.handle))`. (Kernels are compiled with cuda.core's Program, in cubins.)
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from cada_deploy.device import Device
from cada_deploy.device.driver import DriverDevice
from cada_deploy.device.driver_start import describe as described
from cada_deploy.errors import EnvironmentLacks

NAME = "cuda-core"
INSTALL = "pip install 'cada-deploy[gpu]'"


def version() -> str:
    """Of the packages, with or without a driver. Raises EnvironmentLacks."""
    try:
        core = importlib.metadata.version("cuda-core")
        return f"{core}, cuda-bindings {importlib.metadata.version('cuda-bindings')}"
    except importlib.metadata.PackageNotFoundError as error:
        raise EnvironmentLacks(f"the package {error.name} is not installed; {INSTALL}") from error


def describe() -> str:
    """The driver and its devices. Raises EnvironmentLacks."""
    return described(_calls())


def open(ordinal: int) -> Device:
    """Raises EnvironmentLacks: no package, no driver, an old one, no such device."""
    return DriverDevice(NAME, ordinal, _calls())


def _calls() -> Any:
    try:
        from cuda.bindings import driver as calls
    except ImportError as error:
        raise EnvironmentLacks(
            f"cuda-core and cuda-bindings are not usable ({error}); {INSTALL}"
        ) from error
    return calls
