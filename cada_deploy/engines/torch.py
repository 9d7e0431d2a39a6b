"""Engine `torch`: PyTorch itself, for checkpoints and exported programs (.pt2).

A checkpoint goes through the strict loader of cada_deploy.training and never runs code. A .pt2 is
a program: torch.export.load evaluates expressions and may unpickle, so open only one you trust
(what is openly marked as a pickle is refused here). Rows run alone, without gradients, without
TF32 and with deterministic cuDNN.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy.classes import ClassSet
from cada_deploy.device import DeviceLost, OutOfDeviceMemory, Stream, is_cuda, open_device
from cada_deploy.device_arrays import DeviceArray
from cada_deploy.errors import ArtefactMismatch, EnvironmentLacks, UsageError
from cada_deploy.model_files import Model, Tensor, check_classes
from cada_deploy.model_spec import ModelSpec
from cada_deploy.scores import Scores

try:
    import torch
except ImportError as error:
    raise EnvironmentLacks(
        "--engine torch needs PyTorch; install it with: pip install 'cada-deploy[train]'"
    ) from error

NAME = "torch"
PROGRAM = ".pt2"
MODEL_SUFFIXES = (".pth", ".pt", ".pkl", ".safetensors", ".ckpt", ".tar", PROGRAM)
_PROBES = ((64, 64), (256, 512))  # sizes that a dynamic program is tried with


def version() -> str:
    return str(torch.__version__)


@dataclass(frozen=True, eq=False)
class TorchModel(Model):
    """A Model whose network is in memory already: what was checked is what runs."""

    network: Any = None


@dataclass(frozen=True)
class PyTorch:
    """A network on `device`. Thread-safe: it is only read."""

    network: Any
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
        scores = _run(self.network, self.model, feed, self.device)
        _check_scores(self.model, scores, self.classes)
        host: npt.NDArray[Any] = scores[:1].to("cpu", torch.float32).numpy()
        return host


@dataclass(frozen=True)
class PyTorchOnCuda(PyTorch):
    """A network on a GPU. It enqueues on our streams; nothing is captured into a graph, because
    PyTorch's allocator may reuse the memory of a capture that is not its own."""

    gpu: Any = None

    def infer_on(self, batch: DeviceArray, stream: Stream) -> Scores:
        """Rows run alone. The scores are PyTorch's memory, held by the array that is returned."""
        cuda: Any = torch.cuda
        network = cuda.ExternalStream(stream.handle, device=self.device)
        if batch.ready is not None:
            stream.wait(batch.ready)
        with cuda.stream(network), _explained(self.model, batch.shape, batch.dtype):
            given = torch.as_tensor(replace(batch, ready=None), device=self.device)  # waited for
            scores = torch.cat([self._on_gpu(given[i : i + 1]) for i in range(len(given))])
            ready = self.gpu.event()
            ready.record(stream)
        shape, kind = tuple(scores.shape), np.dtype(np.float32)
        array = DeviceArray(self.gpu, scores.data_ptr(), shape, kind, (scores, batch), ready)
        return Scores(array, self.device, ready)

    def _on_gpu(self, row: Any) -> Any:
        fixed = self.model.batch or 1
        with torch.inference_mode(), _exact(self.device):
            scores = self.network(row if fixed == 1 else row.expand(fixed, -1, -1, -1))
            _check_scores(self.model, scores, self.classes)
            return scores[:1].to(torch.float32)


def load_model(
    path: Path,
    *,
    preset: str | None = None,
    spec_file: Path | None = None,
    classes: ClassSet | None = None,
    spec: ModelSpec | None = None,
) -> Model:
    """Read a checkpoint or an exported program and settle its spec. Raises UsageError when nothing
    says how it is fed, ArtefactMismatch for a file that does not fit."""
    if path.suffix == ".onnx":
        raise UsageError(f"{path.name} is an ONNX model; run it with --engine ort")
    if path.suffix == PROGRAM:
        return _program_model(path, preset, spec_file, classes, spec)
    return _checkpoint_model(path, preset, spec_file, classes, spec)


def open(model: Model, device: str, threads: int = 1) -> PyTorch:
    """Put the network on `device`. Raises EnvironmentLacks for a device that is not there.

    threads is PyTorch's own setting, which it keeps for the whole process.
    """
    _require(device)
    if not isinstance(model, TorchModel):
        raise UsageError(
            f"{model.path.name} is not a checkpoint; --engine torch takes "
            f"{', '.join(MODEL_SUFFIXES)}; run an ONNX model with --engine ort"
        )
    torch.set_num_threads(threads)
    assert model.declared_classes is not None
    if not is_cuda(device):
        return PyTorch(model.network, model, model.declared_classes, device)
    gpu = open_device(device)  # the same primary context as PyTorch's
    network = model.network.to(device)
    return PyTorchOnCuda(network, model, model.declared_classes, device, gpu=gpu)


def _require(device: str) -> None:
    if device == "cpu":
        return
    if not device.startswith("cuda:") or not device[5:].isdigit():
        raise UsageError(f"--device {device!r}; expected cpu or cuda:N")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(device[5:]) >= found:
        raise EnvironmentLacks(
            f"--device {device}: this PyTorch ({version()}) finds {found} CUDA devices; install a "
            "CUDA build of PyTorch and the NVIDIA driver, or use --device cpu"
        )


def _run(network: Any, model: Model, feed: npt.NDArray[Any], device: str) -> Any:
    with _explained(model, feed.shape, feed.dtype), torch.inference_mode(), _exact(device):
        return network(torch.from_numpy(np.ascontiguousarray(feed)).to(device))


def _check_scores(model: Model, scores: Any, classes: int) -> None:
    if not isinstance(scores, torch.Tensor):
        kind = type(scores).__name__
        raise ArtefactMismatch(f"{model.path.name} gave a {kind}; expected one tensor")
    shape = tuple(scores.shape)
    if len(shape) != 4 or shape[1] != classes or 0 in shape:
        raise ArtefactMismatch(
            f"{model.path.name} gave scores of shape {shape}; expected (N, {classes}, h, w)"
        )


@contextmanager
def _explained(model: Model, shape: tuple[int, ...], dtype: Any) -> Iterator[None]:
    """PyTorch's errors as ours."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError) as error:
        text = str(error).strip().partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError):
            raise OutOfDeviceMemory(
                f"the GPU has no room for the network ({text}); lower --size or --workers, or stop "
                "other work on it"
            ) from error
        if "CUDA error" in text:
            raise DeviceLost(f"the GPU cannot be used any more: {text}") from error
        raise ArtefactMismatch(
            f"{model.path.name} failed on an input of shape {shape} {dtype}: {text}. "
            "If the model needs other sizes, give --size HxW"
        ) from error


def _exact(device: str) -> Any:
    """The same bits every time, and float32 where float32 is written."""
    if device == "cpu":
        return nullcontext()
    flags = torch.backends.cudnn.flags
    return flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


# --- checkpoints -------------------------------------------------------------------------------


def _checkpoint_model(
    path: Path,
    preset: str | None,
    spec_file: Path | None,
    classes: ClassSet | None,
    spec: ModelSpec | None,
) -> Model:
    from cada_deploy.training.checkpoint_spec import checkpoint_spec
    from cada_deploy.training.checkpoints import load_checkpoint

    try:
        loaded = load_checkpoint(path, classes=len(classes) if classes else None)
    except ArtefactMismatch as error:
        if "--aspp-branches" not in str(error):
            raise
        raise ArtefactMismatch(
            f"{error}\nThat option belongs to `cada-deploy export`: export the checkpoint with it, "
            "and run the ONNX file"
        ) from error
    if spec is None:
        spec = checkpoint_spec(path, loaded, preset=preset, spec_file=spec_file, classes=classes)
    check_classes(path, spec, loaded.classes)
    scores = (None, loaded.classes, None, None)
    return _model(path, loaded.sha256, spec, (None, 3, None, None), scores, loaded.model)


def _model(
    path: Path,
    sha256: str,
    spec: ModelSpec,
    image: tuple[int | None, ...],
    scores: tuple[int | None, ...],
    network: Any,
) -> TorchModel:
    return TorchModel(
        path=path,
        content=None,
        sha256=sha256,
        spec=spec,
        input=Tensor(spec.input.name, "float32", image),
        output=Tensor(spec.output.name, "float32", scores),
        batch=image[0],
        network=network,
    )


# --- exported programs -------------------------------------------------------------------------


def _program_model(
    path: Path,
    preset: str | None,
    spec_file: Path | None,
    classes: ClassSet | None,
    spec: ModelSpec | None,
) -> Model:
    from cada_deploy.training.checkpoint_spec import stated_spec, with_names

    content = _content(path)
    _refuse_pickles(path, content)
    program = _program(path, content)
    image = _image_shape(path, program)
    network = program.module()
    found = _probed_classes(path, network, image)
    if spec is None:
        spec = with_names(
            stated_spec(path, found, preset=preset, spec_file=spec_file, classes=classes)
        )
    check_classes(path, spec, found)
    fixed = (image[2], image[3]) if image[2] and image[3] else None
    if fixed and spec.input.size and fixed != tuple(spec.input.size):
        raise ArtefactMismatch(
            f"{path.name} takes {fixed[0]}x{fixed[1]} (HxW) but its spec says "
            f"{spec.input.size[0]}x{spec.input.size[1]}; correct input.size"
        )
    spec = replace(spec, input=replace(spec.input, size=fixed or spec.input.size))
    digest = hashlib.sha256(content).hexdigest()
    return _model(path, digest, spec, image, (image[0], found, None, None), network)


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise UsageError(f"no exported program at {path}; expected a {PROGRAM} file")
    try:
        return path.read_bytes()
    except PermissionError:
        raise UsageError(f"model {path} cannot be read: permission denied") from None


def _refuse_pickles(path: Path, content: bytes) -> None:
    """What torch.export.load would unpickle with no guard (torch 2.13, pt2_archive/_package.py:
    payloads marked use_pickle, custom and opaque objects) is refused before it sees the file."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = archive.namelist()
            listed = [n for n in names if n.endswith("_config.json")]
            pickled = [n for n in listed if _marks_pickle(json.loads(archive.read(n)))]
    except (zipfile.BadZipFile, ValueError, RuntimeError, KeyError) as error:
        raise ArtefactMismatch(
            f"{path} is not an exported program, or is cut short ({error})"
        ) from error
    objects = [n for n in names if "custom_obj" in n or "opaque_obj" in n]
    if pickled or objects:
        raise ArtefactMismatch(
            f"{path} holds Python objects ({', '.join([*pickled, *objects][:3])}), which could run "
            "code when they are read; refused. Export the program with plain tensors only"
        )


def _marks_pickle(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value.get("use_pickle")) or any(_marks_pickle(v) for v in value.values())
    return isinstance(value, list) and any(_marks_pickle(v) for v in value)


def _program(path: Path, content: bytes) -> Any:
    try:
        with _quiet():
            program = torch.export.load(io.BytesIO(content))
    except Exception as error:  # torch raises unrelated classes for every kind of damage
        text = str(error).strip().partition("\n")[0]
        raise ArtefactMismatch(
            f"{path} is not a program that torch {version()} can load: {text}"
        ) from error
    if training := _in_training(program):
        raise ArtefactMismatch(
            f"{path.name} was exported in training mode ({training}), so its scores depend on what "
            "else it has seen. Call model.eval() before torch.export.export"
        )
    return program


def _in_training(program: Any) -> str:
    """What shows that the program was exported in training mode; empty when nothing does."""
    changed = list(program.graph_signature.buffers_to_mutate.values())
    if changed:
        return f"it changes {changed[0]}"
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for place, argument in enumerate(schema.arguments if schema else ()):
            given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            if argument.name in ("training", "train") and given is True:
                return str(node.target)
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export tells its developers things that are of no use to who runs a program."""
    logger = logging.getLogger("torch")
    before = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(before)


def _image_shape(path: Path, program: Any) -> tuple[int | None, ...]:
    """(N, 3, H, W) of the program's one input, None where it is dynamic."""
    names = program.graph_signature.user_inputs
    nodes = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    if len(nodes) != 1:
        raise ArtefactMismatch(
            f"{path.name} takes {len(nodes)} inputs; expected one, an image batch (N, 3, H, W)"
        )
    value = nodes[0].meta["val"]
    shape = tuple(d if isinstance(d, int) else None for d in value.shape)
    if len(shape) != 4 or shape[1] not in (3, None) or value.dtype != torch.float32:
        raise ArtefactMismatch(
            f"{path.name} takes {tuple(value.shape)} {value.dtype}; expected an image batch "
            "(N, 3, H, W) of float32"
        )
    return shape


def _probed_classes(path: Path, network: Any, image: tuple[int | None, ...]) -> int:
    """How many classes a program gives, from a grey frame."""
    failure = ""
    for height, width in _PROBES:
        shape = (image[0] or 1, 3, image[2] or height, image[3] or width)
        try:
            with torch.inference_mode():
                scores = network(torch.zeros(shape))
        except (RuntimeError, ValueError, AssertionError) as error:
            failure = str(error).strip().partition("\n")[0]
            continue
        if not isinstance(scores, torch.Tensor) or scores.ndim != 4:
            found = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores)
            raise ArtefactMismatch(
                f"{path.name} gave {found}; expected one tensor of scores (N, C, h, w)"
            )
        return int(scores.shape[1])
    raise ArtefactMismatch(f"{path.name} failed on a grey frame: {failure}")
