"""Looks at this machine: processor, fused kernel, engines, packages. Changes nothing."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from cada_deploy import __version__
from cada_deploy.device import layer_module, layers
from cada_deploy.engines import engines, require
from cada_deploy.errors import CadaError, EnvironmentLacks
from cada_deploy.fused import open_kernel


@dataclass(frozen=True)
class Finding:
    """One line: needed ones are those without which the main job cannot run here."""

    what: str
    found: str
    ok: bool = True
    needed: bool = False
    remedy: str = ""


def examine() -> list[Finding]:
    """Everything worth knowing, in the order to read it."""
    return [
        Finding("cada-deploy", f"{__version__}, Python {platform.python_version()}"),
        *_machine(),
        _fused_kernel(),
        *_packages(),
        *_engines(),
        *_cuda_layers(),
    ]


def _machine() -> Iterator[Finding]:
    usable, total = len(os.sched_getaffinity(0)), os.cpu_count()
    yield Finding("processor", f"{_cpu_name()}, {usable} of {total} cores usable")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    yield Finding("memory", f"{memory:.0f} GB")
    yield Finding("disk here", f"{shutil.disk_usage('.').free / 1e9:.0f} GB free")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _fused_kernel() -> Finding:
    try:
        kernel = open_kernel("native")
    except CadaError as error:
        return Finding(
            "fused kernel", "NumPy only: slow, not bit-identical", False, False, str(error)
        )
    return Finding("fused kernel", f"native, instruction set {getattr(kernel, 'isa', 'unknown')}")


def _packages() -> Iterator[Finding]:
    for package in ("numpy", "onnx", "pillow", "safetensors", "click", "rich"):
        yield Finding(package, version(package))
    opencv = _first_version("opencv-python-headless", "opencv-python", "opencv-contrib-python")
    if opencv or find_spec("cv2"):
        yield Finding("opencv", opencv or "found, outside pip")
    else:
        yield Finding("opencv", "missing", False, True, "pip install opencv-python-headless")
    both = [p for p in ("onnxruntime", "onnxruntime-gpu") if _first_version(p)]
    if len(both) == 2:
        yield Finding(
            "onnxruntime", "both builds are installed and overwrite each other", False, True,
            "pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them",
        )  # fmt: skip


def _first_version(*packages: str) -> str | None:
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def _engines() -> Iterator[Finding]:
    for name in engines():
        yield _onnx_runtime() if name == "ort" else _other_engine(name)


def _other_engine(name: str) -> Finding:
    """Each engine's own error says what to install."""
    try:
        return Finding(f"engine {name}", require(name))
    except EnvironmentLacks as error:
        return Finding(f"engine {name}", "missing", False, False, str(error))


def _cuda_layers() -> Iterator[Finding]:
    """Each layer's own error says what to install: its package, or a driver."""
    for name in layers():
        what, found = f"cuda layer {name}", "missing"
        try:
            found = layer_module(name).version()
            yield Finding(what, f"{found}; {layer_module(name).describe()}")
        except EnvironmentLacks as error:
            yield Finding(what, found, False, False, str(error))


def _onnx_runtime() -> Finding:
    try:
        import onnxruntime  # heavy, and its absence is what is asked about
    except ImportError:
        return Finding(
            "engine ort", "onnxruntime is missing", False, True, "pip install 'cada-deploy[cpu]'"
        )
    providers = ", ".join(
        p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers()
    )
    return Finding("engine ort", f"onnxruntime {onnxruntime.__version__} ({providers})")
