"""The real Python bindings of three TensorRT versions, made importable without TensorRT.

A bindings wheel (1.3 MB) is all classes and no engine: it needs nine C functions of libnvinfer,
which here return null. Nothing of NVIDIA's is kept in this repository: wheels come from the index
when a test needs them, pinned by their digests, and stay below build/.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KEPT = ROOT / "build" / "trt_api"

# All that the bindings of 10.3 to 11.4 import from the three libraries.
SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry", "getNvOnnxParserVersion", "getPluginRegistry",
    "initLibNvInferPlugins",
)  # fmt: skip
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")


@dataclass(frozen=True)
class Wheel:
    """A release on the index, for CPython 3.11 on x86-64."""

    version: str
    project: str
    sha256: str

    @property
    def major(self) -> str:
        return self.version.partition(".")[0]

    @property
    def folder(self) -> Path:
        """runtime/ is for PYTHONPATH, types/ for MYPYPATH, api.json what is there."""
        return KEPT / self.version


WHEELS = (
    Wheel(
        "10.3.0", "tensorrt-cu12-bindings",
        "59ace22d7f2ca1e9dcde2cb0cb5916912cb3cd5a9d72dd7852be0160d9b3a0ee",
    ),
    Wheel(
        "10.16.1.11", "tensorrt-cu12-bindings",
        "150ef2b672487e29a8ea916353467c3e199994fb33589167e3641a928e243aa7",
    ),
    Wheel(
        "11.4.0.106", "tensorrt-cu13-bindings",
        "d072ac2a095e2be749fefc847adfb25d5ebe70303401df62ede8fe67a59f27fc",
    ),
)  # fmt: skip


def prepared(wheel: Wheel) -> Path:
    """The wheel's folder, complete. Skips the test where it cannot be had."""
    if sys.version_info[:2] != (3, 11) or platform.machine() != "x86_64":
        pytest.skip("not run: the bindings are pinned for CPython 3.11 on x86-64")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("not run: no C compiler for the empty libraries")
    recipe = _recipe(wheel)
    stamp = wheel.folder / "recipe"
    with alone(wheel):
        if not stamp.exists() or stamp.read_text() != recipe:
            shutil.rmtree(wheel.folder, ignore_errors=True)
            _prepare(wheel, compiler)
            stamp.write_text(recipe)
    return wheel.folder


@contextmanager
def alone(wheel: Wheel) -> Iterator[None]:
    """Tests run in several processes; one at a time works in a version's folder."""
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / f"{wheel.version}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _recipe(wheel: Wheel) -> str:
    """Changes when anything that makes the folder does."""
    sources = [Path(__file__), HERE / "describe.py"]
    return hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest() + wheel.sha256


def _prepare(wheel: Wheel, compiler: str) -> None:
    runtime = wheel.folder / "runtime"
    runtime.mkdir(parents=True)
    with zipfile.ZipFile(_download(wheel)) as archive:
        archive.extractall(runtime)
    inside = runtime / "tensorrt_bindings"
    for name in LIBRARIES:
        _empty_library(compiler, inside, f"lib{name}.so.{wheel.major}", name == "nvinfer")
    package = runtime / "tensorrt"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    )
    command = [sys.executable, str(HERE / "describe.py"), str(wheel.folder)]
    done = subprocess.run(command, env=environment(wheel), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _download(wheel: Wheel) -> Path:
    wanted = wheel.folder / "requirement.txt"
    wanted.write_text(f"{wheel.project}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--require-hashes", "--dest", str(wheel.folder), "--requirement", str(wanted),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        assert "hash" not in last.lower(), done.stderr
        pytest.skip(f"not run: {wheel.project} {wheel.version} cannot be downloaded ({last})")
    (path,) = wheel.folder.glob("*.whl")
    return path


def _empty_library(compiler: str, folder: Path, name: str, symbols: bool) -> None:
    text = "".join(f"void *{s}(void) {{ return 0; }}\n" for s in SYMBOLS) if symbols else ""
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-w", "-x", "c", "-", f"-Wl,-soname,{name}",
         "-o", str(folder / name)],
        input=text, text=True, check=True,
    )  # fmt: skip


def environment(wheel: Wheel, *more: Path) -> dict[str, str]:
    """In which `import tensorrt` is this version's bindings."""
    runtime = wheel.folder / "runtime"
    path = os.pathsep.join(str(p) for p in (runtime, *more))
    library_path = str(runtime / "tensorrt_bindings")
    return {**os.environ, "PYTHONPATH": path, "LD_LIBRARY_PATH": library_path}
