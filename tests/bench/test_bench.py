"""`cada-deploy bench` for real, on the CPU: both measurements, its JSON, its text, its refusals."""

from __future__ import annotations

import copy
import json
import math
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import Ran, cada, read
from foreign_models import fitted_colours, save_colour_model, street_like
from jsonschema import Draft202012Validator
from onnx import TensorProto, helper

import cada_deploy.schemas
from cada_deploy.bench.frames import DRAWN
from cada_deploy.bench.measuring import FrameTimes
from cada_deploy.bench.session import BenchOptions, bench, besides_network
from cada_deploy.bench.words import text, warnings
from cada_deploy.demo import DEMO_MODEL
from cada_deploy.errors import UsageError
from cada_deploy.labelling import ModelChoice
from cada_deploy.model_files import lowest_precision

SHORT = ("--duration", 0.1, "--warm-up", 0.2)


def schema_errors(value: Any) -> list[str]:
    schema = json.loads((resources.files(cada_deploy.schemas) / "bench.schema.json").read_text())
    return [f"{list(e.absolute_path)}: {e.message}" for e in
            Draft202012Validator(schema).iter_errors(value)]  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, Path]:
    """The demo model on small drawn scenes; enough runs for every percentile but the last."""
    folder = tmp_path_factory.mktemp("bench")
    ran = cada(
        "bench", DEMO_MODEL, "--size", "64x128", "--iterations", 120, *SHORT, "--png",
        "--json", folder / "bench.json", "--export-times", folder / "times.json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return ran, folder


@pytest.fixture(scope="module")
def result(demo: tuple[Ran, Path]) -> dict[str, Any]:
    data: dict[str, Any] = read(demo[1] / "bench.json")
    return data


def test_the_result_fits_its_schema(result: dict[str, Any]) -> None:
    assert schema_errors(result) == []
    for key in result:
        assert schema_errors({k: v for k, v in result.items() if k != key}) != [], key
    assert schema_errors({**result, "surprise": 1}) != []


def test_it_says_what_was_measured(result: dict[str, Any]) -> None:
    assert result["engine"] == {**result["engine"], "name": "ort", "device": "cpu"}
    assert result["model"]["sha256"] and result["model"]["precision"] == "float32"
    assert result["model"]["network_input"] == [64, 128]
    assert result["frames"]["source"] == "drawn" and result["frames"]["used"] == DRAWN
    assert "preprocessed batch" in result["engine_only"]["boundary"]
    for stage in ("decode", "preprocess", "network", "PNG"):
        assert stage in result["end_to_end"]["boundary"]
    assert result["machine"]["versions"]["onnxruntime"] == result["engine"]["version"]


def test_every_run_counts(result: dict[str, Any], demo: tuple[Ran, Path]) -> None:
    part = result["engine_only"]
    times = read(demo[1] / "times.json")
    assert len(times) == part["runs"] == part["frames"] >= 120
    compute = sorted(row["computeMs"] for row in times)
    assert part["compute"]["max_ms"] == compute[-1] and part["compute"]["min_ms"] == compute[0]
    assert part["compute"]["percentiles_ms"]["99"] == compute[math.ceil(0.99 * len(compute)) - 1]
    assert (part["compute"]["percentiles_ms"]["99.9"] is None) == (len(times) < 1000)
    assert part["runs_per_s"] == pytest.approx(len(times) / part["wall_s"])


def test_the_times_are_what_trtexec_would_write(demo: tuple[Ran, Path]) -> None:
    times = read(demo[1] / "times.json")
    assert times[0]["startEnqMs"] == 0.0
    for row, after in pairwise(times):
        assert list(row) == [
            "startEnqMs", "endEnqMs", "startH2dMs", "endH2dMs", "startComputeMs", "endComputeMs",
            "startD2hMs", "endD2hMs", "h2dMs", "computeMs", "d2hMs", "latencyMs",
        ]  # fmt: skip
        assert row["endComputeMs"] - row["startComputeMs"] == pytest.approx(row["computeMs"])
        assert row["h2dMs"] == row["d2hMs"] == 0.0 and row["latencyMs"] == row["computeMs"]
        assert row["endComputeMs"] <= after["startEnqMs"]


def test_the_stages_are_the_whole(result: dict[str, Any]) -> None:
    part = result["end_to_end"]
    assert list(part["stages"]) == [
        "decode", "preprocess", "infer", "encode scores", "select", "encode png", "other",
    ]  # fmt: skip
    means = math.fsum(stage["mean_ms"] for stage in part["stages"].values())
    assert means == pytest.approx(part["latency"]["mean_ms"])
    assert part["stages"]["other"]["min_ms"] >= 0
    assert part["stages"]["infer"]["median_ms"] > 0


def test_the_text_reads_like_trtexecs(demo: tuple[Ran, Path], result: dict[str, Any]) -> None:
    out = demo[0].out
    for line in ("Throughput: ", "Latency: min = ", "Compute Time: min = ",
                 "Total Host Walltime: ", "Boundary: ", "=== End to end ==="):  # fmt: skip
        assert line in out, line
    assert "percentile(99%) = " in out
    if result["engine_only"]["runs"] < 1000:
        assert "percentile(99.9%) needs 1000 runs" in out
    assert "--images was not given" in out
    assert text(result) + "\n" == out  # what was kept can be shown again


def test_progress_goes_to_standard_error(demo: tuple[Ran, Path]) -> None:
    assert demo[0].said("engine only, warm-up", "end to end:")
    quiet = cada("bench", DEMO_MODEL, "--size", "32x32", *SHORT, "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


# --- frames, batches, windows ------------------------------------------------------------------


def test_images_of_a_folder(colour_model: Path, frames: Path, tmp_path: Path) -> None:
    ran = cada(
        "bench", colour_model, "--preset", "imagenet-rgb", "--images", frames, "--batch-size", 3,
        "--iterations", 4, *SHORT, "--json", tmp_path / "b.json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    data = read(tmp_path / "b.json")
    assert schema_errors(data) == []
    assert data["frames"] == {**data["frames"], "source": "files", "used": 7, "found": 7}
    assert data["frames"]["sizes"] == [[48, 64]]
    for part in ("engine_only", "end_to_end"):
        assert data[part]["frames"] == 3 * data[part]["runs"] >= 12
    assert "input 3x48x64" in ran.out


def test_images_that_cannot_be_decoded_are_named_and_cost_exit_6(
    colour_model: Path, frames: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    (folder / "good.png").write_bytes((frames / "frame_000.png").read_bytes())
    (folder / "bad.png").write_bytes(b"no image")
    ran = cada(
        "bench", colour_model, "--preset", "imagenet-rgb", "--images", folder, *SHORT,
        "--json", tmp_path / "b.json",
    )  # fmt: skip
    assert ran.code == 6, ran.err
    (rejected,) = read(tmp_path / "b.json")["frames"]["rejected"]
    assert rejected["name"] == "bad.png" and rejected["reason"]
    (folder / "good.png").unlink()
    ran = cada("bench", colour_model, "--preset", "imagenet-rgb", "--images", folder, *SHORT)
    assert ran.code == 2 and ran.said("none of 1 images can be decoded")


def test_a_model_that_slides_its_window_is_measured_at_the_window(
    tmp_path: Path, colour_model: Path
) -> None:
    spec = tmp_path / "slide.toml"
    names = ", ".join(f'"c{k}"' for k in range(6))
    rows = ", ".join("[1, 2, 3]" for _ in range(6))
    spec.write_text(
        f'preset = "imagenet-rgb"\n[classes]\nname = "six"\nnames = [{names}]\n'
        f"label_ids = [0, 1, 2, 3, 4, 5]\npalette = [{rows}]\n"
        '[inference]\nmode = "slide"\nwindow = [32, 32]\nstride = [16, 16]\n'
    )
    ran = cada("bench", colour_model, "--spec", spec, "--size", "48x64", *SHORT,
               "--json", tmp_path / "b.json")  # fmt: skip
    assert ran.code == 0, ran.err
    data = read(tmp_path / "b.json")
    assert data["model"]["network_input"] == [32, 32]
    infer = data["end_to_end"]["stages"]["infer"]["median_ms"]
    assert infer > data["engine_only"]["compute"]["median_ms"]  # six windows and not one


# --- objectives, baselines, mistakes -----------------------------------------------------------


def test_an_objective_that_is_missed_is_exit_5(colour_model: Path, tmp_path: Path) -> None:
    common = ("bench", colour_model, "--preset", "imagenet-rgb", "--size", "32x32", *SHORT)
    ran = cada(*common, "--max-p99-ms", 1e-6, "--json", tmp_path / "b.json")
    assert ran.code == 5 and ran.said("p99", "--max-p99-ms")
    data = read(tmp_path / "b.json")
    assert data["objective"]["met"] is False and data["end_to_end"]["runs"] >= 100
    assert schema_errors(data) == []
    ran = cada(*common, "--max-p99-ms", 60_000)
    assert ran.code == 0 and "met" in ran.out


def quantised(source: Path, target: Path) -> Path:
    """The model with a pair of QuantizeLinear and DequantizeLinear before it: slower, and int8."""
    model = onnx.load(source)
    name = model.graph.input[0].name
    for node in model.graph.node:
        node.input[:] = ["dq" if i == name else i for i in node.input]
    made = [
        helper.make_node("QuantizeLinear", [name, "q_scale", "q_zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "q_scale", "q_zero"], ["dq"]),
    ]
    nodes = [*made, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(helper.make_tensor("q_scale", TensorProto.FLOAT, [], [0.02]))
    model.graph.initializer.append(helper.make_tensor("q_zero", TensorProto.INT8, [], [0]))
    onnx.save(model, target)
    return target


def test_int8_that_is_not_faster_is_a_warning(colour_model: Path, tmp_path: Path) -> None:
    common = ("--preset", "imagenet-rgb", "--size", "32x32", *SHORT)
    kept = tmp_path / "float.json"
    assert cada("bench", colour_model, *common, "--json", kept).code == 0
    before = read(kept)
    before["engine_only"]["compute"]["median_ms"] = 1e-6  # nothing can be faster than that
    kept.write_text(json.dumps(before))
    narrow = quantised(colour_model, tmp_path / "int8.onnx")
    assert (lowest_precision(colour_model), lowest_precision(narrow)) == ("float32", "int8")
    ran = cada("bench", narrow, *common, "--baseline", kept, "--json", tmp_path / "int8.json")
    assert ran.code == 0, ran.err
    data = read(tmp_path / "int8.json")
    assert schema_errors(data) == []
    assert data["baseline"]["precision"] == "float32"
    assert "int8 is not faster" in ran.out and "Baseline: " in ran.out


def test_half_precision_is_recognised(tmp_path: Path) -> None:
    colours = fitted_colours([street_like(32, 32, 0)], 3)
    half = save_colour_model(tmp_path / "half.onnx", colours, dtype="float16")
    assert lowest_precision(half) == "float16"


def test_a_baseline_measured_otherwise_is_refused(
    colour_model: Path, demo: tuple[Ran, Path], tmp_path: Path
) -> None:
    ran = cada("bench", colour_model, "--preset", "imagenet-rgb", "--size", "32x32", *SHORT,
               "--baseline", demo[1] / "bench.json", "--batch-size", 2)  # fmt: skip
    assert ran.code == 4 and ran.said("batch size: 1 there, 2 now", "network input")
    for content in ("[]", "{}", '{"engine_only": {"compute": {"median_ms": "x"}}}', "no json"):
        other = tmp_path / "other.json"
        other.write_text(content)
        ran = cada("bench", colour_model, "--preset", "imagenet-rgb", "--baseline", other, *SHORT)
        assert ran.code == 4, content


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--duration", -1), "--duration"),
        (("--duration", "nan"), "--duration"),
        (("--warm-up", "inf"), "--warm-up"),
        (("--percentile", "50,100"), "--percentile"),
        (("--percentile", "median"), "--percentile"),
        (("--max-p99-ms", 0), "--max-p99-ms"),
        (("--size", "64"), "--size"),
        (("--batch-size", 0), "--batch-size"),
        (("--images", "/nowhere"), "/nowhere"),
    ],
)
def test_mistakes_are_exit_2(options: tuple[Any, ...], said: str) -> None:
    ran = cada("bench", DEMO_MODEL, *options, "--quiet")
    assert ran.code == 2 and ran.said(said), ran.err


def test_a_device_that_is_not_there_is_exit_3() -> None:
    ran = cada("bench", DEMO_MODEL, "--device", "cuda:0", *SHORT)
    assert ran.code == 3, ran.err


# --- the words, on results that this machine cannot give ---------------------------------------


def on_a_gpu(result: dict[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(result)
    part = made["engine_only"]
    row = part["compute"]

    def scaled(factor: float) -> dict[str, Any]:
        return {**row, "median_ms": row["median_ms"] * factor}

    row["coefficient_of_variation"] = 0.001
    part["enqueue"], part["h2d"], part["d2h"] = scaled(0.1), scaled(0.2), scaled(0.3)
    for name in ("engine_only", "end_to_end"):
        made[name]["warm_up"]["stable"] = True
    made["machine"]["settings"]["gpu"] = {"name": "a GPU", "driver": "580", "slowed_by": []}
    return made


def test_a_healthy_result_has_no_warning(result: dict[str, Any]) -> None:
    made = on_a_gpu(result)
    assert warnings(made) == []
    assert "GPU Compute Time: min = " in text(made) and "H2D Latency: min = " in text(made)
    assert schema_errors(made) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["engine_only"]["enqueue"].update(median_ms=1e6), "enqueue-bound"),
        (lambda m: m["engine_only"]["h2d"].update(median_ms=1e6), "copying to the device"),
        (lambda m: m["engine_only"]["d2h"].update(median_ms=1e6), "copying back"),
        (lambda m: m["engine_only"]["compute"].update(coefficient_of_variation=0.026), "varies by"),
        (lambda m: m["end_to_end"]["warm_up"].update(stable=False), "never became stable"),
        (
            lambda m: m["machine"]["settings"]["gpu"].update(slowed_by=["SwPowerCap"]),
            "holds its clocks down: SwPowerCap",
        ),
    ],
)
def test_each_warning_has_its_cause(result: dict[str, Any], change: Any, said: str) -> None:
    made = on_a_gpu(result)
    change(made)
    (warning,) = warnings(made)
    assert said in warning


@pytest.mark.parametrize(
    ("before", "now", "times", "warned"),
    [
        ("float32", "int8", 1.04, True),
        ("float16", "int8", 1.05, False),
        ("float32", "float16", 0.9, True),
        ("float32", "int8", None, True),
        ("float32", "int8", float("nan"), True),
        ("float16", "bfloat16", 0.5, False),  # as wide: no promise
        ("int8", "float32", 0.5, False),
        (None, "int8", 0.5, False),
    ],
)
def test_fewer_bits_must_be_five_percent_faster(
    result: dict[str, Any], before: str | None, now: str, times: float | None, warned: bool
) -> None:
    made = on_a_gpu(result)
    made["model"]["precision"] = now
    made["baseline"] = {
        "model_sha256": "", "precision": before, "median_compute_ms": 1.0, "times_faster": times,
    }  # fmt: skip
    assert any("not faster" in w for w in warnings(made)) == warned


def test_meters_are_stated_by_name(result: dict[str, Any]) -> None:
    made = on_a_gpu(result)
    made["engine_only"]["meters"] = [
        {"name": "rail VDD_IN", "samples": 9, "unit": "W", "min": 5.0, "max": 9.0, "mean": 7.0,
         "joules": 70.0, "mean_watts": 7.0, "joules_per_frame": 0.5},
        {"name": "gpu SM clock", "samples": 9, "unit": "MHz", "min": 1.0, "max": 3.0, "mean": 2.0},
        {"name": "rapl 0 package-0", "samples": 1, "lost": "gone"},
    ]  # fmt: skip
    made["not_metered"] = ["nvml: the package nvidia-ml-py is not installed"]
    assert schema_errors(made) == []
    said = text(made)
    assert "rail VDD_IN, 7 W, 0.5 J a frame" in said
    assert "gpu SM clock, mean 2 MHz (1 to 3)" in said
    assert "lost on the way: gone" in said and "not read: nvml" in said


def test_everything_but_the_network() -> None:
    run = FrameTimes(20.0, {"decode": 5.0, "infer": 10.0, "select": 3.0})
    assert besides_network([run], 1.0) == {"median_ms": 5.0, "of_network": 0.5}
    on_gpu = FrameTimes(20.0, {"decode": 5.0, "gpu": 12.0})
    assert besides_network([on_gpu], 10.0) == {"median_ms": 5.0, "of_network": 0.5}
    assert besides_network([FrameTimes(1.0, {})], 0.0)["of_network"] is None


def test_options_refuse_nonsense() -> None:
    with pytest.raises(UsageError):
        BenchOptions(ModelChoice(DEMO_MODEL), duration_s=math.nan)


def test_from_python(tmp_path: Path) -> None:
    colours = fitted_colours([np.zeros((16, 16, 3), np.uint8) + 90], 2)
    path = save_colour_model(tmp_path / "m.onnx", colours)
    options = BenchOptions(
        ModelChoice(path, preset="imagenet-rgb"), (16, 24), duration_s=0, iterations=3,
        warm_up_s=0, quiet=True,
    )  # fmt: skip
    found = bench(options)
    assert len(found.runs) == 3 and found.met
    assert found.data["engine_only"]["warm_up"]["stable"] is None
    assert "none (--warm-up 0)" in text(found.data)
