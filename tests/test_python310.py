"""The runtime on Python 3.10, which JetPack 6 has: installed from the wheel, without torch, it
labels images and gives the same bytes as here. Not run where no Python 3.10 is at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from foreign_models import save_colour_model, spread_colours, write_images

ROOT = Path(__file__).parent.parent


def _python310() -> str | None:
    candidates = [os.environ.get("CADA_PYTHON310"), shutil.which("python3.10")]
    pyenv = shutil.which("pyenv")
    if pyenv:
        root = subprocess.run([pyenv, "root"], capture_output=True, text=True).stdout.strip()
        candidates += sorted(str(p) for p in Path(root).glob("versions/3.10.*/bin/python3.10"))
    for candidate in candidates:
        if candidate and _runs(candidate):
            return candidate
    return None


def _runs(python: str) -> bool:
    code = "import sys, venv; sys.exit(sys.version_info[:2] != (3, 10))"
    try:
        return subprocess.run([python, "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.fixture(scope="module")
def python310(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = _python310()
    if python is None:
        pytest.skip("not run: no Python 3.10 on this machine (CADA_PYTHON310 names one)")
    folder = tmp_path_factory.mktemp("python310")
    wheels = folder / "wheels"
    _check([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
            "--wheel-dir", wheels, f"--config-settings=build-dir={folder / 'build'}",
            ROOT])  # fmt: skip
    _check([python, "-m", "venv", folder / "venv"])
    inside = folder / "venv" / "bin" / "python"
    (wheel,) = wheels.glob("*.whl")
    _check([inside, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt",
            f"{wheel}[cpu]"])  # fmt: skip
    return inside


def _check(command: list[object], **options: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return str(done.stdout)


def test_labels_images_with_the_compiled_kernel(python310: Path, tmp_path: Path) -> None:
    save_colour_model(tmp_path / "m.onnx", spread_colours(19))
    write_images(tmp_path / "in", 4)
    common = ["-m", "cada_deploy", "pseudo-label", "--preset", "imagenet-rgb", "--quiet",
              "--model", tmp_path / "m.onnx", "--images", tmp_path / "in"]  # fmt: skip
    _check([python310, *common, "--out", tmp_path / "old"], cwd=tmp_path)
    _check([sys.executable, *common, "--out", tmp_path / "here"], cwd=tmp_path)
    for path in sorted((tmp_path / "here" / "labels").iterdir()):
        assert path.read_bytes() == (tmp_path / "old" / "labels" / path.name).read_bytes()
    names = "import torch"
    assert subprocess.run([python310, "-c", names], capture_output=True).returncode != 0
    assert "ok   fused kernel" in _check([python310, "-m", "cada_deploy", "doctor"], cwd=tmp_path)
