"""The kernels under the address and undefined-behaviour sanitizers, over awkward sizes."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .test_pixel_maths import _instruction_sets

KERNELS = Path(__file__).parents[2] / "kernels"
# As in CMakeLists.txt, but for the optimisation.
FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "baseline": ["-march=x86-64"],
}
COMMON = [
    *["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-pthread"],
    *["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
]


def test_no_access_outside_a_buffer_and_no_undefined_behaviour(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("not run: needs g++ on x86-64")
    jobs = [
        (KERNELS / "fused_host.cpp", "host", []),
        (KERNELS / "fused_scalar.cpp", "scalar", []),
        (Path(__file__).with_name("sanitized_driver.cpp"), "driver", []),
        *((KERNELS / "fused_cpu.cpp", isa, flags) for isa, flags in FLAGS.items()),
    ]

    def compiled(job: tuple[Path, str, list[str]]) -> Path:
        source, name, flags = job
        made = tmp_path / f"{name}.o"
        subprocess.run(
            [compiler, *COMMON, *flags, "-c", str(source), "-o", str(made)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = [str(made) for made in pool.map(compiled, jobs)]
    program = tmp_path / "driver"
    linked = subprocess.run(
        [compiler, *COMMON, *objects, "-o", str(program)], capture_output=True, text=True
    )
    if linked.returncode and "asan" in linked.stderr:
        pytest.skip("not run: this g++ has no sanitizer libraries")
    assert linked.returncode == 0, linked.stderr
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0"}
    ran = subprocess.run([str(program)], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert sorted(ran.stdout.split()[1::2]) == sorted(_instruction_sets())
