"""The fused kernels on a GPU (kernels/fused_cuda.cu): the bits of the CPU's, a batch in one launch.

A Plan holds what one shape of batch needs, taps and buffers, and enqueues work on a stream without
waiting or allocating after its first use; `fetch` enqueues the way back, and once the stream has
passed that point `evidence`, `counted` and `selection` read the results. Kernel is the FusedKernel
on top of it, for arrays of the host: it waits.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cada_deploy import cubins, device_arrays
from cada_deploy.device import Device, Function, Memory, Stream, open_device
from cada_deploy.device_arrays import DeviceArray
from cada_deploy.errors import UsageError
from cada_deploy.fused import (
    MEANINGS,
    ORDERS,
    WEIGHTINGS,
    Evidence,
    Labels,
    Selection,
    check_encoded,
    check_mask,
    check_raw,
    check_rule,
    position,
)
from cada_deploy.model_spec import Size
from cada_deploy.policies import COMPARATORS, MEASURES, Rule
from cada_deploy.scores import EncodedScores, Upsampling
from cada_deploy.statistics import HISTOGRAM_BINS, ClassStatistics

NAME = "cuda"

# As in kernels/fused_cuda.cu.
MOST_CLASSES_FIXED = 64  # more, and the class count is a parameter of a general kernel
MOST_CLASSES_OF_WIDE_BLOCKS = 32
MOST_ROWS_OF_GROUP = 15
_PER_PIXEL_THREADS = 256  # a block of encode and soften

_PLANS = 4  # of the synchronous calls
_RULES = 16

Array = npt.NDArray[Any]
Argument = np.generic  # of a kernel: a NumPy scalar of its type
Kept = TypeVar("Kept")
_NULL = np.uint64(0)


@dataclass(frozen=True, eq=False)
class _Taps:
    """Where every output row and column lies between low-resolution ones, on the device."""

    pointers: Sequence[Argument]  # y_lower, y_weight, x_lower, x_weight, group_rows
    groups: int
    memory: Memory


@dataclass(frozen=True, eq=False)
class _Rules:
    pointers: Sequence[Argument]  # thresholds, class_weights, kinds
    count: int
    memory: Memory


def tap_table(
    size: int, low_size: int, align_corners: bool
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """(lower, weight) of every output index, bit for bit tap_of in kernels/pixel.h."""
    o = np.arange(size, dtype=np.int64)
    if align_corners:
        numerator, denominator = o * (low_size - 1) * (size > 1), max(size - 1, 1)
    else:
        numerator, denominator = np.maximum((2 * o + 1) * low_size - size, 0), 2 * size
    lower = numerator // denominator
    weight = (numerator - lower * denominator).astype(np.float32) / np.float32(denominator)
    last = lower >= low_size - 1
    return (
        np.where(last, low_size - 1, lower).astype(np.int32),
        np.where(last, np.float32(0), weight).astype(np.float32),
    )


def row_groups(lower: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """(G + 1,) first rows of the groups, then the number of rows. The rows of a group lie between
    the same two low-resolution rows, and are at most MOST_ROWS_OF_GROUP."""
    starts = [0]
    for y in range(1, len(lower)):
        if lower[y] != lower[y - 1] or y - starts[-1] == MOST_ROWS_OF_GROUP:
            starts.append(y)
    return np.array([*starts, len(lower)], np.int32)


class Kernel:
    """A fused back end (see FusedKernel) on one GPU. Thread-safe: synchronous calls take turns, and
    plans share only tables that do not change."""

    name = NAME
    bit_exact = True

    def __init__(self, threads: int = 1, device: Device | None = None) -> None:
        """threads is for back ends on a CPU. Without a device, cuda:0 is opened."""
        if threads < 1:
            raise UsageError(f"threads is {threads}; expected 1 or more")
        self.device = device or open_device("cuda:0")
        self._lock = threading.RLock()
        self._functions: dict[tuple[int, str], Function] = {}
        self._taps: OrderedDict[tuple[object, ...], _Taps] = OrderedDict()
        self._rules: OrderedDict[tuple[Rule, ...], _Rules] = OrderedDict()
        self._plans: OrderedDict[tuple[object, ...], Plan] = OrderedDict()
        self._stream: Stream | None = None

    # -- arrays of the host

    def encode(self, scores: npt.NDArray[Any], meaning: str) -> npt.NDArray[np.float16]:
        check_raw(scores.shape, scores.dtype)
        position("meaning", meaning, MEANINGS)
        if scores.size == 0:
            return np.empty(scores.shape, np.float16)
        with self._lock:
            stream = self._own_stream()
            raw = self._uploaded(scores.reshape(-1, *scores.shape[-3:]), stream)
            encoded = device_arrays.empty(self.device, raw.shape, np.float16)
            self.encode_on(raw, meaning, encoded, stream)
            return self._fetched(encoded, stream).reshape(scores.shape)

    def accumulate(
        self,
        scores: EncodedScores,
        size: Size,
        weighting: str,
        mask: Labels | None = None,
        *,
        labels: bool = False,
        entropy: bool = False,
    ) -> Evidence:
        with self._lock:
            plan, given, given_mask, stream = self._one_frame(scores, size, mask)
            plan.accumulate(given, weighting, given_mask, stream, labels=labels, entropy=entropy)
            plan.fetch(stream)
            stream.synchronize()
            return plan.evidence(0)

    def count(
        self, scores: EncodedScores, size: Size, rules: Sequence[Rule], mask: Labels | None = None
    ) -> npt.NDArray[np.int64]:
        with self._lock:
            plan, given, given_mask, stream = self._one_frame(scores, size, mask)
            plan.count(given, rules, given_mask, stream)
            plan.fetch(stream)
            stream.synchronize()
            return plan.counted(0)

    def select(
        self,
        scores: EncodedScores,
        size: Size,
        rule: Rule,
        mask: Labels | None = None,
        *,
        entropy: bool = False,
        confidence: bool = False,
    ) -> Selection:
        with self._lock:
            plan, given, given_mask, stream = self._one_frame(scores, size, mask)
            plan.select(given, rule, given_mask, stream, entropy=entropy, confidence=confidence)
            plan.fetch(stream)
            stream.synchronize()
            return plan.selection(0)

    # -- arrays of the device

    def encode_on(
        self, raw: DeviceArray, meaning: str, encoded: DeviceArray, stream: Stream
    ) -> None:
        """Enqueue (N, C, h, w) float32 or float16 -> `encoded`, float16 of that shape."""
        check_raw(raw.shape, raw.dtype)
        assert len(raw.shape) == 4 and encoded.nbytes >= raw.nbytes // raw.dtype.itemsize * 2
        frames, classes, *low = raw.shape
        pixels = low[0] * low[1]
        arguments = (
            np.uint64(raw.address),
            np.int32(raw.dtype == np.float16),
            np.int32(position("meaning", meaning, MEANINGS)),
            np.int64(frames),
            np.int32(classes),
            np.int64(pixels),
            np.uint64(encoded.address),
        )
        self.per_pixel("cada_encode", classes, frames * pixels, arguments, stream)

    def plan(self, shape: tuple[int, int, int, int], size: Size, upsampling: Upsampling) -> Plan:
        """For batches of up to shape[0] frames of scores (C, h, w), to labels of `size`.

        Raises ArtefactMismatch, UsageError, OutOfDeviceMemory (also at a plan's first use)."""
        check_encoded(shape[1:], np.dtype(np.float16), upsampling, size)
        return Plan(self, shape, size, upsampling)

    # -- for plans

    def per_pixel(
        self,
        name: str,
        classes: int,
        pixels: int,
        arguments: Sequence[np.generic],
        stream: Stream,
    ) -> None:
        """Launch encode or soften: one thread for each low-resolution pixel."""
        grid = (-(-pixels // _PER_PIXEL_THREADS), 1, 1)
        block = (_PER_PIXEL_THREADS, 1, 1)
        self.device.launch(self.function(classes, name), grid, block, arguments, stream)

    def function(self, classes: int, name: str) -> Function:
        fixed = classes if classes <= MOST_CLASSES_FIXED else 0
        with self._lock:
            if (fixed, name) not in self._functions:
                image = cubins.kernel_image(self.device, "fused_cuda.cu", {"CADA_CLASSES": fixed})
                module = self.device.load(image)
                for known in ("encode", "soften", "accumulate", "count", "select"):
                    self._functions[fixed, f"cada_{known}"] = module.function(f"cada_{known}")
            return self._functions[fixed, name]

    def taps(self, low: Size, size: Size, align_corners: bool) -> _Taps:
        key = (low, size, align_corners)
        with self._lock:
            if key not in self._taps:
                y_lower, y_weight = tap_table(size[0], low[0], align_corners)
                x_lower, x_weight = tap_table(size[1], low[1], align_corners)
                rows = row_groups(y_lower)
                memory, pointers = self._placed(y_lower, y_weight, x_lower, x_weight, rows)
                self._taps[key] = _Taps(pointers, len(rows) - 1, memory)
            return _recent(self._taps, key, _PLANS)

    def rules(self, rules: Sequence[Rule], classes: int) -> _Rules:
        key = tuple(rules)
        with self._lock:
            if key not in self._rules:
                for rule in key:
                    check_rule(rule, classes)
                ones = np.ones(classes, np.float32)  # read by nobody, as only ratios have weights
                weights = [np.array(r.class_weights, np.float32) if r.class_weights else ones
                           for r in key]  # fmt: skip
                kinds = [(MEASURES.index(r.measure), COMPARATORS.index(r.comparator)) for r in key]
                memory, pointers = self._placed(
                    np.array([r.float32_thresholds for r in key], np.float32),
                    np.array(weights, np.float32),
                    np.array(kinds, np.int32),
                )
                self._rules[key] = _Rules(pointers, len(key), memory)
            return _recent(self._rules, key, _RULES)

    def _placed(self, *arrays: Array) -> tuple[Memory, Sequence[Argument]]:
        """Tables, side by side in one buffer of the device. Waits: they are there for good."""
        offsets = np.cumsum([0, *(-(-array.nbytes // 16) * 16 for array in arrays)])
        staged = self.device.pinned(max(int(offsets[-1]), 1))
        memory = self.device.allocate(staged.nbytes)
        assert staged.host is not None
        for array, offset in zip(arrays, offsets):
            staged.host[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        stream = self._own_stream()
        self.device.copy(memory.address, staged.address, staged.nbytes, stream)
        stream.synchronize()
        return memory, tuple(np.uint64(memory.address + int(o)) for o in offsets[:-1])

    # -- synchronous calls

    def _own_stream(self) -> Stream:
        self._stream = self._stream or self.device.stream()
        return self._stream

    def _one_frame(
        self, scores: EncodedScores, size: Size, mask: Labels | None
    ) -> tuple[Plan, DeviceArray, DeviceArray | None, Stream]:
        array = scores.array
        check_encoded(array.shape, array.dtype, scores.upsampling, size)
        if mask is not None:
            check_mask(mask.shape, mask.dtype, size)
        key = (array.shape, tuple(size), scores.upsampling)
        if key not in self._plans:
            self._plans[key] = self.plan((1, *array.shape), size, scores.upsampling)
        plan = _recent(self._plans, key, _PLANS)
        stream = self._own_stream()
        given = self._uploaded(array[None], stream)
        return plan, given, None if mask is None else self._uploaded(mask, stream), stream

    def _uploaded(self, array: Array, stream: Stream) -> DeviceArray:
        staged = self.device.pinned(array.nbytes)
        assert staged.host is not None
        staged.host[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        target = device_arrays.empty(self.device, array.shape, array.dtype)
        self.device.copy(target.address, staged.address, array.nbytes, stream)
        stream.synchronize()  # then `staged` may go
        return target

    def _fetched(self, array: DeviceArray, stream: Stream) -> Array:
        staged = self.device.pinned(array.nbytes)
        self.device.copy(staged.address, array.address, array.nbytes, stream)
        stream.synchronize()
        return _view(staged, array.shape, array.dtype).copy()


class Plan:
    """Buffers and tables for one shape of batch. One stream at a time, one call's results at a
    time: whoever wants several batches in flight takes several plans. Not thread-safe."""

    def __init__(
        self,
        kernel: Kernel,
        shape: tuple[int, int, int, int],
        size: Size,
        upsampling: Upsampling,
    ) -> None:
        self._kernel = kernel
        self._device = kernel.device
        self._frames, self._classes = shape[:2]
        self._low: Size = (shape[2], shape[3])
        self._size: Size = (size[0], size[1])
        self._upsampling = upsampling
        self._taps = kernel.taps(self._low, self._size, upsampling.align_corners)
        self._buffers: dict[str, _Buffer] = {}
        self._back: list[_Buffer] = []  # what the last call gives
        self._given: _Rules | None = None  # stays as long as the launch that reads it may run
        self._weighting = ""
        self._rule_count = 0

    # -- enqueue

    def accumulate(
        self,
        scores: DeviceArray,
        weighting: str,
        mask: DeviceArray | None,
        stream: Stream,
        *,
        labels: bool = False,
        entropy: bool = False,
    ) -> None:
        """Encoded scores (n, C, h, w), n up to the plan's frames; mask (H, W) uint8 for all."""
        confident = WEIGHTINGS[position("weighting", weighting, WEIGHTINGS)] == "confidence"
        n, c = self._frames, self._classes
        parts = self._counts("evidence", [(n, c, c), (n, c, HISTOGRAM_BINS), (n, 2)], stream)
        maps = [self._map("labels", np.uint8, labels), self._map("entropy", np.float32, entropy)]
        self._launch("cada_accumulate", scores, mask, [np.int32(confident), *parts, *maps], stream)
        self._weighting = weighting

    def count(
        self, scores: DeviceArray, rules: Sequence[Rule], mask: DeviceArray | None, stream: Stream
    ) -> None:
        given = self._given = self._kernel.rules(rules, self._classes)
        (selected,) = self._counts(
            f"counted {given.count}", [(self._frames, given.count, self._classes)], stream
        )
        self._rule_count = given.count
        if given.count:
            arguments = (*given.pointers, np.int32(given.count), selected)
            self._launch("cada_count", scores, mask, arguments, stream)

    def select(
        self,
        scores: DeviceArray,
        rule: Rule,
        mask: DeviceArray | None,
        stream: Stream,
        *,
        entropy: bool = False,
        confidence: bool = False,
    ) -> None:
        given = self._given = self._kernel.rules([rule], self._classes)
        n, c = self._frames, self._classes
        parts = self._counts("kept", [(n, c), (n, c), (n, 2)], stream)
        arguments: list[Argument] = [
            *given.pointers[:2],
            np.int32(MEASURES.index(rule.measure)),
            np.int32(COMPARATORS.index(rule.comparator)),
            self._map("labels", np.uint8, True),
            *parts,
            self._map("entropy", np.float32, entropy),
            self._map("confidence", np.float32, confidence),
        ]
        self._launch("cada_select", scores, mask, arguments, stream)

    def fetch(self, stream: Stream) -> None:
        """Enqueue the copies to the host of what the last call gives."""
        for buffer in self._back:
            here = buffer.pinned_for(self._device)
            self._device.copy(here.address, buffer.memory.address, buffer.memory.nbytes, stream)

    # -- read, after the stream has passed the fetch

    def evidence(self, frame: int) -> Evidence:
        sums, histogram, left_out = self._read_counts("evidence", frame)
        statistics = ClassStatistics(
            self._weighting, histogram.sum(1), sums, histogram, int(left_out[0]), int(left_out[1])
        )
        return Evidence(
            statistics, self._read_map("labels", frame), self._read_map("entropy", frame)
        )

    def counted(self, frame: int) -> npt.NDArray[np.int64]:
        """(R, C)."""
        (counted,) = self._read_counts(f"counted {self._rule_count}", frame)
        return counted

    def selection(self, frame: int) -> Selection:
        predicted, selected, left_out = self._read_counts("kept", frame)
        labels = self._read_map("labels", frame)
        assert labels is not None
        return Selection(
            labels,
            predicted,
            selected,
            int(left_out[0]),
            int(left_out[1]),
            self._read_map("entropy", frame),
            self._read_map("confidence", frame),
        )

    # -- buffers

    def _counts(
        self, name: str, shapes: Sequence[tuple[int, ...]], stream: Stream
    ) -> list[Argument]:
        """Zeroed integers, side by side. A call begins here: it gives these, and maps."""
        buffer = self._buffers.get(name)
        if buffer is None:
            parts = [(shape, np.dtype(np.int64)) for shape in shapes]
            buffer = self._buffers[name] = _Buffer.new(self._device, parts)
        self._back = [buffer]
        self._device.fill(buffer.memory.address, 0, buffer.memory.nbytes, stream)
        return buffer.pointers

    def _map(self, name: str, dtype: Any, wanted: bool) -> Argument:
        if not wanted:
            return _NULL
        if name not in self._buffers:
            shape = (self._frames, *self._size)
            self._buffers[name] = _Buffer.new(self._device, [(shape, np.dtype(dtype))])
        self._back.append(self._buffers[name])
        return self._buffers[name].pointers[0]

    def _read_counts(self, name: str, frame: int) -> list[Array]:
        return [part[frame].copy() for part in self._buffers[name].parts()]

    def _read_map(self, name: str, frame: int) -> Array | None:
        buffer = self._buffers.get(name)
        if buffer not in self._back:
            return None
        assert buffer is not None
        copied: Array = buffer.parts()[0][frame].copy()
        return copied

    # -- launches

    def _launch(
        self,
        name: str,
        scores: DeviceArray,
        mask: DeviceArray | None,
        arguments: Sequence[np.generic],
        stream: Stream,
    ) -> None:
        frames = scores.shape[0]
        assert 1 <= frames <= self._frames
        assert scores.shape[1:] == (self._classes, *self._low) and scores.dtype == np.float16
        if mask is not None:
            check_mask(mask.shape, mask.dtype, self._size)
        for array in (scores, mask):
            if array is not None and array.ready is not None:
                stream.wait(array.ready)
        narrow = MOST_CLASSES_OF_WIDE_BLOCKS < self._classes <= MOST_CLASSES_FIXED
        threads = 64 if narrow else 128
        blocks = frames * self._taps.groups * -(-self._size[1] // threads)
        common: list[Argument] = [
            np.uint64(scores.address),
            self._softened(scores, stream),
            _NULL if mask is None else np.uint64(mask.address),
            *(np.int32(v) for v in (self._classes, *self._low, *self._size)),
            *self._taps.pointers,
            np.int32(self._taps.groups),
        ]
        self._device.launch(
            self._kernel.function(self._classes, name),
            (blocks, 1, 1),
            (threads, 1, 1),
            (*common, *arguments),
            stream,
        )

    def _softened(self, scores: DeviceArray, stream: Stream) -> Argument:
        """Order `probs`: the softmax at low resolution comes first."""
        if self._upsampling.order == ORDERS[0]:
            return _NULL
        if "soft" not in self._buffers:
            shape = (self._frames, self._classes, *self._low)
            self._buffers["soft"] = _Buffer.new(self._device, [(shape, np.dtype(np.float32))])
        (soft,) = self._buffers["soft"].pointers
        frames, pixels = scores.shape[0], self._low[0] * self._low[1]
        arguments = (
            np.uint64(scores.address),
            np.int64(frames),
            np.int32(self._classes),
            np.int64(pixels),
            soft,
        )
        self._kernel.per_pixel("cada_soften", self._classes, frames * pixels, arguments, stream)
        return soft


@dataclass(eq=False)
class _Buffer:
    """Arrays side by side in the device's memory, and their twin on the host once it is wanted."""

    memory: Memory
    shapes: Sequence[tuple[tuple[int, ...], np.dtype[Any]]]
    pinned: Memory | None = None

    @classmethod
    def new(
        cls, device: Device, shapes: Sequence[tuple[tuple[int, ...], np.dtype[Any]]]
    ) -> _Buffer:
        nbytes = sum(_nbytes(shape, dtype) for shape, dtype in shapes)
        return cls(device.allocate(max(nbytes, 1)), shapes)

    def pinned_for(self, device: Device) -> Memory:
        self.pinned = self.pinned or device.pinned(self.memory.nbytes)
        return self.pinned

    @property
    def pointers(self) -> list[Argument]:
        found: list[Argument] = []
        at = self.memory.address
        for shape, dtype in self.shapes:
            found.append(np.uint64(at))
            at += _nbytes(shape, dtype)
        return found

    def parts(self) -> list[Array]:
        """On the host, as they were fetched."""
        assert self.pinned is not None and self.pinned.host is not None
        found, at = [], 0
        for shape, dtype in self.shapes:
            nbytes = _nbytes(shape, dtype)
            found.append(self.pinned.host[at : at + nbytes].view(dtype).reshape(shape))
            at += nbytes
        return found


def _nbytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _view(memory: Memory, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    assert memory.host is not None
    return memory.host[: _nbytes(shape, dtype)].view(dtype).reshape(shape)


def _recent(kept: OrderedDict[Any, Kept], key: object, most: int) -> Kept:
    """The entry of `key`, as the most recent one; the oldest beyond `most` go."""
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)
    return kept[key]
