"""A device of our contract whose GPU is this processor: kernels run for real, streams are lazy.

Everything of the stand-in device (work is done only when somebody waits) and, on top, modules and
launches through the executor. It makes its own modules from CUDA sources (`build_kernels`), so
cubins and a driver are not needed. `kernels_device` is such a device, or the GPU that
CADA_TEST_CUDA names (cuda:0); what needs the executor itself is marked `on_processor`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from stand_in_device import LazyStream, StandInDevice

from cada_deploy.device import Device, open_device
from cada_deploy.errors import RunFailed

from . import build

GPU = os.environ.get("CADA_TEST_CUDA", "")
on_processor = pytest.mark.skipif(bool(GPU), reason="not run on a GPU: the executor's own")

Triple = ctypes.c_uint * 3


@cache
def _library(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    library.cuda_executor_launch.restype = ctypes.c_char_p
    return library


@dataclass(frozen=True)
class HostFunction:
    name: str
    library: ctypes.CDLL


@dataclass(frozen=True)
class HostModule:
    library: ctypes.CDLL

    def function(self, name: str) -> HostFunction:
        if not self.library.cuda_executor_has(name.encode()):
            raise RunFailed(f"the module has no kernel {name}")
        return HostFunction(name, self.library)


@dataclass(eq=False)
class ProcessorDevice(StandInDevice):
    """seed: the order in which a block's threads run; 0 is their own."""

    layer: str = "executor"
    seed: int = 0
    built: list[tuple[str, dict[str, int]]] = field(default_factory=list)

    def build_kernels(self, source: Path, defines: Mapping[str, int]) -> bytes:
        self.built.append((source.name, dict(defines)))
        return str(build.library(source, defines)).encode()

    def load(self, image: bytes) -> HostModule:
        return HostModule(_library(image.decode()))

    def launch(
        self,
        function: HostFunction,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[np.generic],
        stream: LazyStream,
        shared_bytes: int = 0,
    ) -> None:
        if shared_bytes:
            raise RunFailed("the executor has no dynamic shared memory")
        held = [argument.tobytes() for argument in arguments]  # as they are now
        self.launched.append(function.name)

        def work() -> None:
            buffers = [ctypes.create_string_buffer(value, len(value)) for value in held]
            pointers = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, buffers))
            sizes = (ctypes.c_size_t * len(held))(*map(len, held))
            error = function.library.cuda_executor_launch(
                function.name.encode(), Triple(*grid), Triple(*block), pointers, sizes,
                ctypes.c_size_t(len(held)), ctypes.c_uint(self.seed),
            )  # fmt: skip
            if error is not None:
                raise RunFailed(error.decode())

        stream.add(work)


def kernels_device(seed: int = 0) -> Device:
    return open_device(GPU) if GPU else ProcessorDevice(seed=seed)
