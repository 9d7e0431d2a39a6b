"""CUDA sources of this repository to cubins, with the options that their bits need."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from harness import REPOSITORY

OPTIONS = ("-std=c++17", "-fmad=false")  # precise division and no flushing are the defaults


class NotHere(Exception):
    """Neither nvcc nor NVRTC can be found; the message says so."""


def cubin_of(source: Path, architecture: str, classes: int) -> bytes:
    """Compile with nvcc, else with NVRTC through cuda-core. Raises NotHere, CalledProcessError."""
    if shutil.which("nvcc"):
        return _by_nvcc(source, architecture, classes)
    return _by_nvrtc(source, architecture, classes)


def _by_nvcc(source: Path, architecture: str, classes: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.cubin"
        command = [
            "nvcc", "-cubin", f"-arch={architecture}", *OPTIONS, f"-DCADA_CLASSES={classes}",
            "-I", str(REPOSITORY / "kernels"), "-o", str(out), str(source),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        return out.read_bytes()


def _by_nvrtc(source: Path, architecture: str, classes: int) -> bytes:
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise NotHere(
            f"no nvcc on the PATH, and NVRTC needs cuda-core ({error}); pip install cuda-core "
            "nvidia-cuda-nvrtc"
        ) from error
    options = ProgramOptions(
        std="c++17", fma=False, arch=architecture, define_macro=[("CADA_CLASSES", str(classes))],
        include_path=[str(REPOSITORY / "kernels")],
    )  # fmt: skip
    program = Program(source.read_text(encoding="utf-8"), "c++", options)
    return bytes(program.compile("cubin").code)
