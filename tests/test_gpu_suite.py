"""The GPU suite is ready: its script, its benchmarks' refusals, and their logic on stand-ins.

No GPU is behind any of this. Where one is, benchmarks/gpu.sh itself is the test.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command_line import cada
from cuda_executor import build
from cuda_executor.layer import ProcessorDevice

from cada_deploy.device import open_device
from cada_deploy.errors import CadaError
from cada_deploy.fused import cuda, native

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
BENCHMARKS = {
    "fused_gpu.py": (),
    "gpu_end_to_end.py": (),
    "latency.py": ("--device", "cuda:0"),
    "sanitizer_driver.py": (),
}

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="not run: needs bash")
needs_executor = pytest.mark.skipif(
    build.compiler() is None or not native.is_built(), reason="not run: needs g++"
)


def suite(*arguments: str, script: Path = SCRIPT, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, **more}
    return subprocess.run(
        ["bash", str(script), *arguments], capture_output=True, text=True, env=environment
    )


def gpu_is_here() -> bool:
    try:
        open_device("cuda:0")
    except CadaError:
        return False
    return True


@pytest.fixture
def benchmark_named(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a benchmark as running it does: from its own folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


# --- the script --------------------------------------------------------------------------------


@needs_bash
def test_the_script_is_sound() -> None:
    done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert suite("--no-such-option").returncode == 2


@needs_bash
def test_everything_the_suite_names_exists() -> None:
    done = suite("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in (
        "describe", "build", "contracts", "kernels", "pycuda_layer", "fused_gpu", "end_to_end",
        "latency", "bench", "memcheck", "racecheck",
    ):  # fmt: skip
        assert f"\n{stage}, at most " in f"\n{done.stdout}", stage
    seconds = int(done.stdout.rpartition("at most ")[2].split()[0])
    assert 0 < seconds < 540


@needs_bash
@pytest.mark.parametrize(
    ("stage", "old", "new", "words"),
    [
        ("bench", "--warm-up", "--cool-down", "has no --cool-down"),
        ("fused_gpu", "fused_gpu.py", "gone.py", "there is no "),
        ("kernels", "test_cuda_plans.py", "test_gone.py", "file or directory not found"),
    ],
)
def test_a_dry_run_finds_what_is_missing(
    stage: str, old: str, new: str, words: str, tmp_path: Path
) -> None:
    for name in ("tests", "cada_deploy", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "benchmarks").mkdir()
    script = tmp_path / "benchmarks" / "gpu.sh"
    text = SCRIPT.read_text()
    assert old in text
    script.write_text(text.replace(old, new))
    done = suite("--dry-run", stage, script=script)
    assert done.returncode == 1 and words in done.stdout, done.stdout + done.stderr


@needs_bash
def test_without_a_gpu_the_suite_says_so(tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nexit 9\n")
    smi.chmod(0o755)
    done = suite(OUT=str(tmp_path / "out"), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 3 and "not run: nvidia-smi finds no GPU" in done.stdout


@needs_bash
def test_a_failed_stage_hides_no_other(tmp_path: Path) -> None:
    """On a host that claims a GPU and has none: each stage says why it could not run."""
    if gpu_is_here():
        pytest.skip("not run: a GPU is here")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho made up\n")
    smi.chmod(0o755)
    out, script = tmp_path / "out", tmp_path / "benchmarks" / "gpu.sh"
    script.parent.mkdir()
    broken = SCRIPT.read_text().replace("kernels() {\n", "kernels() {\n  echo planted; return 7\n")
    script.write_text(broken)
    for name in BENCHMARKS:
        (script.parent / name).symlink_to(ROOT / "benchmarks" / name)
    done = suite(
        "kernels", "memcheck", "end_to_end", script=script, OUT=str(out),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    rows = [json.loads(line) for line in (out / "stages.jsonl").read_text().splitlines()]
    found = {row["stage"]: row["exit"] for row in rows}
    assert found.pop("build") == 1, "there is nothing to install in that folder"
    assert found == {"describe": 0, "carry": 3, "kernels": 7, "memcheck": 3, "end_to_end": 3}
    summary = (out / "summary.txt").read_text()
    assert "carry: NOT RUN: not run: there is no folder" in summary
    assert "kernels: FAILED: exit 7: planted" in summary
    assert "end_to_end: NOT RUN: not run: " in summary
    assert "=== kernels\nplanted\n" in (out / "logs.txt").read_text()


# --- the benchmarks ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_without_a_gpu_a_benchmark_exits_3_with_the_reason(name: str) -> None:
    if gpu_is_here():
        pytest.skip("not run: a GPU is here")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *BENCHMARKS[name]],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith(("not run: ", "not measured: ")), done.stdout


@needs_executor
def test_the_fused_benchmark_compares_and_judges(
    benchmark_named: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch", reason="not run: needs PyTorch")
    names = ("fused_gpu", "gpu_launch", "gpu_timing", "rivals")
    fused_gpu, gpu_launch, gpu_timing, rivals = map(benchmark_named, names)
    monkeypatch.setattr(rivals, "LOW", (9, 17))
    monkeypatch.setattr(rivals, "SIZE", (64, 128))

    def cannot(order: str, z: Any) -> list[Callable[[], Any]]:
        def run() -> Any:
            raise RuntimeError("no compiler here")

        return [run, run]

    def measured(contenders: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 3) -> Any:
        for run in contenders.values():
            run()
        stream.synchronize()
        times = {"ours": 2.0, "PyTorch eager": 80.0, "bare loop": 1.0}
        return {name: gpu_timing.GpuTimes((times.get(name, 5.0),) * 3, 1) for name in contenders}

    monkeypatch.setattr(rivals, "compiled", cannot)
    monkeypatch.setattr(gpu_timing, "measure", measured)
    monkeypatch.setattr(gpu_launch, "bare_loop", lambda *_: lambda: None)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    device = ProcessorDevice()
    stream = device.stream()
    monkeypatch.setattr(device, "borrowed_stream", lambda _: stream, raising=False)
    bench = fused_gpu.Bench(device, SimpleNamespace(cuda_stream=0), quick=True)

    rows, targets = fused_gpu.of_batch(bench, 8)
    assert [row["case"] for row in rows] == [
        "batch 8, logits, bare loop", "batch 8, logits, PyTorch eager",
        "batch 8, probs, PyTorch eager",
    ]  # fmt: skip
    assert rows[1]["theirs_of_ours"] == 40 and rows[1]["ours"]["caught_up_runs"] == 1
    json.dumps(rows)
    met = {target.what.split(" of ")[0]: target.met for target in targets}
    assert met == {
        "PyTorch eager": True,
        "torch.compile": False,
        "bare loop": False,
        "a frame, batch 8": False,
    }
    assert "not measured" in str(next(t for t in targets if "torch.compile" in t.what))

    encoded = fused_gpu.encoded_batch(2)
    ours = gpu_launch.accumulate(device, stream, torch.from_numpy(encoded), (64, 128), "logits")
    results = ours.results()
    fused_gpu.check_bytes(results, ours, encoded)
    with pytest.raises(fused_gpu.Different, match="labels of frame 0, order logits"):
        fused_gpu.check_bytes(results, ours, encoded[::-1])


@needs_executor
def test_the_sanitizers_driver_compares_with_the_cpu(
    benchmark_named: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = benchmark_named("sanitizer_driver")
    monkeypatch.setattr(driver, "CLASSES", (19, 65))
    assert driver.different(ProcessorDevice()) == []
    monkeypatch.setattr(driver, "SHAPES", driver.SHAPES[:1])
    right = cuda.Kernel.count
    monkeypatch.setattr(cuda.Kernel, "count", lambda *arguments: right(*arguments) + 1)
    found = driver.different(ProcessorDevice())
    assert len(found) == 4 and all(what.endswith(": counted") for what in found)


@needs_executor
def test_a_finished_run_is_held_against_both_kernels(
    benchmark_named: Callable[[str], ModuleType], frames: Path, colour_model: Path, tmp_path: Path
) -> None:
    end_to_end = benchmark_named("gpu_end_to_end")
    out = tmp_path / "out"
    ran = cada(
        "pseudo-label", "--model", colour_model, "--preset", "imagenet-rgb", "--images", frames,
        "--out", out, "--shard-size", 3, "--cache", "on",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    run = end_to_end.Finished.read(out)
    kernels = {"CPU": native.Kernel(), "CUDA": cuda.Kernel(device=ProcessorDevice())}
    assert len(run.frames) == 7 and run.statistics.pixels.sum() > 0
    assert end_to_end.different(run, kernels) == []
    same = end_to_end.agreement(run, run)
    assert same["equal_pixels"] == same["equal_of_both_kept"] == 1.0

    first = run.frames[0]
    other = replace(first, labels=np.full_like(first.labels, 3))
    wrong = replace(run, frames=(other, *run.frames[1:-1]))
    assert end_to_end.different(wrong, {"CPU": kernels["CPU"]}) == [
        "the CPU kernel's statistics",
        "the CPU kernel's labels of 1 of 6 frames",
    ]
    assert (
        end_to_end.agreement(run, replace(run, frames=(other, *run.frames[1:])))["equal_pixels"] < 1
    )


def test_overlap_takes_turns_and_counts_every_frame(
    benchmark_named: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    colour_model: Path,
) -> None:
    latency = benchmark_named("latency")
    monkeypatch.setattr(latency, "SIZE", (48, 64))
    choice = latency.ModelChoice(colour_model, preset="imagenet-rgb")
    _, pipeline = latency.open_pipeline(choice, (48, 64), batch=2)
    row = latency.overlap("colours", pipeline, 6, 2, 4)
    assert row["frames"] == 6 and {len(v) for v in row["images_per_s"].values()} == {2}
    pairs = zip(*row["images_per_s"].values())
    shares = sorted(both / min(decoding, gpu) for decoding, gpu, both in pairs)
    assert row["of_the_slower"] == pytest.approx(sum(shares) / 2)
