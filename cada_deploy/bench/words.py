"""A bench's result as text in the manner of trtexec, and what a reader must be warned of.

Works on the result's JSON alone, so that a kept file can be shown again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cada_deploy.bench.measuring import runs_for

Json = Mapping[str, Any]

ENQUEUE_SHARE = 0.8  # trtexec's own bounds, and its 2.5 % below: 0.5 % is only for locked clocks
MOST_VARIATION = 0.025
LOWER_PRECISION_GAIN = 1.05
_WIDTHS = {"float32": 32, "float16": 16, "bfloat16": 16, "float8": 8, "int8": 8}


def text(result: Json) -> str:
    return "\n".join(
        [
            "=== Model ===",
            *_model(result),
            "",
            "=== Engine only ===",
            *_engine_only(result),
            "",
            "=== End to end ===",
            *_end_to_end(result),
            *_power(result),
            *_verdicts(result),
        ]
    )


# --- parts -------------------------------------------------------------------------------------


def _model(result: Json) -> Iterator[str]:
    model, engine, options = result["model"], result["engine"], result["options"]
    height, width = model["network_input"]
    yield (
        f"Model: {model['file']}, {model['classes']} classes, "
        f"{model['precision'] or 'precision not stated'}, sha256 {model['sha256'][:12]}"
    )
    yield (
        f"Engine: {engine['name']} {engine['version']} on {engine['device']}, input "
        f"{options['batch_size']}x{height}x{width}, {_many(options['threads'], 'thread')}"
    )
    yield f"Machine: {_machine(result['machine'])}"
    yield f"Frames: {_frames(result['frames'])}"


def _machine(machine: Json) -> str:
    parts = [f"{machine['cpu']}, {machine['usable_cores']} of {machine['cores']} cores usable"]
    settings = machine["settings"]
    gpu = settings["gpu"] or {}
    if "name" in gpu:
        parts.append(f"{gpu['name']}, driver {gpu['driver']}")
    if settings["board"]:
        parts.append(settings["board"])
    if settings["nvpmodel"]:
        parts.append(settings["nvpmodel"])
    if settings["cpu_governors"]:
        parts.append(f"governor {', '.join(settings['cpu_governors'])}")
    parts.append(f"load average {machine['load_average']:.2f}")
    return "; ".join(parts)


def _frames(frames: Json) -> str:
    sizes = ", ".join(f"{h}x{w}" for h, w in frames["sizes"][:3])
    more = ", ..." if len(frames["sizes"]) > 3 else ""
    kind = (
        f"{frames['used']} drawn street scenes as PNG (--images was not given)"
        if frames["source"] == "drawn"
        else f"{frames['used']} of {_many(frames['found'], 'image file')}"
    )
    rejected = f"; {len(frames['rejected'])} cannot be decoded" if frames["rejected"] else ""
    return f"{kind}, {sizes}{more}, {frames['mean_bytes'] / 1e6:.2f} MB on average{rejected}"


def _engine_only(result: Json) -> Iterator[str]:
    part = result["engine_only"]
    yield from _opening(part)
    yield _row("Latency", part["latency"])
    if part["enqueue"] is None:
        yield "Enqueue Time, H2D and D2H Latency: none on a CPU (the call is the work)"
        yield _row("Compute Time", part["compute"])
    else:
        yield _row("Enqueue Time", part["enqueue"])
        yield _row("H2D Latency", part["h2d"])
        yield _row("GPU Compute Time", part["compute"])
        yield _row("D2H Latency", part["d2h"])
    yield f"Total Host Walltime: {part['wall_s']:.4g} s"


def _end_to_end(result: Json) -> Iterator[str]:
    part = result["end_to_end"]
    yield from _opening(part)
    yield _row("Latency", part["latency"])
    yield f"Total Host Walltime: {part['wall_s']:.4g} s"
    width = max(map(len, part["stages"]))
    total = part["latency"]["mean_ms"]
    for name, stage in part["stages"].items():
        share = stage["mean_ms"] / total if total > 0 else 0.0
        high = _percentiles(stage, separator=", ")
        yield (
            f"  {name:<{width}}  {stage['median_ms']:9.3f} ms median, {share:6.1%} of the mean"
            f"{', ' if high else ''}{high}"
        )
    rest = part["besides_network"]
    if rest["of_network"] is not None:
        yield (
            f"Everything but decoding and the network: {rest['median_ms']:.3f} ms, "
            f"{rest['of_network']:.1%} of the network's time"
        )


def _opening(part: Json) -> Iterator[str]:
    yield f"Boundary: {part['boundary']}"
    yield f"Warm-up: {_warm_up(part['warm_up'])}"
    yield (
        f"Throughput: {part['runs_per_s']:.6g} qps ({part['frames_per_s']:.6g} images/s, "
        f"{_many(part['runs'], 'run')}, every one counted)"
    )


def _warm_up(warm: Json) -> str:
    if warm["stable"] is None:
        return "none (--warm-up 0)"
    took = f"{_many(warm['runs'], 'run')} in {warm['seconds']:.2f} s"
    if warm["stable"]:
        return f"stable after {took}: {warm['criterion']}"
    return f"NEVER STABLE in {took}; asked for was: {warm['criterion']}"


def _row(title: str, series: Json) -> str:
    row = (
        f"{title}: min = {series['min_ms']:.6g} ms, max = {series['max_ms']:.6g} ms, "
        f"mean = {series['mean_ms']:.6g} ms, median = {series['median_ms']:.6g} ms"
    )
    high = _percentiles(series, separator=", ")
    too_few = [p for p, value in series["percentiles_ms"].items() if value is None]
    missing = "".join(f", percentile({p}%) needs {runs_for(float(p))} runs" for p in too_few)
    return (
        f"{row}{', ' if high else ''}{high}{missing}, "
        f"coefficient of variation = {series['coefficient_of_variation']:.2%}"
    )


def _percentiles(series: Json, separator: str) -> str:
    known = {p: v for p, v in series["percentiles_ms"].items() if v is not None and p != "50"}
    return separator.join(f"percentile({p}%) = {v:.6g} ms" for p, v in known.items())


def _power(result: Json) -> Iterator[str]:
    rows = [
        (title, meter)
        for title, part in (("engine only", "engine_only"), ("end to end", "end_to_end"))
        for meter in result[part]["meters"]
    ]
    yield ""
    yield "=== Power and clocks (whole chip or board, whoever uses it) ==="
    for title, meter in rows:
        yield f"{title}: {_meter(meter)}"
    for missing in result["not_metered"]:
        yield f"not read: {missing}"
    if not rows:
        yield "no rail, counter or clock can be read here"


def _meter(meter: Json) -> str:
    parts = [str(meter["name"])]
    if "joules_per_frame" in meter:
        parts.append(f"{meter['mean_watts']:.4g} W, {meter['joules_per_frame']:.4g} J a frame")
    elif "unit" in meter:
        parts.append(
            f"mean {meter['mean']:.5g} {meter['unit']} ({meter['min']:.5g} to {meter['max']:.5g})"
        )
    if "lost" in meter:
        parts.append(f"lost on the way: {meter['lost']}")
    return ", ".join(parts)


def _verdicts(result: Json) -> Iterator[str]:
    baseline, objective = result["baseline"], result["objective"]
    yield ""
    if baseline is not None and baseline["times_faster"] is not None:
        yield (
            f"Baseline: {baseline['median_compute_ms']:.6g} ms median compute "
            f"({baseline['precision'] or 'precision not stated'}); this model is "
            f"{baseline['times_faster']:.3g}x as fast"
        )
    if objective is not None:
        found = objective["found_ms"]
        yield (
            f"Objective: {objective['what']} {found:.6g} ms, asked for at most "
            f"{objective['max_ms']:g} ms: {'met' if objective['met'] else 'MISSED'}"
        )
    for warning in result["warnings"]:
        yield f"WARNING: {warning}"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


# --- warnings ----------------------------------------------------------------------------------


def warnings(result: Json) -> list[str]:
    """What makes the figures say less than they seem to."""
    return [
        *_unsteady(result),
        *_bound_elsewhere(result["engine_only"]),
        *_slowed(result["machine"]["settings"]),
        *_no_gain(result),
    ]


def _unsteady(result: Json) -> Iterator[str]:
    for title, part in (("engine only", "engine_only"), ("end to end", "end_to_end")):
        if result[part]["warm_up"]["stable"] is False:
            yield f"{title}: the times never became stable; what was measured still moved"
    found = result["engine_only"]["compute"]["coefficient_of_variation"]
    if not found <= MOST_VARIATION:
        yield (
            f"compute time varies by {found:.1%} (coefficient of variation; above "
            f"{MOST_VARIATION:.1%}): other work, or clocks that are not locked; compare medians"
        )


def _bound_elsewhere(part: Json) -> Iterator[str]:
    if part["enqueue"] is None:
        return
    compute = part["compute"]["median_ms"]
    if part["enqueue"]["median_ms"] > ENQUEUE_SHARE * compute:
        yield (
            f"enqueue-bound: the host takes {part['enqueue']['median_ms']:.4g} ms to enqueue "
            f"{compute:.4g} ms of work; a CUDA graph or a larger batch helps"
        )
    for key, words in (("h2d", "to the device"), ("d2h", "back from the device")):
        if part[key]["median_ms"] >= compute:
            yield (
                f"copying {words} takes {part[key]['median_ms']:.4g} ms, the work {compute:.4g} "
                "ms: transfer-bound as measured; overlap copies, or send less"
            )


def _slowed(settings: Json) -> Iterator[str]:
    reasons: Sequence[str] = (settings["gpu"] or {}).get("slowed_by") or ()
    if reasons and not isinstance(reasons, str):
        yield f"the GPU holds its clocks down: {', '.join(reasons)}"


def _no_gain(result: Json) -> Iterator[str]:
    """A model of fewer bits that is not at least 5 % faster than the one of more bits."""
    baseline = result["baseline"]
    if baseline is None:
        return
    before, now = baseline["precision"], result["model"]["precision"]
    if not (before in _WIDTHS and now in _WIDTHS and _WIDTHS[now] < _WIDTHS[before]):
        return
    faster = baseline["times_faster"]
    if faster is None or not faster >= LOWER_PRECISION_GAIN:
        yield (
            f"{now} is not faster: {0.0 if faster is None else faster:.3g}x the {before} "
            f"baseline's speed, expected at least {LOWER_PRECISION_GAIN:g}x; look for layers that "
            "stayed in the wider precision, and for added quantise and reformat steps"
        )
