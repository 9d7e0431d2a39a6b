"""Engine `ort`: ONNX Runtime, on the CPU or a GPU.

On the CPU it is deterministic by construction: every row is run alone and with the same number of
threads, whatever the batch size or the number of workers. On a GPU rows run alone, too; images and
scores are bound by device pointer, the session works on a stream of ours, a pass is captured into a
CUDA graph that was proven (engine_runs.py), and nothing may fall to the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy.device import (
    Device,
    DeviceLost,
    Event,
    OutOfDeviceMemory,
    Stream,
    is_cuda,
    open_device,
)
from cada_deploy.device_arrays import DeviceArray
from cada_deploy.engine_plans import Profile
from cada_deploy.engine_runs import EngineRuns, Network, image_shape
from cada_deploy.errors import ArtefactMismatch, EnvironmentLacks, RunFailed, UsageError
from cada_deploy.model_files import Model, check_classes
from cada_deploy.scores import Scores

try:
    import onnxruntime as ort
except ImportError as error:  # the runtime is an extra: cpu and gpu builds exclude each other
    raise EnvironmentLacks(
        "--engine ort needs ONNX Runtime; install it with: pip install 'cada-deploy[cpu]' "
        "(or [gpu] on a machine with CUDA)"
    ) from error

NAME = "ort"


def version() -> str:
    return str(ort.__version__)


@dataclass(frozen=True)
class OnnxRuntime:
    """An ONNX Runtime session on the CPU. Thread-safe, as InferenceSession.run is."""

    session: ort.InferenceSession
    model: Model
    classes: int
    device: str = "cpu"
    name: str = NAME
    version: str = version()

    def infer(self, batch: npt.NDArray[Any]) -> Scores:
        rows = [self._row(batch[i : i + 1]) for i in range(len(batch))]
        return Scores(rows[0] if len(rows) == 1 else np.concatenate(rows))

    def _row(self, row: npt.NDArray[Any]) -> npt.NDArray[Any]:
        fixed = self.model.batch or 1
        feed = row if fixed == 1 else np.repeat(row, fixed, axis=0)
        scores = _run(self.session, self.model, feed)
        return _checked(self.model, scores, self.classes)[:1]


@dataclass(frozen=True, eq=False)
class OnnxRuntimeOnCuda:
    """An ONNX Runtime session on a GPU. Thread-safe."""

    runs: EngineRuns
    gpu: Device
    classes: int
    device: str
    version: str
    name: str = NAME

    def infer(self, batch: npt.NDArray[Any]) -> Scores:
        return Scores(self.runs.on_host(batch))

    def infer_on(self, batch: DeviceArray, stream: Stream) -> Scores:
        """Enqueue on `stream`. The scores stay on the device, valid until the next call with the
        same `batch` address and shape."""
        scores = self.runs.on_device(batch, stream)
        return Scores(scores, self.device, scores.ready)


def open(model: Model, device: str, threads: int = 1) -> OnnxRuntime | OnnxRuntimeOnCuda:
    """Open a session on `device` (`cpu`, `cuda:0`). Raises EnvironmentLacks for a device that is
    not there, ArtefactMismatch for a model that ONNX Runtime refuses or would run on the CPU in
    part. threads are those of a session on the CPU."""
    _require(device)
    if is_cuda(device):
        return _open_on_cuda(model, device)
    session = _session(model, threads)
    classes = model.declared_classes or _probe(session, model)
    check_classes(model.path, model.spec, classes, model.classes_named)
    return OnnxRuntime(session, model, classes)


def _require(device: str) -> None:
    if device == "cpu":
        return
    if not device.startswith("cuda:") or not device[5:].isdigit():
        raise UsageError(f"--device {device!r}; expected cpu or cuda:N")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise EnvironmentLacks(
            f"--device {device}: this ONNX Runtime ({version()}) has no CUDA provider "
            f"({', '.join(ort.get_available_providers())}); install onnxruntime-gpu in place of "
            "onnxruntime, or use --device cpu"
        )


def _session(model: Model, threads: int) -> ort.InferenceSession:
    options = _options(threads)
    try:
        return ort.InferenceSession(_source(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ORT raises its own unrelated classes for every kind of bad model
        raise ArtefactMismatch(f"ONNX Runtime refuses {model.path.name}: {error}") from error


def _source(model: Model) -> Any:
    return model.content if model.content is not None else str(model.path)


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads would steal the cores from decoding, the fused kernel and PNG encoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = 4  # what fails is raised, and said once
    return options


def _run(session: ort.InferenceSession, model: Model, feed: npt.NDArray[Any]) -> npt.NDArray[Any]:
    try:
        (scores,) = session.run([model.output.name], {model.input.name: feed})
    except Exception as error:
        raise ArtefactMismatch(
            f"{model.path.name} failed on an input of shape {feed.shape} {feed.dtype}: {error}. "
            "If the model needs other sizes, give --size HxW"
        ) from error
    return np.asarray(scores)


def _checked(model: Model, scores: npt.NDArray[Any], classes: int) -> npt.NDArray[Any]:
    if scores.ndim != 4 or scores.shape[1] != classes or 0 in scores.shape:
        raise ArtefactMismatch(
            f"{model.path.name} gave scores of shape {scores.shape}; expected (N, {classes}, h, w)"
        )
    return scores


def _probe(session: ort.InferenceSession, model: Model) -> int:
    """The class count of a model that does not declare it, from one grey frame."""
    height, width = model.spec.input.size or (64, 64)
    shape = image_shape(model.batch or 1, (height, width), model.spec.input.layout)
    scores = _run(session, model, np.zeros(shape, model.spec.input.dtype))
    if scores.ndim != 4:
        raise ArtefactMismatch(
            f"{model.path.name} gave an output of rank {scores.ndim}; expected scores (N, C, h, w)"
        )
    return int(scores.shape[1])


# --- on a GPU ----------------------------------------------------------------------------------

CUDA = "CUDAExecutionProvider"
# Sizes are the model's business; ONNX Runtime itself says what it does not take.
_ANY_SIZE = Profile((1, 1), (64, 64), (1 << 20, 1 << 20), 1)
_BINDINGS = 16  # of a context: pairs of addresses
_NOT_ON_CPU = "session.disable_cpu_ep_fallback"
_RECORD = "session.record_ep_graph_assignment_info"
# A run returns once it is enqueued; its stream orders what follows.
_NO_WAIT = "disable_synchronize_execution_providers"


def _open_on_cuda(model: Model, device: str) -> OnnxRuntimeOnCuda:
    if hasattr(ort, "preload_dlls"):  # CUDA and cuDNN from pip's wheels, where they are there
        ort.preload_dlls()
    gpu = open_device(device)
    stream = gpu.stream()
    session = _session_on_cuda(model, gpu, stream)
    spec = model.spec.input
    network = Network(
        spec.layout,
        np.dtype(spec.dtype),
        np.dtype(model.output.dtype),
        Profile(_ANY_SIZE.minimum, _ANY_SIZE.optimum, _ANY_SIZE.maximum, model.batch or 1),
    )
    passes = _Passes(session, model, gpu, stream, gpu.event(), gpu.event())
    runs = EngineRuns(gpu, passes, network, model.path.name, exclusive=True)
    shape = image_shape(network.profile.batch, spec.size or (64, 64), spec.layout)
    classes = model.declared_classes or runs.on_host(np.zeros(shape, spec.dtype)).shape[1]
    check_classes(model.path, model.spec, classes, model.classes_named)
    major, minor = gpu.compute_capability
    return OnnxRuntimeOnCuda(runs, gpu, classes, device, f"{version()}+cuda.sm_{major}{minor}")


def _session_on_cuda(model: Model, gpu: Device, stream: Stream) -> ort.InferenceSession:
    options = _options(threads=1)
    options.use_deterministic_compute = True
    options.add_session_config_entry(_NOT_ON_CPU, "1")
    provider = {
        "device_id": str(gpu.ordinal),
        "user_compute_stream": str(stream.handle),
        "do_copy_in_default_stream": "1",
        # Chosen by rule, not by a race of measured times: the same scores on every start.
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
    }
    try:
        session = ort.InferenceSession(_source(model), options, providers=[(CUDA, provider)])
    except Exception as error:  # unrelated classes, as on the CPU
        raise _session_error(model, gpu, error) from error
    if session.get_providers()[:1] != [CUDA]:
        raise EnvironmentLacks(
            f"--device cuda:{gpu.ordinal}: ONNX Runtime {version()} could not start its CUDA "
            f"provider and would have run on {', '.join(session.get_providers())}; it needs the "
            "CUDA and cuDNN libraries that it was built for (pip install "
            "'onnxruntime-gpu[cuda,cudnn]'), and a driver for them"
        )
    return session


def _session_error(model: Model, gpu: Device, error: Exception) -> Exception:
    if "fallback to CPU EP has been explicitly disabled" in str(error):
        nodes = _on_cpu(model, gpu)
        listed = ", ".join(nodes[:8]) + (f" and {len(nodes) - 8} more" if len(nodes) > 8 else "")
        return ArtefactMismatch(
            f"ONNX Runtime would run a part of {model.path.name} on the CPU: "
            f"{listed or 'it does not say which nodes'}. Export with a fixed size and an opset of "
            "17 or 18 (a Shape or a new Resize is the usual cause), or use --device cpu"
        )
    return _cuda_error(error) or ArtefactMismatch(
        f"ONNX Runtime refuses {model.path.name}: {error}"
    )


def _on_cpu(model: Model, gpu: Device) -> list[str]:
    """`name (Operator)` of every node that ONNX Runtime places on the CPU; empty where this version
    does not tell."""
    options = _options(threads=1)
    options.add_session_config_entry(_RECORD, "1")
    providers = [(CUDA, {"device_id": str(gpu.ordinal)}), "CPUExecutionProvider"]
    session = ort.InferenceSession(_source(model), options, providers=providers)
    if not hasattr(session, "get_provider_graph_assignment_info"):  # before 1.24
        return []
    return [
        f"{node.name} ({node.op_type})"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != CUDA
        for node in part.get_nodes()
    ]


def _cuda_error(error: Exception) -> RunFailed | None:
    """What ONNX Runtime says of the GPU itself, as our kinds of error."""
    text = str(error)
    if "out of memory" in text or "Failed to allocate memory" in text:
        return OutOfDeviceMemory(
            f"the GPU has no room for the network ({text.partition(chr(10))[0]}); lower --size or "
            "--workers, or stop other work on it"
        )
    if any(f"CUDA failure {code}" in text for code in (46, 700, 702, 710, 719)):
        return DeviceLost(f"the GPU cannot be used any more: {text.partition(chr(10))[0]}")
    return None


@dataclass(eq=False)
class _Passes:
    """Makes contexts of one session. Its stream is given once and for all, so every pass runs
    there: it starts after what is on the caller's stream, which then waits for it. One arena serves
    all passes, so no two may overlap (EngineRuns, exclusive)."""

    session: ort.InferenceSession
    model: Model
    gpu: Device
    stream: Stream
    given: Event
    done: Event

    def context(self, shape: tuple[int, ...], stream: Stream) -> _Pass:
        """Runs once on zeros: ONNX Runtime allocates late, and only then tells the shape."""
        kind = np.dtype(self.model.spec.input.dtype)
        image = self.gpu.allocate(int(np.prod(shape, dtype=np.int64)) * kind.itemsize)
        self.gpu.fill(image.address, 0, image.nbytes, self.stream)
        binding = self.session.io_binding()
        self._bind_image(binding, shape, image.address)
        binding.bind_output(self.model.output.name, "cuda", self.gpu.ordinal)
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            raise _cuda_error(error) or ArtefactMismatch(
                f"{self.model.path.name} failed on an input of shape {shape} {kind}: {error}. "
                "If the model needs other sizes, give --size HxW"
            ) from error
        self.stream.synchronize()
        return _Pass(self, shape, tuple(binding.get_outputs()[0].shape()))

    def bound(self, shape: tuple[int, ...], image: int, scores: tuple[int, ...], at: int) -> Any:
        binding = self.session.io_binding()
        self._bind_image(binding, shape, image)
        kind = np.dtype(self.model.output.dtype)
        binding.bind_output(self.model.output.name, "cuda", self.gpu.ordinal, kind, scores, at)
        return binding

    def run(self, binding: Any, stream: Stream) -> None:
        options = ort.RunOptions()
        options.add_run_config_entry(_NO_WAIT, "1")
        self.given.record(stream)
        self.stream.wait(self.given)
        try:
            self.session.run_with_iobinding(binding, options)
        except Exception as error:
            raise _cuda_error(error) or RunFailed(
                f"{self.model.path.name} failed on the GPU: {error}"
            ) from error
        self.done.record(self.stream)
        stream.wait(self.done)

    def _bind_image(self, binding: Any, shape: tuple[int, ...], address: int) -> None:
        kind = np.dtype(self.model.spec.input.dtype)
        binding.bind_input(self.model.input.name, "cuda", self.gpu.ordinal, kind, shape, address)


@dataclass(eq=False)
class _Pass:
    """One input shape (a Context of engine_runs.py)."""

    passes: _Passes
    shape: tuple[int, ...]
    scores: tuple[int, ...]
    bindings: dict[tuple[int, int], Any] = field(default_factory=dict)

    def execute(self, image: int, scores: int, stream: Stream) -> None:
        key = (image, scores)
        if key not in self.bindings:
            if len(self.bindings) >= _BINDINGS:
                self.bindings.pop(next(iter(self.bindings)))
            self.bindings[key] = self.passes.bound(self.shape, image, self.scores, scores)
        self.passes.run(self.bindings[key], stream)
