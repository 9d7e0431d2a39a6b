"""Turn the bytes of an image file into RGB, strictly: a doubtful file is refused.

Decoders are lenient: OpenCV 5 shows a PNG whose IEND has a wrong checksum, the first frame of an
animation and one page of many, and Pillow shows a PNG whose pixel data fail their checksum. A label
must not stand on such a frame, so headers and structure are checked here, before and after OpenCV
decodes. OpenCV never gets a path: cv2.imread died of SIGSEGV on a name with the bytes ff fe.
Nothing is written here.

What no check can see: a flipped or missing piece inside a JPEG's entropy-coded data that still ends
in EOI. libjpeg warns on stderr and shows grey or shifted blocks. Only a digest of the input helps.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy.errors import EnvironmentLacks, RunFailed, UsageError
from cada_deploy.image_files import shown
from cada_deploy.image_formats import FORMATS, header_of
from cada_deploy.rejections import NOTICES, ImageRejected

# OpenCV's own guard, read once when it loads: a second line behind Limits (OpenCV's default is 2^30
# pixels, 3 GB). Set before the import; harmless if somebody imported cv2 first.
_OPENCV_MAX_PIXELS = 1 << 28
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(_OPENCV_MAX_PIXELS))
# A refused file is reported by us, once, with its name; OpenCV's log says neither. (The variable
# works in every version; the function is cv2.setLogLevel in 4.x, cv2.utils.logging's in 5.)
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

try:
    import cv2 as cv2  # preprocess and labels take it from here, with the settings above and below
except ImportError as error:  # pragma: no cover
    raise EnvironmentLacks(
        "reading images needs OpenCV, and no build of it can be imported "
        f"({error}); pip install 'cada-deploy[cpu]'"
    ) from error

# The project decodes one image per worker thread. OpenCV's own pool would put a second layer of
# threads under each of them, and its size must not change what a run costs: one thread per call.
cv2.setNumThreads(1)


@dataclass(frozen=True)
class Limits:
    """What a file may cost. max_pixels is H * W (2^26: 8192 x 8192, 201 MB as RGB)."""

    max_pixels: int = 1 << 26
    max_side: int = 65535
    max_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if not 1 <= self.max_pixels <= _OPENCV_MAX_PIXELS:
            raise UsageError(
                f"max_pixels is {self.max_pixels}; expected 1 to {_OPENCV_MAX_PIXELS} (2^28)"
            )
        if self.max_side < 1 or self.max_bytes < 1:
            raise UsageError("max_side and max_bytes must be positive")


LIMITS = Limits()


@dataclass(frozen=True, eq=False)
class Decoded:
    """image (H, W, 3) uint8 RGB, C-contiguous; notices are keys of NOTICES, in their order."""

    image: npt.NDArray[np.uint8]
    notices: tuple[str, ...] = ()


# --- reading ---------------------------------------------------------------------------------

# The process or the machine is short of something; the image is not to blame.
_OUR_FAULT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


def read_bytes(path: Path, limits: Limits = LIMITS) -> bytes:
    """The file's bytes. Never blocks on a FIFO or device: only regular files are read.

    Raises ImageRejected (missing, not-a-file, unreadable, too-large); RunFailed when this process
    has no file handle or memory left.
    """
    try:
        return _read(path, limits.max_bytes)
    except OSError as error:
        if error.errno in _OUR_FAULT:
            raise RunFailed(f"cannot open {shown(path)}: {error.strerror}") from error
        reason = "missing" if error.errno in _NOT_THERE else "unreadable"
        raise ImageRejected(reason, error.strerror or str(error)) from error
    except ValueError as error:  # a NUL in the name
        raise ImageRejected("missing", str(error)) from error


def _read(path: Path, max_bytes: int) -> bytes:
    # stat first: to open a device or FIFO can already have an effect. O_NONBLOCK and fstat close
    # the gap between the two calls.
    _regular(path.stat().st_mode)
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb", buffering=0) as file:
        found = os.fstat(handle)
        _regular(found.st_mode)
        if found.st_size <= max_bytes:
            data = _all_of(file.read, found.st_size, max_bytes + 1)
            if len(data) <= max_bytes:
                return data
    raise ImageRejected("too-large", f"{found.st_size} bytes; at most {max_bytes} are read")


def _all_of(read: Callable[[int], bytes | None], expected: int, at_most: int) -> bytes:
    """Everything up to end of file, in one read when the size was right."""
    parts = []
    got = 0
    while got < at_most and (part := read(min(at_most - got, max(expected - got, 0) + 1))):
        parts.append(part)
        got += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise ImageRejected("not-a-file", f"it is {kinds.get(stat.S_IFMT(mode), 'a device')}")


# --- decoding --------------------------------------------------------------------------------


def decode(data: bytes, limits: Limits = LIMITS) -> Decoded:
    """Bytes of a PNG, JPEG, BMP, TIFF or WebP as (H, W, 3) uint8 RGB, pixels as stored.

    The header is judged before anything is decoded, so that a small file that claims 30,000 x
    30,000 pixels costs nothing; then the structure (PNG: every chunk's CRC up to IEND; JPEG: every
    marker up to EOI; BMP, WebP, TIFF: that the pixel data lie within the file); then OpenCV decodes
    and must deliver the header's size. What is not plain 8-bit RGB is converted as NOTICES says.
    Thread-safe. Raises ImageRejected, and RunFailed when memory is short.
    """
    found = examine(data, limits)
    image = _pixels(data, found)
    if image.shape != (found.height, found.width, 3):
        raise ImageRejected(
            "corrupt",
            f"the header says {found.height}x{found.width}, "
            f"the decoder gave {image.shape[0]}x{image.shape[1]}",
        )
    return Decoded(image, found.notices)


@dataclass(frozen=True)
class Examined:
    """What a file is, as far as can be said without decoding it. format is PNG, JPEG, BMP, TIFF or
    WebP; height and width are the header's; notices are keys of NOTICES, in their order."""

    format: str
    height: int
    width: int
    notices: tuple[str, ...]


def examine(data: bytes, limits: Limits = LIMITS) -> Examined:
    """All checks of `decode` that come before the decoder. Raises ImageRejected."""
    header = header_of(data)
    height, width = header.height, header.width
    if max(height, width) > limits.max_side or height * width > limits.max_pixels:
        raise ImageRejected(
            "too-large",
            f"{height}x{width} (HxW) pixels; at most {limits.max_pixels} and "
            f"{limits.max_side} a side are decoded",
        )
    notices = set(header.notices) | FORMATS[header.format].check(data, header)
    ordered = tuple(notice for notice in NOTICES if notice in notices)
    return Examined(header.format, height, width, ordered)


def peek_size(data: bytes) -> tuple[int, int]:
    """(H, W) as the header says, without decoding. Raises ImageRejected."""
    header = header_of(data)
    return header.height, header.width


def _pixels(data: bytes, header: Examined) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB from OpenCV, which gets bytes and no path."""
    # OpenCV 4.12 and 5.0: IMREAD_COLOR rounds a 16-bit RGB TIFF instead of taking the high byte,
    # and IMREAD_COLOR_RGB | IMREAD_ANYDEPTH leaves it in BGR order. UNCHANGED does neither.
    deep_tiff = header.format == "TIFF" and "sixteen-bit" in header.notices
    how = (
        cv2.IMREAD_UNCHANGED if deep_tiff else cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    )
    try:
        found = cv2.imdecode(np.frombuffer(data, np.uint8), how)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise RunFailed(f"no memory to decode {header.height}x{header.width} pixels") from error
        raise ImageRejected("corrupt", f"OpenCV: {error.err}") from error
    if found is None:
        raise ImageRejected("corrupt", f"OpenCV cannot decode this {header.format}")
    pixels: npt.NDArray[Any] = np.asarray(found)
    if deep_tiff:
        pixels = _high_byte(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise ImageRejected("corrupt", f"the decoder gave {pixels.dtype} {pixels.shape}")
    return np.ascontiguousarray(pixels, np.uint8)


def _high_byte(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(H, W) or BGR (H, W, 3) uint16 -> RGB (H, W, 3) uint8; all else stays, to be refused."""
    if pixels.dtype != np.uint16:
        return pixels
    high = (pixels >> np.uint16(8)).astype(np.uint8)
    return np.repeat(high[..., None], 3, axis=2) if high.ndim == 2 else high[..., ::-1]
