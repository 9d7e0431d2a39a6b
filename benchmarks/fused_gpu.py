"""Is the fused kernel on a GPU as fast as its arithmetic allows, and how far ahead of PyTorch?

Frames of 19 classes, 129x257 -> 1024x2048, batches of 8 and 1: statistics with confidence weights,
labels and entropy, both upsample orders. Rivals on the same scores, with the same outputs: PyTorch
eager and torch.compile (the faster of two ways to sum per class), and a bare loop of the kernel's
own arithmetic without memory (bare_loop.cu), which no kernel of these bits can beat. First the
GPU's bytes are compared with the CPU kernel's. Times are medians of pairs that took turns, between
CUDA events, the L2 flushed before every run. Exits 3 without a GPU and says why, 4 when bytes
differ, 5 below a target.

    python benchmarks/fused_gpu.py [--quick] [--record]     rows: results/fused_gpu.jsonl
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from harness import Target, ratio, record, verdict

from cada_deploy.device import Device, open_device
from cada_deploy.errors import CadaError
from cada_deploy.fused import Evidence, native
from cada_deploy.labelling import cores
from cada_deploy.scores import EncodedScores
from cada_deploy.statistics import UNIT

BATCHES = (8, 1)
OURS, EAGER, COMPILED, BARE = "ours", "PyTorch eager", "torch.compile", "bare loop"
TARGETED = (8, "logits")  # batch and order of the targets
MOST_US = 40.0  # a frame
LEAST = {EAGER: 25.0, COMPILED: 4.0}
LEAST_OF_BARE = 0.6
NOT_HERE, WRONG = 3, 4  # exit codes: the environment lacks a GPU; bytes differ


class Different(Exception):
    """The GPU's bytes are not the CPU's; the message says where."""


def encoded_batch(batch: int) -> np.ndarray[Any, Any]:
    """(N, C, h, w) float16: what the CPU kernel makes of the rivals' scores."""
    import rivals

    kernel = native.Kernel(cores())
    return kernel.encode(rivals.scores(batch).numpy(), "logits")


def check_bytes(found: list[Evidence], ours: Any, encoded: np.ndarray[Any, Any]) -> None:
    """Labels, entropies, sums and histograms of every frame. Raises Different."""
    kernel = native.Kernel(cores())
    for n, (gpu, frame) in enumerate(zip(found, encoded, strict=True)):
        scores = EncodedScores(frame, ours.upsampling)
        cpu = kernel.accumulate(scores, ours.size, "confidence", labels=True, entropy=True)
        for what, (theirs, expected) in _pairs(gpu, cpu).items():
            if not np.array_equal(theirs, expected):
                raise Different(
                    f"{what} of frame {n}, order {ours.upsampling.order}: "
                    f"{np.count_nonzero(theirs != expected)} of {expected.size} values differ from "
                    "the CPU kernel's"
                )


def _pairs(gpu: Evidence, cpu: Evidence) -> dict[str, tuple[Any, Any]]:
    assert gpu.entropy is not None and cpu.entropy is not None
    ours, theirs = gpu.statistics, cpu.statistics
    return {
        "labels": (gpu.labels, cpu.labels),
        "entropy": (gpu.entropy.view(np.uint32), cpu.entropy.view(np.uint32)),
        "sums": (ours.sums, theirs.sums),
        "histogram": (ours.histogram, theirs.histogram),
        "left out": (
            np.array([ours.invalid, ours.masked]),
            np.array([theirs.invalid, theirs.masked]),
        ),
    }


def check_rival(rival: tuple[Any, ...], ours: list[Evidence]) -> str:
    """The rival does the same work: nearly all labels and, to tolerance, the sums are ours."""
    label, entropy, sums, pixels = (part.cpu().numpy() for part in rival)
    labels, entropies = (np.stack([getattr(e, k) for e in ours]) for k in ("labels", "entropy"))
    own = np.stack([e.statistics.sums for e in ours]).astype(np.float64) / UNIT
    same = float((label == labels).mean())
    far = float(np.abs(entropy - entropies).max())
    off = float(np.abs(sums - own).max() / own.max())
    if not (same > 0.999 and far < 1e-2 and off < 1e-3 and int(pixels.sum()) == label.size):
        raise Different(f"rival: {same:.2%} of labels, entropy off {far:.2g}, sums off {off:.2g}")
    return f"labels {same:.4%}, entropy within {far:.1e}, sums within {off:.1e} of their largest"


def best_rival(makers: list[Callable[[], Any]], quick: bool) -> tuple[Callable[[], Any], int]:
    """The faster of the ways to sum, and which it is."""
    import gpu_timing

    times = gpu_timing.measure({str(k): run for k, run in enumerate(makers)}, 2 if quick else 5, 2)
    fastest = min(times, key=lambda k: times[k].median)
    return makers[int(fastest)], int(fastest)


@dataclass(frozen=True)
class Bench:
    """The GPU that is measured, and a stream of torch's on it."""

    device: Device
    stream: Any  # torch's
    quick: bool
    fastest: dict[tuple[str, str], int] = field(default_factory=dict)  # rival and order -> its way

    @property
    def rounds(self) -> int:
        return 9 if self.quick else 41

    def row(self, **more: Any) -> dict[str, Any]:
        import torch

        device = self.device
        gpu = {
            "name": device.name,
            "layer": device.layer,
            "driver_cuda": device.driver_version,
            "multiprocessors": device.multiprocessors,
            "torch": torch.__version__,
            "clocks_sm_max_power_limit": _clock(),
        }
        return {
            "gpu": gpu, "shape": "19x129x257 -> 1024x2048", "caches": "L2 flushed",
            "bytes_equal_the_cpus": True, **more,
        }  # fmt: skip


def of_batch(bench: Bench, batch: int) -> tuple[list[dict[str, Any]], list[Target]]:
    """Rows of one batch size, and the targets that it decides."""
    import torch

    encoded = encoded_batch(batch)
    rows: list[dict[str, Any]] = []
    targets: list[Target] = []
    with torch.cuda.stream(bench.stream):
        scores = torch.from_numpy(encoded).cuda()
        for order in ("logits", "probs"):
            found = of_order(bench, encoded, scores, order)
            for name, (own, other) in found.items():
                us, factor = own.median * 1e3 / batch, ratio(other, own)
                print(
                    f"  ours {us:8.2f} us a frame   {name:<14} "
                    f"{other.median * 1e3 / batch:9.2f} us a frame   {factor:7.2f}x ours"
                    + (f"   ({own.caught_up} of ours not hidden)" if own.caught_up else "")
                )
                rows.append(
                    bench.row(
                        case=f"batch {batch}, {order}, {name}", batch=batch, order=order,
                        contender=name, ours=own.as_row(), theirs=other.as_row(),
                        ours_us_a_frame=us, theirs_of_ours=factor,
                    )
                )  # fmt: skip
            if (batch, order) == TARGETED:
                targets = judged(found, batch)
    return rows, targets


def of_order(
    bench: Bench, encoded: np.ndarray[Any, Any], scores: Any, order: str
) -> dict[str, tuple[Any, Any]]:
    """(our times, its times) of every rival that ran. Raises Different."""
    import gpu_launch
    import gpu_timing
    import rivals
    import torch

    batch, (height, width) = len(encoded), rivals.SIZE
    stream = bench.device.borrowed_stream(bench.stream.cuda_stream)
    ours = gpu_launch.accumulate(bench.device, stream, scores, rivals.SIZE, order)
    results = ours.results()
    check_bytes(results, ours, encoded)
    print(f"batch {batch}, {order}: the GPU's bytes are the CPU's")
    found: dict[str, tuple[Any, Any]] = {}

    def against(name: str, run: Callable[[], Any]) -> None:
        pair = gpu_timing.measure({OURS: ours.launch, name: run}, bench.rounds)
        found[name] = pair[OURS], pair[name]

    if order == "logits":  # the loop has the arithmetic of that order
        against(BARE, gpu_launch.bare_loop(bench.device, stream, batch * height * width))
    for name, make in ((EAGER, rivals.eager), (COMPILED, rivals.compiled)):
        torch.compiler.reset()  # else it compiles the next shape for any size, which is slower
        try:
            run = rival(bench, name, order, make(order, scores.float()))
            print(f"  {name}: {check_rival(run(), results)}")
        except Different:
            raise
        except Exception as error:  # of torch's compilers, by the dozen
            print(f"  not measured: {name}: {type(error).__name__}: {str(error)[:300]}")
            continue
        against(name, run)
        del run
        torch.cuda.empty_cache()
    return found


def rival(
    bench: Bench, name: str, order: str, makers: list[Callable[[], Any]]
) -> Callable[[], Any]:
    """The faster of its ways to sum; which that is is settled by the first batch."""
    if (name, order) in bench.fastest:
        return makers[bench.fastest[name, order]]
    run, bench.fastest[name, order] = best_rival(makers, bench.quick)
    return run


def judged(found: dict[str, tuple[Any, Any]], batch: int) -> list[Target]:
    """What did not run is not met."""
    order = TARGETED[1]
    bounds = {**LEAST, BARE: LEAST_OF_BARE}
    targets = [
        Target(
            f"{name} of ours, batch {batch}, {order}",
            ratio(found[name][1], found[name][0]) if name in found else math.nan,
            bound,
        )
        for name, bound in bounds.items()
    ]
    us = found[BARE][0].median * 1e3 / batch
    return [*targets, Target(f"a frame, batch {batch}", us, MOST_US, at_most=True, unit=" us")]


def _clock() -> str:
    """As nvidia-smi sees it under no load of ours; "" where it is not there."""
    try:
        query = "--query-gpu=clocks.sm,clocks.max.sm,power.limit"
        asked = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return asked.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append rows to the results")
    parser.add_argument("--quick", action="store_true", help="fewer runs; cannot be recorded")
    arguments = parser.parse_args()
    if arguments.quick and arguments.record:
        parser.error("--quick figures are not recorded")
    try:
        device = open_device("cuda:0")
        import torch
    except (CadaError, ImportError) as error:
        print(f"not measured: {error}")
        return NOT_HERE
    if not torch.cuda.is_available():
        print(f"not measured: torch {torch.__version__} sees no GPU")
        return NOT_HERE
    bench = Bench(device, torch.cuda.Stream(), arguments.quick)
    targets: list[Target] = []
    try:
        for batch in BATCHES:
            rows, decided = of_batch(bench, batch)
            targets += decided
            if arguments.record:  # at once: what comes later may be cut short
                record("fused_gpu", rows)
    except Different as error:
        print(f"WRONG: {error}")
        return WRONG
    print()
    return verdict(targets)


if __name__ == "__main__":
    sys.exit(main())
