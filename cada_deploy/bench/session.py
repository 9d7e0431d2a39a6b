"""One bench: load the model, warm up, measure the engine alone and then bytes to labels."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from cada_deploy import __version__, device_frames, durable
from cada_deploy.bench import power
from cada_deploy.bench.cuda import device_json, open_on_device
from cada_deploy.bench.frames import Frames, drawn, from_files
from cada_deploy.bench.host import open_host
from cada_deploy.bench.measuring import FrameTimes, RunTimes, Series, Subject, repeated, runs_for
from cada_deploy.bench.measuring import warm_up as warmed_up
from cada_deploy.bench.words import warnings
from cada_deploy.device import Device, is_cuda, open_device
from cada_deploy.engines import DeviceEngine
from cada_deploy.errors import ArtefactMismatch, UsageError
from cada_deploy.fused import best_kernel
from cada_deploy.labelling import ModelChoice
from cada_deploy.model_files import Model, lowest_precision
from cada_deploy.model_spec import Size
from cada_deploy.pipeline import Pipeline, Sizes
from cada_deploy.progress import progress

SCHEMA = 1
PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
DRAWN_SIZE = (512, 1024)  # of frames drawn for a model that takes any size
OBJECTIVE = 99.0
_PACKAGES = (
    "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "opencv-python-headless", "torch",
    "cuda-core", "cuda-bindings", "pycuda", "nvidia-ml-py", "tensorrt",
)  # fmt: skip

Json = dict[str, Any]
Taken = TypeVar("Taken")


@dataclass(frozen=True)
class BenchOptions:
    """A bench as it was asked for."""

    model: ModelChoice
    size: Size | None = None
    images: Path | None = None
    batch_size: int = 1
    duration_s: float = 10.0
    iterations: int = 10
    warm_up_s: float = 10.0
    percentiles: tuple[float, ...] = PERCENTILES
    threads: int = 1
    png: bool = False
    max_p99_ms: float | None = None
    baseline: Path | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.duration_s) and self.duration_s >= 0):
            raise UsageError(f"--duration is {self.duration_s}; expected seconds, 0 or more")
        if not (math.isfinite(self.warm_up_s) and self.warm_up_s >= 0):
            raise UsageError(f"--warm-up is {self.warm_up_s}; expected seconds, 0 for none")
        if not self.percentiles or not all(0 < p < 100 for p in self.percentiles):
            raise UsageError(f"--percentile is {self.percentiles}; expected numbers in 0..100")
        if self.max_p99_ms is not None and not self.max_p99_ms > 0:
            raise UsageError(f"--max-p99-ms is {self.max_p99_ms}; expected milliseconds above 0")

    @property
    def runs(self) -> int:
        """An objective needs a percentile that is more than the maximum."""
        return (
            self.iterations
            if self.max_p99_ms is None
            else max(self.iterations, runs_for(OBJECTIVE))
        )

    def to_json(self) -> Json:
        return {
            "size": list(self.size) if self.size else None,
            "images": None
            if self.images is None
            else os.fsencode(self.images).decode(errors="backslashreplace"),
            "batch_size": self.batch_size,
            "duration_s": self.duration_s,
            "iterations": self.iterations,
            "warm_up_limit_s": self.warm_up_s,
            "threads": self.threads,
            "png": self.png,
        }


@dataclass(frozen=True)
class BenchResult:
    """What was measured, as JSON (schemas/bench.schema.json) and every run of the engine."""

    data: Json
    runs: tuple[RunTimes, ...]

    @property
    def met(self) -> bool:
        """The objective, if one was asked for. Written so that NaN is not met."""
        objective = self.data["objective"]
        return objective is None or bool(objective["met"])


def bench(options: BenchOptions) -> BenchResult:
    """Measure. Raises CadaError for whatever keeps the model from running as asked."""
    baseline = None if options.baseline is None else read_baseline(options.baseline)
    model, pipeline = open_pipeline(
        options.model, options.size, threads=options.threads, batch=options.batch_size
    )
    engine = pipeline.engine
    assert engine is not None
    gpu = open_device(engine.device) if is_cuda(engine.device) else None
    frames = _frames(options, pipeline)
    subject = _subject(options, pipeline, frames, gpu)
    if baseline is not None:
        _check_comparable(baseline, options, engine.device, subject.network)
    meters = power.meters(engine.device)
    engine_only, runs = _engine_only(subject, options, meters)
    end_to_end, frame_runs = _end_to_end(
        subject, options, meters, engine_only["compute"]["median_ms"]
    )
    data: Json = {
        "schema": SCHEMA,
        "cada_deploy": __version__,
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(_printable(a) for a in sys.argv),
        "model": _model_json(options, model, subject),
        "engine": {"name": engine.name, "version": engine.version, "device": engine.device},
        "machine": _machine(engine.device),
        "gpu": None if gpu is None else device_json(gpu),
        "options": options.to_json(),
        "frames": frames.to_json(),
        "engine_only": engine_only,
        "end_to_end": end_to_end,
        "not_metered": list(meters.missing),
        "objective": _objective(options, frame_runs),
        "baseline": None,
    }
    if baseline is not None:
        data["baseline"] = _compared(baseline, data)
    return BenchResult({**data, "warnings": warnings(data)}, tuple(runs))


def _frames(options: BenchOptions, pipeline: Pipeline) -> Frames:
    if options.images is not None:
        return from_files(options.images)
    with progress("drawing scenes", None, unit="sets", quiet=options.quiet) as bar:
        made = drawn(options.size or pipeline.spec.input.size or DRAWN_SIZE)
        bar.advance(1)
    return made


def open_pipeline(
    choice: ModelChoice, size: Size | None, *, threads: int = 1, batch: int = 1
) -> tuple[Model, Pipeline]:
    """The pipeline that a run of this model would use."""
    model, engine = choice.load(threads)
    frames = device_frames.for_engine(engine, model.spec, most=batch)
    pipeline = Pipeline(
        engine, best_kernel(threads), model.spec, Sizes(input=size), on_device=frames
    )
    return model, pipeline


def _subject(
    options: BenchOptions, pipeline: Pipeline, frames: Frames, gpu: Device | None
) -> Subject:
    host = open_host(pipeline, frames, options.batch_size, options.png)
    engine = pipeline.engine
    if gpu is None or not isinstance(engine, DeviceEngine):
        return host
    return open_on_device(host, gpu, engine)


# --- the two measurements ----------------------------------------------------------------------


def _engine_only(
    subject: Subject, options: BenchOptions, meters: power.Meters
) -> tuple[Json, list[RunTimes]]:
    since = time.perf_counter()
    found, runs = _measured(
        "engine only",
        lambda k: subject.engine_run(k, since),
        lambda run: run.latency_ms,
        options,
        meters,
    )
    first = runs[0].start_enqueue
    runs = [RunTimes(*(at - first for at in astuple(run))) for run in runs]
    parts = {
        "enqueue": [run.enqueue_ms for run in runs],
        "h2d": [run.h2d_ms for run in runs],
        "compute": [run.compute_ms for run in runs],
        "d2h": [run.d2h_ms for run in runs],
    }
    for name, ms in parts.items():
        asked = subject.enqueues or name == "compute"
        found[name] = Series(tuple(ms)).to_json(options.percentiles) if asked else None
    return {"boundary": subject.engine_boundary, **found}, runs


def _end_to_end(
    subject: Subject, options: BenchOptions, meters: power.Meters, engine_ms: float
) -> tuple[Json, list[FrameTimes]]:
    found, runs = _measured(
        "end to end", subject.frame_run, lambda run: run.total_ms, options, meters
    )
    stages = {
        stage: Series(tuple(run.stages_ms.get(stage, 0.0) for run in runs))
        for stage in runs[0].stages_ms
    }
    stages["other"] = Series(tuple(r.total_ms - math.fsum(r.stages_ms.values()) for r in runs))
    return {
        "boundary": subject.frame_boundary,
        **found,
        "stages": {name: s.to_json(options.percentiles) for name, s in stages.items()},
        "besides_network": besides_network(runs, engine_ms),
    }, runs


def besides_network(runs: Sequence[FrameTimes], engine_ms: float) -> Json:
    """Everything but the network and the decoder, and as a share of the network's time: medians
    over the runs. Where the network is not a stage of its own (on a GPU nothing waits for it
    alone), its time is the median of the engine's own measurement."""

    def network(run: FrameTimes) -> float:
        return run.stages_ms.get("infer", engine_ms)

    rest = Series(
        tuple(run.total_ms - run.stages_ms.get("decode", 0.0) - network(run) for run in runs)
    ).median
    through = Series(tuple(map(network, runs))).median
    return {"median_ms": rest, "of_network": rest / through if through > 0 else None}


def _measured(
    title: str,
    run: Callable[[int], Taken],
    latency_ms: Callable[[Taken], float],
    options: BenchOptions,
    meters: power.Meters,
) -> tuple[Json, list[Taken]]:
    """Warm up, then measure with the meters read."""
    with progress(f"{title}, warm-up", None, unit="runs", quiet=options.quiet) as bar:

        def one(k: int) -> None:
            run(k)
            bar.advance()

        warm = warmed_up(one, options.warm_up_s)
    with (
        progress(title, None, unit="runs", quiet=options.quiet) as bar,
        power.sampled(meters) as readings,
    ):
        taken, wall_s = repeated(run, options.duration_s, options.runs, bar.advance)
    frames = len(taken) * options.batch_size
    latency = Series(tuple(latency_ms(t) for t in taken))
    return {
        "warm_up": warm.to_json(),
        "runs": len(taken),
        "frames": frames,
        "wall_s": wall_s,
        "runs_per_s": len(taken) / wall_s,
        "frames_per_s": frames / wall_s,
        "latency": latency.to_json(options.percentiles),
        "meters": [reading.to_json(frames) for reading in readings],
    }, taken


def _objective(options: BenchOptions, runs: Sequence[FrameTimes]) -> Json | None:
    if options.max_p99_ms is None:
        return None
    found = Series(tuple(run.total_ms for run in runs)).percentile(OBJECTIVE)
    assert found is not None  # BenchOptions.runs saw to it
    return {
        "what": "p99 of the end-to-end latency",
        "max_ms": options.max_p99_ms,
        "found_ms": found,
        "met": found <= options.max_p99_ms,
    }


# --- what a reader needs to judge the figures ---------------------------------------------------


def _model_json(options: BenchOptions, model: Model, subject: Subject) -> Json:
    onnx = model.path.suffix == ".onnx"
    return {
        "file": _printable(model.path.name),
        "sha256": model.sha256,
        "precision": lowest_precision(model.path) if onnx else None,
        "classes": len(model.spec.classes),
        "network_input": list(subject.network),
        "spec": model.spec.to_json(),
    }


def _machine(device: str) -> Json:
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: v for name in _PACKAGES if (v := _version(name))},
        "settings": power.settings(device),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _printable(text: str) -> str:
    return os.fsencode(text).decode(errors="backslashreplace")


# --- against an earlier result ------------------------------------------------------------------


def read_baseline(path: Path) -> Json:
    """The result file of an earlier bench. Raises ArtefactMismatch for another kind of file."""
    try:
        data: Json = durable.read_json(path)
        data["engine_only"]["compute"]["median_ms"] + 0.0
        data["model"]["sha256"], data["options"]["batch_size"], data["engine"]["device"]
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactMismatch(
            f"--baseline {path} is not a result of cada-deploy bench --json: {error!r}"
        ) from error
    return data


def _check_comparable(baseline: Json, options: BenchOptions, device: str, network: Size) -> None:
    pairs = {
        "device": (baseline["engine"]["device"], device),
        "batch size": (baseline["options"]["batch_size"], options.batch_size),
        "network input": (baseline["model"]["network_input"], list(network)),
        "threads": (baseline["options"]["threads"], options.threads),
        "processor": (baseline["machine"]["cpu"], _cpu_name()),
        "GPU": (_gpu_name(baseline["machine"]["settings"]), _gpu_name(power.settings(device))),
    }
    different = [f"{what}: {a} there, {b} now" for what, (a, b) in pairs.items() if a != b]
    if different:
        raise ArtefactMismatch(
            f"--baseline {options.baseline} was measured otherwise ({'; '.join(different)}); "
            "measure both in the same way"
        )


def _gpu_name(settings: Json) -> str | None:
    return (settings["gpu"] or {}).get("name")


def _compared(baseline: Json, data: Json) -> Json:
    before = baseline["engine_only"]["compute"]["median_ms"]
    now = data["engine_only"]["compute"]["median_ms"]
    return {
        "model_sha256": baseline["model"]["sha256"],
        "precision": baseline["model"]["precision"],
        "median_compute_ms": before,
        "times_faster": before / now if now > 0 else None,
    }
