"""images -> scores -> evidence: the only composer. A few frames at a time, no files of its own.

A Pipeline is frozen and thread-safe; hosts (streaming and later others) call it from their workers
and decide what runs when and what is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cada_deploy import preprocess
from cada_deploy.device_frames import DeviceFrames
from cada_deploy.engines import Engine
from cada_deploy.errors import UsageError
from cada_deploy.fused import Evidence, FusedKernel, Selection
from cada_deploy.ignored import IgnoredArea, Mask, MaskSizeError
from cada_deploy.image_files import ImageRef
from cada_deploy.images import decode, read_bytes
from cada_deploy.inference import frame_scores
from cada_deploy.model_spec import ModelSpec, Size
from cada_deploy.policies import Rule
from cada_deploy.rejections import ImageRejected
from cada_deploy.scores import EncodedScores, Upsampling
from cada_deploy.stages import StageClock


@dataclass(frozen=True)
class Sizes:
    """The options that fix a frame's sizes. label is "image", "model" or (H, W)."""

    input: Size | None = None
    label: str | Size = "image"
    statistics: Size | None = None

    def label_size(self, image: Size, network: Size) -> Size:
        if self.label == "image":
            return image
        if self.label == "model":
            return network
        assert not isinstance(self.label, str)
        return self.label

    def statistics_size(self, image: Size, network: Size) -> Size:
        return self.statistics or self.label_size(image, network)


@dataclass(frozen=True, eq=False)
class Frame:
    """A decoded image (H, W, 3) uint8 RGB with what is recorded of it."""

    relative: bytes
    size_bytes: int
    sha256: str
    image: npt.NDArray[np.uint8]
    notices: tuple[str, ...]

    @property
    def size(self) -> Size:
        return self.image.shape[0], self.image.shape[1]


@dataclass(frozen=True, eq=False)
class ScoredFrame:
    """What the network said of one frame, and what it adds to the statistics."""

    scores: EncodedScores
    evidence: Evidence


@dataclass(frozen=True)
class Pipeline:
    """Everything a worker needs to turn a file into evidence or labels.

    on_device takes frames through preprocessing, network and kernel without leaving the GPU; None
    when the network runs on the CPU, or runs more than once per frame (windows, scales, flips).
    """

    engine: Engine | None  # None: only cached scores are read
    kernel: FusedKernel
    spec: ModelSpec
    sizes: Sizes = Sizes()
    ignored: IgnoredArea = IgnoredArea()
    on_device: DeviceFrames | None = None

    def __post_init__(self) -> None:
        self.input_size((1, 1))  # refuses a --size that the model does not take

    @property
    def upsampling(self) -> Upsampling:
        return Upsampling(self.spec.output.order, self.spec.output.align_corners)

    def open_frame(self, ref: ImageRef, clock: StageClock) -> Frame:
        """Read and strictly decode. Raises ImageRejected."""
        with clock.stage("read"):
            data = read_bytes(ref.path)
            digest = hashlib.sha256(data).hexdigest()
        with clock.stage("decode"):
            decoded = decode(data)
        return Frame(ref.relative, len(data), digest, decoded.image, decoded.notices)

    def input_size(self, image: Size) -> Size:
        """What the frame is resized to before it goes through the network, whole or in windows."""
        if self.spec.inference.mode == "slide":  # then a fixed size is the window's
            return self.sizes.input or image
        return preprocess.input_size(self.spec.input, image, self.sizes.input)

    def scores(self, image: npt.NDArray[np.uint8], clock: StageClock) -> EncodedScores:
        """Raises ImageRejected when no pixel's scores are finite."""
        size = self.input_size((image.shape[0], image.shape[1]))
        if self.on_device:
            (encoded,) = self.on_device.scores([image], size, clock)
            return self._checked(encoded)
        assert self.engine is not None
        raw = frame_scores(self.engine, self.spec, image, size, clock)
        with clock.stage("encode scores"):
            return self._checked(self.kernel.encode(raw, self.spec.output.meaning)[0])

    def score_frames(
        self, frames: Sequence[Frame], weighting: str, clock: StageClock
    ) -> list[ScoredFrame | ImageRejected]:
        """Scores and evidence of each frame, in order; a frame without either says why. On a GPU
        the frames of one size go through it together."""
        if self.on_device is None:
            return [self._score_frame(frame, weighting, clock) for frame in frames]
        found: dict[int, ScoredFrame | ImageRejected] = {}
        for size in dict.fromkeys(frame.size for frame in frames):
            places = [k for k, frame in enumerate(frames) if frame.size == size]
            images = [frames[k].image for k in places]
            found.update(zip(places, self._score_on_device(images, size, weighting, clock)))
        return [found[k] for k in range(len(frames))]

    def _score_frame(
        self, frame: Frame, weighting: str, clock: StageClock
    ) -> ScoredFrame | ImageRejected:
        try:
            scores = self.scores(frame.image, clock)
            network = self.input_size(frame.size)
            return ScoredFrame(scores, self.evidence(scores, frame.size, network, weighting, clock))
        except ImageRejected as error:
            return error

    def _score_on_device(
        self,
        images: Sequence[npt.NDArray[np.uint8]],
        image: Size,
        weighting: str,
        clock: StageClock,
    ) -> list[ScoredFrame | ImageRejected]:
        assert self.on_device is not None
        network = self.input_size(image)
        grid = self.sizes.statistics_size(image, network)
        try:
            mask = self._mask(image, grid)
        except ImageRejected as error:
            return [error] * len(images)
        scored: list[ScoredFrame | ImageRejected] = []
        for encoded, evidence in self.on_device.evidence(
            images, network, grid, weighting, mask, clock
        ):
            try:
                scored.append(ScoredFrame(self._checked(encoded), evidence))
            except ImageRejected as error:
                scored.append(error)
        return scored

    def _checked(self, encoded: npt.NDArray[np.float16]) -> EncodedScores:
        if np.isnan(encoded[0]).all():
            raise ImageRejected(
                "non-finite-scores", "the model gave no finite scores for any pixel of this image"
            )
        return EncodedScores(encoded, self.upsampling)

    def evidence(
        self, scores: EncodedScores, image: Size, network: Size, weighting: str, clock: StageClock
    ) -> Evidence:
        grid = self.sizes.statistics_size(image, network)
        mask = self._mask(image, grid)
        with clock.stage("statistics"):
            return self.kernel.accumulate(scores, grid, weighting, mask)

    def select(
        self,
        scores: EncodedScores,
        image: Size,
        network: Size,
        rule: Rule,
        clock: StageClock,
        *,
        entropy: bool = False,
        confidence: bool = False,
    ) -> Selection:
        grid = self.sizes.label_size(image, network)
        mask = self._mask(image, grid)
        with clock.stage("select"):
            return self.kernel.select(
                scores, grid, rule, mask, entropy=entropy, confidence=confidence
            )

    def _mask(self, image: Size, grid: Size) -> Mask | None:
        try:
            return self.ignored.on_grid(image, grid)
        except MaskSizeError as error:
            raise ImageRejected("mask-size", str(error)) from error


def parse_size(option: str, text: str) -> Size:
    """`512x1024` -> (512, 1024), height first. Raises UsageError."""
    height, separator, width = text.lower().partition("x")
    if not (separator and height.isdecimal() and width.isdecimal()):
        raise UsageError(f"{option} {text!r}: expected HEIGHTxWIDTH, such as 512x1024")
    size = int(height), int(width)
    if not all(1 <= v <= 65535 for v in size):
        raise UsageError(f"{option} {text!r}: each side must be 1 to 65535 pixels")
    return size
