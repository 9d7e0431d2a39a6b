"""What a user installs: the wheel's contents, and the package without its development extras."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = tmp_path_factory.mktemp("build")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps",
               "--no-build-isolation", "--wheel-dir", str(folder),
               f"--config-settings=build-dir={build}", str(ROOT)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_one_top_level_package(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"cada_deploy"}, tops


def test_wheel_holds_what_runs(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for needed in (
        "cada_deploy/cli.py",
        "cada_deploy/demo_model/scenes19.onnx",
        "cada_deploy/kernel_sources/fused_cuda.cu",
        "cada_deploy/kernel_sources/pixel.h",
        "cada_deploy/kernel_sources/preprocess_cuda.cu",
        "cada_deploy/report_page/page.css",
        "cada_deploy/schemas/thresholds.schema.json",
        "cada_deploy/training/source.py",
        "cada_deploy/training/recipe_files/scenes.toml",
    ):
        assert needed in names, f"{needed} is missing from the wheel"
    assert any(re.fullmatch(r"cada_deploy/fused/\S+\.so", n) for n in names), sorted(names)


def test_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    for name in wheel.namelist():
        assert not re.search(r"(^|/)(tests?|benchmarks|docs|kernels)/", name), name
        if name.startswith("cada_deploy/kernel_sources/"):  # compiled at first use on a GPU
            continue
        assert Path(name).suffix not in {".cpp", ".h", ".o", ".pyc", ".pt", ".pth"}, name


def test_wheel_is_for_any_python_of_this_platform(wheel: zipfile.ZipFile) -> None:
    (text,) = [wheel.read(n).decode() for n in wheel.namelist() if n.endswith(".dist-info/WHEEL")]
    assert re.search(r"^Tag: py3-none-\S*(x86_64|aarch64)$", text, re.M), text


def test_runtime_and_gpu_runtime_are_never_installed_together(wheel: zipfile.ZipFile) -> None:
    (text,) = [wheel.read(n).decode() for n in wheel.namelist() if n.endswith("METADATA")]
    requirements = re.findall(r"^Requires-Dist: (\S+?)[ ;>=<](.*)$", text, re.M)
    by_extra: dict[str, set[str]] = {}
    for package, rest in requirements:
        extra = re.search(r"extra == .(\w+)", rest)
        by_extra.setdefault(extra.group(1) if extra else "", set()).add(package)
    for extra, packages in by_extra.items():
        assert not {"onnxruntime", "onnxruntime-gpu"} <= packages, extra
    assert not {"torch", "onnxruntime", "opencv-python"} & by_extra[""], by_extra[""]


def test_constraints_name_every_direct_dependency() -> None:
    pinned = {
        re.split(r"[=;]", line)[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    text = (ROOT / "pyproject.toml").read_text()
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", text, re.M | re.S)
    development = re.search(r"^dev = \[(.*?)^\]", text, re.M | re.S)
    assert dependencies and development
    for name in re.findall(r'"([\w-]+)', dependencies.group(1) + development.group(1)):
        if name != "tomli":  # only Python 3.10 needs it
            assert name.lower() in pinned, f"{name} has no tested version in constraints.txt"
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()
