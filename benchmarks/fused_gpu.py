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
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from harness import Target, Times, ratio, record, verdict

from cada_deploy.device import Device, open_device
from cada_deploy.errors import CadaError
from cada_deploy.fused import native
from cada_deploy.labelling import cores
from cada_deploy.scores import EncodedScores, Upsampling

BATCHES = (8, 1)
OURS, EAGER, COMPILED, BARE = "ours", "PyTorch eager", "torch.compile", "bare loop"
MOST_US = 40.0  # a frame, batch 8, order logits
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


def check_bytes(ours: Any, encoded: np.ndarray[Any, Any]) -> None:
    """Labels, entropies, sums and histograms of every frame. Raises Different."""
    kernel = native.Kernel(cores())
    sums, histogram, left_out = (part.cpu().numpy() for part in ours.parts)
    for n, frame in enumerate(encoded):
        scores = EncodedScores(frame, Upsampling(ours.order, align_corners=True))
        found = kernel.accumulate(scores, ours.size, "confidence", labels=True, entropy=True)
        assert found.labels is not None and found.entropy is not None
        counted, bits = found.statistics, ours.entropy[n].cpu().numpy().view(np.uint32)
        pairs = {
            "labels": (ours.labels[n].cpu().numpy(), found.labels),
            "entropy": (bits, found.entropy.view(np.uint32)),
            "sums": (sums[n], counted.sums.astype(np.int64)),
            "histogram": (histogram[n], counted.histogram.astype(np.int64)),
            "left out": (left_out[n], np.array([counted.invalid, counted.masked])),
        }
        for what, (gpu, cpu) in pairs.items():
            if not np.array_equal(gpu, cpu):
                raise Different(
                    f"{what} of frame {n}, order {ours.order}: {np.count_nonzero(gpu != cpu)} of "
                    f"{gpu.size} values differ from the CPU kernel's"
                )


def check_rival(rival: tuple[Any, ...], ours: Any) -> str:
    """The rival does the same work: nearly all labels and, to tolerance, the sums are ours."""
    label, entropy, sums, pixels = rival
    same = (label == ours.labels).float().mean().item()
    far = (entropy - ours.entropy).abs().max().item()
    own = ours.parts[0].double() / 2**23
    off = ((sums.double() - own).abs().max() / own.max()).item()
    if not (same > 0.999 and far < 1e-2 and off < 1e-3 and int(pixels.sum()) == label.numel()):
        raise Different(f"rival: {same:.2%} of labels, entropy off {far:.2g}, sums off {off:.2g}")
    return f"labels {same:.4%}, entropy within {far:.1e}, sums within {off:.1e} of their largest"


def best_rival(makers: list[Callable[[], Any]], quick: bool) -> tuple[Callable[[], Any], int]:
    """The faster of the ways to sum, and which it is."""
    import gpu_timing

    times = gpu_timing.measure({str(k): run for k, run in enumerate(makers)}, 2 if quick else 5, 2)
    fastest = min(times, key=lambda k: times[k].median)
    return makers[int(fastest)], int(fastest)


def measured(device: Device, quick: bool) -> tuple[list[dict[str, Any]], list[Target]]:
    import gpu_launch
    import gpu_timing
    import rivals
    import torch

    rows: list[dict[str, Any]] = []
    targets: list[Target] = []
    rounds = 9 if quick else 41
    gpu = {
        "name": device.name,
        "layer": device.layer,
        "driver_cuda": device.driver_version,
        "multiprocessors": device.multiprocessors,
        "torch": torch.__version__,
        "sm_clock_mhz": _clock(),
    }
    stream = torch.cuda.Stream()
    ours_stream = device.borrowed_stream(stream.cuda_stream)
    chosen: dict[tuple[str, str], int] = {}
    with torch.cuda.stream(stream):
        for batch in BATCHES:
            encoded = encoded_batch(batch)
            scores = torch.from_numpy(encoded).cuda()
            z = scores.float()
            bare = gpu_launch.bare_loop(
                device, ours_stream, batch * rivals.SIZE[0] * rivals.SIZE[1]
            )
            for order in ("logits", "probs"):
                ours = gpu_launch.accumulate(device, ours_stream, scores, rivals.SIZE, order)
                ours.labels.fill_(77)
                ours.entropy.fill_(-1)
                ours.launch()
                torch.cuda.synchronize()
                check_bytes(ours, encoded)
                print(f"batch {batch}, {order}: the GPU's bytes are the CPU's")
                found: dict[str, tuple[Times, Times]] = {}
                for name, make in ((EAGER, rivals.eager), (COMPILED, rivals.compiled)):
                    makers = make(order, z)
                    if (name, order) in chosen:
                        run = makers[chosen[name, order]]
                    else:
                        run, chosen[name, order] = best_rival(makers, quick)
                    print(f"  {name}: {check_rival(run(), ours)}")
                    pair = gpu_timing.measure({OURS: ours.launch, name: run}, rounds)
                    found[name] = pair[OURS], pair[name]
                    del makers, run
                    torch.cuda.empty_cache()
                if order == "logits":  # the loop has the arithmetic of that order
                    pair = gpu_timing.measure({OURS: ours.launch, BARE: bare}, rounds)
                    found[BARE] = pair[OURS], pair[BARE]
                for name, (own, other) in found.items():
                    us = own.median * 1e3 / batch
                    factor = ratio(other, own)
                    print(
                        f"  ours {us:8.2f} us a frame   {name:<14} "
                        f"{other.median * 1e3 / batch:9.2f} us a frame   {factor:7.2f}x ours"
                    )
                    rows.append(
                        {
                            "case": f"batch {batch}, {order}, {name}", "gpu": gpu, "batch": batch,
                            "shape": "19x129x257 -> 1024x2048", "order": order, "contender": name,
                            "caches": "L2 flushed", "bytes_equal_the_cpus": True,
                            "ours": own.as_row(), "theirs": other.as_row(),
                            "ours_us_a_frame": us, "theirs_of_ours": factor,
                        }
                    )  # fmt: skip
                    if batch == 8 and order == "logits":
                        bound = LEAST_OF_BARE if name == BARE else LEAST[name]
                        targets.append(Target(f"{name} of ours, batch 8, {order}", factor, bound))
                if batch == 8 and order == "logits":
                    us = found[BARE][0].median * 1e3 / batch
                    targets.append(
                        Target("microseconds a frame, batch 8", us, MOST_US, at_most=True)
                    )
    return rows, targets


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
        import torch

        device = open_device("cuda:0")
    except (CadaError, ImportError) as error:
        print(f"not measured: {error}")
        return NOT_HERE
    if not torch.cuda.is_available():
        print(f"not measured: torch {torch.__version__} sees no GPU")
        return NOT_HERE
    try:
        rows, targets = measured(device, arguments.quick)
    except Different as error:
        print(f"WRONG: {error}")
        return WRONG
    print()
    code = verdict(targets)
    if arguments.record:
        record("fused_gpu", rows)
    return code


if __name__ == "__main__":
    sys.exit(main())
