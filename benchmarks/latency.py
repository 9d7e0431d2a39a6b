"""What does everything but the network cost, and does decoding keep the GPU waiting?

The demo model and DeepLabV2 on ResNet-101 (random weights) at 512x1024, measured as `cada-deploy
bench` does: the engine alone, and from image bytes to labels. A few runs each on the CPU; on
cuda:0, where there is one, also the whole with 16 decoding threads, held against the slower of
(decoding alone, GPU alone). Prints, exits 5 below a target of ResNet-101, 3 without the device that
was asked for; --record appends rows to results/latency.jsonl.

    python benchmarks/latency.py [--device cpu|cuda:0] [--quick] [--record]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import random_resnet101
from harness import Target, Times, how_busy, record, verdict

from cada_deploy.bench import frames as bench_frames
from cada_deploy.bench.measuring import WINDOWS
from cada_deploy.bench.session import BenchOptions, bench, open_pipeline
from cada_deploy.demo import DEMO_MODEL
from cada_deploy.device import open_device
from cada_deploy.errors import CadaError
from cada_deploy.images import decode
from cada_deploy.labelling import ModelChoice, cores
from cada_deploy.pipeline import Frame, Pipeline
from cada_deploy.stages import StageClock
from cada_deploy.streaming import ordered_map

SIZE = (512, 1024)
RESNET = "ResNet-101, random weights"
DECODERS = 16
GROUP = 4  # frames that go through the GPU together
MOST_BESIDES = 0.15  # of the network's time, decoding apart
LEAST_OVERLAP = 0.9  # of the slower of decoding alone and GPU alone


def models(folder: Path) -> Iterator[tuple[str, Path]]:
    """The large one is written when its turn comes, once."""
    yield "demo model", DEMO_MODEL
    large = folder / "resnet101.onnx"
    yield RESNET, large if large.exists() else random_resnet101.write(large, SIZE)


def latency(case: str, model: Path, device: str, quick: bool) -> dict[str, Any]:
    """One row: both measurements of `cada-deploy bench` and their warnings."""
    on_gpu = device != "cpu"
    result = bench(
        BenchOptions(
            ModelChoice(model, device=device),
            SIZE,
            duration_s=1.0 if quick or not on_gpu else 3.0,
            iterations=WINDOWS if quick else 8,
            warm_up_s=0.0 if quick else 15.0,
            threads=cores(),  # on a GPU those of the kernel that cuts labels, on the CPU
            quiet=True,
        )
    ).data
    engine, whole = result["engine_only"], result["end_to_end"]
    besides = whole["besides_network"]["of_network"]
    print(
        f"{case}, {device}: engine {engine['compute']['median_ms']:.2f} ms, bytes to labels "
        f"{whole['latency']['median_ms']:.2f} ms; besides network and decoding {besides:.1%} of "
        f"the network ({engine['runs']} and {whole['runs']} runs)"
    )
    for warning in result["warnings"]:
        print(f"    WARNING: {warning}")
    return {
        "case": f"latency, {case}, {device}",
        "what": case,
        "size": list(SIZE),
        "threads": result["options"]["threads"],
        "engine": result["engine"],
        "settings": result["machine"]["settings"],
        "model_sha256": result["model"]["sha256"],
        "besides_network_of_network": besides,
        "target_at_most": MOST_BESIDES,
        "engine_only": engine,
        "end_to_end": whole,
        "warnings": result["warnings"],
    }


# --- decoding beside the GPU -------------------------------------------------------------------


def overlap(case: str, pipeline: Pipeline, count: int, rounds: int, group: int) -> dict[str, Any]:
    """One row: frames per second of the whole, of decoding alone and of the GPU alone, each with
    DECODERS threads; the three take turns. Medians of ratios of a turn."""
    made = bench_frames.drawn(SIZE)
    data = [made.data[k % len(made.data)] for k in range(count)]
    decoded = [opened(one) for one in made.data]
    groups = list(grouped(data, group))
    ready = [
        [decoded[(k * group + n) % len(decoded)] for n in range(len(part))]
        for k, part in enumerate(groups)
    ]

    def through(frames: Sequence[Frame]) -> None:
        pipeline.score_frames(frames, "confidence", StageClock())

    contenders: dict[str, Callable[[], object]] = {
        "decoding alone": lambda: drain(lambda part: [opened(one) for one in part], groups),
        "GPU alone": lambda: drain(through, ready),
        "both": lambda: drain(lambda part: through([opened(one) for one in part]), groups),
    }
    per_s: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(1 + rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn:
                per_s[name].append(count / (time.perf_counter() - start))
    alone = zip(per_s["decoding alone"], per_s["GPU alone"], strict=True)
    reached = Times(tuple(b / min(pair) for b, pair in zip(per_s["both"], alone, strict=True)))
    medians = {name: Times(tuple(values)).median for name, values in per_s.items()}
    print(
        f"{case}, {DECODERS} threads, groups of {group}: "
        + ", ".join(f"{name} {value:.1f} images/s" for name, value in medians.items())
        + f"; both of the slower: {reached.median:.1%}"
    )
    return {
        "case": f"overlap, {case}, groups of {group}",
        "what": case,
        "size": list(SIZE),
        "threads": DECODERS,
        "group": group,
        "frames": count,
        "images_per_s": per_s,
        "of_the_slower": reached.median,
        "target_at_least": LEAST_OVERLAP,
    }


def opened(data: bytes) -> Frame:
    found = decode(data)
    return Frame(b"frame.png", len(data), "", np.ascontiguousarray(found.image), found.notices)


def grouped(data: Sequence[bytes], size: int) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def drain(work: Callable[[Any], object], items: Sequence[Any]) -> None:
    for _ in ordered_map(work, items, DECODERS):
        pass


# --- all of it ---------------------------------------------------------------------------------


def devices(asked: str | None) -> list[str]:
    """What was asked for; else the CPU, and cuda:0 where it opens (else the reason is printed)."""
    if asked:
        return [asked]
    try:
        open_device("cuda:0")
    except (CadaError, ImportError) as error:
        print(f"not measured on a GPU: {error}")
        return ["cpu"]
    return ["cpu", "cuda:0"]


def measured(
    device: str, case: str, model: Path, quick: bool
) -> tuple[list[dict[str, Any]], list[Target]]:
    """Rows of one model on one device. The targets are those of the large network."""
    rows = [latency(case, model, device, quick)]
    besides = 100 * rows[0]["besides_network_of_network"]
    what = f"besides the network, {case}, {device}"
    targets = [Target(what, besides, 100 * MOST_BESIDES, at_most=True, unit=" %")]
    if device != "cpu":
        _, pipeline = open_pipeline(ModelChoice(model, device=device), SIZE, batch=GROUP)
        count, rounds = (64, 1) if quick else (128, 3)
        rows.append(overlap(f"{case}, {device}", pipeline, count, rounds, GROUP))
        reached = 100 * rows[-1]["of_the_slower"]
        targets.append(Target(rows[-1]["case"], reached, 100 * LEAST_OVERLAP, unit=" %"))
    return rows, targets if case == RESNET else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="measure there alone: cpu or cuda:N")
    parser.add_argument("--record", action="store_true", help="append rows to the results")
    parser.add_argument("--quick", action="store_true", help="fewer runs; cannot be recorded")
    arguments = parser.parse_args()
    if arguments.quick and arguments.record:
        parser.error("--quick figures are not recorded")
    print(f"{SIZE[0]}x{SIZE[1]}; {how_busy()}")
    targets: list[Target] = []
    with tempfile.TemporaryDirectory(prefix="cada-latency-") as name:
        try:
            for device in devices(arguments.device):
                for case, model in models(Path(name)):
                    rows, decided = measured(device, case, model, arguments.quick)
                    targets += decided
                    if arguments.record:  # at once: what comes later may be cut short
                        record("latency", rows)
        except CadaError as error:
            print(f"not measured: {error}")
            return error.exit_code
    print()
    return verdict(targets)


if __name__ == "__main__":
    sys.exit(main())
