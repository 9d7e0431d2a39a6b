"""cada_seg on other ground: under the sanitizers, for ARM, against its engines' real headers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from command_line import Argument

from cada_deploy.demo import DEMO_MODEL

from .built import RUNTIME, built, compiled, environment, stand_in
from .cada_seg import DONE, run
from .test_decode import BAD, JPEG, PNGS
from .test_labels import assert_same
from .test_preprocess import GOOD_TEXT, TEXTS
from .test_tensorrt import SPEC, plan_bytes, plan_file

HERE = Path(__file__).parent


def driver_of(folder: Path, out: Path, *words: object, compiler: str = "g++") -> Path:
    return compiled(
        out, HERE / "sanitized_driver.cpp", "-I", RUNTIME, folder / "libcada_seg.so",
        f"-Wl,-rpath,{folder}", *words, compiler=compiler,
    )  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Good and bad images, models, plans and specs, and pieces of them."""
    contents = [*PNGS.values(), *BAD.values(), JPEG, GOOD_TEXT.encode()]
    contents += [text.encode() for text in TEXTS]
    model = onnx.load(DEMO_MODEL)
    for tensor in model.graph.initializer:  # a small one: how it is built is what matters
        tensor.raw_data = tensor.raw_data[:16]
    model = model.SerializeToString()
    contents += [model, b"ftrt" + bytes(20) + bytes([10, 3, 0, 30]), b"ftrt" + bytes(9)]
    contents += [model[:at] + bytes([model[at] ^ 255]) + model[at + 1 :] for at in range(0, 400, 3)]
    contents += [model[:end] for end in (1, 7, 100, 1000)]
    folder = tmp_path / "files"
    folder.mkdir()
    paths = [folder / f"{k:04d}" for k in range(len(contents))]
    for path, content in zip(paths, contents):
        path.write_bytes(content)
    return paths


def test_no_access_outside_a_buffer_and_no_undefined_behaviour(
    sanitized: Path, files: list[Path], ort: Path, golden: Path, program: Path, tmp_path: Path
) -> None:
    driver = driver_of(sanitized, tmp_path / "driver", "-fsanitize=address,undefined")
    plan = plan_file(tmp_path / "m.engine", plan_bytes(3), SPEC)
    ran = run(
        driver, plan, *files, ASAN_OPTIONS="detect_leaks=1", UBSAN_OPTIONS="print_stacktrace=1"
    )
    assert ran.code == 0, ran.err[-4000:]
    assert len(ran.out) == 17 and not ran.err
    # ONNX Runtime itself keeps memory to the end, so leaks are not looked for here.
    common = (
        "--model",
        DEMO_MODEL,
        "--images",
        golden,
        "--ort-library",
        ort,
        "--entropy",
        "--quiet",
    )
    checked = run(
        sanitized / "cada_seg", *common, "--out", tmp_path / "one", ASAN_OPTIONS="detect_leaks=0"
    )
    assert (checked.code, checked.err) == (DONE, "")
    assert run(program, *common, "--out", tmp_path / "two", "--threads", 2).code == DONE
    assert_same(tmp_path / "one", tmp_path / "two")
    assert_same(tmp_path / "one", tmp_path / "two", "entropy")


def test_an_arm_build_gives_the_same_labels_and_entropies(sanitized: Path, tmp_path: Path) -> None:
    """Preprocessing, score encoding and the fused kernel, on the frames of the driver; the network
    is the stand-in's plan."""
    compiler = "aarch64-linux-gnu-g++"
    if shutil.which(compiler) is None:
        pytest.skip(f"not run: needs {compiler} (Debian: g++-aarch64-linux-gnu)")
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={RUNTIME / 'aarch64.cmake'}"
    arm = built("aarch64", ["-DCADA_SEG_CODECS=OFF", toolchain, *stand_in(compiler)])
    header = (arm / "libcada_seg.so").read_bytes()[:20]
    assert header[:4] == b"\x7fELF" and header[18:20] == b"\xb7\x00"  # EM_AARCH64
    there = driver_of(arm, tmp_path / "arm", "-Wl,--allow-shlib-undefined", compiler=compiler)
    here = driver_of(sanitized, tmp_path / "here", "-fsanitize=address,undefined")
    plan = plan_file(tmp_path / "m.engine", plan_bytes(half=True), SPEC)
    if platform.machine() == "aarch64":
        words: list[Argument] = [there, plan]
    elif emulator := shutil.which("qemu-aarch64"):
        words = [emulator, "-L", "/usr/aarch64-linux-gnu", there, plan]
    else:
        pytest.skip("not run beyond linking: needs qemu-aarch64 (Debian: qemu-user)")
    one, two, empty = run(here, plan), run(words[0], *words[1:]), run(here)
    assert one.code == two.code == 0, two.err
    assert one.out == two.out != empty.out


def _header(name: str, variable: str, *places: str) -> Path:
    """The folder that holds a header of somebody else's. Skips where there is none."""
    candidates = [Path(p) for p in (os.environ.get(variable, ""), *places) if p]
    for folder in candidates:
        if (folder / name).is_file():
            return folder
    pytest.skip(f"not run: needs {name}; name its folder in {variable}")


def test_onnxruntimes_table_has_our_functions_at_their_places() -> None:
    folder = _header(
        "onnxruntime_c_api.h", "CADA_ORT_INCLUDE", "/usr/include/onnxruntime",
        "/usr/local/include/onnxruntime", "/usr/include",
    )  # fmt: skip
    compiled(
        Path(os.devnull), "-fsyntax-only", "-Wno-unused", "-isystem", folder, "-I", RUNTIME,
        HERE / "ort_table.cpp",
    )  # fmt: skip


def _trt_includes() -> Iterator[str]:
    yield "/usr/include/x86_64-linux-gnu"
    yield "/usr/include/aarch64-linux-gnu"
    yield "/usr/local/tensorrt/include"


def test_our_tensorrt_code_compiles_against_the_real_headers() -> None:
    tensorrt = _header("NvInferRuntime.h", "CADA_TENSORRT_INCLUDE", *_trt_includes())
    cuda = _header("cuda_runtime_api.h", "CADA_CUDA_INCLUDE", "/usr/local/cuda/include")
    compiled(
        Path(os.devnull), "-fsyntax-only", "-isystem", tensorrt, "-isystem", cuda, "-I", RUNTIME,
        RUNTIME / "tensorrt.cpp",
    )  # fmt: skip


def test_a_package_build_installs_header_library_and_program(folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["cmake", "--install", folder, "--prefix", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    installed = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert {"cada_seg.h", "libcada_seg.so", "cada_seg"} <= installed
    moved = run(tmp_path / "bin" / "cada_seg", "--version")
    assert moved.code == DONE, (moved.err, sys.platform, environment().get("LD_LIBRARY_PATH"))
