"""Builds cada_seg once per state of its sources and keeps it below build/, for every test run."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
RUNTIME = KERNELS / "runtime"
STAND_IN = Path(__file__).parent / "stand_in_tensorrt"
KEPT = ROOT / "build" / "cada_seg_tests"


def built(name: str, options: Sequence[str] = ()) -> Path:
    """A finished build of kernels/runtime with these CMake options. Skips where none can be."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("not run: needs cmake")
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("not run: needs a C++ compiler")
    folder = KEPT / f"{name}-{_digest(options)[:16]}"
    KEPT.mkdir(parents=True, exist_ok=True)
    with _locked(KEPT / f"{name}.lock"):
        if not (folder / "done").exists():
            for old in KEPT.glob(f"{name}-*"):
                shutil.rmtree(old)
            _make(cmake, folder, options)
            (folder / "done").touch()
    return folder


def _make(cmake: str, folder: Path, options: Sequence[str]) -> None:
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configured = subprocess.run(
        [cmake, *generator, "-S", RUNTIME, "-B", folder, "-DCADA_SEG_WERROR=ON", *options],
        capture_output=True,
        text=True,
    )
    for package in ("PNG", "JPEG", "ZLIB"):
        if f"Could NOT find {package}" in configured.stderr:
            pytest.skip(f"not run: needs the development files of {package}")
    assert configured.returncode == 0, configured.stderr
    made = subprocess.run(
        [cmake, "--build", folder, "--parallel", "2"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-4000:]


def _digest(options: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join(options).encode())
    for path in sorted(p for p in KERNELS.rglob("*") if p.is_file() and p.suffix != ".cu"):
        digest.update(str(path.name).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def compiled(
    out: Path, *words: object, compiler: str = "g++", standard: str | None = "-std=c++17"
) -> Path:
    """A program or library made with g++. Skips where there is none."""
    found = shutil.which(compiler)
    if found is None:
        pytest.skip(f"not run: needs {compiler}")
    done = subprocess.run(
        [
            found,
            *([standard] if standard else []),
            "-Wall",
            "-Wextra",
            "-Werror",
            *map(str, words),
            "-o",
            str(out),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two test processes build one after the other, and the second finds it done."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stand_in(compiler: str = "g++") -> list[str]:
    """The CMake options that build the back end trt over the stand-in for TensorRT."""
    sources = sorted(STAND_IN.iterdir())
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    library = KEPT / f"stand_in-{compiler}-{digest}" / "libnvinfer.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        made = compiled(
            library.with_name(f"{os.getpid()}.so"), "-shared", "-fPIC", "-O1", "-ffp-contract=off",
            "-Wl,-soname,libnvinfer.so", STAND_IN / "stand_in.cpp", compiler=compiler,
        )  # fmt: skip
        made.replace(library)
    return [
        "-DCADA_SEG_TENSORRT=ON",
        f"-DTENSORRT_INCLUDE={STAND_IN}",
        f"-DTENSORRT_LIBRARY={library}",
        f"-DCUDART_INCLUDE={STAND_IN}",
        f"-DCUDART_LIBRARY={library}",
    ]


def ort_library() -> Path:
    """libonnxruntime.so inside the onnxruntime package. Skips where there is none."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="not run: needs onnxruntime")
    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    if not found:
        pytest.skip("not run: this onnxruntime package has no libonnxruntime.so of its own")
    return found[0]


def environment(**more: str) -> dict[str, str]:
    """The process's own, without settings that would decide what the tests decide."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CADA_")}
    return {**kept, **more}
