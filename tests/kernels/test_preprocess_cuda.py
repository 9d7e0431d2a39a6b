"""The row that the CUDA kernel makes has the bytes of preprocess.to_batch_row: the tolerance is 0.

The device is this processor (tests/cuda_executor), or with CADA_TEST_CUDA=cuda:0 that GPU. Nothing
here has a second opinion on what is right: the CPU path calls OpenCV and Pillow themselves.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cuda_executor import build
from cuda_executor.layer import ProcessorDevice, kernels_device, on_processor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cada_deploy import cubins, preprocess_cuda
from cada_deploy.device import Device
from cada_deploy.device_arrays import DeviceArray
from cada_deploy.errors import UsageError
from cada_deploy.model_spec import InputSpec, Size
from cada_deploy.preprocess import pillow_orders_by_size, to_batch_row
from cada_deploy.preprocess_cuda import (
    BILINEAR,
    COLUMNS_FIRST,
    HALVED,
    ROWS_FIRST,
    SAME,
    DevicePreprocess,
    bicubic_table,
    bilinear_table,
    filter_of,
)
from cada_deploy.presets import PRESETS, preset

from .test_cuda_on_cpu import sanitized

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="not run: needs g++")

FILTERS = ("bilinear", "bicubic")
GUARD = 64  # bytes before and after a batch, and in rows that nobody writes
UNTOUCHED = 0xA5
PLAIN = InputSpec("RGB", 1.0, (0, 0, 0), (1, 1, 1), "bilinear")

# input -> output. One pixel, primes, both ways, one axis only, exact halves (OpenCV's own case) and
# just not, both orders of Pillow's passes, tiles of 32 and one more, windows longer than a chunk.
AWKWARD: dict[str, tuple[Size, Size]] = {
    "one pixel": ((1, 1), (1, 1)),
    "one pixel grows": ((1, 1), (5, 3)),
    "to one pixel": ((13, 17), (1, 1)),
    "same": ((7, 11), (7, 11)),
    "prime up": ((7, 11), (31, 37)),
    "prime down": ((31, 37), (7, 11)),
    "halved": ((38, 46), (19, 23)),
    "halved rows": ((38, 23), (19, 23)),
    "halved columns": ((19, 46), (19, 23)),
    "nearly halved": ((39, 46), (19, 23)),
    "doubled": ((19, 23), (38, 46)),
    "rows grow, columns shrink": ((5, 90), (40, 9)),
    "columns grow, rows shrink": ((90, 5), (9, 40)),
    "rows only": ((50, 13), (9, 13)),
    "columns only": ((13, 50), (13, 9)),
    "a whole tile": ((20, 21), (32, 32)),
    "one more than a tile": ((20, 21), (33, 33)),
    "long windows": ((211, 10), (3, 9)),
    "long windows of columns": ((10, 211), (9, 3)),
    "a line": ((1, 97), (1, 41)),
    "a column": ((97, 1), (41, 1)),
    "extreme": ((3, 400), (200, 2)),
}


def picture(size: Size, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Noise; an odd seed makes it black and white, where a bicubic kernel overshoots."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return (pixels > 127).astype(np.uint8) * np.uint8(255) if seed % 2 else pixels


def on_device(device: Device, array: npt.NDArray[Any]) -> DeviceArray:
    memory = device.pinned(array.nbytes)
    assert memory.host is not None
    memory.host[:] = array.reshape(-1).view(np.uint8)
    return DeviceArray(device, memory.address, array.shape, array.dtype, memory)


class Batch:
    """A batch between guards, filled with what no row holds by chance."""

    def __init__(self, device: Device, spec: InputSpec, size: Size, rows: int = 1) -> None:
        shape = (rows, 3, *size) if spec.layout == "NCHW" else (rows, *size, 3)
        self.dtype = np.dtype(spec.dtype)
        nbytes = int(np.prod(shape)) * self.dtype.itemsize
        memory = device.pinned(nbytes + 2 * GUARD)
        assert memory.host is not None
        self.bytes = memory.host
        self.bytes[:] = UNTOUCHED
        address = memory.address + GUARD
        self.array = DeviceArray(device, address, shape, self.dtype, memory)

    def row(self, row: int) -> npt.NDArray[Any]:
        """(1, ...), and nothing else was touched if it is the only one written."""
        inner = self.bytes[GUARD:-GUARD].view(self.dtype).reshape(self.array.shape)
        return inner[row : row + 1]

    def untouched_but(self, *written: int) -> bool:
        rows = self.bytes[GUARD:-GUARD].reshape(self.array.shape[0], -1)
        others = np.delete(rows, written, axis=0)
        guards = (self.bytes[:GUARD], self.bytes[-GUARD:])
        return all(bool((part == UNTOUCHED).all()) for part in (*guards, others))


def assert_the_cpus_bytes(
    pre: DevicePreprocess, image: npt.NDArray[np.uint8], size: Size | None
) -> None:
    stream = pre.device.stream()
    batch = Batch(pre.device, pre.spec, size or image.shape[:2])
    given = on_device(pre.device, image)
    pre.run(given, size, batch.array, 0, stream)
    stream.synchronize()  # until here `given` must live
    expected = to_batch_row(image, pre.spec, size)
    found = batch.row(0)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes(), np.abs(found - expected).max()
    assert batch.untouched_but(0)


@pytest.mark.parametrize("how", FILTERS)
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_sizes_have_the_cpus_bytes(how: str, name: str) -> None:
    before, after = AWKWARD[name]
    pre = DevicePreprocess(kernels_device(seed=len(name)), replace(PLAIN, resize=how))
    for seed in range(2):
        assert_the_cpus_bytes(pre, picture(before, seed), after)


def test_the_awkward_sizes_take_every_way_through_the_kernel() -> None:
    taken = {filter_of(how, *sizes) for how in FILTERS for sizes in AWKWARD.values()}
    assert taken == {SAME, BILINEAR, HALVED, ROWS_FIRST, COLUMNS_FIRST} or _pillow_12()


def _pillow_12() -> bool:
    return not pillow_orders_by_size()


@pytest.mark.parametrize("how", FILTERS)
def test_many_sizes_have_the_cpus_bytes(how: str) -> None:
    pre = DevicePreprocess(kernels_device(), replace(PLAIN, resize=how))
    dice = np.random.default_rng(5)
    for seed in range(120):
        height, width, h, w = (int(side) for side in dice.integers(1, 90, 4))
        assert_the_cpus_bytes(pre, picture((height, width), seed), (h, w))


@pytest.mark.parametrize("how", FILTERS)
@pytest.mark.parametrize(("before", "after"), [((360, 480), (512, 1024)), ((540, 960), (270, 480)),
                                               ((512, 1024), (256, 512))])  # fmt: skip
def test_sizes_of_the_road_have_the_cpus_bytes(how: str, before: Size, after: Size) -> None:
    pre = DevicePreprocess(kernels_device(), replace(PLAIN, resize=how))
    assert_the_cpus_bytes(pre, picture(before), after)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("colour", ["RGB", "BGR"])
def test_every_preset_layout_type_and_order(
    name: str, layout: str, dtype: str, colour: str
) -> None:
    spec = replace(preset(name)[0], layout=layout, dtype=dtype, colour=colour)
    pre = DevicePreprocess(kernels_device(), spec)
    for size in (None, (37, 53), (19, 64)):
        assert_the_cpus_bytes(pre, picture((37, 53)), size)


SIDES = st.integers(1, 70)
NUMBERS = st.floats(-300, 300, width=32)
POSITIVE = st.floats(2.0**-10, 300, width=32)


@settings(deadline=None)
@given(
    spec=st.builds(
        InputSpec,
        colour=st.sampled_from(["RGB", "BGR"]),
        scale=st.floats(2.0**-20, 4, width=32),
        mean=st.tuples(NUMBERS, NUMBERS, NUMBERS),
        std=st.tuples(POSITIVE, POSITIVE, POSITIVE),
        resize=st.sampled_from(FILTERS),
        layout=st.sampled_from(["NCHW", "NHWC"]),
        dtype=st.just("float32"),
    ),
    before=st.tuples(SIDES, SIDES),
    after=st.none() | st.tuples(SIDES, SIDES),
    seed=st.integers(0, 100),
)
def test_any_image_size_and_statistics(
    spec: InputSpec, before: Size, after: Size | None, seed: int
) -> None:
    pre = DevicePreprocess(kernels_device(seed=seed), spec)
    assert_the_cpus_bytes(pre, picture(before, seed), after)


def test_halves_round_as_numpy_does() -> None:
    """Every byte through scales from subnormal results to those near 65504."""
    image = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 256, 3)
    device, dice = kernels_device(), np.random.default_rng(3)
    for _ in range(60):
        scale, *rest = (2.0 ** dice.uniform(-24, 3.9, 7)).tolist()
        spec = replace(PLAIN, scale=scale, mean=tuple(rest[:3]), dtype="float16")
        assert_the_cpus_bytes(DevicePreprocess(device, spec), image, None)
    near_the_end = replace(PLAIN, scale=256.9, dtype="float16")  # 65509.5 rounds to 65504
    assert_the_cpus_bytes(DevicePreprocess(device, near_the_end), image, None)


def test_older_pillows_always_begin_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess_cuda, "pillow_orders_by_size", lambda: False)
    device, (before, after) = kernels_device(), AWKWARD["long windows"]
    pre = DevicePreprocess(device, replace(PLAIN, resize="bicubic"))
    image, stream = picture(before), device.stream()
    batch, given = Batch(device, pre.spec, after), on_device(device, image)
    pre.run(given, after, batch.array, 0, stream)
    stream.synchronize()
    rows_done = Image.fromarray(image).resize((after[1], before[0]), Image.Resampling.BICUBIC)
    both = np.array(rows_done.resize(after[::-1], Image.Resampling.BICUBIC))
    assert np.array_equal(batch.row(0)[0], both.transpose(2, 0, 1))


@pytest.mark.parametrize("barrier", [0, 1])
@on_processor
def test_a_missing_barrier_would_be_found(
    barrier: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = (build.KERNELS / "preprocess_cuda.cu").read_text().split("__syncthreads();")
    assert len(parts) == 3
    joints = ["__syncthreads();", "__syncthreads();"]
    joints[barrier] = ""
    (tmp_path / "preprocess_cuda.cu").write_text(
        parts[0] + joints[0] + parts[1] + joints[1] + parts[2]
    )
    monkeypatch.setattr(cubins, "sources", lambda: tmp_path)
    with pytest.raises(AssertionError):
        for seed in range(4):  # some order of the threads shows it
            pre = DevicePreprocess(ProcessorDevice(seed=seed), replace(PLAIN, resize="bicubic"))
            assert_the_cpus_bytes(pre, picture((70, 70)), (41, 40))


# ---- batches, streams, memory ----


@pytest.mark.parametrize("how", FILTERS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_row_touches_no_other(how: str, layout: str, dtype: str) -> None:
    spec = replace(preset("caffe-bgr")[0], resize=how, layout=layout, dtype=dtype)
    device, size = kernels_device(), (17, 35)
    pre, stream = DevicePreprocess(device, spec), device.stream()
    batch = Batch(device, spec, size, rows=4)
    images = {2: picture((29, 31), 2), 0: picture((17, 35), 4)}
    for row, image in images.items():
        given = on_device(device, image)
        pre.run(given, size, batch.array, row, stream)
        stream.synchronize()
        assert batch.row(row).tobytes() == to_batch_row(image, spec, size).tobytes()
    assert batch.untouched_but(*images)


@on_processor
def test_after_the_first_use_nothing_is_allocated_or_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = ProcessorDevice()
    pre, stream = DevicePreprocess(device, PLAIN), device.stream()
    image, size = picture((20, 30)), (11, 13)
    given, batch = on_device(device, image), Batch(device, PLAIN, size)
    pre.run(given, size, batch.array, 0, stream)
    stream.synchronize()

    def refused(*_: object, **__: object) -> Any:
        raise AssertionError("allocated or made")

    for name in ("allocate", "pinned", "stream", "event", "load"):
        monkeypatch.setattr(device, name, refused)
    batch.bytes[:] = UNTOUCHED
    for _ in range(3):
        pre.run(given, size, batch.array, 0, stream)
    assert stream.pending and not batch.row(0).tobytes().strip(bytes([UNTOUCHED]))
    stream.synchronize()
    assert batch.row(0).tobytes() == to_batch_row(image, PLAIN, size).tobytes()


def test_the_images_event_is_waited_for() -> None:
    device = kernels_device()
    pre, copies, ours = DevicePreprocess(device, PLAIN), device.stream(), device.stream()
    image, size = picture((20, 30)), (11, 13)
    source, memory, ready = on_device(device, image), device.allocate(image.nbytes), device.event()
    device.copy(memory.address, source.address, image.nbytes, copies)
    ready.record(copies)
    given = DeviceArray(device, memory.address, image.shape, image.dtype, memory, ready)
    batch = Batch(device, PLAIN, size)
    pre.run(given, size, batch.array, 0, ours)
    ours.synchronize()
    assert batch.row(0).tobytes() == to_batch_row(image, PLAIN, size).tobytes()


@pytest.mark.parametrize("how", FILTERS)
@on_processor
def test_replaced_tables_live_until_nothing_reads_them(how: str) -> None:
    device, spec = ProcessorDevice(), replace(PLAIN, resize=how)
    pre, stream = DevicePreprocess(device, spec), device.stream()
    image = picture((20, 30))
    given = on_device(device, image)
    most = preprocess_cuda._PAIRS_OF_SIZES
    sizes = [(7, w) for w in range(1, 3 * most)]
    batches = [Batch(device, spec, size) for size in sizes]
    for size, batch in zip(sizes, batches):
        pre.run(given, size, batch.array, 0, stream)
    assert len(pre._tables) == most and len(pre._replaced) == len(sizes) - most
    stream.synchronize()
    for size, batch in zip(sizes, batches):
        assert batch.row(0).tobytes() == to_batch_row(image, spec, size).tobytes()
    pre.run(given, (9, 9), Batch(device, spec, (9, 9)).array, 0, stream)
    assert len(pre._tables) == most and not pre._replaced


def test_many_threads_share_one() -> None:
    device, spec = kernels_device(), replace(PLAIN, resize="bicubic")
    pre = DevicePreprocess(device, spec)
    image = picture((23, 29))
    given = on_device(device, image)
    done: list[tuple[Size, Batch]] = []
    streams = [device.stream() for _ in range(4)]

    def work(k: int) -> None:
        for w in range(1, 30):
            size = (5 + k % 2, w)
            batch = Batch(device, spec, size)
            pre.run(given, size, batch.array, 0, streams[k])
            done.append((size, batch))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for stream in streams:
        stream.synchronize()
    assert len(done) == 4 * 29
    for size, batch in done:
        assert batch.row(0).tobytes() == to_batch_row(image, spec, size).tobytes()


@on_processor
def test_one_module_and_one_launch_an_image() -> None:
    device = ProcessorDevice()
    pre = DevicePreprocess(device, replace(PLAIN, resize="bicubic"))
    for size in ((9, 9), (9, 12), None):
        assert_the_cpus_bytes(pre, picture((40, 9)), size)
    assert device.launched == ["cada_preprocess"] * 3
    assert device.built == [("preprocess_cuda.cu", {})]


# ---- refusals ----


@on_processor
def test_what_the_cpu_refuses_is_refused() -> None:
    device = ProcessorDevice()
    for spec in (
        replace(PLAIN, scale=1000.0, dtype="float16"),
        replace(PLAIN, std=(1e-38, 1, 1)),
    ):
        with np.errstate(all="ignore"), pytest.raises(UsageError, match="leave the range"):
            DevicePreprocess(device, spec)
    pre, stream = DevicePreprocess(device, PLAIN), device.stream()
    image, out = picture((4, 6)), Batch(device, PLAIN, (4, 6), rows=2).array
    for wrong in (image[..., 0], image.astype(np.float32), image[..., :2], image[:0]):
        given = DeviceArray(device, out.address, wrong.shape, wrong.dtype, out)
        with pytest.raises(ValueError, match=r"expected \(H, W, 3\) uint8"):
            pre.run(given, None, out, 0, stream)
    given = on_device(device, image)
    for other in (
        replace(out, shape=(2, 4, 6, 3)),
        replace(out, shape=(3, 4, 6)),
        replace(out, shape=(2, 3, 6, 4)),
        replace(out, dtype=np.dtype(np.float16)),
    ):
        with pytest.raises(ValueError, match=r"expected float32 \(N, 3, 4, 6\)"):
            pre.run(given, None, other, 0, stream)
    with pytest.raises(ValueError, match=r"expected float32 \(N, 3, 0, 6\)"):
        pre.run(given, (0, 6), replace(out, shape=(2, 3, 0, 6)), 0, stream)
    for row in (-1, 2):
        with pytest.raises(ValueError, match=f"row is {row}, but the batch has 2"):
            pre.run(given, None, out, row, stream)
    assert not stream.pending


@on_processor
def test_arrays_of_another_device_are_refused() -> None:
    device, other = ProcessorDevice(), ProcessorDevice(ordinal=1)
    pre, stream = DevicePreprocess(device, PLAIN), device.stream()
    image, out = on_device(device, picture((4, 6))), Batch(device, PLAIN, (4, 6)).array
    with pytest.raises(UsageError, match=r"the image lies on cuda:1, but this .* on cuda:0"):
        pre.run(replace(image, device=other), None, out, 0, stream)
    with pytest.raises(UsageError, match="the batch lies on cuda:1"):
        pre.run(image, None, replace(out, device=other), 0, stream)


# ---- tables ----


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 9), (9, 1), (7, 31), (31, 7), (64, 32),
                                               (2048, 1024), (3, 400), (65535, 2)])  # fmt: skip
def test_tables_stay_inside_the_image(before: int, after: int) -> None:
    for clamped in (False, True):
        taps, weights = np.split(bilinear_table(before, after, clamped=clamped), 2)
        assert taps.shape == (2, after) and taps.min() >= 0 and taps.max() < before
        assert weights.min() >= 0 and np.all(np.abs(weights.sum(0) - 2048) <= 1)
    first, count, *weights = bicubic_table(before, after)
    assert first.min() >= 0 and count.min() >= 1 and (first + count).max() == before
    assert np.all(np.diff(first) >= 0) and np.all(np.diff(first + count) >= 0)
    sums = np.sum(weights, axis=0, dtype=np.int64)
    assert np.all(np.abs(sums - (1 << 22)) <= len(weights) / 2)
    # Whatever the pixels are, the kernel's 32-bit sums hold.
    assert np.abs(np.array(weights, np.int64)).sum(0).max() * 255 < 2**31 - 2**21


# ---- under the sanitizers ----


def test_the_kernel_under_the_sanitizers() -> None:
    names = "awkward_sizes_have or touches_no_other or live_until"
    done = sanitized(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0",
        "tests/kernels/test_preprocess_cuda.py", "-k", names,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
