"""The README is true: its commands run, its Python works, its figures are the recorded rows."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from foreign_models import fitted_colours, save_colour_model

from benchmarks import readme_tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def _commands() -> list[str]:
    lines = [line for block in _blocks("console") for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines), lines
    return [line[2:] for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader stands after `make demo`: the checkout's model, the demo, a foreign model."""
    home = tmp_path_factory.mktemp("reader")
    model = home / "cada_deploy" / "demo_model"
    model.mkdir(parents=True)
    shutil.copy(ROOT / "cada_deploy" / "demo_model" / "scenes19.onnx", model)
    _run("cada-deploy demo --out demo-out", home)
    import cv2

    images = [
        cv2.imread(str(p))[..., ::-1] for p in sorted(home.glob("demo-out/scenes/images/*"))[:4]
    ]
    save_colour_model(home / "foreign.onnx", fitted_colours(images, 19))
    refused = "pseudo-label --model foreign.onnx --images demo-out --out x"
    template = subprocess.run(
        [*_program(), *refused.split()],
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert template.returncode == 2, template.stderr
    (home / "foreign.toml").write_text(template.stderr.partition("\n\n")[2])
    return home


def _program() -> list[str]:
    return [sys.executable, "-m", "cada_deploy"]


def _run(command: str, folder: Path) -> str:
    words = shlex.split(command)
    assert words[0] == "cada-deploy", command
    done = subprocess.run(
        [*_program(), *words[1:]], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_command_runs_in_order(folder: Path) -> None:
    commands = _commands()
    assert commands[0] == "make demo"  # its second half is the fixture
    for command in commands[1:]:
        _run(command, folder)
    for name in ("labels-1", "labels-2", "labels-3", "labels-4", "labels-strict", "labels-mixed"):
        assert len(list((folder / name / "labels").glob("*.png"))) == 48, name
    assert (folder / "demo-out" / "pseudo-labels" / "report.html").stat().st_size > 100_000


def test_python_example_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (code,) = _blocks("python")
    names = {"frame": np.zeros((64, 96, 3), np.uint8)}
    exec(compile(code, "README.md", "exec"), names)  # our own README, not input
    prediction = names["prediction"]
    assert prediction.labels.shape == (64, 96) and prediction.entropy.dtype == np.float32


def test_make_demo_is_the_command_that_was_tested() -> None:
    assert "cada-deploy demo --out demo-out" in (ROOT / "Makefile").read_text()


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_figures_are_the_recorded_rows() -> None:
    shown = re.search(r"<!-- performance -->\n(.*?)<!-- /performance -->", README, re.S)
    assert shown and shown.group(1) == readme_tables.performance(ROOT / "benchmarks" / "results"), (
        "the README's figures are not those of benchmarks/results; run benchmarks/readme_tables.py"
    )
    shown = re.search(r"<!-- adaptation -->\n(.*?)<!-- /adaptation -->", README, re.S)
    assert shown and shown.group(1) == readme_tables.adaptation(ROOT / "benchmarks" / "results")
