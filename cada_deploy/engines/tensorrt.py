"""Engine `trt`: NVIDIA TensorRT 10.3 to 11.4 through one path, for ONNX files and built plans.

Networks are strongly typed: the ONNX says every precision, TensorRT only chooses kernels. Enum
members go by name (their integers were renumbered in 11), newer ones behind a probe. What a plan
is and whether it may run here is decided in engine_plans.py, whether it is right in
engine_gates.py; this file alone calls TensorRT. It has not run on a GPU yet (docs/tensorrt.md).
"""

from __future__ import annotations

import platform
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cada_deploy import durable, engine_cache, model_files
from cada_deploy.classes import ClassSet
from cada_deploy.device import Device, Stream, is_cuda, open_device
from cada_deploy.device_arrays import DeviceArray
from cada_deploy.engine_builds import Built, Opened, Wanted, Workshop, made
from cada_deploy.engine_plans import (
    HARDWARE,
    ONE_GPU,
    SUFFIXES,
    VERSION_COMPATIBLE,
    Build,
    Machine,
    Plan,
    PlanOptions,
    Profile,
    check_gpu,
    check_version,
    driver_version,
    parsed_version,
    profile_for,
    read_manifest,
    read_plan,
    shown,
    source_model,
    with_options,
    without_manifest,
)
from cada_deploy.engine_runs import EngineRuns, Network, image_shape, size_of
from cada_deploy.engines import open_engine
from cada_deploy.errors import ArtefactMismatch, EnvironmentLacks, RunFailed, UsageError
from cada_deploy.model_files import Model, Tensor, check_classes
from cada_deploy.model_spec import ModelSpec
from cada_deploy.progress import Bar, progress
from cada_deploy.scores import Scores

NAME = "trt"
DEVICE = "cuda:0"  # where it runs when nobody says
BUILDS = True  # load_model takes a `build`

OLDEST = (10, 3)
JETSON = Path("/etc/nv_tegra_release")


def install_line(jetson: bool = JETSON.exists()) -> str:
    """How TensorRT comes to this machine."""
    if jetson:
        return (
            "JetPack brings its own: sudo apt install python3-libnvinfer, then install cada-deploy "
            "for the system's Python in an environment that sees it: "
            "python3 -m venv --system-site-packages ENV"
        )
    if platform.machine() != "x86_64":
        return (
            "install it with: pip install 'cada-deploy[trt]' (servers with ARM; on a Jetson take "
            "JetPack's own in a venv made with --system-site-packages)"
        )
    return "install it with: pip install 'cada-deploy[trt]'"


try:
    import tensorrt as trt
except (ImportError, OSError) as error:  # OSError: the bindings are there, their library is not
    raise EnvironmentLacks(
        f"--engine trt needs NVIDIA TensorRT ({error}); {install_line()}"
    ) from error

Array = npt.NDArray[Any]
Result = TypeVar("Result")

_WIDTHS = {"FLOAT": "float32", "HALF": "float16"}


def version() -> str:
    return str(trt.__version__)


# --- models ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TensorRTModel(Model):
    """A Model with its plan, or with the wishes by which one is built."""

    build: Build = Build()
    plan: Plan | None = None


def load_model(
    path: Path,
    *,
    preset: str | None = None,
    spec_file: Path | None = None,
    classes: ClassSet | None = None,
    spec: ModelSpec | None = None,
    build: Build | None = None,
) -> Model:
    """Read an ONNX file or a built plan and settle its spec. No GPU is touched.

    A plan takes its spec from its manifest; one without needs --spec or --preset and runs
    unverified. Raises ArtefactMismatch for a plan that is not what it claims.
    """
    build = build or Build()
    if path.suffix in SUFFIXES and build.rebuild:
        build = replace(with_options(build, read_manifest(path)), out=path)
        path = _same_source(path)
    if path.suffix in SUFFIXES:
        return _planned(path, preset, spec_file, classes, spec)
    model = model_files.load_model(
        path, preset=preset, spec_file=spec_file, classes=classes, spec=spec
    )
    return TensorRTModel(**vars(model), build=build)


def _same_source(path: Path) -> Path:
    """The ONNX of a plan that is to be built anew; another model under its name is refused."""
    source, manifest = source_model(path), read_manifest(path)
    if manifest is not None:
        found = model_files.load_model(source, spec=manifest.spec).sha256
        if found != manifest.model_sha256:
            raise ArtefactMismatch(
                f"{path.name} was built from an ONNX of sha256 {manifest.model_sha256[:12]}..., "
                f"but {source} is {found[:12]}...: another model. Give it as --model {source}, or "
                "export it under a new name"
            )
    return source


def _planned(
    path: Path,
    preset: str | None,
    spec_file: Path | None,
    classes: ClassSet | None,
    spec: ModelSpec | None,
) -> TensorRTModel:
    plan = read_plan(path)
    manifest = plan.manifest
    spec = spec or model_files.stated_spec(preset, spec_file, classes)
    if spec is None:
        if manifest is None:
            raise without_manifest(path)
        spec = manifest.spec.with_classes(classes) if classes else manifest.spec
    spec = _at_one_size(spec, manifest.profile if manifest else None)
    return TensorRTModel(
        path=path,
        content=None,
        sha256=manifest.model_sha256 if manifest else plan.sha256,
        spec=spec,
        input=manifest.input if manifest else Tensor(spec.input.name, spec.input.dtype, None),
        output=manifest.output if manifest else Tensor(spec.output.name, "float32", None),
        batch=None,  # the engine pads: any number of rows may come
        classes_named=classes is not None
        or spec_file is not None
        or (manifest is not None and preset is None),
        plan=plan,
    )


def _at_one_size(spec: ModelSpec, profile: Profile | None) -> ModelSpec:
    """A plan of one size resizes every frame to it, as a model of fixed size does."""
    one = profile is not None and profile.minimum == profile.maximum
    if not one or spec.inference.mode != "whole" or spec.inference.scales != (1.0,):
        return spec
    assert profile is not None
    return replace(spec, input=replace(spec.input, size=profile.minimum))


# --- the engine --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TensorRT:
    """A plan on a GPU. Thread-safe."""

    runs: EngineRuns
    loaded: Loaded
    gpu: Device
    classes: int
    device: str
    version: str
    name: str = NAME

    def infer(self, batch: Array) -> Scores:
        """Rows go through the plan's one batch shape; a part that is left is padded."""
        return Scores(self.runs.on_host(batch))

    def infer_on(self, batch: DeviceArray, stream: Stream) -> Scores:
        """Enqueue on `stream`. The scores stay on the device, valid until the next call with the
        same `batch` address and shape."""
        scores = self.runs.on_device(batch, stream)
        return Scores(scores, self.device, scores.ready)


def open(model: Model, device: str, threads: int = 1) -> TensorRT:
    """Put a plan on `device`, building it first where the model is an ONNX file. Raises
    EnvironmentLacks without a GPU, ArtefactMismatch for a plan that is not for this machine, and
    CheckFailed when a built one is wrong."""
    _require(device)
    planned = model if isinstance(model, TensorRTModel) else TensorRTModel(**vars(model))
    plan = planned.plan
    if plan is not None:
        check_version(plan, version())  # before the GPU is touched
    gpu = open_device(device)
    machine = _machine(gpu)
    if plan is not None:
        check_gpu(plan, machine)
    else:
        plan = _made(planned, gpu, machine, threads)
    return _opened(planned, plan, gpu, device)


def _require(device: str) -> None:
    if device == "cpu":
        raise UsageError("--engine trt runs on an NVIDIA GPU; give --device cuda:0")
    if not is_cuda(device):
        raise UsageError(f"--device {device!r}; expected cuda:N, such as cuda:0")
    if parsed_version(version())[:2] < OLDEST:
        raise EnvironmentLacks(
            f"TensorRT {version()} is here; --engine trt needs {OLDEST[0]}.{OLDEST[1]} or newer "
            f"(strongly typed networks); {install_line()}"
        )


def _machine(gpu: Device) -> Machine:
    return Machine(
        version(), gpu.driver_version, driver_version(), gpu.name, gpu.compute_capability
    )


def _made(model: TensorRTModel, gpu: Device, machine: Machine, threads: int) -> Plan:
    profile = profile_for(model.spec, model.batch, model.build.options)
    precision = model_files.lowest_precision(model.path)
    wanted = Wanted(model, profile, precision, machine, model.build)

    def looked_at(plan: Plan) -> Opened:
        engine: Any = _opened(model, plan, gpu, f"cuda:{gpu.ordinal}")
        return Opened(engine, engine.loaded.inspected())

    shop = Workshop(
        build=lambda: _built(wanted, gpu),
        run=looked_at,
        reference=lambda: open_engine("ort", model, "cpu", threads),
    )
    return made(wanted, shop)


def _opened(model: Model, plan: Plan, gpu: Device, device: str) -> TensorRT:
    dla = plan.manifest.options.dla if plan.manifest else None
    loaded = Loaded(plan, gpu, model, dla)
    if plan.manifest is not None and loaded.network.profile != plan.manifest.profile:
        raise ArtefactMismatch(
            f"{plan.path} takes {loaded.network.profile.text}, its manifest says "
            f"{plan.manifest.profile.text}; one of them was changed. Build it again"
        )
    runs = EngineRuns(gpu, loaded, loaded.network, model.path.name)
    classes = loaded.classes or runs.probed_classes()
    check_classes(model.path, model.spec, classes, model.classes_named)
    verified = "" if plan.manifest is not None and plan.manifest.verified else ".unverified"
    told = f"{version()}+plan.{plan.sha256[:16]}{verified}"
    return TensorRT(runs, loaded, gpu, classes, device, told)


# --- what TensorRT says ------------------------------------------------------------------------


class Log(trt.ILogger):
    """TensorRT's last complaints. It is called from TensorRT's own threads and never raises."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self._errors: deque[str] = deque(maxlen=20)

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
            self._errors.append(msg.strip())

    @property
    def said(self) -> str:
        """What went wrong, in TensorRT's words."""
        return "; ".join(list(self._errors)[-3:]) or "TensorRT gave no reason"


def _started(make: Callable[[Log], Result], log: Log) -> Result:
    """A Builder or Runtime. Without a driver the bindings raise TypeError for a null pointer."""
    try:
        return make(log)
    except (TypeError, RuntimeError) as error:
        raise EnvironmentLacks(
            f"TensorRT {version()} cannot start: {log.said} ({error}). It needs an NVIDIA GPU and "
            "a driver for its CUDA version; `cada-deploy doctor` shows what is here"
        ) from error


def _out_of_memory(text: str) -> bool:
    low = text.lower()
    return any(w in low for w in ("out of memory", "outofmemory", "insufficient memory"))


# --- building ----------------------------------------------------------------------------------


class Monitor(trt.IProgressMonitor):
    """TensorRT's build on our progress bar, and the way to stop it. It never raises: an exception
    would have to pass through TensorRT."""

    def __init__(self, bar: Bar, stop: threading.Event) -> None:
        trt.IProgressMonitor.__init__(self)
        self._bar = bar
        self._stop = stop

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        self._bar.advance(0, phase_name)

    def phase_finish(self, phase_name: str) -> None:
        pass

    def step_complete(self, phase_name: str, step: int) -> bool:
        self._bar.advance(1)
        return not self._stop.is_set()


def _built(wanted: Wanted, gpu: Device) -> Built:
    """Raises ArtefactMismatch for a network that TensorRT cannot build (naming the operator),
    RunFailed when memory is short, KeyboardInterrupt once TensorRT has stopped."""
    stop = threading.Event()

    def work() -> Built:
        gpu.synchronize()  # makes the device current in this thread
        with progress("building", None, quiet=wanted.build.quiet, unit="steps") as bar:
            return _serialized(wanted, Monitor(bar, stop))

    # In a thread of its own, because a signal is only seen when the main thread runs Python.
    with ThreadPoolExecutor(1, "tensorrt-build") as pool:
        future = pool.submit(work)
        try:
            return future.result()
        except BaseException:
            stop.set()
            raise


def _serialized(wanted: Wanted, monitor: Monitor) -> Built:
    log = Log()
    builder = _started(trt.Builder, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(network, wanted.model, log)
    config = builder.create_builder_config()
    flags = _configure(config, builder, wanted.build.options, wanted.precision)
    _set_profile(config, builder, network, wanted)
    config.progress_monitor = monitor
    timings = wanted.build.timing_cache or engine_cache.timing_cache(wanted.machine)
    cache = _with_timings(config, timings, wanted.build.say)
    content = builder.build_serialized_network(network, config)
    if content is None:
        raise _not_built(wanted, log.said)
    _keep_timings(cache, timings)
    level = HARDWARE[wanted.build.options.hardware] if wanted.build.options.hardware else ONE_GPU
    return Built(bytes(memoryview(content)), flags, level)


def _not_built(wanted: Wanted, said: str) -> Exception:
    if _out_of_memory(said):
        return RunFailed(
            f"no memory to build {wanted.model.path.name} for {wanted.profile.text}: {said}. Free "
            "the GPU, or lower --workspace, --max-size or --batch-size"
        )
    return ArtefactMismatch(f"TensorRT {version()} cannot build {wanted.model.path.name}: {said}")


def _parse(network: trt.INetworkDefinition, model: Model, log: Log) -> None:
    parser = trt.OnnxParser(network, log)
    if model.content is not None:
        done = parser.parse(model.content)
    else:  # weights beside the file: the parser finds them by its path
        done = parser.parse_from_file(str(model.path))
    if not done:
        told = [_parser_error(parser.get_error(k)) for k in range(min(parser.num_errors, 5))]
        raise ArtefactMismatch(
            f"TensorRT {version()} does not take {model.path.name}: "
            + ("; ".join(told) or log.said)
            + ". Export the network without that operator, or run it with --engine ort"
        )
    if network.num_inputs != 1:
        raise ArtefactMismatch(
            f"{model.path.name} has {network.num_inputs} inputs; expected the image alone"
        )
    for tensor in [network.get_output(k) for k in range(network.num_outputs)]:
        if tensor.name != model.output.name:
            network.unmark_output(tensor)  # nobody reads it


def _parser_error(error: trt.ParserError) -> str:
    where = f"operator {error.node_operator()} (node {error.node()} {error.node_name()!r})"
    return f"{where}: {error.desc()} [{error.code().name}]"


def _configure(
    config: trt.IBuilderConfig, builder: trt.Builder, options: PlanOptions, precision: str
) -> tuple[str, ...]:
    """Set everything but sizes; the names of the flags that are on."""
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: float32 is to mean float32
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else no layer says its type
    flags = []
    strict = getattr(trt.BuilderFlag, "STRICT_NANS", None)  # since 10.7
    if strict is not None:
        config.set_flag(strict)
        flags.append("STRICT_NANS")
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        flags.append(VERSION_COMPATIBLE)
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.hardware is not None:
        config.hardware_compatibility_level = _hardware_level(options.hardware)
    if options.dla is not None:
        _use_dla(config, builder, options.dla, precision)
        flags.append("GPU_FALLBACK")
    return tuple(flags)


def _hardware_level(wish: str) -> trt.HardwareCompatibilityLevel:
    if wish == "ampere-plus":
        return trt.HardwareCompatibilityLevel.AMPERE_PLUS
    found = getattr(trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY", None)
    level: trt.HardwareCompatibilityLevel | None = found  # since 10.13
    if level is None:
        raise EnvironmentLacks(
            f"TensorRT {version()} cannot build for every GPU of one compute capability; take "
            "--hardware-compatible ampere-plus, or TensorRT 10.13 or newer"
        )
    return level


def _use_dla(config: trt.IBuilderConfig, builder: trt.Builder, core: int, precision: str) -> None:
    if not 0 <= core < builder.num_DLA_cores:
        raise EnvironmentLacks(
            f"--dla {core}: TensorRT {version()} finds {builder.num_DLA_cores} DLA cores here "
            "(AGX Orin and Orin NX have them; TensorRT 10.8 to 11.3 does not use them)"
        )
    if precision == "float32":
        raise UsageError("--dla: a DLA computes in float16 or int8; this graph is float32")
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)


def _set_profile(
    config: trt.IBuilderConfig,
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    wanted: Wanted,
) -> None:
    image = network.get_input(0)
    if all(d >= 0 for d in tuple(image.shape)):
        return  # nothing to choose
    profile, layout = wanted.profile, wanted.model.spec.input.layout
    low, best, high = (
        trt.Dims(list(image_shape(profile.batch, size, layout)))
        for size in (profile.minimum, profile.optimum, profile.maximum)
    )
    chosen = builder.create_optimization_profile()
    chosen.set_shape(image.name, low, best, high)
    if config.add_optimization_profile(chosen) < 0:
        raise ArtefactMismatch(
            f"TensorRT {version()} refuses the sizes {profile.text} for {wanted.model.path.name}"
        )


def _with_timings(
    config: trt.IBuilderConfig, path: Path, say: Callable[[str], None]
) -> trt.ITimingCache:
    """Kernel times of earlier builds. A cache of another GPU or version, or a damaged one, is left
    aside and said; it costs time, never correctness."""
    old = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(old)
    if cache is not None and config.set_timing_cache(cache, False):
        return cache
    say(f"{path} is not a timing cache for this TensorRT and GPU; starting a new one")
    fresh = config.create_timing_cache(b"")
    config.set_timing_cache(fresh, False)
    return fresh


def _keep_timings(cache: trt.ITimingCache, path: Path) -> None:
    content = bytes(memoryview(cache.serialize()))
    with engine_cache.locked(path):
        durable.make_folder(path.parent)
        durable.write_file(path, content, engine_cache.PRIVATE_FILE)


# --- a plan in memory --------------------------------------------------------------------------


class Loaded:
    """A deserialised plan: its names, types and sizes as TensorRT gives them."""

    def __init__(self, plan: Plan, gpu: Device, model: Model, dla: int | None) -> None:
        gpu.synchronize()  # makes the device current: TensorRT allocates on the current one
        self.log = Log()
        self._runtime = _started(trt.Runtime, self.log)  # must outlive the engine
        if plan.version_compatible:
            # Such a plan carries a lean runtime, which is host code; its manifest vouches for it.
            self._runtime.engine_host_code_allowed = True
        if dla is not None:
            self._runtime.DLA_core = dla
        self.engine = self._runtime.deserialize_cuda_engine(plan.content)
        if self.engine is None:
            raise self._refusal(plan)
        self.layout = model.spec.input.layout
        self.input, self.output = self._names(plan, model)
        kinds = self._dtype(plan, self.input), self._dtype(plan, self.output)
        self.network = Network(self.layout, *kinds, self._profile())

    def _refusal(self, plan: Plan) -> Exception:
        if _out_of_memory(self.log.said):
            return RunFailed(f"no memory on the GPU for {plan.path.name}: {self.log.said}")
        return ArtefactMismatch(
            f"TensorRT {version()} refuses {plan.path}: {self.log.said}. Build it again here"
        )

    def _names(self, plan: Plan, model: Model) -> tuple[str, str]:
        names = [self.engine.get_tensor_name(k) for k in range(self.engine.num_io_tensors)]
        into = [n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        out = [n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        wanted_in, wanted_out = model.spec.input.name, model.spec.output.name
        if len(into) != 1 or len(out) != 1:
            raise ArtefactMismatch(
                f"{plan.path} has inputs {into} and outputs {out}; expected one image and its "
                "scores"
            )
        if wanted_in not in ("", into[0]) or wanted_out not in ("", out[0]):
            raise ArtefactMismatch(
                f"{plan.path} has input {into[0]!r} and output {out[0]!r}; its spec says "
                f"{wanted_in!r} and {wanted_out!r}"
            )
        return into[0], out[0]

    def _dtype(self, plan: Plan, name: str) -> np.dtype[Any]:
        kind = self.engine.get_tensor_dtype(name).name
        if kind not in _WIDTHS or len(tuple(self.engine.get_tensor_shape(name))) != 4:
            raise ArtefactMismatch(
                f"{plan.path}: {name!r} is {kind} of shape "
                f"{tuple(self.engine.get_tensor_shape(name))}; expected a float32 or float16 "
                "tensor of rank 4"
            )
        if self.engine.get_tensor_format(name) != trt.TensorFormat.LINEAR:
            raise ArtefactMismatch(f"{plan.path}: {name!r} is not laid out row by row (LINEAR)")
        return np.dtype(_WIDTHS[kind])

    def _profile(self) -> Profile:
        shape = tuple(self.engine.get_tensor_shape(self.input))
        shapes = [shape] * 3
        if any(d < 0 for d in shape):
            shapes = [tuple(s) for s in self.engine.get_tensor_profile_shape(self.input, 0)]
        low, best, high = (size_of(s, self.layout) for s in shapes)
        return Profile(low, best, high, shapes[2][0])

    @property
    def classes(self) -> int | None:
        """From the plan itself; None where it is known only with the input's shape."""
        found = tuple(self.engine.get_tensor_shape(self.output))[1]
        return found if found > 0 else None

    def inspected(self) -> str:
        inspector = self.engine.create_engine_inspector()
        return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

    def context(self, shape: tuple[int, ...], stream: Stream) -> Context:
        """A new context for one input shape. Raises RunFailed when the GPU has no room for it."""
        raw = self.engine.create_execution_context()
        if raw is None:
            raise RunFailed(
                f"no memory on the GPU for another pass at {shown(size_of(shape, self.layout))}: "
                f"{self.log.said}. Use fewer --workers, a smaller --size or --batch-size"
            )
        done = raw.set_optimization_profile_async(0, stream.handle)
        if not done or not raw.set_input_shape(self.input, shape) or raw.infer_shapes():
            raise ArtefactMismatch(f"TensorRT refuses input shape {shape}: {self.log.said}")
        return Context(self, raw)


class Context:
    """An execution context at one input shape."""

    def __init__(self, loaded: Loaded, raw: trt.IExecutionContext) -> None:
        self._loaded = loaded  # the engine must outlive its contexts
        self._raw = raw
        self.scores = tuple(raw.get_tensor_shape(loaded.output))

    def execute(self, image: int, scores: int, stream: Stream) -> None:
        raw, loaded = self._raw, self._loaded
        if not (
            raw.set_tensor_address(loaded.input, image)
            and raw.set_tensor_address(loaded.output, scores)
            and raw.execute_async_v3(stream.handle)
        ):
            raise RunFailed(f"TensorRT could not run the network: {loaded.log.said}")
