"""Every file of cada_deploy/engines keeps the contract of its folder, on the devices it has."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from command_line import child_environment
from foreign_models import linear_scores, save_colour_model, spread_colours
from stand_in_ort_cuda import ort_cuda_here
from trt_on_cpu import tensorrt_here

from cada_deploy import engines
from cada_deploy.engine_plans import Build, PlanOptions
from cada_deploy.errors import CadaError, EnvironmentLacks, UsageError
from cada_deploy.model_files import Model, load_model

COLOURS = spread_colours(5)
NAMES = sorted(engines.engines())
ORT_ON_CUDA = "ort on cuda:0"  # the real session of the CPU, bound and ordered as on a GPU
WAYS = [*NAMES, ORT_ON_CUDA]


@pytest.fixture(autouse=True)
def tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for TensorRT, which shows that our side keeps the contract."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tensorrt_here():
        yield


@pytest.fixture(autouse=True)
def onnx_runtime_on_cuda() -> Iterator[None]:
    """A stand-in for ONNX Runtime's CUDA provider, likewise."""
    with ort_cuda_here():
        yield


def foreign(path: Path, **options: object) -> Model:
    save_colour_model(path, COLOURS, **options)  # type: ignore[arg-type]
    return load_model(path, preset="imagenet-rgb")


def opened(name: str, path: Path, **options: object) -> engines.Engine:
    """The engine on a colour model in its own kind of file; skipped where it cannot run here."""
    name, _, device = name.partition(" on ")
    try:
        model = own_kind(name, path, **options)
        return engines.open_engine(name, model, device or engines.default_device(name))
    except EnvironmentLacks as error:
        pytest.skip(f"not run: {error}")
    except UsageError as error:
        pytest.skip(f"not run: engine {name} takes no ONNX model ({error})")


def own_kind(name: str, path: Path, **options: object) -> Model:
    if name == "trt":
        save_colour_model(path, COLOURS, **options)  # type: ignore[arg-type]
        build = Build(PlanOptions((8, 8), (17, 23), (64, 96), 2))
        return engines.load_model(name, path, preset="imagenet-rgb", build=build)
    if name != "torch":
        return foreign(path, **options)
    pytest.importorskip("torch", reason="the extra `train` is not installed")
    from foreign_torch import save_colour_program

    program = save_colour_program(path.with_suffix(".pt2"), COLOURS, **options)  # type: ignore[arg-type]
    return engines.load_model(name, program, preset="imagenet-rgb")


def batch(rows: int, height: int = 17, width: int = 23) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(3))
    return generator.normal(0, 1, (rows, 3, height, width)).astype(np.float32)


def test_the_listing_is_the_folder_and_imports_no_library() -> None:
    files = {p.stem for p in Path(engines.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(engines.engines().values()) == files
    assert set(engines.engines()) <= set(engines.names())
    code = (
        "import sys; from cada_deploy import engines; engines.names();"
        "print([m for m in ('onnxruntime', 'torch', 'tensorrt', 'cv2') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=child_environment(),
        check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_at_least_onnx_runtime_is_under_test(tmp_path: Path) -> None:
    engine = engines.open_engine("ort", foreign(tmp_path / "m.onnx"), "cpu")
    assert engine.name == "ort" and engine.device == "cpu" and engine.classes == 5


@pytest.mark.parametrize("name", NAMES)
def test_a_module_declares_its_name(name: str) -> None:
    try:
        module = importlib.import_module(f"cada_deploy.engines.{engines.engines()[name]}")
    except EnvironmentLacks as error:
        pytest.skip(f"not run: {error}")
    assert name == module.NAME
    assert callable(module.open) and re.match(r"\d+\.\d+", module.version())


@pytest.mark.parametrize("name", WAYS)
def test_the_scores_are_the_networks(name: str, tmp_path: Path) -> None:
    engine = opened(name, tmp_path / "m.onnx", stride=1)
    rows = batch(2)
    scores = engine.infer(rows)
    assert scores.device == "cpu" and scores.ready is None
    weight, bias = (v.astype(np.float64) for v in linear_scores(COLOURS))
    expected = np.einsum("kc,nchw->nkhw", weight, rows.astype(np.float64)) + bias[:, None, None]
    assert scores.array.shape == (2, 5, 17, 23)
    assert np.abs(scores.array - expected).max() <= 1e-4


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("stride", [1, 8])
def test_a_rows_bits_do_not_depend_on_its_neighbours(
    name: str, stride: int, tmp_path: Path
) -> None:
    engine = opened(name, tmp_path / "m.onnx", stride=stride)
    rows = batch(5)
    together = engine.infer(rows).array
    for k in range(5):
        alone = engine.infer(rows[k : k + 1]).array
        assert alone.tobytes() == together[k : k + 1].tobytes()
    assert engine.infer(rows[::-1].copy()).array[::-1].tobytes() == together.tobytes()


@pytest.mark.parametrize("name", WAYS)
def test_many_threads_may_call_at_once_and_get_the_same_bits(name: str, tmp_path: Path) -> None:
    engine = opened(name, tmp_path / "m.onnx")
    rows = batch(1, 64, 96)
    expected = engine.infer(rows).array.tobytes()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: engine.infer(rows).array.tobytes(), range(24)))
    assert found == [expected] * 24


@pytest.mark.parametrize("name", WAYS)
def test_nan_and_infinity_come_through(name: str, tmp_path: Path) -> None:
    engine = opened(name, tmp_path / "m.onnx", stride=1)
    rows = batch(1)
    rows[0, :, 4, 5] = np.nan
    scores = engine.infer(rows).array
    assert np.isnan(scores[0, :, 4, 5]).all()
    assert np.isfinite(np.delete(scores.reshape(5, -1), 4 * 23 + 5, axis=1)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", ["cuda:99", "gpu", "", "cpu:1", "cuda:-1"])
def test_a_device_that_is_not_there_is_an_error_never_the_cpu(
    name: str, device: str, tmp_path: Path
) -> None:
    with pytest.raises(CadaError) as caught:
        engines.open_engine(name, foreign(tmp_path / "m.onnx"), device)
    assert caught.value.exit_code in (2, 3)


def test_an_unknown_engine_is_refused_and_a_planned_one_is_lacking(tmp_path: Path) -> None:
    model = foreign(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=r"no engine is called 'ortt'.*did you mean 'ort'"):
        engines.open_engine("ortt", model, "cpu")
    for name in set(engines.names()) - set(engines.engines()):
        with pytest.raises(EnvironmentLacks, match="use --engine ort"):
            engines.open_engine(name, model, "cpu")
