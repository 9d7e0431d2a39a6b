"""How much disk a run's score cache will need, said before the work begins."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from cada_deploy.errors import RunFailed
from cada_deploy.image_files import ImageRef
from cada_deploy.images import peek_size, read_bytes
from cada_deploy.pipeline import Pipeline
from cada_deploy.rejections import ImageRejected
from cada_deploy.stages import StageClock

_MARGIN = 1.05  # labels and manifests come on top of the scores
_TRIES = 8  # images looked at for one that decodes
_SAMPLE = 32  # images whose headers are read, spread over the list


def keep_scores(
    pipeline: Pipeline,
    images: Sequence[ImageRef],
    out: Path,
    cache: str,
    say: Callable[[str], None],
) -> bool:
    """Whether to keep the scores of these (yet unscored) images. cache is auto, on or off.

    Raises RunFailed when it is "on" and the disk is short.
    """
    if not images or cache == "off":
        return cache != "off"
    need = estimated_bytes(pipeline, images)
    if need is None:
        return True
    free = shutil.disk_usage(out).free
    text = f"the score cache needs about {size_text(need)} of {size_text(free)} free"
    if need * _MARGIN < free:
        say(text)
        return True
    if cache == "on":
        raise RunFailed(
            f"{text}. Free some space, choose another --out, or use --cache off (the network then "
            "runs twice)"
        )
    say(f"{text}: too little, so the cache is off and the network runs twice")
    return False


def estimated_bytes(pipeline: Pipeline, images: Sequence[ImageRef]) -> int | None:
    """From the scores of the first image that decodes, in proportion to the input pixels of a
    sample. None when none of the first few decodes."""
    for ref in images[:_TRIES]:
        try:
            frame = pipeline.open_frame(ref, StageClock())
            scores = pipeline.scores(frame.image, StageClock())
        except ImageRejected:
            continue
        height, width = pipeline.input_size(frame.size)
        per_pixel = scores.array.nbytes / (height * width)
        return int(per_pixel * _mean_input_pixels(pipeline, images) * len(images))
    return None


def _mean_input_pixels(pipeline: Pipeline, images: Sequence[ImageRef]) -> float:
    pixels = []
    for ref in images[:: max(1, len(images) // _SAMPLE)]:
        try:
            height, width = pipeline.input_size(peek_size(read_bytes(ref.path)))
        except ImageRejected:
            continue
        pixels.append(height * width)
    return sum(pixels) / len(pixels) if pixels else 0.0


def size_text(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
