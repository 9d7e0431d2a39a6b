"""Frames through one GPU: upload, preprocess, network, fused kernel, and back only what is small.

Each caller (a worker thread of the host) takes a lane: a stream, and pinned and device buffers of
its own. It enqueues everything for its frames and waits once, at the end; with several workers
several frames are in flight, and the GPU works while images are decoded. Per frame come back the
encoded scores (for the cache) and the statistics, nothing of full size. Once a lane has seen a
size, nothing is allocated for it again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cada_deploy import device_arrays
from cada_deploy.device import Device, Memory, OutOfDeviceMemory, Stream
from cada_deploy.device_arrays import DeviceArray
from cada_deploy.engines import DeviceEngine, Engine
from cada_deploy.fused import Evidence, Labels
from cada_deploy.fused.cuda import Kernel, Plan
from cada_deploy.model_spec import ModelSpec, Size
from cada_deploy.preprocess_cuda import DevicePreprocess
from cada_deploy.scores import Upsampling
from cada_deploy.stages import StageClock

Image = npt.NDArray[np.uint8]
Encoded = npt.NDArray[np.float16]

_MASKS = 16
_SIZES = 2  # a lane keeps buffers for; images of many sizes cost allocations, not memory


@dataclass(frozen=True)
class _Wanted:
    """Statistics of each frame, on a grid."""

    grid: Size
    weighting: str
    mask: DeviceArray | None


def for_engine(
    engine: Engine,
    spec: ModelSpec,
    *,
    most: int = 1,
    auto_batch: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> DeviceFrames | None:
    """None for an engine on the CPU, and for a spec by which a frame goes through the network more
    than once (windows, scales, mirror): the host averages those."""
    if not isinstance(engine, DeviceEngine) or not spec.inference.plain:
        return None
    return DeviceFrames(engine, spec, most=most, auto_batch=auto_batch, say=say)


class DeviceFrames:
    """Thread-safe; as many lanes as callers at once.

    most is how many frames go through the network together; with auto_batch it is halved, and
    that is said, when the device has no room. Methods raise OutOfDeviceMemory else, and DeviceLost
    when the GPU is gone.
    """

    def __init__(
        self,
        engine: DeviceEngine,
        spec: ModelSpec,
        *,
        most: int = 1,
        auto_batch: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.device: Device = engine.gpu
        self.engine = engine
        self.spec = spec
        self.kernel = Kernel(device=self.device)
        self.preprocess = DevicePreprocess(self.device, spec.input)
        self._most = most
        self._auto_batch = auto_batch
        self._say = say
        self._lock = threading.Lock()
        self._idle: list[_Lane] = []
        self._masks: OrderedDict[tuple[Size, Size], DeviceArray] = OrderedDict()

    @property
    def most(self) -> int:
        """Frames that go through the network together."""
        return self._most

    def scores(self, images: Sequence[Image], network: Size, clock: StageClock) -> list[Encoded]:
        """images (H, W, 3) uint8 RGB of one size, network the network's input (h, w) -> encoded
        scores (C, h', w') of each."""
        return [encoded for encoded, _ in self._all(images, network, None, clock)]

    def evidence(
        self,
        images: Sequence[Image],
        network: Size,
        grid: Size,
        weighting: str,
        mask: Labels | None,
        clock: StageClock,
    ) -> list[tuple[Encoded, Evidence]]:
        """As `scores`, with the statistics of each image on `grid` (H, W). mask is that of the run:
        the same whenever image size and grid are."""
        size = (images[0].shape[0], images[0].shape[1])
        wanted = _Wanted(grid, weighting, None if mask is None else self._mask(mask, size))
        found = self._all(images, network, wanted, clock)
        return [(encoded, evidence) for encoded, evidence in found if evidence is not None]

    def _all(
        self, images: Sequence[Image], network: Size, wanted: _Wanted | None, clock: StageClock
    ) -> list[tuple[Encoded, Evidence | None]]:
        found: list[tuple[Encoded, Evidence | None]] = []
        while len(found) < len(images):
            most = self._most
            part = images[len(found) : len(found) + most]
            try:
                with self._lane() as lane:
                    found += lane.run(part, network, wanted, clock)
            except OutOfDeviceMemory as error:
                self._lower(most, error)
        return found

    def _lower(self, most: int, error: OutOfDeviceMemory) -> None:
        """Halve the batch, or raise the error again."""
        with self._lock:
            self._idle.clear()  # their buffers are the room that is wanted
            if self._most < most:  # another worker has lowered it meanwhile
                return
            if not self._auto_batch or most == 1:
                raise error
            self._most = most // 2
        self._say(f"{error}\nGoing on with batches of {most // 2} in place of {most}")

    @contextmanager
    def _lane(self) -> Iterator[_Lane]:
        with self._lock:
            lane = self._idle.pop() if self._idle else _Lane(self)
        yield lane
        # One that failed may have work under way in its buffers: it is not used again.
        with self._lock:
            self._idle.append(lane)

    def _mask(self, mask: Labels, image: Size) -> DeviceArray:
        key = (image, (mask.shape[0], mask.shape[1]))
        with self._lock:
            if key not in self._masks:
                self._masks[key] = _uploaded(self.device, mask)
                while len(self._masks) > _MASKS:
                    self._masks.popitem(last=False)  # a lane that uses it holds it
            self._masks.move_to_end(key)
            return self._masks[key]


@dataclass(eq=False)
class _Buffers:
    """What a lane keeps for one size of image and network."""

    pinned: Memory
    images: list[DeviceArray]
    batch: DeviceArray
    encoded: DeviceArray | None = None
    back: Memory | None = None


class _Lane:
    """A stream and its buffers; one caller at a time."""

    def __init__(self, frames: DeviceFrames) -> None:
        self._frames = frames
        self._device = frames.device
        self._stream = frames.device.stream()
        self._buffers: OrderedDict[tuple[object, ...], _Buffers] = OrderedDict()
        self._plans: OrderedDict[tuple[object, ...], Plan] = OrderedDict()

    def run(
        self, images: Sequence[Image], network: Size, wanted: _Wanted | None, clock: StageClock
    ) -> list[tuple[Encoded, Evidence | None]]:
        stream, frames = self._stream, self._frames
        with clock.stage("upload"):
            size = (images[0].shape[0], images[0].shape[1])
            buffers = self._buffers_for(size, network)
            self._upload(images, buffers)
        with clock.stage("gpu"):
            for row in range(len(images)):
                frames.preprocess.run(buffers.images[row], network, buffers.batch, row, stream)
            scores = frames.engine.infer_on(_rows(buffers.batch, len(images)), stream)
            encoded = self._encode(scores.array, buffers)
            plan = self._accumulate(encoded, wanted) if wanted else None
            back = self._fetch(encoded, buffers, plan)
            stream.synchronize()
            return [
                (back[k].copy(), plan.evidence(k) if plan else None) for k in range(len(images))
            ]

    # -- enqueue

    def _upload(self, images: Sequence[Image], buffers: _Buffers) -> None:
        assert buffers.pinned.host is not None
        for k, (image, target) in enumerate(zip(images, buffers.images)):
            at = k * image.nbytes
            buffers.pinned.host[at : at + image.nbytes] = image.reshape(-1)
            source = buffers.pinned.address + at
            if target.address != source:  # else the GPU reads the host's memory itself
                self._device.copy(target.address, source, image.nbytes, self._stream)

    def _encode(self, raw: DeviceArray, buffers: _Buffers) -> DeviceArray:
        if raw.ready is not None:
            self._stream.wait(raw.ready)
        if buffers.encoded is None or buffers.encoded.shape[1:] != raw.shape[1:]:
            shape = (buffers.batch.shape[0], *raw.shape[1:])
            buffers.encoded = device_arrays.empty(self._device, shape, np.float16)
            buffers.back = self._device.pinned(buffers.encoded.nbytes)
        encoded = _rows(buffers.encoded, raw.shape[0])
        meaning = self._frames.spec.output.meaning
        self._frames.kernel.encode_on(raw, meaning, encoded, self._stream)
        return encoded

    def _accumulate(self, encoded: DeviceArray, wanted: _Wanted) -> Plan:
        output = self._frames.spec.output
        key = (encoded.shape[1:], wanted.grid)
        if key not in self._plans:
            _, classes, height, width = encoded.shape
            self._plans[key] = self._frames.kernel.plan(
                (self._frames.most, classes, height, width),
                wanted.grid,
                Upsampling(output.order, output.align_corners),
            )
            while len(self._plans) > _SIZES:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        plan = self._plans[key]
        plan.accumulate(encoded, wanted.weighting, wanted.mask, self._stream)
        return plan

    def _fetch(self, encoded: DeviceArray, buffers: _Buffers, plan: Plan | None) -> Encoded:
        assert buffers.back is not None and buffers.back.host is not None
        self._device.copy(buffers.back.address, encoded.address, encoded.nbytes, self._stream)
        if plan:
            plan.fetch(self._stream)
        here = buffers.back.host[: encoded.nbytes]
        return here.view(np.float16).reshape(encoded.shape)

    # -- buffers

    def _buffers_for(self, size: Size, network: Size) -> _Buffers:
        key = (size, network, self._frames.most)
        if key not in self._buffers:
            while len(self._buffers) >= _SIZES:
                self._buffers.popitem(last=False)  # its last run was waited for
            self._buffers[key] = self._new_buffers(size, network)
        self._buffers.move_to_end(key)
        return self._buffers[key]

    def _new_buffers(self, size: Size, network: Size) -> _Buffers:
        device, spec, most = self._device, self._frames.spec.input, self._frames.most
        image = (*size, 3)
        nbytes = size[0] * size[1] * 3
        pinned = device.pinned(most * nbytes)
        # Where host and device share memory, the pinned bytes are the device's own.
        held = pinned if device.integrated else device.allocate(most * nbytes)
        images = [
            DeviceArray(device, held.address + k * nbytes, image, np.dtype(np.uint8), held)
            for k in range(most)
        ]
        row = (3, *network) if spec.layout == "NCHW" else (*network, 3)
        batch = device_arrays.empty(device, (most, *row), spec.dtype)
        return _Buffers(pinned, images, batch)


def _rows(array: DeviceArray, count: int) -> DeviceArray:
    return replace(array, shape=(count, *array.shape[1:]))


def _uploaded(device: Device, values: Labels) -> DeviceArray:
    stream: Stream = device.stream()
    staged = device.pinned(values.nbytes)
    assert staged.host is not None
    staged.host[:] = values.reshape(-1)
    target = device_arrays.empty(device, values.shape, values.dtype)
    device.copy(target.address, staged.address, values.nbytes, stream)
    stream.synchronize()
    return target
