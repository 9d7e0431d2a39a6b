"""Runs the device contract where libcuda.so.1 is the stand-in: a process of its own for every layer
and mode, so that nothing else of the suite ever meets a driver that is none.

PyCUDA has no wheel on PyPI, so its layer runs against a record of PyCUDA's names too. The real one,
where it is installed, runs on the stand-in as it is: its extension links libcuda.so.1.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_driver import build

from cada_deploy import cubins
from cada_deploy.device import layer_module, layers
from cada_deploy.errors import EnvironmentLacks

NAMES = Path(build.__file__).with_name("pycuda_names")
CONTRACT = Path(__file__).with_name("test_device.py")


@pytest.mark.parametrize("mode", ["eager", "lazy"])
@pytest.mark.parametrize("layer", sorted(layers()))
def test_a_layer_keeps_the_contract(layer: str, mode: str) -> None:
    try:
        layer_module(layer).version()
    except EnvironmentLacks as error:
        pytest.skip(f"not run: {error}")
    keeps_the_contract(layer, mode)


@pytest.mark.parametrize("mode", ["eager", "lazy"])
def test_the_pycuda_layer_keeps_it_on_recorded_names(mode: str) -> None:
    keeps_the_contract("pycuda", mode, PYTHONPATH=str(NAMES))


@pytest.mark.parametrize("architecture", ["sm_75", "sm_90"])
def test_the_contracts_kernels_compile_for_a_gpu(architecture: str) -> None:
    pytest.importorskip("cuda.core", reason="not run: needs cuda-core for NVRTC")
    image = cubins.compile_with_nvrtc(build.KERNELS, architecture, {})
    assert all(name.encode() in image for name in build.NAMES)


def keeps_the_contract(layer: str, mode: str, **more: str) -> None:
    if build.compiler() is None:
        pytest.skip("not run: needs g++ for the stand-in driver")
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(build.driver_folder()),
        "CADA_TEST_STAND_IN": mode,
        "CADA_TEST_LAYER": layer,
        "CADA_STAND_IN_LAZY": str(int(mode == "lazy")),
        **more,
    }
    environment.pop("CADA_TEST_CUDA", None)
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CONTRACT)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=CONTRACT.parents[2],
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed, skipped = (re.search(rf"(\d+) {word}", done.stdout) for word in ("passed", "skipped"))
    assert passed and int(passed[1]) >= 45, done.stdout
    assert skipped is None or int(skipped[1]) <= 2, done.stdout
