"""What doctor says of the CUDA layers: version, driver, devices; or what is missing, and the line
that installs it. (Engines: test_engine_trt.py; the exit code: test_cli.py.)"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import cada
from cuda_driver import build

from cada_deploy.device import DEFAULT_LAYER, open_device
from cada_deploy.errors import EnvironmentLacks

NAMES = Path(build.__file__).with_name("pycuda_names")


def told(output: str, layer: str) -> str:
    """The layer's line and the one after it."""
    lines = output.splitlines()
    index = next(k for k, line in enumerate(lines) if f"cuda layer {layer}" in line)
    return " ".join(lines[index : index + 2])


@pytest.fixture
def no_driver() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    pytest.skip("not run: this machine has an NVIDIA driver")


def test_each_layer_with_its_driver_and_devices() -> None:
    if build.compiler() is None:
        pytest.skip("not run: needs g++ for the stand-in driver")
    environment = {
        **os.environ, "LD_LIBRARY_PATH": str(build.driver_folder()), "PYTHONPATH": str(NAMES),
        "CADA_STAND_IN_DEVICES": "2", "CADA_STAND_IN_DRIVER_VERSION": "12080",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "cada_deploy", "doctor"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for layer, package in (("cuda-core", "cuda-bindings "), ("pycuda", "2026.1;")):
        line = told(done.stdout, layer)
        assert line.startswith("ok   cuda layer") and package in line
        assert "driver for CUDA 12.8, cuda:0 Stand-in GPU 0 (sm_90), cuda:1 Stand-in" in line


@pytest.mark.usefixtures("no_driver")
def test_the_package_is_here_and_the_driver_is_not() -> None:
    line = told(cada("doctor").out, "cuda-core")
    assert line.startswith("-") and "cuda-bindings" in line
    assert "no usable NVIDIA driver" in line and "install one for CUDA 12.0 or later" in line


def test_a_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.metadata.version

    def version(package: str) -> str:
        if package in ("cuda-core", "pycuda"):
            raise importlib.metadata.PackageNotFoundError(package)
        return installed(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    out = cada("doctor").out
    assert "missing" in told(out, "cuda-core")
    assert "pip install 'cada-deploy[gpu]'" in told(out, "cuda-core")
    assert "pip install 'cada-deploy[pycuda]'" in told(out, "pycuda")


@pytest.mark.usefixtures("no_driver")
def test_opening_a_device_without_a_driver() -> None:
    with pytest.raises(EnvironmentLacks, match="no usable NVIDIA driver"):
        open_device("cuda:0", DEFAULT_LAYER)


def test_opening_a_device_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EnvironmentLacks, match=r"pip install 'cada-deploy\[gpu\]'"):
        open_device("cuda:0", DEFAULT_LAYER)
