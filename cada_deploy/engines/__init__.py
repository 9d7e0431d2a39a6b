"""The contract of an engine: a batch in, the network's scores out.

Each engine is one file with NAME (its name on the command line), `version()` and
`open(model, device, threads) -> Engine`; one that runs other files than ONNX also has a
`load_model` like that of model_files. One that builds an engine of its own from a model says so
with BUILDS = True, and its load_model takes a `build`; DEVICE is where it runs when nobody says. A
device that was asked for and cannot be had is an
EnvironmentLacks error, never a quiet fall to the CPU. Engines are found by listing this folder.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy.typing as npt

from cada_deploy import model_files
from cada_deploy.classes import ClassSet
from cada_deploy.device import Device, Stream
from cada_deploy.device_arrays import DeviceArray
from cada_deploy.engine_plans import Build
from cada_deploy.errors import EnvironmentLacks, UsageError, nearest
from cada_deploy.model_files import Model
from cada_deploy.model_spec import ModelSpec
from cada_deploy.scores import Scores

# Names that the command line promises and that this version cannot run yet.
_PLANNED: dict[str, str] = {}


class Engine(Protocol):
    """An open model. infer may be called from several threads at once."""

    name: str
    version: str
    device: str  # "cpu", "cuda:0"
    classes: int

    def infer(self, batch: npt.NDArray[Any]) -> Scores:
        """(N, 3, H, W) or (N, H, W, 3), as the model's spec says -> scores (N, C, h, w).

        On the CPU every row is run alone, so a row's scores cannot depend on its neighbours.
        Raises ArtefactMismatch when the model gives another shape than it promised.
        """
        ...


@runtime_checkable
class DeviceEngine(Engine, Protocol):
    """An engine on a GPU, which enqueues on our stream."""

    gpu: Device

    def infer_on(self, batch: DeviceArray, stream: Stream) -> Scores:
        """As infer, from and to the device: scores.array is a DeviceArray, scores.ready the event
        after which it holds the values. It stays until the next call with a batch of this address
        and shape. Raises ArtefactMismatch, OutOfDeviceMemory, DeviceLost."""
        ...


@cache
def engines() -> dict[str, str]:
    """Module by engine name. Read from the source text, so that listing imports no library."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem != "__init__":
            found[_declared_name(path)] = path.stem
    return found


def _declared_name(path: Path) -> str:
    name = _declared(path, "NAME")
    assert name is not None, f"{path.name} declares no NAME"
    return str(name)


def _declared(path: Path, constant: str) -> Any:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == constant:
            return ast.literal_eval(node.value)
    return None


def default_device(name: str) -> str:
    """Where an engine runs when nobody says: the CPU, unless its file names another device."""
    return str(_constant(name, "DEVICE") or "cpu")


def builds(name: str) -> bool:
    """Whether an engine builds something of its own from a model."""
    return bool(_constant(name, "BUILDS"))


def _constant(name: str, constant: str) -> Any:
    if name not in engines():
        return None
    return _declared(Path(__file__).with_name(f"{engines()[name]}.py"), constant)


def names() -> list[str]:
    """Every name the command line takes, planned ones too."""
    return sorted({*engines(), *_PLANNED})


def require(name: str) -> str:
    """The version of the engine's library. Raises EnvironmentLacks, with what to install, when it
    is not here."""
    return str(_module(name).version())


def load_model(
    name: str,
    path: Path,
    *,
    preset: str | None = None,
    spec_file: Path | None = None,
    classes: ClassSet | None = None,
    spec: ModelSpec | None = None,
    build: Build | None = None,
) -> Model:
    """Read `path` as the engine `name` reads it: its own kind of file, or else ONNX. `build` is for
    engines that are built from a model; others leave it aside, but refuse a rebuild."""
    own = getattr(_module(name), "load_model", model_files.load_model)
    more = {"build": build} if builds(name) else {}
    if build is not None and build.rebuild and not more:
        raise UsageError(f"--rebuild: engine {name} runs models as they are and builds nothing")
    model: Model = own(path, preset=preset, spec_file=spec_file, classes=classes, spec=spec, **more)
    return model


def open_engine(name: str, model: Model, device: str, threads: int = 1) -> Engine:
    """Raises UsageError for an unknown name, EnvironmentLacks for one that cannot run here."""
    engine: Engine = _module(name).open(model, device, threads)
    return engine


def _module(name: str) -> ModuleType:
    if name in engines():
        return import_module(f"{__name__}.{engines()[name]}")
    if name in _PLANNED:
        raise EnvironmentLacks(f"--engine {name}: {_PLANNED[name]}; use --engine ort")
    raise UsageError(f"no engine is called {name!r}; {nearest(name, names())}")
