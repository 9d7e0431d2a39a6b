"""The row of a batch, made on a GPU (kernels/preprocess_cuda.cu): the bytes of preprocess.py.

One launch for an image, nothing waited for. Where an output pixel lies and what its taps weigh is
float64 arithmetic of OpenCV and of Pillow; it is done here, once for each pair of sizes, and the
kernel adds integers. Images come from the host or from a decoder on the device; that is not here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cada_deploy import cubins
from cada_deploy.device import Device, Event, Memory, Stream
from cada_deploy.device_arrays import DeviceArray
from cada_deploy.errors import UsageError
from cada_deploy.model_spec import InputSpec, Size
from cada_deploy.preprocess import pillow_orders_by_size, to_batch_row

# As in kernels/preprocess_cuda.cu.
SAME, BILINEAR, HALVED, ROWS_FIRST, COLUMNS_FIRST = range(5)
_LANES, _THREAD_ROWS, _TILE = 32, 8, 32
_BILINEAR_BITS = 11
_BICUBIC_BITS = 22

_PAIRS_OF_SIZES = 16
_NULL = np.uint64(0)

Table = npt.NDArray[np.int32]


def filter_of(how: str, image: Size, size: Size) -> int:
    """Which way of the kernel makes `size` from `image` with the spec's filter."""
    if image == size:
        return SAME
    if how == "bilinear":
        return HALVED if image == (2 * size[0], 2 * size[1]) else BILINEAR
    assert how == "bicubic", how
    lost_rows, lost_columns = image[0] - size[0], image[1] - size[1]
    columns_first = lost_rows > 0 and lost_rows > 2 * lost_columns
    return COLUMNS_FIRST if columns_first and pillow_orders_by_size() else ROWS_FIRST


def bilinear_table(input_side: int, output_side: int, *, clamped: bool) -> Table:
    """(4, outputs): two input indices, their weights in 1/2048: cv2.resize with INTER_LINEAR.

    clamped is for columns: outside the image they get no weight, while rows keep theirs and are
    repeated, which is not the same after rounding.
    """
    scale = 1.0 / (output_side / input_side)
    position = ((np.arange(output_side) + 0.5) * scale - 0.5).astype(np.float32)
    lower = np.floor(position).astype(np.int32)
    share = position - lower.astype(np.float32)
    if clamped:
        share[(lower < 0) | (lower >= input_side - 1)] = 0
    unit = np.float32(1 << _BILINEAR_BITS)
    taps = [np.clip(tap, 0, input_side - 1) for tap in (lower, lower + 1)]
    weights = [np.rint((np.float32(1) - share) * unit), np.rint(share * unit)]
    return np.array([*taps, *weights], np.int32)


def bicubic_table(input_side: int, output_side: int) -> Table:
    """(2 + taps, outputs): first input index, number of weights, weights in 1/2^22: Pillow's
    BICUBIC (Keys' kernel, a = -0.5, stretched by the ratio when it shrinks)."""
    if input_side == output_side:  # Pillow leaves the pass out; one weight of 1 changes nothing
        outputs = np.arange(output_side)
        ones = np.ones_like(outputs)
        return np.array([outputs, ones, ones << _BICUBIC_BITS], np.int32)
    scale = input_side / output_side
    stretch = max(scale, 1.0)
    support, inverse = 2.0 * stretch, 1.0 / stretch
    centre = (np.arange(output_side) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int32), 0)
    count = np.minimum((centre + support + 0.5).astype(np.int32), input_side) - first
    tap = np.arange(count.max())[:, None]
    shares = np.where(tap < count, _keys((tap + first - centre + 0.5) * inverse), 0.0)
    total = np.add.accumulate(shares, axis=0)[-1]  # one after the other, as Pillow adds
    shares = shares / np.where(total == 0, 1.0, total)
    weights = shares * (1 << _BICUBIC_BITS) + np.where(shares < 0, -0.5, 0.5)
    return np.concatenate([first[None], count[None], weights.astype(np.int32)])


def _keys(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


@dataclass(frozen=True, eq=False)
class _Tables:
    """What the kernel reads for one pair of sizes, and until when it may be reading."""

    filter: int
    pointers: tuple[np.uint64, np.uint64]  # rows, columns
    memory: Memory | None
    last_uses: dict[int, Event] = field(default_factory=dict)  # by stream

    @property
    def in_flight(self) -> bool:
        return not all(event.done for event in self.last_uses.values())


class DevicePreprocess:
    """preprocess.to_batch_row on one GPU, for one spec. Thread-safe. It owns the tables, so it must
    live, as the arrays must, until the stream has passed what `run` enqueued."""

    def __init__(self, device: Device, spec: InputSpec) -> None:
        """Raises UsageError when scale, mean and std leave the range of the spec's dtype,
        EnvironmentLacks and RunFailed when the kernel cannot be had."""
        to_batch_row(np.zeros((1, 1, 3), np.uint8), spec)  # refuses what the CPU refuses
        self.device = device
        self.spec = spec
        image = cubins.kernel_image(device, "preprocess_cuda.cu", {})
        self._function = device.load(image).function("cada_preprocess")
        self._normalisation = np.array([spec.scale, *spec.mean, *spec.std], np.float32)
        self._dtype = np.dtype(spec.dtype)
        self._lock = threading.Lock()
        self._stream: Stream | None = None
        self._tables: OrderedDict[tuple[Size, Size], _Tables] = OrderedDict()
        self._replaced: list[_Tables] = []  # still read by what is enqueued

    def run(
        self, image: DeviceArray, size: Size | None, out: DeviceArray, row: int, stream: Stream
    ) -> None:
        """Enqueue: image (H, W, 3) uint8 RGB -> out[row], out being (N, 3, h, w) or (N, h, w, 3) in
        the spec's layout and dtype. size is (h, w); None keeps the image's own.

        The first use of a pair of sizes uploads its tables and waits for that; afterwards nothing
        is allocated or waited for. Not to be captured into a graph: the tables belong to the last
        _PAIRS_OF_SIZES pairs and go when nothing enqueued reads them. Raises UsageError for an
        array on another device, ValueError for one of another shape or type, OutOfDeviceMemory.
        """
        self._check(image, size, out, row)
        height, width = image.shape[:2]
        h, w = size = size or (height, width)
        for array in (image, out):
            if array.ready is not None:
                stream.wait(array.ready)
        with self._lock:  # until the use is on record, so that nobody replaces the tables before
            tables = self._tables_of((height, width), size)
            along, across = (h, w) if tables.filter == COLUMNS_FIRST else (w, h)
            self.device.launch(
                self._function,
                (-(-along // _LANES), -(-across // _TILE), 1),
                (_LANES, _THREAD_ROWS, 1),
                (
                    np.uint64(image.address),
                    *(np.int32(v) for v in (height, width, tables.filter)),
                    *tables.pointers,
                    np.uint64(out.address + row * 3 * h * w * self._dtype.itemsize),
                    np.int32(h),
                    np.int32(w),
                    np.int32(self.spec.colour == "BGR"),
                    np.int32(self.spec.layout == "NHWC"),
                    np.int32(self._dtype == np.float16),
                    *self._normalisation,
                ),
                stream,
            )
            if tables.memory is not None:
                if stream.handle not in tables.last_uses:
                    tables.last_uses[stream.handle] = self.device.event()
                tables.last_uses[stream.handle].record(stream)

    def _check(self, image: DeviceArray, size: Size | None, out: DeviceArray, row: int) -> None:
        for what, array in (("image", image), ("batch", out)):
            if array.device.ordinal != self.device.ordinal:
                raise UsageError(
                    f"the {what} lies on cuda:{array.device.ordinal}, but this preprocessing runs "
                    f"on cuda:{self.device.ordinal}; copy it there, or open that device"
                )
        shape = image.shape
        if image.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or image.nbytes == 0:
            raise ValueError(f"expected (H, W, 3) uint8, found {image.dtype} {shape}")
        h, w = size or shape[:2]
        expected = (3, h, w) if self.spec.layout == "NCHW" else (h, w, 3)
        if min(h, w) < 1 or out.shape[1:] != expected or out.dtype != self._dtype:
            wanted = ", ".join(map(str, expected))
            raise ValueError(
                f"out is {out.dtype} {out.shape}; expected {self._dtype} (N, {wanted})"
            )
        if not 0 <= row < out.shape[0]:
            raise ValueError(f"row is {row}, but the batch has {out.shape[0]}")

    # -- tables

    def _tables_of(self, image: Size, size: Size) -> _Tables:
        key = (image, size)
        if key not in self._tables:
            self._tables[key] = self._new_tables(image, size)
        self._tables.move_to_end(key)
        if len(self._tables) > _PAIRS_OF_SIZES:
            _, oldest = self._tables.popitem(last=False)
            self._replaced = [old for old in (*self._replaced, oldest) if old.in_flight]
        return self._tables[key]

    def _new_tables(self, image: Size, size: Size) -> _Tables:
        how = filter_of(self.spec.resize, image, size)
        if how in (SAME, HALVED):
            return _Tables(how, (_NULL, _NULL), None)
        if how == BILINEAR:
            rows = bilinear_table(image[0], size[0], clamped=False)
            columns = bilinear_table(image[1], size[1], clamped=True)
        else:
            rows, columns = bicubic_table(image[0], size[0]), bicubic_table(image[1], size[1])
        memory = self._uploaded(np.concatenate([rows.reshape(-1), columns.reshape(-1)]))
        pointers = (np.uint64(memory.address), np.uint64(memory.address + rows.nbytes))
        return _Tables(how, pointers, memory)

    def _uploaded(self, values: Table) -> Memory:
        self._stream = self._stream or self.device.stream()
        staged = self.device.pinned(values.nbytes)
        memory = self.device.allocate(values.nbytes)
        assert staged.host is not None
        staged.host[:] = values.view(np.uint8)
        self.device.copy(memory.address, staged.address, values.nbytes, self._stream)
        self._stream.synchronize()  # then `staged` may go, and every stream finds the tables
        return memory
