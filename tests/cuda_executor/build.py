"""Compiles a CUDA source for the executor with g++, once for each content and option."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

EXECUTOR = Path(__file__).with_name("executor.h")
KERNELS = Path(__file__).parents[2] / "kernels"
# The bits need: no contraction, no fast-math.
FLAGS = ("-std=c++17", "-O2", "-g", "-fPIC", "-shared", "-ffp-contract=off", "-fvisibility=hidden",
         "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-function")  # fmt: skip
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SANITIZED = "CADA_EXECUTOR_SANITIZED"  # in the environment: everything under ASan and UBSan
# `KERNEL` is how fused_cuda.cu spells a kernel with its launch bounds.
_KERNEL = re.compile(r'^(?:extern "C" __global__ void|KERNEL) (\w+)\(', re.MULTILINE)


def compiler() -> str | None:
    return shutil.which("g++")


def kernels_in(source: str) -> list[str]:
    """Names of the kernels that a source defines."""
    return _KERNEL.findall(source)


def library(source: Path, defines: Mapping[str, int]) -> Path:
    """The shared library of one source. Raises CalledProcessError with the compiler's words."""
    gxx = compiler()
    assert gxx is not None, "ask compiler() first"
    text = source.read_text(encoding="utf-8")
    flags = [*FLAGS, *(f"-D{name}={value}" for name, value in sorted(defines.items()))]
    if os.environ.get(SANITIZED):
        flags += SANITIZERS
    if "fma" in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        flags.append("-mfma")  # else pixel.h emulates it: the same bits, slower
    headers = [EXECUTOR, *sorted(KERNELS.glob("*.h"))]
    digest = hashlib.sha256(repr(flags).encode())
    for part in (text.encode(), *(header.read_bytes() for header in headers)):
        digest.update(hashlib.sha256(part).digest())
    made = _folder() / f"{source.stem}-{digest.hexdigest()[:24]}.so"
    if made.exists():
        return made
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        program, out = Path(folder) / "program.cpp", Path(folder) / "out.so"
        entries = "".join(f"CUDA_EXECUTOR_KERNEL({name});\n" for name in kernels_in(text))
        program.write_text(
            f'#include "{EXECUTOR}"\n#include "{source.resolve()}"\n{entries}', encoding="utf-8"
        )
        command = [gxx, *flags, "-I", str(KERNELS), str(program), "-o", str(out)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        out.replace(made)
    return made


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"cada-cuda-executor-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
