"""Is the fused kernel as fast as the processor allows, and how far ahead of what a user would run?

One frame of 19 classes, 129x257 -> 1024x2048, on two threads: statistics with confidence weights,
labels and entropy, outputs allocated anew each time, as the rivals do. Rivals: PyTorch eager and
torch.compile (the faster of two ways to sum per class), the same graph in ONNX Runtime (without the
per-class sums, which favours it), and a bare loop of our own exp over the same number of values in
the first-level cache, which no softmax can beat.

    python benchmarks/fused_kernel.py            prints, exits 5 below a target
    python benchmarks/fused_kernel.py --record   and appends rows to results/fused_kernel.jsonl
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from harness import REPOSITORY, Target, Times, how_busy, measure, ratio, record, verdict
from onnx import TensorProto, helper
from rivals import CLASSES, LOW, SIZE, compiled, eager
from rivals import scores as frame

from cada_deploy.errors import EnvironmentLacks
from cada_deploy.fused import native
from cada_deploy.scores import EncodedScores, Upsampling

THREADS = 2

EAGER, COMPILED, GRAPH, EXP = (
    "PyTorch eager",
    "torch.compile",
    "ONNX Runtime graph",
    "bare exp loop",
)
REPEATED = 5  # of ours after each rival: its caches and freed memory are warm for most of them
# Promised for the order `logits`; the bare loop says little about `probs`, whose cost is ln.
TARGETS = {EAGER: 60.0, COMPILED: 50.0, GRAPH: 400.0}
MOST_OF_EXP = 3.2


# ---- rivals ----


def faster(one: Callable[[], object], other: Callable[[], object]) -> Callable[[], object]:
    """The rival gets its better variant."""
    times = measure({"one": one, "other": other}, rounds=2)
    return one if times["one"].median <= times["other"].median else other


def graph(order: str) -> ort.InferenceSession:
    """Resize, Softmax, entropy and ArgMax as a user would write them in ONNX."""
    make = helper.make_node
    first, second = ("u", "p") if order == "logits" else ("low", "p")

    def resized(source: str, target: str) -> onnx.NodeProto:
        return make(
            "Resize",
            [source, "", "", "sizes"],
            [target],
            mode="linear",
            coordinate_transformation_mode="align_corners",
        )

    if order == "logits":
        nodes = [
            resized("z", first),
            make("Softmax", [first], [second], axis=1),
            make("LogSoftmax", [first], ["lnp"], axis=1),
        ]
    else:
        nodes = [
            make("Softmax", ["z"], [first], axis=1),
            resized(first, second),
            make("Max", [second, "tiny"], ["some"]),
            make("Log", ["some"], ["lnp"]),
        ]
    nodes += [
        make("Mul", ["p", "lnp"], ["plnp"]),
        make("ReduceSum", ["plnp", "axis"], ["negative"], keepdims=0),
        make("Neg", ["negative"], ["entropy"]),
        make("ArgMax", ["p"], ["label"], axis=1, keepdims=0),
    ]
    constants = [
        helper.make_tensor("sizes", TensorProto.INT64, [4], [1, CLASSES, *SIZE]),
        helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
    ]
    if order == "probs":
        constants.append(helper.make_tensor("tiny", TensorProto.FLOAT, [], [1e-12]))
    made = helper.make_graph(
        nodes,
        "what_the_kernel_does",
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, CLASSES, *LOW])],
        [
            helper.make_tensor_value_info("entropy", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("label", TensorProto.INT64, None),
        ],
        constants,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def exp_loop(isa: str) -> Callable[[], object]:
    """CLASSES * H * W exps on THREADS threads, over 19 * 128 values (9.5 KiB) again and again."""
    built = sorted(REPOSITORY.glob("build/*/libcada_probe.so"), key=lambda p: p.stat().st_mtime)
    if not built:
        sys.exit("no build/*/libcada_probe.so; run: pip install --no-build-isolation -e .")
    loop = getattr(ctypes.CDLL(str(built[-1])), f"cada_bench_exp_{isa}")
    loop.argtypes = (*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2)
    x = -np.random.default_rng(0).random((THREADS, CLASSES * 128), dtype=np.float32) * 20
    y = np.empty_like(x)
    times = SIZE[0] * SIZE[1] // 128 // THREADS
    # Each thread on a core of its own: unpinned the loop took much longer here, which
    # would flatter us; both threads on one core for so short a time is the likely cause.
    cores = iter(sorted(os.sched_getaffinity(0)) * THREADS)
    pool = ThreadPoolExecutor(THREADS, initializer=lambda: os.sched_setaffinity(0, {next(cores)}))

    def one(thread: int) -> None:
        loop(x[thread].ctypes.data, y[thread].ctypes.data, x.shape[1], times)

    return lambda: list(pool.map(one, range(THREADS)))


# ---- us ----


def ours(scores: EncodedScores) -> Callable[[], object]:
    kernel = native.Kernel(THREADS)
    return lambda: kernel.accumulate(scores, SIZE, "confidence", labels=True, entropy=True)


def encoded(z: torch.Tensor, order: str) -> EncodedScores:
    array = native.Kernel(THREADS).encode(z.numpy(), "logits")[0]
    return EncodedScores(array, Upsampling(order, align_corners=True))


def usable() -> list[str]:
    found = []
    for isa in native.INSTRUCTION_SETS:
        try:
            found.append(native.choose_isa(isa))
        except EnvironmentLacks:
            continue
    native.choose_isa()
    return found


def against_rivals(z: torch.Tensor, order: str) -> dict[str, Times]:
    """Us and the rivals of one upsample order. Each rival takes turns with us alone: when all
    took turns together PyTorch came out slower, perhaps for ONNX Runtime's spinning threads."""
    run = ours(encoded(z, order))
    times: dict[str, Times] = {}
    for name, make in rivals(z, order).items():
        rival = make()
        # We come right after it, once with its threads gone idle and once warm.
        pair = measure({name: rival, "ours": lambda: (run(), run())}, rounds=7)
        times[name] = pair[name]
        times[f"ours after {name}"] = Times(tuple(ms / 2 for ms in pair["ours"].ms))
    return times


def rivals(z: torch.Tensor, order: str) -> dict[str, Callable[[], Callable[[], object]]]:
    """Made when their turn comes, so that none has threads about before it."""

    def in_onnx_runtime() -> Callable[[], object]:
        session, feed = graph(order), {"z": z.numpy()}
        return lambda: session.run(None, feed)

    return {
        EAGER: lambda: faster(*eager(order, z)),
        COMPILED: lambda: faster(*compiled(order, z)),
        GRAPH: in_onnx_runtime,
    }


def against_exp(z: torch.Tensor, order: str, isa: str) -> dict[str, Times]:
    native.choose_isa(isa)
    slow = isa in ("baseline", "scalar")
    contenders = {"ours": ours(encoded(z, order)), EXP: exp_loop(isa)}
    times = measure(contenders, rounds=1 if slow else 41, warm_up=0 if slow else 3)
    native.choose_isa()
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append rows to the results")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    z = frame()
    rows: list[dict[str, Any]] = []
    targets: list[Target] = []
    shape = f"{CLASSES}x{LOW[0]}x{LOW[1]} -> {SIZE[0]}x{SIZE[1]}"
    print(f"{shape}, {THREADS} threads; ms are medians; {how_busy()}\n")

    def note(order: str, isa: str, name: str, times: Times, **more: float) -> None:
        rows.append(
            {
                "shape": shape, "batch": 1, "threads": THREADS, "caches": "warm", "order": order,
                "isa": isa, "contender": name, **times.as_row(), **more,
            }
        )  # fmt: skip

    isas = usable()
    for order in ("logits", "probs"):
        times = against_rivals(z, order)
        for name, bound in TARGETS.items():
            faster_by = ratio(times[name], times[f"ours after {name}"])
            print(
                f"{order:<7} {name:<19} {times[name].median:9.2f} ms   "
                f"ours {faster_by:7.1f}x faster"
            )
            note(order, isas[0], name, times[name], ours_is_faster_by=faster_by)
            if order == "logits":
                targets.append(Target(f"{name}, {order}", faster_by, bound))
    print()
    for order in ("logits", "probs"):
        for isa in isas:
            times = against_exp(z, order, isa)
            of_exp = ratio(times["ours"], times[EXP])
            print(
                f"{order:<7} {isa:<9} {times['ours'].median:9.2f} ms   bare exp loop "
                f"{times[EXP].median:8.2f} ms   {of_exp:5.2f}x of it"
            )
            note(order, isa, "ours", times["ours"], of_bare_exp=of_exp)
            note(order, isa, EXP, times[EXP])
            if order == "logits" and isa == isas[0]:
                targets.append(Target(f"{EXP}, {isa}, {order}", of_exp, MOST_OF_EXP, at_most=True))
    print()
    code = verdict(targets)
    if arguments.record:
        record("fused_kernel", rows)
    return code


if __name__ == "__main__":
    sys.exit(main())
