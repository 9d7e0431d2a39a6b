"""The executor finds what a GPU would only perhaps punish, and the kernels under sanitizers."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_executor import build
from cuda_executor.layer import ProcessorDevice

from cada_deploy.errors import RunFailed

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MISTAKES = HERE / "planted_mistakes.cu"
THREADS = 64

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="not run: needs g++")


def launched(kernel: str, seed: int = 0, threads: int = THREADS) -> list[int]:
    """64 values 0, 1, 2, ... after the kernel."""
    device = ProcessorDevice(seed=seed)
    memory, stream = device.pinned(4 * THREADS), device.stream()
    assert memory.host is not None
    values = memory.host.view(np.int32)
    values[:] = np.arange(THREADS)
    function = device.load(device.build_kernels(MISTAKES, {})).function(kernel)
    one = (1, 1, 1)
    device.launch(function, one, (threads, 1, 1), [np.uint64(memory.address)], stream)
    stream.synchronize()
    return values.tolist()


def test_right_kernels_give_right_values_in_any_order() -> None:
    for seed in range(8):
        assert launched("right_reversal", seed) == list(range(THREADS))[::-1]
        for thread, value in enumerate(launched("right_collectives", seed)):
            lane = thread % 32
            assert value == 1 + 31 * 16 + (lane ^ 1) + 4 + (3 if lane < 16 else 0)


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("barrier_for_some", r"waits at __syncthreads in line \d+, but thread 16 has left"),
        ("barrier_after_leaving", r"waits at __syncthreads in line \d+, but thread 32 has left"),
        (
            "two_barriers",
            r"__syncthreads in line \d+, but thread 32 waits at __syncthreads in line",
        ),
        ("collective_and_barrier", "names lane 16, which waits at __syncthreads in line"),
        ("outside_own_mask", r"__ballot_sync in line \d+: the lane is not in its own mask"),
        ("masks_differ", "which names another mask"),
        ("calls_differ", "which waits at __ballot_sync in line"),
        ("lane_has_left", "the mask names lane 7, which has left the kernel"),
        ("lane_never_comes", "which waits at __ballot_sync in line"),
        ("reads_outside_mask", "reads lane 20, which is not in the mask"),
    ],
)
def test_a_planted_mistake_is_found_and_named(kernel: str, words: str) -> None:
    found = set()
    for seed in range(6):  # which of two lanes meets the other depends on the order
        with pytest.raises(RunFailed, match=f"kernel {kernel}, block") as caught:
            launched(kernel, seed)
        found.add(str(caught.value))
    assert any(re.search(words, text) for text in found), found
    source = MISTAKES.read_text().splitlines()
    for call, line in re.findall(r"(__\w+) in line (\d+)", " ".join(found)):
        assert call in source[int(line) - 1]


def test_a_block_that_is_no_whole_number_of_warps_has_no_full_mask() -> None:
    with pytest.raises(RunFailed, match="lane 16, which does not exist"):
        launched("right_collectives", threads=16)


def test_a_missing_barrier_makes_the_result_depend_on_the_order() -> None:
    results = {tuple(launched("no_barrier", seed)) for seed in range(4)}
    assert len(results) > 1


def test_shared_memory_starts_as_garbage() -> None:
    assert launched("garbage_summed")[0] != THREADS


def test_arguments_of_another_size_are_refused() -> None:
    device = ProcessorDevice()
    function = device.load(device.build_kernels(MISTAKES, {})).function("no_barrier")
    for arguments in ([], [np.int32(1)], [np.uint64(0), np.int32(1)]):
        stream = device.stream()
        device.launch(function, (1, 1, 1), (64, 1, 1), arguments, stream)
        with pytest.raises(RunFailed, match="takes arguments of 8 bytes"):
            stream.synchronize()


def test_impossible_grids_and_blocks_are_refused() -> None:
    device = ProcessorDevice()
    module = device.load(device.build_kernels(MISTAKES, {}))
    for grid, block in (((0, 1, 1), (64, 1, 1)), ((1, 1, 1), (1025, 1, 1))):
        stream = device.stream()
        device.launch(module.function("no_barrier"), grid, block, [np.uint64(0)], stream)
        with pytest.raises(RunFailed, match="kernel no_barrier: "):
            stream.synchronize()
    with pytest.raises(RunFailed, match="has no kernel nothing"):
        module.function("nothing")


# ---- under the sanitizers ----


def sanitized(*command: str) -> subprocess.CompletedProcess[str]:
    """This Python with the address sanitizer underneath; the executor's libraries have both."""
    if platform.machine() != "x86_64":
        pytest.skip("not run: needs x86-64")
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"):
        asked = subprocess.run(
            [str(build.compiler()), f"-print-file-name={name}"], capture_output=True, text=True
        )
        if not Path(asked.stdout.strip()).is_absolute():
            pytest.skip(f"not run: this g++ has no {name}")
        libraries.append(asked.stdout.strip())
    environment = {
        **os.environ,
        build.SANITIZED: "1",
        "LD_PRELOAD": ":".join(libraries),
        # Python and NumPy keep what they allocate; a fault in a kernel must end the process.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "PYTHONMALLOC": "malloc",
    }
    environment.pop("CADA_TEST_CUDA", None)  # the executor's kernels are what is looked at
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT
    )


LAUNCH = "from kernels.test_cuda_on_cpu import launched; launched({!r})"


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("past_the_end", "heap-buffer-overflow"),
        ("before_the_start", "heap-buffer-overflow"),
        ("shift_too_far", "shift exponent 32 is too large"),
    ],
)
def test_sanitizers_find_planted_accesses(kernel: str, words: str) -> None:
    done = sanitized("-c", LAUNCH.format(kernel))
    assert done.returncode != 0
    assert words in done.stderr, done.stderr


def test_sanitizers_are_silent_for_what_is_right() -> None:
    done = sanitized("-c", LAUNCH.format("right_collectives"))
    assert done.returncode == 0, done.stderr


def test_the_kernels_under_the_sanitizers() -> None:
    """Every kernel over the awkward sizes that have the fewest pixels: register and general paths,
    both orders, masks, invalid pixels."""
    names = "pixel or prime or 65 or NaN"
    done = sanitized(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0",
        "tests/contracts/test_fused.py",
        "-k", f"any_order_of_threads and ({names}) and not regions",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
