"""Kernels as cubins: found ahead of time, kept, made again when damaged, refused with reasons."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from cada_deploy import cubins
from cada_deploy.errors import EnvironmentLacks, RunFailed

ROOT = Path(__file__).parent.parent
SMALL = {"CADA_CLASSES": 2}


class Compiler:
    def __init__(self) -> None:
        self.calls: list[tuple[str, str, dict[str, int]]] = []

    def __call__(self, source: Path, architecture: str, defines: Mapping[str, int]) -> bytes:
        self.calls.append((source.name, architecture, dict(defines)))
        return b"\x7fELF" + repr(self.calls[-1]).encode()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cada-deploy" / "kernels"


@pytest.fixture
def compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(cubins, "compile_with_nvrtc", made)
    return made


FUSED = cubins.sources() / "fused_cuda.cu"


def test_compiled_once_for_each_architecture_and_define(compiler: Compiler, folder: Path) -> None:
    wishes = [("sm_90", 2), ("sm_90", 3), ("sm_87", 2), ("sm_90", 2)]
    images = [cubins.image_for(FUSED, arch, {"CADA_CLASSES": c}) for arch, c in wishes]
    assert len(compiler.calls) == 3 and images[0] == images[3]
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 3
    assert all(re.fullmatch(r"fused_cuda-[23]-sm_\d+-[0-9a-f]{16}\.cubin", n) for n in names)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_another_source_is_another_name(tmp_path: Path) -> None:
    for name in ("fused_cuda.cu", "pixel.h"):
        shutil.copy(cubins.sources() / name, tmp_path)
    before = cubins.cubin_name(tmp_path / "fused_cuda.cu", "sm_90", SMALL)
    for name in ("fused_cuda.cu", "pixel.h"):
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        after = cubins.cubin_name(tmp_path / "fused_cuda.cu", "sm_90", SMALL)
        assert after != before
        before = after


def test_a_damaged_cubin_is_made_again_and_said(compiler: Compiler, folder: Path) -> None:
    image = cubins.image_for(FUSED, "sm_90", SMALL)
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    for damage in (whole[:-1], b"", whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]):
        kept.write_bytes(damage)
        with pytest.warns(RuntimeWarning, match="damaged; the kernel is compiled again"):
            assert cubins.image_for(FUSED, "sm_90", SMALL) == image
        assert kept.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_said_and_no_error(
    compiler: Compiler, folder: Path
) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="cannot be kept .* XDG_CACHE_HOME"):
        assert cubins.image_for(FUSED, "sm_90", SMALL).startswith(b"\x7fELF")


def test_cubins_made_ahead_of_time_come_first(compiler: Compiler, tmp_path: Path) -> None:
    for name in ("fused_cuda.cu", "pixel.h"):
        shutil.copy(cubins.sources() / name, tmp_path)
    source = tmp_path / "fused_cuda.cu"
    (tmp_path / "cubins").mkdir()
    (tmp_path / "cubins" / cubins.cubin_name(source, "sm_90", SMALL)).write_bytes(b"ahead")
    assert cubins.image_for(source, "sm_90", SMALL) == b"ahead"
    assert not compiler.calls


def test_without_any_compiler_the_missing_package_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> bytes:
        raise ImportError("No module named 'cuda'")

    monkeypatch.setattr(cubins, "compile_with_nvrtc", none)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(EnvironmentLacks, match=r"sm_90.*neither NVRTC.*cada-deploy\[gpu\]"):
        cubins.image_for(FUSED, "sm_90", SMALL)


def test_a_compiler_that_refuses_is_quoted(folder: Path) -> None:
    pytest.importorskip("cuda.core", reason="not run: needs cuda-core")
    with pytest.raises(RunFailed, match=r"fused_cuda.cu for sm_90(.|\n)*64 classes"):
        cubins.image_for(FUSED, "sm_90", {"CADA_CLASSES": 65})


def test_cmake_makes_cubins_under_the_names_that_are_looked_for(tmp_path: Path) -> None:
    cmake = Path(sys.executable).with_name("cmake")
    if shutil.which("nvcc") is None or not cmake.exists():
        pytest.skip("not run: needs nvcc and cmake")
    options = ["-DCADA_CUDA_ARCHITECTURES=90", "-DCADA_CUDA_CLASSES=2"]
    for command in (
        [str(cmake), "-S", str(ROOT), "-B", str(tmp_path / "build"), *options],
        [str(cmake), "--build", str(tmp_path / "build"), "--target", "cada_cubins"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    made = {path.name for path in (tmp_path / "build" / "cubins").iterdir()}
    preprocess = cubins.sources() / "preprocess_cuda.cu"
    assert cubins.cubin_name(FUSED, "sm_90", SMALL) in made
    assert cubins.cubin_name(preprocess, "sm_90", {}) in made
