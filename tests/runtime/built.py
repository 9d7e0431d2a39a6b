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


def built(name: str, options: Sequence[str] = (), also: Sequence[Path] = ()) -> Path:
    """A finished build of kernels/runtime with these CMake options. Skips where it cannot be made.

    `also` are files outside kernels/ that the build depends on.
    """
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("not run: needs cmake")
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("not run: needs a C++ compiler")
    folder = KEPT / f"{name}-{_digest(options, also)[:16]}"
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


def _digest(options: Sequence[str], also: Sequence[Path]) -> str:
    digest = hashlib.sha256("\0".join(options).encode())
    sources = [p for p in sorted(KERNELS.rglob("*")) if p.is_file() and p.suffix != ".cu"]
    for path in [*sources, *also]:
        digest.update(str(path.name).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def compiled(out: Path, *words: object, compiler: str = "g++") -> Path:
    """A program or library made with g++. Skips where there is none."""
    found = shutil.which(compiler)
    if found is None:
        pytest.skip(f"not run: needs {compiler}")
    done = subprocess.run(
        [found, "-std=c++17", "-Wall", "-Wextra", "-Werror", *map(str, words), "-o", str(out)],
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
