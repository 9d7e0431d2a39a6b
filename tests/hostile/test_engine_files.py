"""Engine files and manifests that lie, break off or come from elsewhere: each is refused with its
reason before the GPU is touched. On the stand-in; a plan is executable code, so none is loaded."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Ran, cada
from foreign_models import save_colour_model, spread_colours, write_images
from trt_on_cpu import REAL, needs_stand_in, tensorrt_here, untouchable

from cada_deploy import engines
from cada_deploy.engine_plans import (
    Build,
    PlanOptions,
    driver_version,
    header_version,
    manifest_path,
    parsed_version,
    read_plan,
)
from cada_deploy.errors import ArtefactMismatch, CadaError

pytestmark = needs_stand_in
SIZE = (48, 64)


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes, Path]:
    """A plan, its manifest, and the folder with its ONNX."""
    if REAL:
        pytest.skip("not run: made with the stand-in")
    folder = tmp_path_factory.mktemp("right")
    path = save_colour_model(folder / "m.onnx", spread_colours(5))
    build = Build(PlanOptions(SIZE, SIZE, SIZE), out=folder / "m.engine")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        with tensorrt_here():
            model = engines.load_model("trt", path, preset="imagenet-rgb", build=build)
            engines.open_engine("trt", model, "cuda:0")
    finally:
        os.environ.pop("XDG_CACHE_HOME")
        os.environ.update({} if before is None else {"XDG_CACHE_HOME": before})
    plan = folder / "m.engine"
    return plan.read_bytes(), manifest_path(plan).read_bytes(), folder


@pytest.fixture
def plan(right: tuple[bytes, bytes, Path], tmp_path: Path) -> Path:
    path = tmp_path / "m.engine"
    path.write_bytes(right[0])
    manifest_path(path).write_bytes(right[1])
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """predict with an engine where nothing may touch the GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_images(tmp_path / "in", 1, SIZE)

    def run(path: Path, *options: str | Path) -> Ran:
        with tensorrt_here(device=untouchable):
            ran = cada("predict", "--engine", "trt", "--model", path, "--images", tmp_path / "in",
                       "--out", tmp_path / "out", *options)  # fmt: skip
        assert not (tmp_path / "out").exists()
        return ran

    return run


def ultralytics(plan: bytes) -> bytes:
    told = json.dumps({"stride": 32, "names": {"0": "road"}, "task": "segment"}).encode()
    return len(told).to_bytes(4, "little") + told + plan


CONTENTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda b: b"", "it is empty"),
    "three bytes": (lambda b: b[:3], "is not a TensorRT plan"),
    "tag alone": (lambda b: b[:4], "is cut short: 4 bytes"),
    "cut in the header": (lambda b: b[:27], "is cut short: 27 bytes"),
    "cut after the header": (lambda b: b[:28], "is cut short: 28 of"),
    "cut at the end": (lambda b: b[:-1], "is cut short"),
    "a byte more": (lambda b: b + b"\0", "is not the plan of its manifest"),
    "a bit flipped": (lambda b: b[:-9] + bytes([b[-9] ^ 4]) + b[-8:], "is not the plan of its"),
    "another tag": (lambda b: b"ftrs" + b[4:], "it begins with 66 74 72 73"),
    "big endian": (lambda b: b"trtf" + b[4:], "it begins with 74 72 74 66"),
    "another serialisation": (lambda b: b[:4] + b"\x07" + b[5:], "serialisation version 7"),
    "ultralytics": (ultralytics, "Ultralytics wrote"),
    "json": (lambda b: b'{"a": 1}', "it is text"),
    "html": (lambda b: b"<!DOCTYPE html>", "it is text"),
    "onnx": (lambda b: b"\x08\x09\x3a\x00" + b[4:], "looks like an ONNX file"),
    "zeros": (lambda b: bytes(4096), "is not a TensorRT plan"),
    "noise": (lambda b: random.Random(2).randbytes(4096), "is not a TensorRT plan"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_that_is_not_the_plan_is_exit_4(
    name: str, plan: Path, run: Callable[..., Ran]
) -> None:
    change, said = CONTENTS[name]
    plan.write_bytes(change(plan.read_bytes()))
    ran = run(plan)
    assert ran.code == 4 and ran.said("error:", said), ran.err


def test_ultralytics_header_is_explained(plan: Path, run: Callable[..., Ran]) -> None:
    plan.write_bytes(ultralytics(plan.read_bytes()))
    ran = run(plan, "--preset", "imagenet-rgb")
    assert ran.code == 4
    assert ran.said("names, stride, task", "yolo export format=onnx", "cada-deploy export")


def test_what_only_looks_like_ultralytics_is_not_called_so() -> None:
    for content in (b"\x08\x00\x00\x00{broken}ftrt", b"\x02\x00\x00\x00[]ftrt",
                    b"\x02\x00\x00\x00{}abcd"):  # fmt: skip
        with pytest.raises(ArtefactMismatch) as caught:
            header_version(Path("x.engine"), content + bytes(40))
        assert "Ultralytics" not in str(caught.value)


def test_a_missing_manifest_is_exit_4_and_says_both_ways_out(
    plan: Path, run: Callable[..., Ran]
) -> None:
    manifest_path(plan).unlink()
    ran = run(plan)
    assert ran.code == 4 and ran.said("no m.engine.json beside it", "--spec FILE.toml", "export")


def test_a_missing_file_a_folder_and_a_pipe_are_exit_2(
    tmp_path: Path, run: Callable[..., Ran]
) -> None:
    assert run(tmp_path / "none.engine").code == 2
    (tmp_path / "folder.engine").mkdir()
    assert run(tmp_path / "folder.engine").said("not a regular file")
    os.mkfifo(tmp_path / "pipe.engine")
    assert run(tmp_path / "pipe.engine").code == 2


@pytest.mark.parametrize("version", ["10.3.0", "11.4.0.106"])
def test_another_version_is_exit_4_before_the_gpu_is_touched(
    version: str, plan: Path, tmp_path: Path
) -> None:
    write_images(tmp_path / "in", 1, SIZE)
    with tensorrt_here(version, device=untouchable):
        ran = cada("predict", "--engine", "trt", "--model", plan, "--images", tmp_path / "in",
                   "--out", tmp_path / "out")  # fmt: skip
    assert ran.code == 4
    assert ran.said("was built with TensorRT 10.16.1.11", f"here is {version}", "--rebuild")


def test_a_header_that_contradicts_its_manifest_is_caught_by_the_digest(
    plan: Path, run: Callable[..., Ran]
) -> None:
    content = bytearray(plan.read_bytes())
    content[24:28] = bytes((11, 4, 0, 106))
    plan.write_bytes(bytes(content))
    assert run(plan).said("is not the plan of its manifest")


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(manifest_path(path).read_text())
    given = change(data)
    manifest_path(path).write_text(json.dumps(data if given is None else given))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"x"', "{}", '{"schema": 2}', "\xff"])
def test_a_manifest_that_is_none(text: str, plan: Path, run: Callable[..., Ran]) -> None:
    manifest_path(plan).write_bytes(text.encode("latin-1"))
    ran = run(plan)
    assert ran.code == 4 and ran.said("m.engine.json"), ran.err


def test_every_field_is_needed_and_no_other_is_taken(plan: Path, run: Callable[..., Ran]) -> None:
    whole = json.loads(manifest_path(plan).read_text())
    for key in whole:
        manifest_path(plan).write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        assert run(plan).code == 4, key
    manifest_path(plan).write_text(json.dumps({**whole, "surprise": 1}))
    assert run(plan).code == 4


@pytest.mark.parametrize("value", [None, 3, -1, "x", [], {}, [1], {"a": 1}, True, 1e300])
def test_a_field_of_another_kind_never_ends_in_a_traceback(
    value: Any, plan: Path, run: Callable[..., Ran]
) -> None:
    """Some fields only tell: with those the plan is still right, and the GPU would be next."""
    whole = json.loads(manifest_path(plan).read_text())
    telling = {
        "frames": str, "cada_deploy": str, "model": str, "precision": str, "model_sha256": str,
        "build_seconds": (int, float), "flags": list,
        "batch": int,  # the plan itself has one too: that is compared once it is loaded
    }  # fmt: skip
    for key in whole:
        manifest_path(plan).write_text(json.dumps({**whole, key: value}))
        try:
            assert run(plan).code in (2, 4), key
        except AssertionError as error:
            assert "was opened" in str(error), (key, error)
            assert value == whole[key] or isinstance(value, telling.get(key, ())), key


def test_a_manifest_that_calls_itself_verified_is_not(plan: Path) -> None:
    whole = json.loads(manifest_path(plan).read_text())
    changed(plan, lambda d: d["gates"][1].update(passed=False))
    with pytest.raises(ArtefactMismatch, match="follows from the gates"):
        read_plan(plan)
    changed(plan, lambda d: {**whole, "gates": []})
    with pytest.raises(ArtefactMismatch, match="follows from the gates"):
        read_plan(plan)
    changed(plan, lambda d: {**whole, "gates": [], "verified": False})
    manifest = read_plan(plan).manifest
    assert manifest is not None and not manifest.verified


def test_a_manifest_of_another_profile_is_refused_once_the_plan_is_loaded(plan: Path) -> None:
    changed(plan, lambda d: d.update(batch=3))
    with tensorrt_here(), pytest.raises(ArtefactMismatch, match="batch 1, its manifest says"):
        engines.open_engine("trt", engines.load_model("trt", plan), "cuda:0")


def test_a_model_name_cannot_lead_out_of_the_folder(
    plan: Path, run: Callable[..., Ran], tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    save_colour_model(outside / "x.onnx", spread_colours(5))
    changed(plan, lambda d: d.update(model="../outside/x.onnx"))
    moved = tmp_path / "inside"
    moved.mkdir()
    for path in (plan, manifest_path(plan)):
        path.rename(moved / path.name)
    ran = run(moved / "m.engine", "--rebuild")
    assert ran.code == 2 and ran.said("holds none called"), ran.err


@pytest.mark.parametrize("seed", range(20))
def test_flipped_bytes_anywhere_are_refused(seed: int, plan: Path, run: Callable[..., Ran]) -> None:
    dice, data = random.Random(seed), bytearray(plan.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    plan.write_bytes(bytes(data))
    assert run(plan).code == 4


def test_an_onnx_with_the_wrong_suffix_and_a_plan_as_onnx(
    right: tuple[bytes, bytes, Path], tmp_path: Path, run: Callable[..., Ran]
) -> None:
    renamed = tmp_path / "model.engine"
    renamed.write_bytes((right[2] / "m.onnx").read_bytes())
    assert run(renamed).code == 4
    renamed = tmp_path / "plan.onnx"
    renamed.write_bytes(right[0])
    ran = run(renamed, "--preset", "imagenet-rgb")
    assert ran.code == 4 and ran.said("is not an ONNX")


def test_a_version_is_read_from_what_others_write() -> None:
    assert parsed_version("10.16.1.11") == (10, 16, 1, 11)
    assert parsed_version("10.0.0b6") == (10, 0, 0)
    assert parsed_version("") == () == parsed_version("unknown")


def test_the_drivers_version(tmp_path: Path) -> None:
    told = tmp_path / "version"
    told.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release\n")
    assert driver_version(told) == "580.95.05"
    told.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue\n")
    assert driver_version(told) == "535.54.03"
    assert driver_version(tmp_path / "none") == ""


def test_nothing_that_was_refused_was_a_bug(plan: Path) -> None:
    """The right plan is read, and only the GPU is missing."""
    with tensorrt_here(device=untouchable), pytest.raises(AssertionError, match="was opened"):
        engines.open_engine("trt", engines.load_model("trt", plan), "cuda:0")
    assert not issubclass(AssertionError, CadaError)
