"""Engine `ort`: ONNX Runtime. On the CPU it is deterministic by construction: every row is run
alone and with the same number of threads, whatever the batch size or the number of workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy.errors import ArtefactMismatch, EnvironmentLacks, UsageError
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


def open(model: Model, device: str, threads: int = 1) -> OnnxRuntime:
    """Open a session on `device` ("cpu"). Raises EnvironmentLacks for a device that is not there
    and ArtefactMismatch for a model that ONNX Runtime refuses."""
    _require(device)
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
    raise EnvironmentLacks(
        f"--device {device}: this version of cada-deploy has no GPU pipeline; use --device cpu"
    )


def _session(model: Model, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads would steal the cores from decoding, the fused kernel and PNG encoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = 4  # what fails is raised, and said once
    source = model.content if model.content is not None else str(model.path)
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ORT raises its own unrelated classes for every kind of bad model
        raise ArtefactMismatch(f"ONNX Runtime refuses {model.path.name}: {error}") from error


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
    shape = (model.batch or 1, 3, height, width)
    if model.spec.input.layout == "NHWC":
        shape = (model.batch or 1, height, width, 3)
    scores = _run(session, model, np.zeros(shape, model.spec.input.dtype))
    if scores.ndim != 4:
        raise ArtefactMismatch(
            f"{model.path.name} gave an output of rank {scores.ndim}; expected scores (N, C, h, w)"
        )
    return int(scores.shape[1])
