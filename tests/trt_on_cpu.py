"""TensorRT for tests: the stand-in, on the stand-in for a GPU. CADA_REAL_TENSORRT=1 takes the real
library and the real GPU in their place, and leaves out what only planted faults can show.

    with tensorrt_here(fault="shift") as trt: trt.open(model, "cuda:0")

`python -c "import trt_on_cpu; trt_on_cpu.main()" pseudo-label ...` is the command line with it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import cada_deploy.device
import cada_deploy.engines
from cada_deploy.device import ordinal_of
from cada_deploy.errors import EnvironmentLacks

REAL = os.environ.get("CADA_REAL_TENSORRT") == "1"
VERSIONS = ("10.3.0", "10.16.1.11", "11.4.0.106")
_OURS = "cada_deploy.engines.tensorrt"
_LOADED = ("tensorrt", "stand_in_tensorrt", _OURS)

needs_stand_in = pytest.mark.skipif(
    REAL, reason="not run: the stand-in alone can be given faults, versions and GPUs"
)


@contextmanager
def tensorrt_here(
    version: str = "10.16.1.11", fault: str = "", device: Any = None
) -> Iterator[Any]:
    """cada_deploy.engines.tensorrt with a TensorRT. `device` is a StandInDevice, or a function that
    is called in place of open_device."""
    if REAL:
        yield import_module(_OURS)
        return
    saved = {name: sys.modules.pop(name, None) for name in _LOADED}
    before = {k: os.environ.get(k) for k in ("STAND_IN_TRT_VERSION", "STAND_IN_TRT_FAULT")}
    os.environ |= {"STAND_IN_TRT_VERSION": version, "STAND_IN_TRT_FAULT": fault}
    opened = cada_deploy.device.open_device
    try:
        sys.modules["tensorrt"] = import_module("stand_in_tensorrt")
        ours: Any = import_module(_OURS)
        cada_deploy.device.open_device = ours.open_device = _opener(device)
        yield ours
    finally:
        cada_deploy.device.open_device = opened
        for name, module in saved.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        vars(cada_deploy.engines).pop("tensorrt", None)
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def _opener(device: Any) -> Callable[..., Any]:
    from cuda_executor.layer import ProcessorDevice

    if callable(device):
        return device  # type: ignore[no-any-return]
    gpu = device or ProcessorDevice()  # runs our kernels, too, where there is a g++

    def open_device(name: str, layer: str | None = None) -> Any:
        if ordinal_of(name) != 0:
            raise EnvironmentLacks(f"--device {name}: the stand-in has one GPU, cuda:0")
        return gpu

    return open_device


def untouchable(name: str, layer: str | None = None) -> Any:
    """In place of open_device, where nothing may touch the GPU."""
    raise AssertionError(f"{name} was opened")


def environment(**more: str) -> dict[str, str]:
    """Of a child process that runs `main`."""
    from command_line import child_environment

    both = child_environment(**more)
    both["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), both["PYTHONPATH"]])
    return both


def main() -> None:
    from cada_deploy.cli import main as command_line

    version = os.environ.get("STAND_IN_TRT_VERSION", "10.16.1.11")
    with tensorrt_here(version, os.environ.get("STAND_IN_TRT_FAULT", "")):
        command_line(sys.argv[1:])
