"""ONNX Runtime on CUDA, on stand-ins: nothing falls to the CPU, everything is bound and ordered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_models import save_colour_model, spread_colours
from stand_in_device import LazyStream, StandInDevice, memory_at
from stand_in_ort_cuda import ort_cuda_here

from cada_deploy import device_arrays
from cada_deploy.device import DeviceLost, OutOfDeviceMemory
from cada_deploy.device_arrays import DeviceArray
from cada_deploy.engines import DeviceEngine, onnxrt, open_engine
from cada_deploy.errors import ArtefactMismatch, EnvironmentLacks, RunFailed
from cada_deploy.model_files import Model, load_model

COLOURS = spread_colours(5)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    save_colour_model(tmp_path / "m.onnx", COLOURS)
    return load_model(tmp_path / "m.onnx", preset="imagenet-rgb")


def batch(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 3, 40, 56)).astype(np.float32)


def uploaded(gpu: StandInDevice, values: np.ndarray, stream: LazyStream) -> tuple[DeviceArray, Any]:
    staged = gpu.pinned(values.nbytes)
    assert staged.host is not None
    staged.host[:] = values.reshape(-1).view(np.uint8)
    image = device_arrays.empty(gpu, values.shape, values.dtype)  # type: ignore[arg-type]
    gpu.copy(image.address, staged.address, values.nbytes, stream)
    return image, staged


def test_the_session_is_pinned_and_may_not_fall_to_the_cpu(model: Model) -> None:
    with ort_cuda_here() as state:
        engine = open_engine("ort", model, "cuda:0")
        assert isinstance(engine, DeviceEngine) and engine.device == "cuda:0"
        assert engine.version == f"{onnxrt.version()}+cuda.sm_87"
        (session,) = state.sessions
    assert session.options.use_deterministic_compute
    assert session.options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    assert session.provider["use_tf32"] == "0"
    assert session.provider["cudnn_conv_algo_search"] == "HEURISTIC"
    assert session.provider["device_id"] == "0"
    assert int(session.provider["user_compute_stream"]) > 0


@pytest.mark.parametrize("rows", [1, 3])
def test_scores_are_those_of_the_cpu_plain_captured_and_replayed(model: Model, rows: int) -> None:
    expected = [open_engine("ort", model, "cpu").infer(batch(rows, k)).array for k in range(4)]
    with ort_cuda_here() as state:
        engine = open_engine("ort", model, "cuda:0")
        for k in range(4):
            assert np.array_equal(engine.infer(batch(rows, k)).array, expected[k])
        assert isinstance(engine, onnxrt.OnnxRuntimeOnCuda)
        assert engine.runs.graphs >= 1 and engine.runs.graphs_refused == 0
        bound = state.bound
        engine.infer(batch(rows))
        assert state.bound == bound, "nothing is bound again"


@pytest.mark.parametrize("captures", ["refused", "empty"])
def test_a_graph_that_is_not_right_never_serves(model: Model, captures: str) -> None:
    expected = [open_engine("ort", model, "cpu").infer(batch(1, k)).array for k in range(5)]
    with ort_cuda_here(StandInDevice(captures=captures)):
        engine = open_engine("ort", model, "cuda:0")
        for k in range(5):
            assert np.array_equal(engine.infer(batch(1, k)).array, expected[k])
        assert isinstance(engine, onnxrt.OnnxRuntimeOnCuda)
        assert engine.runs.graphs == 0 and engine.runs.graphs_refused >= 1


def test_a_pass_waits_for_the_callers_stream_and_is_waited_for(model: Model) -> None:
    gpu = StandInDevice()
    values = batch(2)
    with ort_cuda_here(gpu):
        engine = open_engine("ort", model, "cuda:0")
        assert isinstance(engine, DeviceEngine)
        stream = gpu.stream()
        image, staged = uploaded(gpu, values, stream)
        scores = engine.infer_on(image, stream)
        found = memory_at(scores.array.address, scores.array.nbytes)
        assert set(found.tolist()) == {0xCD}, "enqueued, not run"
        scores.ready.synchronize()
        expected = open_engine("ort", model, "cpu").infer(values).array
        assert found.tobytes() == expected.tobytes()
    assert staged is not None


def test_a_provider_that_does_not_start_is_an_error_not_the_cpu(model: Model) -> None:
    with (
        ort_cuda_here(falls=True),
        pytest.raises(EnvironmentLacks, match=r"could not start its CUDA .*CPUExecutionProvider"),
    ):
        open_engine("ort", model, "cuda:0")


def test_nodes_on_the_cpu_are_named(model: Model) -> None:
    with (
        ort_cuda_here(on_cpu=frozenset({"AveragePool"})),
        pytest.raises(ArtefactMismatch, match=r"on the CPU: .*\(AveragePool\)\. Export with"),
    ):
        open_engine("ort", model, "cuda:0")


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        ("CUDA failure 2: out of memory ; GPU=0", OutOfDeviceMemory, "lower --size"),
        ("BFCArena: Failed to allocate memory for requested buffer", OutOfDeviceMemory, "--size"),
        ("CUDA failure 700: an illegal memory access was encountered", DeviceLost, "any more"),
        ("Non-zero status code returned while running Conv node", RunFailed, "failed on the GPU"),
    ],
)
def test_what_goes_wrong_in_a_run_has_its_kind(
    model: Model, said: str, kind: type[Exception], words: str
) -> None:
    with ort_cuda_here() as state:
        engine = open_engine("ort", model, "cuda:0")
        engine.infer(batch(1))
        state.fails = said
        with pytest.raises(kind, match=words):
            engine.infer(batch(1))


def test_a_first_run_that_fails_speaks_of_sizes(model: Model) -> None:
    with ort_cuda_here() as state:
        engine = open_engine("ort", model, "cuda:0")
        state.fails = "Got invalid dimensions for input"
        with pytest.raises(ArtefactMismatch, match="give --size HxW"):
            engine.infer(batch(1))


def test_a_runtime_without_cuda_says_what_to_install(model: Model) -> None:
    with pytest.raises(EnvironmentLacks, match="onnxruntime-gpu in place of onnxruntime"):
        open_engine("ort", model, "cuda:0")


def test_passes_of_all_shapes_wait_for_one_another(model: Model) -> None:
    """One arena serves the session: a pass of another shape may not overlap, even from a graph."""
    gpu = StandInDevice()
    with ort_cuda_here(gpu):
        engine = open_engine("ort", model, "cuda:0")
        assert isinstance(engine, DeviceEngine)
        streams = [gpu.stream(), gpu.stream()]
        values = [batch(1), batch(1)[:, :, :24, :32].copy()]
        images = [uploaded(gpu, v, s) for v, s in zip(values, streams)]
        for _ in range(3):
            for (image, _staged), stream in zip(images, streams):
                engine.infer_on(image, stream)
        for stream in streams:
            stream.synchronize()
        first = engine.infer_on(images[0][0], streams[0])
        last = engine.infer_on(images[1][0], streams[1])
        assert not first.ready.done
        last.ready.synchronize()
        # `ready` itself is recorded just after the point that the next pass waits for.
        assert first.ready.done or len(streams[0].pending) == 1
