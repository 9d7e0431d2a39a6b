"""Measures honestly: warm-up, rivals interleaved with us, order statistics, and rows that stay.

A benchmark asks one question, prints its answer, exits 5 below its targets and, with --record,
appends rows to benchmarks/results/<name>.jsonl. Rows are never changed.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
# Elsewhere where the checkout's own must not be touched: a borrowed machine brings rows home.
RESULTS = Path(os.environ.get("CADA_BENCHMARK_RESULTS", REPOSITORY / "benchmarks" / "results"))
BELOW_TARGET = 5  # exit code: a check failed
SETTLE_S = 0.03
PACKAGES = ("cada-deploy", "numpy", "torch", "onnx", "onnxruntime", "opencv-python-headless")


@dataclass(frozen=True)
class Times:
    """Wall-clock milliseconds of one contender, in the order they were taken."""

    ms: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """The measured value at that rank (no interpolation)."""
        ordered = sorted(self.ms)
        return ordered[min(int(q * len(ordered)), len(ordered) - 1)]

    @property
    def median(self) -> float:
        ordered, middle = sorted(self.ms), len(self.ms) // 2
        return (ordered[middle] + ordered[-1 - middle]) / 2

    def as_row(self) -> dict[str, float]:
        row = {f"p{round(100 * q)}_ms": self.quantile(q) for q in (0.1, 0.9, 0.99)}
        return {"median_ms": self.median, **row, "runs": len(self.ms)}


def measure(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1
) -> dict[str, Times]:
    """Times all contenders `rounds` times, taking turns, so that a slow minute of the machine falls
    on all of them. `warm_up` rounds before are thrown away. Garbage collection waits, and so do we
    before each turn: the threads of PyTorch and ONNX Runtime spin for a while after their work."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm_up + rounds):
        for name, run in contenders.items():
            gc.collect()
            gc.disable()
            time.sleep(SETTLE_S)
            try:
                start = time.perf_counter()
                run()
                elapsed = (time.perf_counter() - start) * 1e3
            finally:
                gc.enable()
            if turn >= warm_up:
                taken[name].append(elapsed)
    return {name: Times(tuple(ms)) for name, ms in taken.items()}


def ratio(slow: Times, fast: Times) -> float:
    """The median of the ratios of pairs that were measured one after the other."""
    pairs = tuple(a / b for a, b in zip(slow.ms, fast.ms, strict=True))
    return Times(pairs).median


@dataclass(frozen=True)
class Target:
    """A promise of this benchmark: found must be at least (or at most) `bound`."""

    what: str
    found: float
    bound: float
    at_most: bool = False
    unit: str = "x"

    @property
    def met(self) -> bool:
        """Written so that NaN is not met."""
        return self.found <= self.bound if self.at_most else self.found >= self.bound

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        verdict = "ok" if self.met else "BELOW TARGET"
        unit = self.unit
        found = f"{self.found:8.2f}{unit}" if self.found == self.found else "not measured"
        return f"{self.what:<44} {found}   target {sign} {self.bound:g}{unit}   {verdict}"


def verdict(targets: list[Target]) -> int:
    """Prints every target; the exit code."""
    for target in targets:
        print(target)
    return 0 if all(target.met for target in targets) else BELOW_TARGET


def how_busy() -> str:
    """A word on what else this machine is doing: ratios of short and long work suffer from it."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    busy = " - busy, do not trust the ratios" if load > 0.5 * cores else ""
    return f"load average {load:.1f} on {cores} cores{busy}"


def machine() -> dict[str, Any]:
    """What a reader needs to judge a row: processor, system, versions, commit."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        **_checkout(),
    }


def record(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends the rows of one recording; they share the machine, the command and the time."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    stamp = {
        "benchmark": name,
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
    }
    path = RESULTS / f"{name}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**stamp, **row}) + "\n" for row in rows)
    print(f"{len(rows)} rows appended to {path}")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _checkout() -> dict[str, Any]:
    """Of a copy without its history, what CADA_COMMIT says, and no word on changes."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return {"commit": os.environ.get("CADA_COMMIT", ""), "uncommitted_changes": None}
    return {"commit": commit, "uncommitted_changes": bool(_git("status", "--porcelain"))}


def _git(*arguments: str) -> str:
    try:
        ran = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""
