"""Engine `trt` from ONNX to scores, on the stand-in for TensorRT: built once, gated, kept, rebuilt,
refused. CADA_REAL_TENSORRT=1 runs the same on the real library; nothing else proves it there."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import Ran, cada, deliverables, read
from foreign_models import save_colour_model, spread_colours, street_like, write_images
from jsonschema import Draft202012Validator
from onnx import helper
from planted_faults import BY_GATE
from stand_in_device import StandInDevice
from trt_on_cpu import REAL, VERSIONS, environment, needs_stand_in, tensorrt_here, untouchable

import cada_deploy
from cada_deploy import engine_cache, engine_plans, engines
from cada_deploy.engine_plans import Build, PlanOptions, manifest_path, read_manifest, read_plan
from cada_deploy.errors import (
    ArtefactMismatch,
    CheckFailed,
    EnvironmentLacks,
    RunFailed,
    UsageError,
)

COLOURS = spread_colours(5)
SIZE = (48, 64)
PRESET = ("--preset", "imagenet-rgb")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cada-deploy" / "engines"


@pytest.fixture
def trt() -> Iterator[Any]:
    with tensorrt_here() as module:
        yield module


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    return save_colour_model(tmp_path / "m.onnx", COLOURS)


def wishes(batch: int = 1, **more: Any) -> PlanOptions:
    return PlanOptions(SIZE, SIZE, SIZE, batch, **more)


def loaded(path: Path, options: PlanOptions | None = None, **more: Any) -> Any:
    build = Build(options or wishes(), **more)
    preset = "imagenet-rgb" if path.suffix == ".onnx" else None
    return engines.load_model("trt", path, preset=preset, build=build)


def opened(path: Path, options: PlanOptions | None = None, **more: Any) -> Any:
    return engines.open_engine("trt", loaded(path, options, **more), "cuda:0")


def rows(count: int, size: tuple[int, int] = SIZE, dtype: str = "float32") -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(count))
    return generator.normal(0, 1, (count, 3, *size)).astype(dtype)


def reference(path: Path, batch: np.ndarray) -> np.ndarray:
    model = engines.load_model("ort", path, preset="imagenet-rgb")
    found: np.ndarray = engines.open_engine("ort", model, "cpu").infer(batch).array
    return found


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    if REAL:
        return bool(np.abs(found - expected).max() <= 1e-3)
    return found.tobytes() == expected.tobytes()


# --- without TensorRT --------------------------------------------------------------------------


COMMANDS = {
    "pseudo-label": ("--engine", "trt", "--model", "m.onnx", "--images", "in", "--out", "out"),
    "predict": ("--engine", "trt", "--model", "m.engine", "--images", "in", "--out", "out"),
    "compare": ("m.onnx", "m.engine", "--images", "in", *PRESET),
    "export": ("m.onnx", "-o", "m2.engine"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_machine_without_tensorrt_is_exit_3_and_says_what_to_install(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_colour_model(tmp_path / "m.onnx", COLOURS)
    write_images(tmp_path / "in", 1)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.delitem(sys.modules, "cada_deploy.engines.tensorrt", raising=False)
    ran = cada(command, *COMMANDS[command])
    assert ran.code == 3, ran.err
    assert ran.said("--engine trt needs NVIDIA TensorRT", "pip install 'cada-deploy[trt]'")
    assert not (tmp_path / "out").exists()


def test_a_jetson_is_told_of_jetpacks_own(trt: Any) -> None:
    assert "python3-libnvinfer" in trt.install_line(jetson=True)
    assert "--system-site-packages" in trt.install_line(jetson=True)


def test_doctor_says_what_is_missing_of_each_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.delitem(sys.modules, "cada_deploy.engines.tensorrt", raising=False)
    told = cada("doctor").out
    assert "engine trt" in told and "pip install 'cada-deploy[trt]'" in told
    with tensorrt_here():
        lines = [line for line in cada("doctor").out.splitlines() if "engine trt" in line]
    assert len(lines) == 1 and lines[0].startswith("ok")


@needs_stand_in
def test_bindings_without_a_driver_are_exit_3(onnx_file: Path) -> None:
    with tensorrt_here(fault="driver"), pytest.raises(EnvironmentLacks, match="cannot start"):
        opened(onnx_file)


@needs_stand_in
def test_a_tensorrt_that_is_too_old_is_exit_3(onnx_file: Path) -> None:
    with tensorrt_here("10.2.0.19"), pytest.raises(EnvironmentLacks, match=r"needs 10\.3"):
        opened(onnx_file)


# --- built once --------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS[-1:] if REAL else VERSIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_scores_are_the_networks_in_every_version(
    version: str, dtype: str, tmp_path: Path
) -> None:
    path = save_colour_model(tmp_path / "m.onnx", COLOURS, dtype=dtype)
    batch = rows(5, dtype=dtype)
    with tensorrt_here(version):
        engine = opened(path, wishes(2))
        assert engine.classes == 5 and engine.device == "cuda:0"
        for _ in range(4):
            scores = engine.infer(batch)
            assert scores.array.dtype == np.dtype(dtype)
            assert close(scores.array, reference(path, batch))


def test_an_engine_is_built_once_and_kept_private(onnx_file: Path, cache: Path, trt: Any) -> None:
    said: list[str] = []
    first = opened(onnx_file, say=said.append)
    assert any("building a TensorRT engine" in text for text in said)
    (plan,) = cache.glob("*.engine")
    before = plan.stat().st_mtime_ns
    again: list[str] = []
    second = opened(onnx_file, say=again.append)
    assert again == [] and plan.stat().st_mtime_ns == before
    assert first.version == second.version and "+plan." in first.version
    assert "unverified" not in first.version
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    files = [p for p in cache.iterdir() if p.is_file()]
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o600}


def test_the_manifest_says_everything_and_fits_its_schema(
    onnx_file: Path, cache: Path, trt: Any
) -> None:
    opened(onnx_file, wishes(3))
    (path,) = cache.glob("*.engine.json")
    data = read(path)
    schema = Path(engine_plans.__file__).parent / "schemas" / "engine.schema.json"
    validator = Draft202012Validator(json.loads(schema.read_text()))
    assert [e.message for e in validator.iter_errors(data)] == []
    assert data["verified"] and data["batch"] == 3 and data["precision"] == "float32"
    assert data["machine"]["tensorrt"] == trt.version()
    assert data["profiles"] == [{k: list(SIZE) for k in ("minimum", "optimum", "maximum")}]
    assert all(isinstance(flag, str) for flag in data["flags"]) and "TF32" not in data["flags"]
    plan = read_plan(path.with_name(path.name.removesuffix(".json")))
    assert plan.manifest is not None and plan.manifest.to_json() == data
    for key in data:
        assert list(validator.iter_errors({k: v for k, v in data.items() if k != key})), key
    assert list(validator.iter_errors({**data, "surprise": 1}))


@needs_stand_in
def test_the_key_covers_everything_that_decides_a_plan(
    onnx_file: Path, cache: Path, tmp_path: Path
) -> None:
    other = save_colour_model(tmp_path / "other.onnx", spread_colours(5, seed=1))
    half = save_colour_model(tmp_path / "half.onnx", COLOURS, dtype="float16")
    gpu = StandInDevice()
    ways: list[tuple[str, StandInDevice, Path, PlanOptions]] = [
        ("10.16.1.11", gpu, onnx_file, wishes()),
        ("10.3.0", gpu, onnx_file, wishes()),
        ("10.16.1.11", replace(gpu, name="Another GPU"), onnx_file, wishes()),
        ("10.16.1.11", replace(gpu, compute_capability=(9, 0)), onnx_file, wishes()),
        ("10.16.1.11", replace(gpu, driver_version="12.6"), onnx_file, wishes()),
        ("10.16.1.11", gpu, other, wishes()),
        ("10.16.1.11", gpu, half, wishes()),
        ("10.16.1.11", gpu, onnx_file, wishes(2)),
        ("10.16.1.11", gpu, onnx_file, PlanOptions(SIZE, SIZE, (96, 64))),
        ("10.16.1.11", gpu, onnx_file, wishes(workspace_mib=64)),
        ("10.16.1.11", gpu, onnx_file, wishes(hardware="ampere-plus")),
        ("10.16.1.11", gpu, onnx_file, wishes(version_compatible=True)),
    ]
    for count, (version, device, path, options) in enumerate(ways, 1):
        with tensorrt_here(version, device=device):
            opened(path, options)
        assert len(list(cache.glob("*.engine"))) == count


@pytest.mark.parametrize("harm", ["cut", "changed", "no manifest", "manifest alone", "not json"])
def test_a_kept_engine_that_is_not_whole_is_built_anew(
    harm: str, onnx_file: Path, cache: Path, trt: Any
) -> None:
    opened(onnx_file)
    (plan,) = cache.glob("*.engine")
    content = plan.read_bytes()
    if harm == "cut":
        plan.write_bytes(content[:-5])
    elif harm == "changed":
        plan.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "no manifest":
        manifest_path(plan).unlink()
    elif harm == "manifest alone":
        plan.unlink()
    else:
        manifest_path(plan).write_text("{")
    said: list[str] = []
    opened(onnx_file, say=said.append)
    assert any("building a TensorRT engine" in text for text in said)
    assert read_plan(plan).manifest is not None


def test_a_cache_that_others_can_write_is_refused(onnx_file: Path, cache: Path, trt: Any) -> None:
    opened(onnx_file)
    cache.chmod(0o777)
    with pytest.raises(ArtefactMismatch, match="can be written by others"):
        opened(onnx_file)


def test_a_cache_of_another_user_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_cache.folder()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ArtefactMismatch, match="belongs to user"):
        engine_cache.folder()


def test_rebuild_builds_the_kept_engine_anew(onnx_file: Path, cache: Path, trt: Any) -> None:
    opened(onnx_file)
    (plan,) = cache.glob("*.engine")
    before = plan.stat().st_mtime_ns
    opened(onnx_file, rebuild=True)
    assert plan.stat().st_mtime_ns > before and len(list(cache.glob("*.engine"))) == 1


# --- what is asked of the builder --------------------------------------------------------------


def flags_of(path: Path) -> tuple[str, ...]:
    manifest = read_manifest(path)
    assert manifest is not None
    return manifest.flags


@needs_stand_in
def test_options_reach_the_builder_by_name(onnx_file: Path, tmp_path: Path) -> None:
    half = save_colour_model(tmp_path / "half.onnx", COLOURS, dtype="float16")
    for version in VERSIONS:
        out = tmp_path / f"{version}.engine"
        with tensorrt_here(version):
            opened(half, wishes(version_compatible=True, dla=1, workspace_mib=8), out=out)
        strict = set() if version == "10.3.0" else {"STRICT_NANS"}
        assert set(flags_of(out)) == strict | {"VERSION_COMPATIBLE", "GPU_FALLBACK"}
        built = json.loads(out.read_bytes()[32:].partition(b"}")[0] + b"}")
        assert built["detailed"] and "TF32" not in built["flags"]
        assert set(built["flags"]) == set(flags_of(out))


@needs_stand_in
@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"dla": 2}, EnvironmentLacks, "finds 2 DLA cores"),
        ({"dla": 0}, UsageError, "this graph is float32"),
        ({"hardware": "same-capability"}, EnvironmentLacks, "10.13 or newer"),
    ],
)
def test_what_this_tensorrt_or_gpu_cannot_do(
    options: dict[str, Any], kind: type[Exception], said: str, onnx_file: Path
) -> None:
    with tensorrt_here("10.3.0"), pytest.raises(kind, match=said):
        opened(onnx_file, wishes(**options))


def test_hardware_compatibility_is_in_the_manifest(
    onnx_file: Path, tmp_path: Path, trt: Any
) -> None:
    for wish, level in engine_plans.HARDWARE.items():
        out = tmp_path / f"{wish}.engine"
        opened(onnx_file, wishes(hardware=wish), out=out)
        manifest = read_manifest(out)
        assert manifest is not None and manifest.hardware_compatibility == level


def test_timing_caches_are_kept_reused_and_replaced_when_damaged(
    onnx_file: Path, cache: Path, tmp_path: Path, trt: Any
) -> None:
    opened(onnx_file)
    assert len(list(cache.glob("timing-*.cache"))) == 1
    mine = tmp_path / "mine" / "timings"
    opened(onnx_file, rebuild=True, timing_cache=mine)
    content, said = mine.read_bytes(), []
    opened(onnx_file, rebuild=True, timing_cache=mine, say=said.append)
    assert content and not any("timing cache" in text for text in said)
    mine.write_bytes(b"not a timing cache")
    opened(onnx_file, rebuild=True, timing_cache=mine, say=said.append)
    assert any("is not a timing cache" in text for text in said)
    assert mine.read_bytes() == content


def test_a_model_of_many_sizes_takes_them_and_names_them_otherwise(
    onnx_file: Path, trt: Any
) -> None:
    engine = opened(onnx_file, PlanOptions((32, 40), (48, 64), (64, 80)))
    for size in ((32, 40), (48, 64), (64, 80), (50, 72)):
        assert close(engine.infer(rows(2, size)).array, reference(onnx_file, rows(2, size)))
    with pytest.raises(ArtefactMismatch, match=r"96x64 \(HxW\).*32x40 to 64x80, batch 1"):
        engine.infer(rows(1, (96, 64)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (PlanOptions((48, 64), (32, 64), (96, 96)), "must not shrink"),
        (PlanOptions((96, 64), None, (48, 64)), "must not shrink"),
    ],
)
def test_sizes_that_make_no_sense(
    options: PlanOptions, said: str, onnx_file: Path, trt: Any
) -> None:
    with pytest.raises(UsageError, match=said):
        opened(onnx_file, options)


def test_a_model_of_fixed_size_and_batch_has_one_profile(tmp_path: Path, trt: Any) -> None:
    path = save_colour_model(tmp_path / "fixed.onnx", COLOURS, size=SIZE, batch=2)
    out = tmp_path / "fixed.engine"
    opened(path, PlanOptions(), out=out)
    manifest = read_manifest(out)
    assert manifest is not None and manifest.profile.text == "48x64, batch 2"
    assert opened(out).infer(rows(3)).array.shape == (3, 5, 6, 8)
    with pytest.raises(UsageError, match="takes 48x64"):
        opened(path, PlanOptions(None, (32, 32), None))
    with pytest.raises(UsageError, match="batch is fixed at 2"):
        opened(path, PlanOptions(batch=3))


def test_windows_and_scales_are_in_the_profile(onnx_file: Path, trt: Any) -> None:
    spec = loaded(onnx_file).spec
    scaled = replace(spec, inference=replace(spec.inference, scales=(0.5, 1.0, 1.5)))
    profile = engine_plans.profile_for(scaled, None, wishes())
    assert (profile.minimum, profile.optimum, profile.maximum) == ((24, 32), SIZE, (72, 96))
    slid = replace(
        spec, inference=replace(spec.inference, mode="slide", window=(32, 32), stride=(16, 16))
    )
    for options in (PlanOptions(), wishes()):
        profile = engine_plans.profile_for(slid, None, options)
        assert profile.minimum == profile.maximum == (32, 32)


# --- a network or a build that does not work ---------------------------------------------------


@needs_stand_in
def test_an_unsupported_operator_is_named_with_its_node(tmp_path: Path, trt: Any) -> None:
    path = save_colour_model(tmp_path / "m.onnx", COLOURS)
    model = onnx.load(path)
    model.graph.node.append(
        helper.make_node("NonMaxSuppression", ["logits", "logits"], ["kept"], name="boxes")
    )
    onnx.save(model, path)
    said = r"operator NonMaxSuppression \(node 2 'boxes'\).*UNSUPPORTED_NODE.*--engine ort"
    with pytest.raises(ArtefactMismatch, match=said):
        opened(path)


@needs_stand_in
def test_no_memory_for_the_build_is_exit_1_and_says_what_to_lower(onnx_file: Path) -> None:
    with tensorrt_here(fault="memory"), pytest.raises(RunFailed, match="lower --workspace"):
        opened(onnx_file)


@needs_stand_in
@pytest.mark.parametrize("fault", sorted(BY_GATE))
def test_an_engine_that_is_wrong_is_not_kept(fault: str, tmp_path: Path, cache: Path) -> None:
    path = save_colour_model(tmp_path / "m.onnx", COLOURS, dtype="float16")
    out = tmp_path / "m.engine"
    with tensorrt_here(fault=fault):
        for place in (None, out):
            with pytest.raises(CheckFailed, match=f"{BY_GATE[fault]}: ") as caught:
                opened(path, wishes(3), out=place)
            assert "is not kept" in str(caught.value)
    assert not list(cache.glob("*.engine*")) and not list(tmp_path.glob("m.engine*"))


@needs_stand_in
def test_a_wrong_engine_does_not_replace_a_right_one(onnx_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.engine"
    with tensorrt_here():
        opened(onnx_file, out=out)
    before = out.read_bytes(), manifest_path(out).read_bytes()
    with tensorrt_here(fault="shift"), pytest.raises(CheckFailed):
        opened(onnx_file, out=out)
    assert (out.read_bytes(), manifest_path(out).read_bytes()) == before


@needs_stand_in
def test_a_pass_that_fails_is_told(onnx_file: Path) -> None:
    with tensorrt_here(fault="execute"), pytest.raises(CheckFailed, match="could not run"):
        opened(onnx_file)


# --- as a file ---------------------------------------------------------------------------------


def test_a_plan_says_how_it_is_fed(onnx_file: Path, tmp_path: Path, trt: Any) -> None:
    out = tmp_path / "m.engine"
    made = opened(onnx_file, wishes(2), out=out)
    assert out.read_bytes()[:4] == b"ftrt", "raw, so that trtexec and Triton load it"
    model = loaded(out)
    assert model.sha256 == loaded(onnx_file).sha256
    assert model.spec.input.size == SIZE, "a plan of one size resizes every frame to it"
    engine = engines.open_engine("trt", model, "cuda:0")
    assert engine.version == made.version
    assert close(engine.infer(rows(3)).array, reference(onnx_file, rows(3)))


def test_a_plan_without_manifest_needs_a_spec_and_is_unverified(
    onnx_file: Path, tmp_path: Path, trt: Any
) -> None:
    out = tmp_path / "m.engine"
    opened(onnx_file, out=out)
    manifest_path(out).unlink()
    with pytest.raises(ArtefactMismatch, match=r"no m\.engine\.json beside it.*--spec"):
        engines.load_model("trt", out)
    model = engines.load_model("trt", out, preset="imagenet-rgb")
    engine = engines.open_engine("trt", model, "cuda:0")
    assert engine.version.endswith(".unverified") and engine.classes == 5
    assert close(engine.infer(rows(2)).array, reference(onnx_file, rows(2)))


@needs_stand_in
def test_wrong_versions_are_refused_before_the_gpu_is_touched(
    onnx_file: Path, tmp_path: Path
) -> None:
    plain, lasting = tmp_path / "plain.engine", tmp_path / "lasting.engine"
    with tensorrt_here("10.16.1.11"):
        opened(onnx_file, out=plain)
        opened(onnx_file, wishes(version_compatible=True), out=lasting)
    for version in ("10.3.0", "11.4.0.106"):
        with tensorrt_here(version, device=untouchable), pytest.raises(ArtefactMismatch) as caught:
            opened(plain)
        told = str(caught.value)
        assert f"built with TensorRT 10.16.1.11, here is {version}" in told
        assert "--rebuild" in told
    with tensorrt_here("11.4.0.106"):
        assert close(opened(lasting).infer(rows(1)).array, reference(onnx_file, rows(1)))
    earlier = tensorrt_here("10.3.0", device=untouchable)
    with earlier, pytest.raises(ArtefactMismatch, match="runs on later versions only"):
        opened(lasting)


@needs_stand_in
def test_a_version_of_three_numbers_is_compared_as_far_as_it_goes(
    onnx_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.engine"
    with tensorrt_here("10.3.0"):
        opened(onnx_file, out=out)
        opened(out)


@needs_stand_in
@pytest.mark.parametrize(
    ("hardware", "gpu", "fits"),
    [
        (None, StandInDevice(), True),
        (None, StandInDevice(name="Another"), False),
        (None, StandInDevice(compute_capability=(8, 6)), False),
        ("same-capability", StandInDevice(name="Another"), True),
        ("same-capability", StandInDevice(compute_capability=(8, 6)), False),
        ("ampere-plus", StandInDevice(name="Another", compute_capability=(12, 0)), True),
        ("ampere-plus", StandInDevice(compute_capability=(7, 5)), False),
    ],
)
def test_another_gpu_is_refused_unless_the_plan_was_built_for_it(
    hardware: str | None, gpu: StandInDevice, fits: bool, onnx_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.engine"
    with tensorrt_here():
        opened(onnx_file, wishes(hardware=hardware), out=out)
    with tensorrt_here(device=gpu):
        if fits:
            opened(out)
            return
        with pytest.raises(ArtefactMismatch, match=r"was built on Stand-in GPU.*here is"):
            opened(out)


def test_rebuild_of_a_plan_starts_from_the_onnx_beside_it(
    onnx_file: Path, tmp_path: Path, trt: Any
) -> None:
    out = tmp_path / "m.engine"
    options = PlanOptions((32, 40), SIZE, (64, 80), 2)
    opened(onnx_file, options, out=out)
    out.write_bytes(b"ftrt")  # harmed: only a rebuild helps
    with pytest.raises(ArtefactMismatch):
        loaded(out)
    build = Build(rebuild=True)
    model = engines.load_model("trt", out, preset="imagenet-rgb", build=build)
    engines.open_engine("trt", model, "cuda:0")
    manifest = read_plan(out).manifest
    assert manifest is not None and manifest.options == options and manifest.verified


def test_rebuild_refuses_another_model_and_a_missing_one(
    onnx_file: Path, tmp_path: Path, trt: Any
) -> None:
    out = tmp_path / "m.engine"
    opened(onnx_file, out=out)
    save_colour_model(onnx_file, spread_colours(5, seed=3))
    with pytest.raises(ArtefactMismatch, match="another model"):
        loaded(out, rebuild=True)
    onnx_file.unlink()
    with pytest.raises(UsageError, match="holds none called"):
        loaded(out, rebuild=True)


def test_other_engines_refuse_a_rebuild(onnx_file: Path) -> None:
    with pytest.raises(UsageError, match="builds nothing"):
        engines.load_model("ort", onnx_file, preset="imagenet-rgb", build=Build(rebuild=True))


# --- on the command line -----------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "in", 4, SIZE)
    return tmp_path / "in"


def test_export_makes_an_engine_and_says_so(onnx_file: Path, tmp_path: Path, trt: Any) -> None:
    out = tmp_path / "m.engine"
    ran = cada("export", onnx_file, "-o", out, *PRESET, "--size", "48x64", "--batch-size", 2)
    assert ran.code == 0, ran.err
    assert ran.said("building a TensorRT engine", "passed its gates", "drawn street scenes")
    assert cada("export", onnx_file, "-o", out, *PRESET).said("exists; give another -o")
    again = cada(
        "export", onnx_file, "-o", out, *PRESET, "--overwrite", "--format", "trt",
        "--min-size", "32x40", "--opt-size", "48x64", "--max-size", "64x80",
        "--workspace", 64, "--version-compatible", "--hardware-compatible", "ampere-plus",
        "--timing-cache", tmp_path / "timings",
    )  # fmt: skip
    assert again.code == 0, again.err
    manifest = read_manifest(out)
    assert manifest is not None and manifest.profile.text == "32x40 to 64x80, batch 1"
    assert manifest.options.workspace_mib == 64 and (tmp_path / "timings").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-o", "m.onnx2", "--format", "trt"), "expected a name that ends in .engine or .plan"),
        (("-o", "m.engine", "--size", "48x64", "--min-size", "8x8"), "--size fixes the input"),
        (("-o", "m2.onnx", "--workspace", "8"), "marked trt"),
        (("-o", "m2.onnx", "--max-size", "8x8"), "marked trt"),
        (("-o", "m.engine", "--head", "labels"), "gives scores"),
        (("-o", "m.engine", "--device", "cpu"), "--device cuda:0"),
    ],
)
def test_export_options_that_do_not_go_together(
    arguments: tuple[str, ...], said: str, onnx_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, trt: Any,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    ran = cada("export", onnx_file, *arguments, *PRESET)
    assert ran.code == 2 and ran.said(said), ran.err


def test_a_checkpoint_becomes_an_engine_by_way_of_onnx(
    tmp_path: Path, trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export of checkpoints has its own tests; here it is only the first link."""
    from cada_deploy.commands import export

    asked: dict[str, Any] = {}

    def export_checkpoint(checkpoint: Path, *, out: Path, size: Any, **more: Any) -> Any:
        asked.update(more, size=size, out=out)
        spec = loaded(save_colour_model(tmp_path / "bare.onnx", COLOURS)).spec
        model = onnx.load(tmp_path / "bare.onnx")
        helper.set_model_props(model, {"cada_deploy.model_spec": spec.dumps()})
        onnx.save(model, out)
        return type("Made", (), {"path": out, "bytes": 1, "nodes": 1, "seconds": 0})

    monkeypatch.setattr(export, "_exporter", lambda: export_checkpoint)
    (tmp_path / "net.pth").write_bytes(b"")
    ran = cada("export", tmp_path / "net.pth", "-o", tmp_path / "net.engine", "--size", "48x64",
               "--preset", "bdl", "--classes", "camvid-11")  # fmt: skip
    assert ran.code == 0, ran.err
    assert asked["out"] == tmp_path / "net.onnx" and asked["preset"] == "bdl"
    assert read_plan(tmp_path / "net.engine").manifest is not None


def test_a_failed_gate_is_exit_5(onnx_file: Path, tmp_path: Path) -> None:
    if REAL:
        pytest.skip("not run: the stand-in alone can be given faults")
    with tensorrt_here(fault="shift"):
        ran = cada("export", onnx_file, "-o", tmp_path / "m.engine", *PRESET, "--size", "48x64")
    assert ran.code == 5 and ran.said("is wrong, so it is not kept", "parity")


def test_gates_look_at_the_frames_that_are_given(
    onnx_file: Path, images: Path, tmp_path: Path, trt: Any
) -> None:
    out = tmp_path / "m.engine"
    ran = cada("export", onnx_file, "-o", out, *PRESET, "--size", "48x64", "--images", images)
    assert ran.code == 0, ran.err
    manifest = read_manifest(out)
    assert manifest is not None and manifest.frames == f"4 of 4 images of {images}"


def labelled(images: Path, out: Path, *options: str | Path | int) -> Ran:
    return cada("pseudo-label", *PRESET, "--images", images, "--out", out, *options)


def test_pseudo_labels_are_those_of_onnx_runtime_with_either_kind_of_file(
    onnx_file: Path, images: Path, tmp_path: Path, cache: Path, trt: Any
) -> None:
    """The stand-in computes with ONNX Runtime, so the bytes must be the same."""
    plan = tmp_path / "m.engine"
    assert cada("export", onnx_file, "-o", plan, *PRESET, "--size", "48x64").code == 0
    ways: dict[str, tuple[str | Path | int, ...]] = {
        "ort": ("--model", onnx_file),
        "onnx": ("--engine", "trt", "--model", onnx_file, "--size", "48x64"),
        "batch": ("--engine", "trt", "--model", onnx_file, "--size", "48x64", "--batch-size", 3),
        "plan": ("--engine", "trt", "--model", plan),
    }
    for name, options in ways.items():
        ran = labelled(images, tmp_path / name, *options)
        assert ran.code == 0, ran.err
    if not REAL:
        found = {name: deliverables(tmp_path / name) for name in ways}
        evidence = {name: json.loads(files.pop("statistics.json")) for name, files in found.items()}
        run_ids = {statistics.pop("run_id") for statistics in evidence.values()}
        assert len(found["ort"]) > 4 and len(run_ids) == 4, "another engine or size, another run"
        for name in ways:
            assert found[name] == found["ort"], name
            assert evidence[name] == evidence["ort"], name
    identity = {name: read(tmp_path / name / "run.json")["identity"] for name in ways}
    assert identity["onnx"]["engine"]["device_kind"] == "cuda"
    assert identity["plan"]["model"] == identity["ort"]["model"], "the ONNX's digest in both"
    assert "+plan." in identity["onnx"]["engine"]["version"]
    again = labelled(images, tmp_path / "onnx", *ways["onnx"])
    assert again.code == 0 and again.said("resuming") and not again.said("building")


def test_another_engine_is_another_run(
    onnx_file: Path, images: Path, tmp_path: Path, trt: Any
) -> None:
    options = ("--model", onnx_file, "--size", "48x64")
    assert labelled(images, tmp_path / "out", *options).code == 0
    ran = labelled(images, tmp_path / "out", "--engine", "trt", *options)
    assert ran.code == 4 and ran.said("the engine, its version or its kind of device")


def test_images_that_a_plan_does_not_take_are_told_with_their_sizes(
    onnx_file: Path, tmp_path: Path, trt: Any
) -> None:
    plan = tmp_path / "m.engine"
    ran = cada("export", onnx_file, "-o", plan, *PRESET, "--min-size", "16x16",
               "--opt-size", "24x32", "--max-size", "32x40")  # fmt: skip
    assert ran.code == 0, ran.err
    write_images(tmp_path / "big", 1, (96, 128))
    ran = cada("predict", "--engine", "trt", "--model", plan, "--images", tmp_path / "big",
               "--out", tmp_path / "out")  # fmt: skip
    assert ran.code == 4 and ran.said("at 96x128 (HxW)", "16x16 to 32x40, batch 1", "--size")
    ran = cada("predict", "--engine", "trt", "--model", plan, "--images", tmp_path / "big",
               "--out", tmp_path / "fits", "--size", "32x40")  # fmt: skip
    assert ran.code == 0, ran.err


def test_compare_holds_a_plan_against_its_onnx(
    onnx_file: Path, images: Path, tmp_path: Path, trt: Any
) -> None:
    plan = tmp_path / "m.engine"
    assert cada("export", onnx_file, "-o", plan, *PRESET, "--size", "48x64").code == 0
    gates = ("--images", images, *PRESET, "--max-margin", "0.01", "--quiet")
    for b in ((plan,), (onnx_file, "--engine", "trt", "--size", "48x64")):
        ran = cada("compare", onnx_file, *b, *gates)
        assert ran.code == 0, ran.err
        assert f"B {b[0]} (trt {trt.version()}+plan." in ran.out


def test_the_python_api_builds_and_keeps_too(onnx_file: Path, cache: Path, trt: Any) -> None:
    load = cada_deploy.load
    model = load(onnx_file, preset="imagenet-rgb", engine="trt", size=SIZE)
    frame = street_like(*SIZE, seed=4)
    found = model.predict(frame)
    expected = load(onnx_file, preset="imagenet-rgb", size=SIZE).predict(frame)
    assert len(list(cache.glob("*.engine"))) == 1
    if not REAL:
        assert found.labels.tobytes() == expected.labels.tobytes()


# --- two at once, and stopped ------------------------------------------------------------------


def started(*arguments: str | Path, **more: str) -> subprocess.Popen[str]:
    code = "import trt_on_cpu; trt_on_cpu.main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment(**more),
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> Ran:
    out, err = process.communicate(timeout=60)
    return Ran(process.returncode, out, err)


@needs_stand_in
def test_two_builds_at_once_are_one_build_and_one_that_waits(
    onnx_file: Path, cache: Path, images: Path, tmp_path: Path
) -> None:
    model = ("--engine", "trt", "--model", onnx_file, *PRESET, "--size", "48x64")
    runs = [
        started("predict", *model, "--images", images, "--out", tmp_path / f"out-{k}",
                STAND_IN_TRT_FAULT="slow")
        for k in range(2)
    ]  # fmt: skip
    told = [ended(process) for process in runs]
    assert [t.code for t in told] == [0, 0], told
    both = told[0].err + told[1].err
    assert both.count("building a TensorRT engine") == 1
    assert both.count("waiting for it") == 1
    assert len(list(cache.glob("*.engine"))) == 1
    labels = [sorted((tmp_path / f"out-{k}" / "labels").glob("*.png")) for k in range(2)]
    assert [p.read_bytes() for p in labels[0]] == [p.read_bytes() for p in labels[1]]


@needs_stand_in
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_leaves_no_engine_and_can_be_repeated(
    how: signal.Signals, onnx_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.engine"
    arguments = ("export", onnx_file, "-o", out, *PRESET, "--size", "48x64")
    process = started(*arguments, STAND_IN_TRT_FAULT="slow")
    assert process.stderr is not None
    while "building a TensorRT engine" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.7)
    process.send_signal(how)
    ran = ended(process)
    assert ran.code == (-9 if how == signal.SIGKILL else 130), ran
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("m.")) == ["m.onnx"]
    with tensorrt_here():
        assert cada(*arguments).code == 0  # the lock died with its holder
