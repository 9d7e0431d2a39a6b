"""The contract of a CUDA layer: the few calls that everything on a GPU here is made of.

Each layer is one file with NAME (`cuda-core`, `pycuda`), `version()`, `describe()` (the driver and
its devices, for doctor) and `open(ordinal) -> Device`. Layers are found by listing this folder, and
one contract suite runs over all of them. CADA_CUDA_LAYER chooses one by name.

Addresses are plain integers in one unified address space, so one `copy` serves every direction.
Everything with a stream is asynchronous: memory must live, and pinned memory must not be
rewritten, until the stream has passed that point. A Device may be used from several threads; every
method makes the device's primary context current in the calling thread first.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cada_deploy.errors import RunFailed, UsageError, nearest

DEFAULT_LAYER = "cuda-core"
LAYER_VARIABLE = "CADA_CUDA_LAYER"

Grid = tuple[int, int, int]


class OutOfDeviceMemory(RunFailed):
    """The device has no room for a buffer; the message says how much was wanted and was free, and
    what to lower."""


class DeviceLost(RunFailed):
    """The GPU cannot be used any more in this process: a fault in a kernel, a reset, a fallen bus.
    What was committed is safe; the same command resumes."""


class Event(Protocol):
    """A point in a stream."""

    handle: int

    def record(self, stream: Stream) -> None: ...

    def synchronize(self) -> None:
        """Wait on the host; the GIL is not held. Raises DeviceLost when work before it failed."""
        ...

    @property
    def done(self) -> bool: ...

    def milliseconds_since(self, earlier: Event) -> float:
        """Device time between two events that were made with timing=True and have passed."""
        ...


class Stream(Protocol):
    """Work in order. handle is the CUstream as an integer (what ONNX Runtime, TensorRT and the
    `stream` of __cuda_array_interface__ take)."""

    handle: int

    def synchronize(self) -> None: ...

    def wait(self, event: Event) -> None:
        """What is enqueued from now on starts after the event; the host goes on."""
        ...


class Memory(Protocol):
    """A buffer that lives as long as this object. `host` is the same bytes as a (nbytes,) uint8
    array where the host can reach them (pinned memory), else None."""

    address: int  # as the device sees it
    nbytes: int
    host: npt.NDArray[np.uint8] | None


class Function(Protocol):
    """A kernel of a loaded module, ready to launch."""

    name: str


class Module(Protocol):
    def function(self, name: str) -> Function:
        """Raises RunFailed when the module has no kernel of that name."""
        ...


class Graph(Protocol):
    """Captured work, to be launched as a whole on the addresses that it was captured with."""

    def launch(self, stream: Stream) -> None: ...


class Device(Protocol):
    """One GPU through one layer."""

    layer: str  # "cuda-core"
    ordinal: int
    name: str  # "NVIDIA H200"
    compute_capability: tuple[int, int]
    driver_version: str  # highest CUDA version of the driver, "13.0"
    integrated: bool  # host and device share memory (Jetson): pinned memory needs no copy
    multiprocessors: int

    def stream(self) -> Stream: ...

    def borrowed_stream(self, handle: int) -> Stream:
        """Someone else's CUstream; never destroyed here."""
        ...

    def event(self, *, timing: bool = False) -> Event: ...

    def allocate(self, nbytes: int) -> Memory:
        """Device memory, aligned to 256 bytes, contents undefined. Raises OutOfDeviceMemory."""
        ...

    def pinned(self, nbytes: int) -> Memory:
        """Page-locked host memory that the device can reach at `address`, too."""
        ...

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None: ...

    def fill(self, target: int, byte: int, nbytes: int, stream: Stream) -> None: ...

    def ordinal_at(self, address: int) -> int | None:
        """The ordinal of the device whose memory is at `address`; None when CUDA knows no memory
        there."""
        ...

    def load(self, image: bytes) -> Module:
        """A cubin for this device. Raises RunFailed when the driver refuses it."""
        ...

    def launch(
        self,
        function: Function,
        grid: Grid,
        block: Grid,
        arguments: Sequence[np.generic],
        stream: Stream,
        shared_bytes: int = 0,
    ) -> None:
        """Arguments are NumPy scalars of the kernel's own types; an address is np.uint64."""
        ...

    def capture(self, stream: Stream, work: Callable[[], None]) -> Graph:
        """Run `work`, which enqueues on `stream` (and on streams that wait for it), into a graph.
        Raises RunFailed when it did something that cannot be captured."""
        ...

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""
        ...

    def synchronize(self) -> None: ...


@cache
def layers() -> dict[str, str]:
    """Module by layer name. Read from the source text, so that listing imports no library."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "NAME":
                found[str(ast.literal_eval(node.value))] = path.stem
    return found


def layer_module(name: str) -> Any:
    """The module of a layer: NAME, version, describe, open. Importing it needs no library."""
    return import_module(f"{__name__}.{layers()[name]}")


def is_cuda(device: str) -> bool:
    return device.startswith("cuda:")


def ordinal_of(device: str) -> int:
    """`cuda:1` -> 1. Raises UsageError for anything else."""
    kind, _, number = device.partition(":")
    if kind != "cuda" or not number.isdecimal():
        raise UsageError(f"--device {device!r}; expected cpu or cuda:N, such as cuda:0")
    return int(number)


def open_device(device: str, layer: str | None = None) -> Device:
    """Open `cuda:N` through `layer`, else the one that CADA_CUDA_LAYER names, else cuda-core.

    Raises UsageError for a bad name, EnvironmentLacks when the layer's package, the driver or that
    device is not there (and says what to install).
    """
    ordinal = ordinal_of(device)
    name = layer or os.environ.get(LAYER_VARIABLE) or DEFAULT_LAYER
    if name not in layers():
        raise UsageError(f"no CUDA layer is called {name!r}; {nearest(name, layers())}")
    opened: Device = layer_module(name).open(ordinal)
    return opened
