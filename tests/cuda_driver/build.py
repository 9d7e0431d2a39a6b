"""Builds the stand-in for libcuda.so.1 and its kernels with g++, once for each content."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = HERE / "kernels.cu"
NAMES = ("add", "arguments", "places")
FLAGS = ("-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")
MAGIC = b"stand-in module\n"  # an image that the stand-in loads: this and a library's path


def compiler() -> str | None:
    return shutil.which("g++")


def driver_folder() -> Path:
    """A folder with libcuda.so.1 in it, for LD_LIBRARY_PATH."""
    flags = ("-fvisibility=hidden", "-Wl,-soname,libcuda.so.1", "-ldl")
    texts = [HERE / "stand_in.cpp", HERE / "not_here.inc"]
    return _built("libcuda.so.1", texts[0].read_text(encoding="utf-8"), texts, flags).parent


def kernel_image() -> bytes:
    """kernels.cu for the stand-in."""
    entries = "".join(f"HOST_KERNEL({name});\n" for name in NAMES)
    program = f'#include "host_kernels.h"\n#include "kernels.cu"\n{entries}'
    library = _built("kernels.so", program, [HERE / "host_kernels.h", KERNELS], ())
    return MAGIC + os.fsencode(library) + b"\0"


def _built(name: str, program: str, texts: list[Path], flags: tuple[str, ...]) -> Path:
    gxx = compiler()
    assert gxx is not None, "ask compiler() first"
    digest = hashlib.sha256(repr((FLAGS, flags, program)).encode())
    for text in texts:
        digest.update(hashlib.sha256(text.read_bytes()).digest())
    cache = Path(tempfile.gettempdir()) / f"cada-cuda-driver-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    made = cache / digest.hexdigest()[:24] / name
    if made.exists():
        return made
    made.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        source, out = Path(folder) / "program.cpp", Path(folder) / name
        source.write_text(program, encoding="utf-8")
        command = [gxx, *FLAGS, "-I", str(HERE), str(source), "-o", str(out), *flags]
        subprocess.run(command, check=True, capture_output=True, text=True)
        out.replace(made)
    return made
