"""Label maps as files: grey PNGs of ids, colours, overlays, 16-bit confidence and entropy.

Nothing is written to disk here. Equal arrays give equal bytes with one build of OpenCV (its zlib
decides), and equal arrays after reading with every build.
"""

from __future__ import annotations

import io
import math
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from cada_deploy.classes import ClassSet
from cada_deploy.errors import ArtefactMismatch
from cada_deploy.images import Examined, cv2, decode, examine
from cada_deploy.rejections import ImageRejected

LabelMap = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]
Table = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

INVALID_16 = 65535  # entropy PNG: a pixel without a finite entropy
LARGEST_16 = 65534  # entropy PNG: the largest finite value


def encode_label_png(labels: LabelMap, level: int = 1) -> bytes:
    """labels (H, W) uint8 -> an 8-bit grey PNG with these very values.

    level 1 is for speed; 2 to 9 spend time to save disk.
    """
    if labels.ndim != 2:
        raise ValueError(f"a label map is (H, W); found {labels.shape}")
    return _png(labels, level)


def encode_colour_png(labels: LabelMap, classes: ClassSet, level: int = 1) -> bytes:
    """labels (H, W) uint8 train ids -> an RGB PNG in the palette; ids outside the set are black."""
    return _png(_looked_up(labels, classes.colours[:, ::-1]), level)


def encode_rgb_png(image: npt.NDArray[np.uint8], level: int = 1) -> bytes:
    """image (H, W, 3) uint8 RGB -> an RGB PNG."""
    return _png(np.ascontiguousarray(image[..., ::-1]), level)


def overlay(
    image: npt.NDArray[np.uint8], labels: LabelMap, classes: ClassSet, alpha: float = 0.5
) -> npt.NDArray[np.uint8]:
    """image (H, W, 3) RGB with the palette laid over it: (256 - a) image + a colour, a = 256 alpha.

    In integers, rounded half up. Pixels whose id is outside the set (255: not selected) show the
    image. Raises ValueError when sizes differ or alpha lies outside 0..1.
    """
    if image.shape != (*labels.shape, 3) or not 0 <= alpha <= 1:
        raise ValueError(f"image {image.shape}, labels {labels.shape}, alpha {alpha}")
    share = np.zeros((256, 1), np.uint16)
    share[: len(classes)] = round(256 * alpha)
    # 256 * 255 + 128 = 65,408 stays below 2^16.
    mixed = _looked_up(labels, np.repeat(256 - share, 3, axis=1)).astype(np.uint16, copy=False)
    mixed *= image
    mixed += _looked_up(labels, classes.colours * share + np.uint16(128))
    mixed >>= np.uint16(8)
    return mixed.astype(np.uint8)


def encode_confidence_png16(confidence: Floats, level: int = 1) -> bytes:
    """confidence (H, W) in 0..1 -> 16-bit grey PNG of round(c * 65535), half to even.

    NaN (an invalid pixel) becomes 0, which no valid pixel has: the largest of C probabilities is
    at least 1 / C.
    """
    scaled = np.rint(np.nan_to_num(_float64(confidence), nan=0.0) * 65535.0)
    return _png(np.clip(scaled, 0, 65535).astype(np.uint16), level)


def encode_entropy_png16(entropy_nats: Floats, classes: int, level: int = 1) -> bytes:
    """entropy (H, W) in nats -> 16-bit grey PNG of round(E * (65535 / ln C)), half to even.

    C = classes. NaN and infinity (invalid pixels) become INVALID_16 = 65535; finite values end at
    LARGEST_16 = 65534, so that only the top step of a uniform pixel is lost. One class: all 0.
    """
    values = _float64(entropy_nats)
    finite = np.isfinite(values)
    steps_per_nat = 65535.0 / math.log(classes) if classes > 1 else 0.0
    steps = np.clip(np.rint(np.where(finite, values, 0.0) * steps_per_nat), 0, LARGEST_16)
    return _png(np.where(finite, steps, INVALID_16).astype(np.uint16), level)


def read_label_png(data: bytes, name: str = "the label map") -> LabelMap:
    """(H, W) uint8 ids of an 8-bit grey or a palette PNG, exactly as stored.

    A palette PNG's indices are the ids (GTA5, Pascal VOC); decoders that look up its colours, as
    OpenCV does, lose them. Raises ArtefactMismatch, with `name` in the message, for everything
    else: RGB, 16 bits, alpha, a grey PNG of fewer bits (readers stretch those), another format, a
    damaged file.
    """
    try:
        found = examine(data)
        if found.format != "PNG" or not _holds_ids(found):
            raise ArtefactMismatch(
                f"{name} is a {found.format} with {_described(found)}; expected a PNG with one "
                "8-bit channel of ids (grey or palette). Colours cannot be turned back into ids "
                "safely"
            )
        # For a palette too: Pillow fills in missing pixels without a word, OpenCV refuses.
        decoded = decode(data).image
    except ImageRejected as error:
        raise ArtefactMismatch(f"{name} cannot be read as a label PNG: {error}") from error
    if "palette" in found.notices:
        return _indices(data, name)
    return np.ascontiguousarray(decoded[..., 0])


def _indices(data: bytes, name: str) -> LabelMap:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            return np.array(image, np.uint8)
    except (OSError, SyntaxError, ValueError) as error:
        raise ArtefactMismatch(f"{name} has a palette that Pillow cannot read: {error}") from error


def _holds_ids(found: Examined) -> bool:
    kinds = set(found.notices) - {"trailing-bytes", "exif-orientation"}
    return kinds == {"grey"} or kinds - {"alpha-dropped"} == {"palette"}


def _described(found: Examined) -> str:
    return ", ".join(found.notices) or "three 8-bit colour channels"


def _looked_up(labels: LabelMap, table: Table) -> Table:
    """(H, W) ids, (256, 3) table -> (H, W, 3): numpy's table[labels], ten times as fast."""
    three = cv2.merge([np.ascontiguousarray(labels)] * 3)
    return cast(Table, cv2.LUT(three, table[None].copy()))


def _float64(values: Floats) -> npt.NDArray[np.float64]:
    if values.ndim != 2:
        raise ValueError(f"expected (H, W); found {values.shape}")
    return values.astype(np.float64)


def _png(array: Table, level: int) -> bytes:
    """(H, W) or BGR (H, W, 3), uint8 or uint16 -> PNG.

    Measured at 1024x2048, one thread, OpenCV 5.0, ms / kB. Train ids: smooth regions of 19 classes;
    the same with 40 % cut out as 255; that with 2 % single pixels missing (run lengths ignore the
    level):
      level 1, run lengths, no filter   4.7 / 80    6.4 / 185     8.4 / 223
      level 1, default, no filter       6.0 / 137   9.4 / 284    10.8 / 335
      level 6, default, no filter      17.7 / 79   36.3 / 167    44.9 / 213
      level 9, default, no filter     127.6 / 61  441.5 / 146   542.7 / 188
    Smooth 16-bit maps at level 1: 160 / 2525 default with SUB, 86 / 3844 run lengths with SUB, 200
    / 4156 default without a filter. Colours at level 1: 24 / 184 default, 122 / 3075 run lengths.
    """
    if not 1 <= level <= 9:
        raise ValueError(f"PNG level is {level}; expected 1 to 9")
    fast_ids = array.ndim == 2 and array.dtype == np.uint8 and level == 1
    strategy = cv2.IMWRITE_PNG_STRATEGY_RLE if fast_ids else cv2.IMWRITE_PNG_STRATEGY_DEFAULT
    smooth = array.dtype == np.uint16
    row_filter = cv2.IMWRITE_PNG_FILTER_SUB if smooth else cv2.IMWRITE_PNG_FILTER_NONE
    done, encoded = cv2.imencode(
        ".png",
        np.ascontiguousarray(array),
        [
            cv2.IMWRITE_PNG_COMPRESSION, level,
            cv2.IMWRITE_PNG_STRATEGY, strategy,
            cv2.IMWRITE_PNG_FILTER, row_filter,
        ],
    )  # fmt: skip
    assert done
    return encoded.tobytes()
