"""Find image files and turn their bytes into RGB, strictly: a doubtful file is refused.

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
import re
import stat
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy.errors import CadaError, EnvironmentLacks, RunFailed, UsageError

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

SUFFIXES = (b".png", b".jpg", b".jpeg", b".bmp", b".tif", b".tiff", b".webp")

# Every reason an input can be refused with; rejected.jsonl and the report use these words.
REASONS = {
    "missing": "the path names nothing, or a link that leads nowhere",
    "not-a-file": "a folder, FIFO, socket or device",
    "unreadable": "the operating system refused to open or read it",
    "empty": "0 bytes",
    "not-an-image": "the first bytes are of no image format we know of",
    "unsupported-format": "an image, but of a format or a variant that has no defined reading here",
    "multi-frame": "an animation or several pages: which one is meant?",
    "too-large": "more bytes or pixels than the limits allow; judged before decoding",
    "truncated": "the file ends before its own structure does",
    "bad-checksum": "a checksum in the file does not fit its bytes",
    "corrupt": "the structure contradicts itself or the decoder gave up",
    "wrong-size": "another height and width than this run needs",
    "mask-size": "another height and width than the ignore mask",
    "non-finite-scores": "the network gave no finite score for this image",
}

# Every remark about a decoded image whose stored pixels were not plain 8-bit RGB.
NOTICES = {
    "exif-orientation": "a rotation is noted in the file and ignored: labels fit the stored pixels",
    "sixteen-bit": "16 bits a channel; the high byte is used",
    "low-bit-depth": "1, 2 or 4 bits a sample, stretched to 0..255",
    "grey": "one channel, repeated three times",
    "palette": "indices, looked up in the file's palette",
    "alpha-dropped": "transparency ignored; the stored colours are used as they are",
    "cmyk": "four inks, made RGB by the decoder without a colour profile",
    "trailing-bytes": "bytes follow the end of the image and are ignored",
}


class ImageRejected(CadaError):
    """One input that gets no label. reason is a key of REASONS, detail says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


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


@dataclass(frozen=True)
class ImageRef:
    """An input by name. relative (bytes, '/' between parts) names the output and orders the run;
    size_bytes is 0 when the file cannot be looked at (read_bytes then says why)."""

    path: Path
    relative: bytes
    size_bytes: int


@dataclass(frozen=True, eq=False)
class Decoded:
    """image (H, W, 3) uint8 RGB, C-contiguous; notices are keys of NOTICES, in their order."""

    image: npt.NDArray[np.uint8]
    notices: tuple[str, ...] = ()


# --- finding ---------------------------------------------------------------------------------


def find_images(source: Path) -> list[ImageRef]:
    """The images of a folder, a list file or one image file, sorted by the bytes of `relative`.

    A folder is read recursively. Names that end in one of SUFFIXES (in any case) count, whatever
    they are: a FIFO called a.png is refused later, not overlooked. Names with a leading dot, and
    everything below such a folder, are skipped. Links to files are followed. Links to folders are
    followed after the real folders, in order of their path, and each real folder is read once: a
    second way to it, a loop, or a link to a folder above `source` adds nothing.

    A list has one path a line, relative to the list's own folder (or absolute); blank lines and
    lines that begin with '#' are skipped; a suffix is not required; a missing entry becomes a
    rejection later. '..' and '/' at its front are left out of `relative`, so that no output can
    leave OUT. A name with a newline in it needs a folder.

    Raises UsageError when there is no such source or no image in it, RunFailed when a folder
    cannot be read (its images would silently be missing).
    """
    try:
        mode = source.stat().st_mode
    except (OSError, ValueError) as error:
        raise UsageError(f"no images: {_shown(source)} cannot be opened ({error})") from error
    if stat.S_ISDIR(mode):
        refs = _from_folder(source)
    elif not stat.S_ISREG(mode):
        raise UsageError(f"{_shown(source)} is neither a folder nor a list of paths")
    elif _is_image_name(os.fsencode(source.name)):
        refs = [ImageRef(source, os.fsencode(source.name), source.stat().st_size)]
    else:
        refs = _from_list(source)
    return sorted(refs, key=lambda ref: ref.relative)


def _shown(path: Path | bytes) -> str:
    """A name for a message: one line, valid Unicode whatever the bytes are."""
    name = path if isinstance(path, bytes) else os.fsencode(path)
    return ascii(name.decode(errors="surrogateescape")) if not _printable(name) else name.decode()


def _printable(name: bytes) -> bool:
    try:
        return name.decode().isprintable()
    except UnicodeDecodeError:
        return False


def _is_image_name(name: bytes) -> bool:
    return name.lower().endswith(SUFFIXES)


def _from_folder(source: Path) -> list[ImageRef]:
    others: Counter[str] = Counter()
    refs = []
    for entry, relative in _files_below(os.fsencode(source)):
        if _is_image_name(relative):
            refs.append(ImageRef(Path(os.fsdecode(entry.path)), relative, _size_of(entry.path)))
        else:
            others[Path(os.fsdecode(entry.name)).suffix or "no suffix"] += 1
    if not refs:
        found = ", ".join(f"{n} x {kind!a}" for kind, n in others.most_common(5)) or "nothing"
        known = b" ".join(SUFFIXES).decode()
        raise UsageError(
            f"no image in folder {_shown(source)}: found {found}; expected names ending in {known} "
            "(names with a leading dot are skipped)"
        )
    return refs


def _size_of(path: bytes) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 - bytes in, so that any name works
    except OSError:
        return 0


def _files_below(root: bytes) -> Iterator[tuple[os.DirEntry[bytes], bytes]]:
    """(entry, relative path) of every visible file; see find_images for links."""
    seen = _ancestors(root)
    waiting = [(root, b"")]
    links: list[tuple[bytes, bytes]] = []
    while waiting or links:
        if not waiting:
            links.sort(key=lambda link: link[1], reverse=True)
            waiting.append(links.pop())
        folder, prefix = waiting.pop()
        identity, entries = _listed(folder)
        if prefix and identity in seen:
            continue
        seen.add(identity)
        for entry in entries:
            relative = prefix + entry.name
            if entry.name.startswith(b"."):
                continue
            if _is_folder(entry):
                to = links if entry.is_symlink() else waiting
                to.append((entry.path, relative + b"/"))
            else:
                yield entry, relative


def _ancestors(folder: bytes) -> set[tuple[int, int]]:
    """Device and inode of every folder above this one: a link to one of them is a loop."""
    above = Path(os.fsdecode(os.path.realpath(folder))).parents
    return {(s.st_dev, s.st_ino) for s in (p.stat() for p in above)}


def _listed(folder: bytes) -> tuple[tuple[int, int], list[os.DirEntry[bytes]]]:
    """Which real folder this is (device, inode), and what is in it."""
    try:
        here = os.stat(folder)  # noqa: PTH116
        with os.scandir(folder) as entries:
            return (here.st_dev, here.st_ino), list(entries)
    except OSError as error:
        raise RunFailed(
            f"cannot list folder {_shown(folder)}: {error.strerror}; its images would be missing"
        ) from error


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _from_list(source: Path) -> list[ImageRef]:
    text = source.read_bytes()
    if b"\0" in text:
        raise UsageError(
            f"{_shown(source)} holds NUL bytes: it is no list of paths (one a line), no folder and "
            "has no image suffix"
        )
    lines = text.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    names = [line.rstrip(b"\r") for line in lines]
    names = [name for name in names if name.strip() and not name.lstrip().startswith(b"#")]
    if not names:
        raise UsageError(
            f"no image in list {_shown(source)}: {len(lines)} lines, all blank or comments"
        )
    folder = os.fsencode(source.parent)
    paths = [os.path.join(folder, name) for name in names]  # noqa: PTH118
    return [
        ImageRef(Path(os.fsdecode(path)), _inside(name), _size_of(path))
        for path, name in zip(paths, names)
    ]


def _inside(name: bytes) -> bytes:
    """The entry without '.', '..' and a leading '/': a relative path that stays where it is put."""
    parts = os.path.normpath(name).split(b"/")
    return b"/".join(part for part in parts if part not in (b"", b".", b"..")) or b"unnamed"


def output_stem(relative: bytes) -> bytes:
    """The relative path without its image suffix: b'a/b.PNG' -> b'a/b'. Other suffixes stay."""
    for suffix in SUFFIXES:
        if relative.lower().endswith(suffix):
            stem = relative[: -len(suffix)]
            return relative if stem == b"" or stem.endswith(b"/") else stem
    return relative


def check_output_names(refs: Sequence[ImageRef]) -> None:
    """Raises UsageError, naming both, when two inputs would write one output.

    Also when the output of one (a.png) is a folder that another one needs (a.png/b.png).
    """
    taken: dict[bytes, ImageRef] = {}
    for ref in refs:
        name = output_stem(ref.relative) + b".png"
        if name in taken:
            raise UsageError(
                f"{_shown(taken[name].path)} and {_shown(ref.path)} would both be written to "
                f"{_shown(name)}; rename one, or give a list that names each once"
            )
        taken[name] = ref
    for ref in refs:
        for parent in _parents(ref.relative):
            if parent in taken:
                raise UsageError(
                    f"the output of {_shown(taken[parent].path)} is the file {_shown(parent)}, but "
                    f"{_shown(ref.path)} needs a folder of that name; rename one"
                )


def _parents(relative: bytes) -> Iterator[bytes]:
    at = relative.rfind(b"/")
    while at > 0:
        yield relative[:at]
        at = relative.rfind(b"/", 0, at)


def check_out_not_inside(source: Path, out: Path) -> None:
    """Raises UsageError when OUT is the input folder or lies in it: labels would become inputs."""
    if not source.is_dir():
        return
    folder, target = source.resolve(), out.resolve()
    if target == folder or folder in target.parents:
        raise UsageError(
            f"OUT {_shown(out)} lies inside the input folder {_shown(source)}, and its labels "
            "would be taken for images the next time; give a folder outside it"
        )


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
            raise RunFailed(f"cannot open {_shown(path)}: {error.strerror}") from error
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
    header = _header(data)
    height, width = header.height, header.width
    if max(height, width) > limits.max_side or height * width > limits.max_pixels:
        raise ImageRejected(
            "too-large",
            f"{height}x{width} (HxW) pixels; at most {limits.max_pixels} and "
            f"{limits.max_side} a side are decoded",
        )
    notices = set(header.notices) | _FORMATS[header.format].check(data, header)
    ordered = tuple(notice for notice in NOTICES if notice in notices)
    return Examined(header.format, height, width, ordered)


def peek_size(data: bytes) -> tuple[int, int]:
    """(H, W) as the header says, without decoding. Raises ImageRejected."""
    header = _header(data)
    return header.height, header.width


@dataclass(frozen=True)
class _Header:
    format: str
    height: int
    width: int
    notices: frozenset[str] = frozenset()
    end: int = 0  # where the header's own part of the file ends


@dataclass(frozen=True)
class _Format:
    """magic begins the file; header reads the size; check walks the rest and adds notices."""

    magic: tuple[bytes, ...]
    header: Callable[[bytes], _Header]
    check: Callable[[bytes, _Header], set[str]]


# Image formats that OpenCV or Pillow may read and we do not: named, so that the refusal is clear.
_OTHERS = {
    b"GIF8": "GIF", b"\0\0\0\x0cjP": "JPEG 2000", b"\xff\x4f\xff\x51": "JPEG 2000",
    b"8BPS": "PSD", b"v/1\x01": "OpenEXR", b"#?RADIANCE": "Radiance HDR", b"\0\0\1\0": "ICO",
    b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL", b"II+\0": "BigTIFF", b"MM\0+": "BigTIFF",
    b"P1": "PNM", b"P2": "PNM", b"P3": "PNM", b"P4": "PNM", b"P5": "PNM", b"P6": "PNM",
}  # fmt: skip


def _header(data: bytes) -> _Header:
    if not data:
        raise ImageRejected("empty", "0 bytes")
    for kind in _FORMATS.values():
        if data.startswith(kind.magic):
            return _read_header(kind, data)
    for magic, name in _OTHERS.items():
        if data.startswith(magic):
            raise ImageRejected("unsupported-format", f"{name}; expected {_expected()}")
    if data[4:8] == b"ftyp":
        raise ImageRejected("unsupported-format", f"HEIF or AVIF; expected {_expected()}")
    raise ImageRejected("not-an-image", f"it begins {data[:16]!r}; expected {_expected()}")


def _expected() -> str:
    return ", ".join(_FORMATS)


def _read_header(kind: _Format, data: bytes) -> _Header:
    try:
        header = kind.header(data)
    except (struct.error, IndexError) as error:
        raise ImageRejected("truncated", "the file ends inside its header") from error
    if header.height < 1 or header.width < 1:
        raise ImageRejected("corrupt", f"the header says {header.height}x{header.width} pixels")
    return header


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


# --- PNG: https://www.w3.org/TR/png-3/ -------------------------------------------------------

_MOST_CHUNKS = 1 << 18  # libpng writes 8 KiB a chunk: 201 MB of pixels make 24,600 at worst

_PNG_KINDS: dict[int, frozenset[str]] = {
    0: frozenset({"grey"}),
    2: frozenset(),
    3: frozenset({"palette"}),
    4: frozenset({"grey", "alpha-dropped"}),
    6: frozenset({"alpha-dropped"}),
}


def _png_header(data: bytes) -> _Header:
    length, name, width, height, depth, kind = struct.unpack_from(">I4sIIBB", data, 8)
    if name != b"IHDR" or length != 13 or kind not in _PNG_KINDS:
        raise ImageRejected("corrupt", "a PNG that does not begin with a valid IHDR chunk")
    depths = {16: {"sixteen-bit"}, 8: set[str]()}
    notices = _PNG_KINDS[kind] | depths.get(depth, {"low-bit-depth"})
    if kind == 3:
        notices -= {"low-bit-depth"}
    return _Header("PNG", height, width, frozenset(notices), 8)


def _png_check(data: bytes, header: _Header) -> set[str]:
    """Every chunk's CRC up to IEND, ancillary ones too: a damaged file is damaged."""
    notices: set[str] = set()
    view = memoryview(data)
    at, seen_pixels = header.end, False
    for _ in range(_MOST_CHUNKS):
        if at + 12 > len(data):
            raise ImageRejected("truncated", f"no IEND chunk in {len(data)} bytes")
        length, name = struct.unpack_from(">I4s", data, at)
        if not (name.isalpha() and length < 1 << 31):
            raise ImageRejected("corrupt", f"at byte {at} there is no PNG chunk, but {name!r}")
        end = at + 12 + length
        if end > len(data):
            raise ImageRejected(
                "truncated", f"chunk {name.decode()} ends at byte {end} of {len(data)}"
            )
        (stored,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(view[at + 4 : end - 4]) != stored:
            raise ImageRejected("bad-checksum", f"chunk {name.decode()} at byte {at}")
        if name == b"acTL":
            raise ImageRejected("multi-frame", "an animated PNG")
        notices |= _png_chunk_notices(name, data[at + 8 : end - 4])
        seen_pixels |= name == b"IDAT"
        at = end
        if name == b"IEND":
            break
    else:
        raise ImageRejected("corrupt", f"a PNG of more than {_MOST_CHUNKS} chunks")
    if not seen_pixels:
        raise ImageRejected("corrupt", "a PNG without pixel data (no IDAT chunk)")
    return notices | _trailing(data, at)


def _png_chunk_notices(name: bytes, content: bytes) -> set[str]:
    if name == b"tRNS":
        return {"alpha-dropped"}
    return _orientation(content) if name == b"eXIf" else set()


def _trailing(data: bytes, end: int) -> set[str]:
    return {"trailing-bytes"} if end < len(data) else set()


# --- JPEG: ITU-T T.81 ------------------------------------------------------------------------

_JPEG_FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}  # baseline, extended, progressive; Huffman or not
_JPEG_NO_FRAMES = {0xC4, 0xC8, 0xCC}  # in the range of frames, but tables
# A scan of ten bytes can cost a pass over all pixels; encoders write about ten scans, and
# libjpeg-turbo's own fuzzers stop at 500.
_MOST_SCANS = 100
# In entropy-coded data FF 00 is a stuffed byte, FF D0..D7 a restart; anything else ends the scan.
_JPEG_SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def _jpeg_segments(data: bytes, at: int) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end of its content) of each segment from `at`; the last one is EOI."""
    while True:
        if at >= len(data):
            raise ImageRejected("truncated", f"no EOI marker in {len(data)} bytes")
        if data[at] != 0xFF:
            raise ImageRejected("corrupt", f"at byte {at} there is no JPEG marker")
        while at < len(data) and data[at] == 0xFF:  # any number of fill bytes
            at += 1
        if at >= len(data):
            raise ImageRejected("truncated", f"no EOI marker in {len(data)} bytes")
        marker = data[at]
        if marker == 0xD9:
            yield marker, at + 1, at + 1
            return
        if at + 3 > len(data):
            raise ImageRejected("truncated", f"segment {marker:02X} at byte {at} is cut")
        end = at + 1 + int.from_bytes(data[at + 1 : at + 3], "big")
        if marker < 0xC0 or 0xD0 <= marker <= 0xD8 or end < at + 3:
            raise ImageRejected("corrupt", f"segment {marker:02X} at byte {at} has no place there")
        if end > len(data):
            raise ImageRejected("truncated", f"segment {marker:02X} ends at {end} of {len(data)}")
        yield marker, at + 3, end
        at = _jpeg_scan_end(data, end) if marker == 0xDA else end


def _jpeg_scan_end(data: bytes, at: int) -> int:
    found = _JPEG_SCAN_END.search(data, at)
    return found.start() if found else len(data)


def _jpeg_header(data: bytes) -> _Header:
    notices: set[str] = set()
    for marker, start, end in _jpeg_segments(data, 2):
        if marker == 0xE1 and data[start : start + 6] == b"Exif\0\0":
            notices |= _orientation(data[start + 6 : end])
        elif 0xC0 <= marker <= 0xCF and marker not in _JPEG_NO_FRAMES:
            return _jpeg_frame(marker, data[start:end], notices, end)
        elif marker in (0xDA, 0xD9):
            break
    raise ImageRejected("corrupt", "a JPEG without a frame header")


def _jpeg_frame(marker: int, content: bytes, notices: set[str], end: int) -> _Header:
    precision, height, width, components = struct.unpack_from(">BHHB", content)
    kinds = {1: {"grey"}, 3: set[str](), 4: {"cmyk"}}
    if marker not in _JPEG_FRAMES or precision != 8 or components not in kinds:
        raise ImageRejected(
            "unsupported-format",
            f"JPEG of kind SOF{marker - 0xC0}, {precision} bits, {components} components; "
            "expected baseline or progressive, 8 bits, 1, 3 or 4 components",
        )
    return _Header("JPEG", height, width, frozenset(notices | kinds[components]), end)


def _jpeg_check(data: bytes, header: _Header) -> set[str]:
    """Every marker from the frame header to EOI. An EOI within a thumbnail does not count."""
    scans, end, notices = 0, 0, set[str]()
    for marker, start, end in _jpeg_segments(data, header.end):
        scans += marker == 0xDA
        if scans > _MOST_SCANS:
            raise ImageRejected("unsupported-format", f"a JPEG of more than {_MOST_SCANS} scans")
        if marker == 0xE1 and data[start : start + 6] == b"Exif\0\0":
            notices |= _orientation(data[start + 6 : end])
    if not scans:
        raise ImageRejected("corrupt", "a JPEG without a scan")
    return notices | _trailing(data, end)


# --- BMP: Microsoft's BITMAPINFOHEADER -------------------------------------------------------

_BMP_MASKS = (0xFF0000, 0xFF00, 0xFF)


def _bmp_header(data: bytes) -> _Header:
    offset, info = struct.unpack_from("<II", data, 10)
    if info == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    elif 40 <= info <= 1024:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    else:
        raise ImageRejected("not-an-image", f"it begins 'BM', but its info header is {info} bytes")
    plain = compression == 0 and bits in (1, 4, 8, 24, 32)
    masked = compression == 3 and bits == 32
    if not plain and not (masked and struct.unpack_from("<III", data, 54) == _BMP_MASKS):
        raise ImageRejected(
            "unsupported-format",
            f"BMP with {bits} bits and compression {compression}; expected 1, 4, 8, 24 or 32 bits, "
            "uncompressed",
        )
    notices = {"palette"} if bits <= 8 else {"alpha-dropped"} if bits == 32 else set()
    end = offset + (max(width, 0) * bits + 31) // 32 * 4 * abs(height)
    return _Header("BMP", abs(height), width, frozenset(notices), end)


def _bmp_check(data: bytes, header: _Header) -> set[str]:
    if header.end > len(data):
        raise ImageRejected("truncated", f"the pixels end at byte {header.end} of {len(data)}")
    return _trailing(data, header.end)


# --- WebP: RFC 9649 --------------------------------------------------------------------------


def _webp_header(data: bytes) -> _Header:
    if data[8:12] != b"WEBP":
        raise ImageRejected("not-an-image", f"RIFF with {data[8:12]!r}; expected WEBP")
    (riff,) = struct.unpack_from("<I", data, 4)
    height, width, notices = _webp_size(data)
    return _Header("WebP", height, width, frozenset(notices), riff + 8)


def _webp_size(data: bytes) -> tuple[int, int, set[str]]:
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF, set()
    if kind == b"VP8L" and data[20:21] == b"\x2f":
        (bits,) = struct.unpack_from("<I", data, 21)
        alpha = {"alpha-dropped"} if bits >> 28 & 1 else set()
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, alpha
    if kind != b"VP8X":
        struct.unpack_from("<I", data, 26)  # too short to hold any of the three: truncated
        raise ImageRejected("corrupt", f"WebP that begins with chunk {kind!r}")
    flags, width, height = data[20], _u24(data, 24), _u24(data, 27)
    if flags & 0x02:
        raise ImageRejected("multi-frame", "an animated WebP")
    return height + 1, width + 1, {"alpha-dropped"} if flags & 0x10 else set()


def _u24(data: bytes, at: int) -> int:
    return data[at] | data[at + 1] << 8 | data[at + 2] << 16


def _webp_check(data: bytes, header: _Header) -> set[str]:
    if header.end > len(data):
        raise ImageRejected(
            "truncated", f"the file should have {header.end} bytes, not {len(data)}"
        )
    notices: set[str] = set()
    at = 12
    while at + 8 <= header.end:
        name, length = struct.unpack_from("<4sI", data, at)
        if name == b"EXIF":
            content = data[at + 8 : at + 8 + length]
            notices |= _orientation(content.removeprefix(b"Exif\0\0"))
        elif name == b"ANMF":
            raise ImageRejected("multi-frame", "an animated WebP")
        at += 8 + length + (length & 1)
    return notices | _trailing(data, header.end)


# --- TIFF 6.0, and the TIFF inside EXIF ------------------------------------------------------

_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION = 256, 257, 258, 262, 274
_SAMPLES, _PLANAR, _EXTRA, _SAMPLE_FORMAT = 277, 284, 338, 339
_PLACES = ((273, 279), (324, 325))  # offsets and byte counts of strips, of tiles
_TAGS = {_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION, _SAMPLES, _PLANAR, _EXTRA,
         _SAMPLE_FORMAT, *_PLACES[0], *_PLACES[1]}  # fmt: skip
_MOST_NUMBERS = 1 << 18  # one strip a row is 65,535 strips; 8,192 x 8,192 in 16 x 16 tiles is 2^18
_TIFF_NUMBERS = {1: "B", 3: "H", 4: "I"}  # BYTE, SHORT, LONG


def _tiff_tags(data: bytes) -> tuple[dict[int, tuple[int, ...]], int]:
    """The first directory's numbers by tag, and the place of the next directory (0: none).

    Only the tags we use, each once, so that a hostile directory costs little. Raises struct.error
    when the data are too short for what they claim.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        raise struct.error("no TIFF header")
    (at,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, at)
    tags: dict[int, tuple[int, ...]] = {}
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind, numbers = struct.unpack_from(order + "HHI", data, entry)
        if kind not in _TIFF_NUMBERS or tag not in _TAGS or tag in tags:
            continue
        if numbers > _MOST_NUMBERS:
            raise struct.error("more numbers than any image needs")
        form = f"{order}{numbers}{_TIFF_NUMBERS[kind]}"
        size = struct.calcsize(form)
        where = entry + 8
        if size > 4:
            (where,) = struct.unpack_from(order + "I", data, entry + 8)
        tags[tag] = struct.unpack_from(form, data, where)
    (following,) = struct.unpack_from(order + "I", data, at + 2 + 12 * count)
    return tags, following


def _orientation(exif: bytes) -> set[str]:
    """A notice when EXIF data ask for a rotation or mirroring; unreadable EXIF asks for nothing."""
    try:
        tags, _ = _tiff_tags(exif)
    except struct.error:
        return set()
    value = tags.get(_ORIENTATION, (1,))[:1]
    return {"exif-orientation"} if value and 2 <= value[0] <= 8 else set()


def _tiff_header(data: bytes) -> _Header:
    tags, following = _tiff_tags(data)
    if not (tags.get(_WIDTH) and tags.get(_HEIGHT)):
        raise ImageRejected("corrupt", "a TIFF that does not say its width and height")
    if following:
        raise ImageRejected("multi-frame", "a TIFF of several pages")
    notices = _tiff_variant(tags)
    ends = [
        offset + size
        for offsets, sizes in _PLACES
        for offset, size in zip(tags.get(offsets, ()), tags.get(sizes, ()))
    ]
    return _Header(
        "TIFF", tags[_HEIGHT][0], tags[_WIDTH][0], frozenset(notices), max(ends, default=0)
    )


def _tiff_variant(tags: dict[int, tuple[int, ...]]) -> set[str]:
    """Notices of a variant whose reading is defined; every other one is refused.

    Refused with reason: alpha (OpenCV multiplies it in), an orientation (OpenCV turns the pixels
    even with IMREAD_IGNORE_ORIENTATION, 4.12 and 5.0), float and signed samples, 16-bit planes.
    """
    bits = set(tags.get(_BITS, (1,)))
    (photometric, samples, planar, orientation) = (
        (tags.get(tag) or (default,))[0]
        for tag, default in ((_PHOTOMETRIC, -1), (_SAMPLES, 1), (_PLANAR, 1), (_ORIENTATION, 1))
    )
    allowed = {  # (photometric, samples): bits
        (0, 1): {1, 8}, (1, 1): {1, 8, 16}, (2, 3): {8, 16}, (3, 1): {8}, (5, 4): {8}, (6, 3): {8},
    }  # fmt: skip
    fine = (
        len(bits) == 1
        and bits <= allowed.get((photometric, samples), set())
        and set(tags.get(_SAMPLE_FORMAT, (1,))) == {1}
        and _EXTRA not in tags
        and orientation == 1
        and (planar == 1 or bits == {8})
    )
    if not fine:
        raise ImageRejected(
            "unsupported-format",
            f"TIFF with {samples} samples of {sorted(bits)} bits, photometric {photometric}, "
            f"orientation {orientation}, alpha {'yes' if _EXTRA in tags else 'no'}; expected 8 or "
            "16-bit grey or RGB, palette or CMYK, upright, without alpha",
        )
    notices = {0: {"grey"}, 1: {"grey"}, 3: {"palette"}, 5: {"cmyk"}}.get(photometric, set())
    return notices | {1: {"low-bit-depth"}, 16: {"sixteen-bit"}}.get(min(bits), set())


def _tiff_check(data: bytes, header: _Header) -> set[str]:
    if header.end > len(data):
        raise ImageRejected("truncated", f"the pixels end at byte {header.end} of {len(data)}")
    return set()


_FORMATS = {
    "PNG": _Format((b"\x89PNG\r\n\x1a\n",), _png_header, _png_check),
    "JPEG": _Format((b"\xff\xd8\xff",), _jpeg_header, _jpeg_check),
    "BMP": _Format((b"BM",), _bmp_header, _bmp_check),
    "TIFF": _Format((b"II*\0", b"MM\0*"), _tiff_header, _tiff_check),
    "WebP": _Format((b"RIFF",), _webp_header, _webp_check),
}
