"""The built program and library, ONNX Runtime's own library, and golden frames."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest

from cada_deploy import scenes

from .built import built, compiled, ort_library, stand_in
from .cada_seg import Library


@pytest.fixture(scope="session")
def folder() -> Path:
    return built("plain")


@pytest.fixture(scope="session")
def program(folder: Path) -> Path:
    return folder / "cada_seg"


@pytest.fixture(scope="session")
def library(folder: Path) -> Library:
    return Library.at(folder / "libcada_seg.so")


@pytest.fixture(scope="session")
def ort() -> Path:
    return ort_library()


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build under the sanitizers, with the back end trt over the stand-in for TensorRT."""
    trial = tmp_path_factory.mktemp("trial")
    (trial / "empty.cpp").write_text("int main() {}\n")
    try:
        compiled(trial / "empty", trial / "empty.cpp", "-fsanitize=address,undefined")
    except AssertionError:
        pytest.skip("not run: this g++ has no sanitizer libraries")
    debug = ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0", "-DCADA_SEG_SANITIZE=ON"]
    return built("sanitized", [*debug, *stand_in()])


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Street scenes in both lights, of several sizes and in subfolders, as PNGs."""
    root = tmp_path_factory.mktemp("golden") / "frames"
    crops = [(64, 128), (64, 128), (61, 117), (1, 1), (33, 128)]
    for seed, (height, width) in enumerate(crops):
        style = (scenes.SOURCE, scenes.TARGET)[seed % 2]
        image = scenes.scene(seed, style, (64, 128)).image[:height, :width]
        path = root / (f"street.{seed}.png" if seed % 2 else f"more/deeper/{seed}.PNG")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".png", image[..., ::-1])[1].tobytes())
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.png").touch()
    (root / "notes.txt").touch()
    return root
