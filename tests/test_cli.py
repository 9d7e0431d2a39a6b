"""The command line itself: every --help, light imports, nearest names, errors without traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from command_line import cada, child, child_environment

from cada_deploy import __version__, cli
from cada_deploy.errors import CadaError, nearest

COMMANDS = sorted(
    p.stem.replace("_", "-")
    for p in (Path(cli.__file__).parent / "commands").glob("*.py")
    if p.stem != "__init__"
)
HEAVY = ["onnxruntime", "onnx", "cv2", "torch", "numpy", "PIL", "safetensors", "rich"]


def test_the_commands_are_the_folder() -> None:
    listed = cli.group.list_commands(click.Context(cli.group))
    assert listed == COMMANDS
    assert {"pseudo-label", "select", "predict", "evaluate", "doctor", "demo"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_explains_itself(command: str, flag: str) -> None:
    ran = cada(command, flag)
    assert ran.code == 0 and ran.err == ""
    assert ran.out.startswith("Usage:") and "Example:" in ran.out
    for line in ran.out.splitlines():
        assert len(line) <= 100, line


def test_help_lists_every_command_with_a_sentence() -> None:
    ran = cada("--help")
    assert ran.code == 0
    lines = {line.split()[0]: line.split()[1:] for line in ran.out.splitlines() if line.strip()}
    for command in COMMANDS:
        assert len(lines[command]) >= 2, f"{command} has no short help"
    assert "Exit codes" in ran.out


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["nonsense"], []])
def test_help_and_mistakes_import_no_heavy_library(arguments: list[str]) -> None:
    code = (
        "import json, sys\n"
        "from cada_deploy.cli import main\n"
        "try: main(json.loads(sys.argv[1]))\n"
        "except SystemExit: pass\n"
        f"print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)], capture_output=True, text=True,
        env=child_environment(), timeout=60, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_one_commands_help_runs_no_network(tmp_path: Path) -> None:
    """onnxruntime is an extra: without it every --help must still work."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('not here')")
    environment = child_environment()
    environment["PYTHONPATH"] = str(tmp_path) + os.pathsep + environment["PYTHONPATH"]
    for arguments in (["pseudo-label", "--help"], ["select", "--help"], ["doctor", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "cada_deploy", *arguments], capture_output=True,
            env=environment, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_without_onnx_runtime_the_run_says_what_to_install(
    colour_model: Path, frames: Path, tmp_path: Path
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('not here')")
    environment = child_environment()
    environment["PYTHONPATH"] = str(tmp_path) + os.pathsep + environment["PYTHONPATH"]
    done = subprocess.run(
        [sys.executable, "-m", "cada_deploy", "pseudo-label", "--model", colour_model, "--preset",
         "imagenet-rgb", "--images", frames, "--out", tmp_path / "out"],
        capture_output=True, text=True, env=environment, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "pip install 'cada-deploy[cpu]'" in done.stderr and "Traceback" not in done.stderr


def test_the_version_is_the_packages() -> None:
    assert cada("--version").out.strip().endswith(__version__)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("pseudo-lable", "pseudo-label"), ("selct", "select"), ("eval", "evaluate"),
     ("pseudo_label", "pseudo-label")],
)  # fmt: skip
def test_an_unknown_command_suggests_the_nearest(wrong: str, right: str) -> None:
    ran = cada(wrong)
    assert ran.code == 2
    assert ran.said(f"no command is called {wrong!r}", f"did you mean {right!r}?")


def test_an_unknown_option_is_exit_2_and_suggests_the_nearest() -> None:
    ran = cada("pseudo-label", "--modle", "x")
    assert ran.code == 2 and ran.said("--modle", "--model")


def test_a_missing_option_is_exit_2() -> None:
    for command in ("pseudo-label", "predict"):
        ran = cada(command)
        assert ran.code == 2 and ran.said("Missing option")


def test_no_command_shows_the_help() -> None:
    ran = cada()
    assert ran.code == 2 and "pseudo-label" in ran.out + ran.err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "the same command goes on"),
        (MemoryError(), 1, "--workers"),
        (OSError(28, "No space left on device", "/x/y"), 1, "/x/y: No space left"),
        (CadaError("found, expected, remedy"), 1, "error: found, expected, remedy"),
    ],
    ids=repr,
)
def test_errors_become_sentences_and_codes(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli.group, "main", fail)
    ran = cada("doctor")
    assert ran.code == code and said in ran.err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr(cli.group, "main", fail)
    with pytest.raises(AssertionError, match="ours"):
        cada("doctor")


def test_every_error_kind_has_its_own_code() -> None:
    kinds = CadaError.__subclasses__()
    codes = {kind.__name__: kind.exit_code for kind in kinds}
    table = {
        "RunFailed": 1, "UsageError": 2, "EnvironmentLacks": 3, "ArtefactMismatch": 4,
        "CheckFailed": 5,
    }  # fmt: skip
    assert {k: codes[k] for k in table} == table


def test_doctor_runs_and_finds_the_main_job_runnable() -> None:
    ran = cada("doctor")
    assert ran.code == 0, ran.out
    assert "cada-deploy" in ran.out and "onnxruntime" in ran.out and "MISS" not in ran.out


def test_python_m_is_the_command() -> None:
    ran = child("--version")
    assert ran.code == 0 and ran.out.strip().endswith(__version__)


def test_nearest_lists_what_is_known() -> None:
    assert nearest("b", ["beta", "alpha"]) == "known: alpha, beta"
    assert nearest("alpa", ["beta", "alpha"]).endswith("did you mean 'alpha'?")
