"""How long should the GPU kernel take? A PREDICTION from its machine code; nothing runs on a GPU.

kernels/fused_cuda.cu (19 classes) is compiled for sm_90 and disassembled. In `cada_accumulate` the
row loop of the order `logits` is found (the loop with most FFMA and one division), and two turns of
it are counted along the cheapest way: settled (the whole warp skips the search for the maximum) and
parted (it does not). So are the way from the entry to the loop, which reads the taps, the loop that
gives sums away, and the zeroing and merging of a block's sums. How often each happens for the
benchmark's scores is counted in NumPy over the same warps and rows. Then

    microseconds = warp instructions / (multiprocessors x 4 a clock x clock)

with the 132 multiprocessors of an H100 SXM and of an H200, at their highest clock of 1980 MHz: the
two differ in memory alone, which this formula does not see. Every issue slot is taken for used:
stalls, conflicts of atomics, half-filled last waves and memory (about 2 microseconds on an H200 for
5 bytes a pixel, if it did not overlap) are left out, so a measurement will lie above. The bare loop
(bare_loop.cu) is treated in the same way. Rows say "kind": "prediction" and hold the formula.

    python benchmarks/instruction_counts.py [--record]     rows: results/fused_gpu_predictions.jsonl
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sass
from harness import REPOSITORY, record

from cada_deploy import cubins
from cada_deploy.errors import EnvironmentLacks
from cada_deploy.fused.cuda import row_groups, tap_table
from cada_deploy.statistics import HISTOGRAM_BINS

MULTIPROCESSORS, SLOTS, CLOCK_HZ = 132, 4, 1.98e9
ARCHITECTURE = "sm_90"
GPUS = "H100 SXM, H200"
FORMULA = (
    "microseconds a frame = warp instructions a frame / (multiprocessors * issue slots * clock) * "
    "1e6; warp instructions a frame = rows * (settled or parted turn) + gives * give turn + warps "
    "* (way to the rows + words of the block's sums / 128 threads * (zeroing + merging a word))"
)
CLASSES, SIZE = 19, (1024, 2048)
WARP, BLOCK = 32, 128  # as in kernels/fused_cuda.cu
NOT_HERE = 3  # exit code: the environment lacks something


# --- the machine code --------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """Instructions a warp issues, by where."""

    settled: list[sass.Instruction]
    parted: list[sass.Instruction]
    give: list[sass.Instruction]
    start: list[sass.Instruction]
    zero_each: float  # a word of the block's shared sums
    merge_each: float


def counted(kernel: sass.Function) -> Counted:
    """Of `cada_accumulate`, order `logits`. Raises LookupError when the code looks otherwise than
    the docstring says."""
    loops = kernel.loops()
    row_loop = _row_loop(kernel, loops)
    blocks = kernel.blocks
    own = sorted(row_loop.blocks)
    exponentials = max(own, key=lambda k: blocks[k].count("FFMA"))
    units = max((k for k in own if k > exponentials), key=lambda k: blocks[k].count("FFMA"))
    search = max((k for k in own if k < exponentials), key=lambda k: blocks[k].count("FSETP"))
    give = _only(
        [x for x in loops if x.blocks < row_loop.blocks and _count(kernel, x, "REDUX")], "give loop"
    )
    reading = max(range(row_loop.header), key=lambda k: (blocks[k].count("LDG"), k))
    reads = [k for k in range(row_loop.header) if blocks[k].count("LDG")]
    found = Counted(
        settled=kernel.cheapest_turn(row_loop, (exponentials, units)),
        parted=kernel.cheapest_turn(row_loop, (search, exponentials, units)),
        give=kernel.cheapest_turn(give, _with(kernel, give, "REDUX")),
        start=kernel.cheapest_way([0, reading if reading in reads else reads[-1], row_loop.header]),
        zero_each=_each(kernel, loops, "STS", "LDS"),
        merge_each=_each(kernel, loops, "LDS", "REDUX"),
    )
    _check(found)
    return found


def _row_loop(kernel: sass.Function, loops: Sequence[sass.Loop]) -> sass.Loop:
    """`probs` has a ln, and so a conversion of its exponent, for every class; `logits` has one."""
    heavy = [x for x in loops if _count(kernel, x, "FFMA") > 8 * CLASSES]
    return _only([x for x in heavy if _count(kernel, x, "I2FP") < CLASSES], "row loop of `logits`")


def _only(found: Sequence[sass.Loop], what: str) -> sass.Loop:
    if len(found) != 1:
        raise LookupError(f"found {len(found)} candidates for the {what}; expected one")
    return found[0]


def _count(kernel: sass.Function, loop: sass.Loop, name: str) -> int:
    return sum(kernel.blocks[k].count(name) for k in loop.blocks)


def _with(kernel: sass.Function, loop: sass.Loop, name: str) -> list[int]:
    return [k for k in loop.blocks if kernel.blocks[k].count(name)]


def _each(kernel: sass.Function, loops: Sequence[sass.Loop], has: str, lacks: str) -> float:
    """Instructions a word, of the tightest loop of that kind."""
    rates = [
        len(kernel.cheapest_turn(x, _with(kernel, x, has))) / _count(kernel, x, has)
        for x in loops
        if _count(kernel, x, has) and not _count(kernel, x, lacks) and not _count(kernel, x, "FFMA")
    ]
    if not rates:
        raise LookupError(f"no loop with {has} and without {lacks}")
    return min(rates)


def _check(found: Counted) -> None:
    """The counts must hold what the mathematics needs: eight FFMA an exp (seven with a settled
    maximum of 0 folded away), one for S1, one for the units, one for the interpolation."""
    fused = sum(i.name == "FFMA" for i in found.settled)
    if not 9 * CLASSES <= fused <= 14 * CLASSES + 40 or len(found.parted) <= len(found.settled):
        raise LookupError(
            f"a settled turn has {fused} FFMA and {len(found.settled)} instructions, a parted one "
            f"{len(found.parted)}: the ways were not recognised"
        )


# --- how often: the same warps and rows, in NumPy ----------------------------------------------


@dataclass(frozen=True)
class Happened:
    """Of one frame of the benchmark's scores, over all warps."""

    warps: int  # a warp takes 32 columns through one group of rows
    rows: int  # pixel-warps
    settled_rows: int
    gives: int  # turns of the give loop

    def to_json(self) -> dict[str, float]:
        return {
            "pixel_warps": self.rows,
            "rows_a_group": self.rows / self.warps,
            "settled_share": self.settled_rows / self.rows,
            "gives_a_pixel_warp": self.gives / self.rows,
        }


def happened(scores: npt.NDArray[np.float16], labels: npt.NDArray[np.uint8]) -> Happened:
    """scores (C, h, w) encoded, labels (H, W) as the kernel gives them; align_corners."""
    width = labels.shape[1]
    if width % WARP:
        raise ValueError(f"{width} columns; this walk wants a multiple of {WARP}")
    lower_rows, lower_columns = (
        tap_table(n, low, align_corners=True)[0] for n, low in zip(labels.shape, scores.shape[1:])
    )
    settled = settled_cells(scores)[:, lower_columns]  # (h, W)
    by_warp = settled.reshape(len(settled), width // WARP, WARP).all(2)
    warps = rows = settled_rows = gives = 0
    for start, stop in pairwise(row_groups(lower_rows).tolist()):
        across = width // WARP
        warps += across
        rows += across * (stop - start)
        settled_rows += int(by_warp[lower_rows[start]].sum()) * (stop - start)
        gives += gives_of(labels[start:stop])
    return Happened(warps, rows, settled_rows, gives)


def settled_cells(scores: npt.NDArray[np.float16]) -> npt.NDArray[np.bool_]:
    """(h, w): one class is 0 at all four taps and every other one below 0 at each."""
    right = np.minimum(np.arange(scores.shape[2]) + 1, scores.shape[2] - 1)
    down = np.minimum(np.arange(scores.shape[1]) + 1, scores.shape[1] - 1)
    four = [scores, scores[:, :, right], scores[:, down], scores[:, down][:, :, right]]
    zero = np.logical_and.reduce([f == 0 for f in four])
    below = np.logical_and.reduce([f < 0 for f in four])
    found: npt.NDArray[np.bool_] = (zero | below).all(0) & (zero.sum(0) == 1)
    return found


def gives_of(labels: npt.NDArray[np.uint8]) -> int:
    """Turns of the give loop for one group (rows, W): at a row where lanes of a warp change their
    label, one for each label they leave; at the end one for each label of the warp."""
    width = labels.shape[1]
    gives = 0
    for before, now in pairwise(labels):
        left = np.where(before != now, before, 255).reshape(width // WARP, WARP)
        gives += _distinct(left, ignore=255)
    return gives + _distinct(labels[-1].reshape(width // WARP, WARP), ignore=255)


def _distinct(rows: npt.NDArray[np.uint8], ignore: int) -> int:
    """Sum over rows of how many different values, `ignore` apart."""
    ordered = np.sort(rows, axis=1)
    first = np.ones_like(ordered, bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return int((first & (ordered != ignore)).sum())


# --- the prediction ----------------------------------------------------------------------------


def microseconds(warp_instructions: float) -> float:
    return warp_instructions / (MULTIPROCESSORS * SLOTS * CLOCK_HZ) * 1e6


def whole(code: Counted, often: Happened) -> dict[str, float]:
    """Warp instructions of one frame, by part."""
    words = 2 * CLASSES * CLASSES + CLASSES * HISTOGRAM_BINS
    return {
        "rows": often.settled_rows * len(code.settled)
        + (often.rows - often.settled_rows) * len(code.parted),
        "giving sums": often.gives * len(code.give),
        "reading taps": often.warps * len(code.start),
        "block sums": often.warps * words / BLOCK * (code.zero_each + code.merge_each),
    }


def rows_of(
    code: Counted, often: Happened, bare: Sequence[sass.Instruction]
) -> list[dict[str, Any]]:
    parts = whole(code, often)
    total = sum(parts.values())
    pixel_warps = SIZE[0] * SIZE[1] // WARP
    common = {
        "kind": "prediction",
        "not_measured": "counted from machine code; no GPU was used",
        "shape": f"{CLASSES}x129x257 -> {SIZE[0]}x{SIZE[1]}",
        "order": "logits",
        "architecture": ARCHITECTURE,
        "gpus": GPUS,
        "formula": FORMULA,
        "assumed": {"multiprocessors": MULTIPROCESSORS, "issue_slots": SLOTS, "clock_hz": CLOCK_HZ},
    }
    bare_us = microseconds(pixel_warps * max(len(bare), sass.busiest_unit_cycles(bare)))
    return [
        {
            **common,
            "case": "bare loop",
            "instructions_a_pixel_warp": len(bare),
            "by_unit": sass.by_unit(bare),
            "busiest_unit_cycles": sass.busiest_unit_cycles(bare),
            "predicted_us_a_frame": bare_us,
        },
        *(
            {
                **common,
                "case": f"fused kernel, {name} rows alone",
                "instructions_a_pixel_warp": len(turn),
                "by_unit": sass.by_unit(turn),
                "busiest_unit_cycles": sass.busiest_unit_cycles(turn),
                "predicted_us_a_frame": microseconds(pixel_warps * len(turn)),
            }
            for name, turn in (("settled", code.settled), ("parted", code.parted))
        ),
        {
            **common,
            "case": "fused kernel, all",
            "instructions_a_pixel_warp": total / often.rows,
            "parts_a_pixel_warp": {k: v / often.rows for k, v in parts.items()},
            "code": {
                "settled_turn": len(code.settled),
                "parted_turn": len(code.parted),
                "give_turn": len(code.give),
                "before_the_rows": len(code.start),
            },
            "data": often.to_json(),
            "predicted_us_a_frame": microseconds(total),
            "predicted_of_bare_loop": bare_us / microseconds(total),
        },
    ]


def benchmark_frame() -> tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
    """The first frame of benchmarks/fused_gpu.py, encoded, and its labels (both on the CPU)."""
    import rivals

    from cada_deploy.fused import native
    from cada_deploy.scores import EncodedScores, Upsampling

    kernel = native.Kernel(2)
    encoded = kernel.encode(rivals.scores().numpy(), "logits")[0]
    scores = EncodedScores(encoded, Upsampling("logits", align_corners=True))
    labels = kernel.accumulate(scores, SIZE, "confidence", labels=True).labels
    assert labels is not None
    return encoded, labels


def disassembled(
    source: Path, defines: Mapping[str, int], folder: Path
) -> dict[str, sass.Function]:
    cubin = folder / f"{source.stem}.cubin"
    cubin.write_bytes(cubins.compiled(source, ARCHITECTURE, defines))
    return sass.functions(sass.disassembled(cubin))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append rows to the results")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as name:
            kernels = disassembled(
                REPOSITORY / "kernels" / "fused_cuda.cu", {"CADA_CLASSES": CLASSES}, Path(name)
            )
            bare = disassembled(REPOSITORY / "benchmarks" / "bare_loop.cu", {}, Path(name))
        frame = benchmark_frame()
    except (EnvironmentLacks, FileNotFoundError, ImportError) as error:
        print(f"not run: {error}")
        return NOT_HERE
    except subprocess.CalledProcessError as error:
        print(f"nvdisasm failed: {error.stderr}")
        return 1
    loop = bare["cada_bare_loop"]
    turn = loop.cheapest_turn(loop.busiest_loop())
    rows = rows_of(counted(kernels["cada_accumulate"]), happened(*frame), turn)
    print(
        f"PREDICTIONS for {GPUS}; nothing ran on a GPU. {MULTIPROCESSORS} "
        f"multiprocessors, {SLOTS} issue slots, {CLOCK_HZ / 1e6:.0f} MHz:\n"
    )
    for row in rows:
        print(
            f"{row['case']:<32} {row['instructions_a_pixel_warp']:7.1f} instructions a pixel-warp  "
            f"{row['predicted_us_a_frame']:6.1f} microseconds a frame"
        )
    print()
    for part, value in rows[-1]["parts_a_pixel_warp"].items():
        print(f"  {part:<14} {value:7.1f} a pixel-warp")
    print(f"  {rows[-1]['data']}")
    print(f"  predicted share of the bare loop: {rows[-1]['predicted_of_bare_loop']:.0%}")
    if arguments.record:
        record("fused_gpu_predictions", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
