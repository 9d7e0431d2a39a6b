"""Make the batch row that a model's spec asks for: resize, colour order, scale, mean, std.

The order is that of the reference projects (AdaptSegNet, BDL, CRST, DAFormer): resize the
stored uint8 RGB, then to float32, then colour order, then x = (scale * v - mean) / std. Since v is
one of 256 values, all of it after the resize is one table per channel: the same float32 numbers as
the formula, bit for bit, in a quarter of the time.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import metadata

import numpy as np
import numpy.typing as npt
from PIL import Image

from cada_deploy.errors import UsageError
from cada_deploy.images import cv2
from cada_deploy.model_spec import InputSpec, Size

BatchRow = npt.NDArray[np.float32] | npt.NDArray[np.float16]

_FLOATS: dict[str, type[np.float32] | type[np.float16]] = {
    "float32": np.float32,
    "float16": np.float16,
}
# cv2.LUT moves elements of a width and does not look inside: halves travel as 16-bit integers.
_CARRIERS = {"float32": np.float32, "float16": np.uint16}


def input_size(spec: InputSpec, image: Size, override: Size | None = None) -> Size:
    """(H, W) at which an image of (H, W) enters the network.

    A fixed-size model takes its own size; else `override` (--size); else the image's own.
    Raises UsageError when a fixed-size model is asked for another size.
    """
    if spec.size is None:
        return image if override is None else override
    if override is not None and tuple(override) != tuple(spec.size):
        raise UsageError(
            f"the model takes {spec.size[0]}x{spec.size[1]} (HxW) and nothing else, but --size is "
            f"{override[0]}x{override[1]}; leave --size out, or export the model with that size"
        )
    return spec.size


def pillow_orders_by_size() -> bool:
    """Since Pillow 13 the order of its two passes follows the sizes; it decides the last bit."""
    return int(metadata.version("pillow").partition(".")[0]) >= 13


def resize_identity(how: str) -> str:
    """Whose pixels a resize gives: part of the run id."""
    if how == "bilinear":
        return "opencv"
    return "pillow-13" if pillow_orders_by_size() else "pillow-12"


def to_batch_row(
    image: npt.NDArray[np.uint8],
    spec: InputSpec,
    size: Size | None = None,
    out: BatchRow | None = None,
) -> BatchRow:
    """image (H, W, 3) uint8 RGB -> (1, 3, h, w) or (1, h, w, 3) in the spec's dtype, C-contiguous.

    size is (h, w); None keeps the image's own. With `out`, an array of exactly that shape and
    dtype, nothing is allocated and `out` is returned: one row of a batch, for example. Every value
    is fl(fl(fl(scale * v) - mean) / std) in float32 (float16: rounded once more), v being the
    resized 0..255. Deterministic.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"expected (H, W, 3) uint8, found {image.dtype} {image.shape}")
    pixels = resize(image, size, spec.resize) if size else np.ascontiguousarray(image)
    row = _row(spec, (pixels.shape[0], pixels.shape[1]), out)
    tables = _tables(spec)
    carried = row.view(_CARRIERS[spec.dtype])
    if spec.layout == "NCHW":
        for position, channel in enumerate(_order(spec)):
            cv2.LUT(cv2.extractChannel(pixels, channel), tables[position], dst=carried[0, position])
    else:
        ordered = pixels if spec.colour == "RGB" else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
        cv2.LUT(ordered, np.ascontiguousarray(tables.T)[None], dst=carried[0])
    return row


def resize(image: npt.NDArray[np.uint8], size: Size, how: str) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 -> (h, w, 3) uint8, C-contiguous; the image itself when the size is its own.

    "bilinear" is OpenCV's INTER_LINEAR (no antialiasing), "bicubic" Pillow's BICUBIC, which
    widens its kernel when it shrinks; OpenCV's does not, and is another filter then.
    """
    height, width = size
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    if how == "bilinear":
        found = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        return np.asarray(found, np.uint8)
    assert how == "bicubic", how
    whole = Image.fromarray(np.ascontiguousarray(image))
    return np.array(whole.resize((width, height), Image.Resampling.BICUBIC))


def _row(spec: InputSpec, size: Size, out: BatchRow | None) -> BatchRow:
    shape = (1, 3, *size) if spec.layout == "NCHW" else (1, *size, 3)
    dtype = _FLOATS[spec.dtype]
    if out is None:
        fresh: BatchRow = np.empty(shape, dtype)  # type: ignore[assignment]
        return fresh
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.dtype} {out.shape}; expected contiguous {dtype} {shape}")
    return out


def _order(spec: InputSpec) -> tuple[int, int, int]:
    """Which stored RGB channel stands at each position of the model's input."""
    return (0, 1, 2) if spec.colour == "RGB" else (2, 1, 0)


@lru_cache(maxsize=16)
def _tables(spec: InputSpec) -> npt.NDArray[np.generic]:
    """(3, 256): the value of every v per channel of the model's colour order, as LUT carries it."""
    v = np.arange(256, dtype=np.float32)
    mean = np.array(spec.mean, np.float32)[:, None]
    std = np.array(spec.std, np.float32)[:, None]
    with np.errstate(over="ignore"):
        values = ((np.float32(spec.scale) * v - mean) / std).astype(_FLOATS[spec.dtype])
    if not np.isfinite(values).all():
        raise UsageError(
            f"input scale {spec.scale}, mean {spec.mean} and std {spec.std} leave the range of "
            f"{spec.dtype}; check them in the model's spec"
        )
    values.setflags(write=False)
    return np.ascontiguousarray(values).view(_CARRIERS[spec.dtype])
