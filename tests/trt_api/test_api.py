"""engines/tensorrt.py and the stand-in use only what the bindings of every version have; planted
mistakes show that the check can tell. Behaviour is not checked here: there is no TensorRT."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trt_api.bindings import ROOT, WHEELS, Wheel, alone, environment, prepared

OURS = ROOT / "cada_deploy" / "engines" / "tensorrt.py"
TESTS = ROOT / "tests"
VERSIONS = [wheel.version for wheel in WHEELS]

wheels = pytest.mark.parametrize("wheel", WHEELS, ids=VERSIONS)


def api(wheel: Wheel) -> dict[str, Any]:
    classes: dict[str, Any] = json.loads((prepared(wheel) / "api.json").read_text())["classes"]
    return classes


def mypy(wheel: Wheel, file: Path) -> list[str]:
    """Errors of one file against this version's types, as `line: message`."""
    folder = prepared(wheel)
    command = [
        sys.executable, "-m", "mypy", "--follow-imports=silent", "--no-error-summary",
        "--hide-error-context", "--cache-dir", str(folder / "mypy"), "--strict", str(file),
    ]  # fmt: skip
    types = {**os.environ, "MYPYPATH": str(folder / "types")}
    with alone(wheel):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=types)
    assert done.stderr == "" and done.returncode in (0, 1), done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if ": error:" in line]
    return [line.partition(":")[2] for line in lines]


@wheels
def test_our_file_has_no_type_error(wheel: Wheel) -> None:
    assert mypy(wheel, OURS) == []


# What it was, what it becomes, and the versions in which that is an error.
MISTAKES = (
    ("trt.BuilderFlag.TF32", "trt.BuilderFlag.FP16", VERSIONS[2:]),
    (
        "trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
        VERSIONS[2:],
    ),
    ('getattr(trt.BuilderFlag, "STRICT_NANS", None)', "trt.BuilderFlag.STRICT_NANS", VERSIONS[:1]),
    (
        'getattr(trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY", None)',
        "trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY",
        VERSIONS[:1],
    ),
    ("raw.execute_async_v3(stream.handle)", "raw.execute_async_v2(stream.handle)", VERSIONS),
    ("builder.build_serialized_network", "builder.build_engine", VERSIONS),
    ("self.engine.num_io_tensors", "self.engine.num_bindings", VERSIONS),
    ("raw.set_tensor_address(loaded.input, image)", "raw.set_tensor_address(image)", VERSIONS),
    ("engine_host_code_allowed = True", 'engine_host_code_allowed = "yes"', VERSIONS),
    ("config.progress_monitor = monitor", "config.progress_monitor = builder", VERSIONS),
    ("config.set_memory_pool_limit(", "config.set_max_workspace_size(", VERSIONS),
)


@wheels
def test_planted_mistakes_are_found(wheel: Wheel, tmp_path: Path) -> None:
    text = OURS.read_text()
    expected = set()
    for before, after, versions in MISTAKES:
        assert text.count(before) == 1, f"{before!r} must occur once; choose another mistake"
        text = text.replace(before, after)
        if wheel.version in versions:
            expected.add(after)
    file = tmp_path / "planted_mistakes.py"
    file.write_text(text)
    lines = text.splitlines()
    found = {int(error.partition(":")[0]) for error in mypy(wheel, file)}
    texts = " ".join(lines[number - 1] for number in found)
    for after in expected:
        assert after in texts, f"{after!r} was not found in {wheel.version}"
    assert len(found) == len(expected), sorted(lines[n - 1] for n in found)


# --- by name, without mypy ---------------------------------------------------------------------


def chains(tree: ast.AST) -> set[tuple[str, ...]]:
    """("BuilderFlag", "TF32") of every `trt.BuilderFlag.TF32`."""
    found = set()
    for node in ast.walk(tree):
        names: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            names.insert(0, inner.attr)
            inner = inner.value
        if names and isinstance(inner, ast.Name) and inner.id == "trt":
            found.add(tuple(names))
    return found


def probes(tree: ast.AST) -> set[tuple[str, ...]]:
    """The same of every `getattr(trt.BuilderFlag, "STRICT_NANS", None)`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            assert len(node.args) == 3, "a probe has a default"
            (outer,) = (max(chains(node.args[0]), key=len, default=("",)),)
            found.add((*outer, ast.literal_eval(node.args[1])))
    return found


def is_there(classes: dict[str, Any], chain: tuple[str, ...]) -> bool:
    here: Any = classes.get(chain[0])
    for name in chain[1:]:
        if here is None:
            return False
        if name in here.get("enum", {}) or name in here.get("methods", ()):
            return True
        here = here.get("nested", {}).get(name)
    return here is not None


@wheels
def test_every_name_is_in_every_version_or_behind_a_probe(wheel: Wheel) -> None:
    classes = api(wheel)
    names = {c for c in chains(ast.parse(OURS.read_text())) if not c[-1].startswith("__")}
    assert len(names) > 20
    assert sorted(n for n in names if not is_there(classes, n)) == []


def test_every_probe_is_for_a_name_that_some_version_has_and_some_lack() -> None:
    found = probes(ast.parse(OURS.read_text()))
    assert found
    each = [api(wheel) for wheel in WHEELS]
    for chain in found:
        assert {is_there(classes, chain) for classes in each} == {True, False}, chain


@wheels
def test_what_we_override_is_there_to_be_overridden(wheel: Wheel) -> None:
    """A misspelt `step_complete` would never be called, and no type checker would tell."""
    classes, seen = api(wheel), 0
    for node in ast.parse(OURS.read_text()).body:
        bases = [b.attr for b in getattr(node, "bases", []) if isinstance(b, ast.Attribute)]
        for base in bases:
            assert isinstance(node, ast.ClassDef)
            ours = [
                f.name for f in node.body
                if isinstance(f, ast.FunctionDef) and f.name[0] != "_" and not f.decorator_list
            ]  # fmt: skip
            assert ours and set(ours) <= set(classes[base]["methods"]), base
            seen += 1
    assert seen == 2


def test_no_enum_value_is_written_as_a_number() -> None:
    """They were renumbered between 10 and 11."""
    assert not re.search(r"\d\s*<<\s*\d|flags\s*=\s*\d", OURS.read_text())
    each = [api(wheel)["BuilderFlag"]["enum"] for wheel in WHEELS]
    assert len({values["VERSION_COMPATIBLE"] for values in each}) == 2


# --- the stand-in ------------------------------------------------------------------------------


@wheels
def test_the_stand_in_has_real_names_and_values_only(
    wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = api(wheel)
    monkeypatch.setenv("STAND_IN_TRT_VERSION", wheel.version)
    monkeypatch.delitem(sys.modules, "stand_in_tensorrt", raising=False)
    module = importlib.import_module("stand_in_tensorrt")
    monkeypatch.delitem(sys.modules, "stand_in_tensorrt")
    assert module.__version__ == wheel.version
    ours = {n: v for n, v in vars(module).items() if isinstance(v, type) and _own(v, n)}
    assert len(ours) > 20
    for name, thing in ours.items():
        _same(name, thing, classes[name])


def _own(thing: type, name: str) -> bool:
    return thing.__module__ == "stand_in_tensorrt" and not name.startswith("_")


def _same(name: str, thing: Any, real: dict[str, Any]) -> None:
    if "enum" in real:
        members = {m.name: int(m) for m in thing}
        assert members.items() <= real["enum"].items(), name
        return
    known = {*real["methods"], *real["properties"], *real["nested"]}
    mine = {n for n in vars(thing) if not n.startswith("_")}
    assert mine <= known, f"{name}: {sorted(mine - known)}"
    for inner in real["nested"]:
        if inner in mine:
            _same(f"{name}.{inner}", getattr(thing, inner), real["nested"][inner])


# --- the real classes --------------------------------------------------------------------------

IN_A_CHILD = """
import threading
from pathlib import Path
from cada_deploy import engines
from cada_deploy.errors import EnvironmentLacks
from foreign_models import save_colour_model, spread_colours
from stand_in_device import StandInDevice
import cada_deploy.engines.tensorrt as ours

class Bar:
    def advance(self, n=1, note=None): pass

import tensorrt as trt
log = ours.Log()
trt.ILogger.log  # the bindings' own
log.log(trt.ILogger.Severity.ERROR, "told")
log.log(trt.ILogger.Severity.INFO, "not told")
assert log.said == "told", log.said
stop = threading.Event()
monitor = ours.Monitor(Bar(), stop)
monitor.phase_start("a", None, 3)
assert monitor.step_complete("a", 0) is True
stop.set()
assert monitor.step_complete("a", 1) is False
ours.open_device = lambda name, layer=None: StandInDevice()
path = save_colour_model(Path({folder!r}) / "m.onnx", spread_colours(5))
try:
    engines.open_engine("trt", engines.load_model("trt", path, preset="imagenet-rgb"), "cuda:0")
except EnvironmentLacks as error:
    print(ours.version(), error)
"""


@wheels
def test_our_classes_are_made_of_the_real_ones_and_a_missing_driver_is_told(
    wheel: Wheel, tmp_path: Path
) -> None:
    prepared(wheel)
    done = subprocess.run(
        [sys.executable, "-c", IN_A_CHILD.format(folder=str(tmp_path))],
        capture_output=True, text=True,
        env={**environment(wheel, ROOT, TESTS), "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{wheel.version} TensorRT {wheel.version} cannot start")
