"""Headers and structure of the image formats that are read: sizes without decoding, and every flaw
that can be seen from the bytes (a cut file, a wrong checksum, several pages, pixels that are not
what the header says). Nothing is decoded here.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cada_deploy.rejections import ImageRejected


@dataclass(frozen=True)
class Header:
    format: str
    height: int
    width: int
    notices: frozenset[str] = frozenset()
    end: int = 0  # where the header's own part of the file ends


@dataclass(frozen=True)
class Format:
    """magic begins the file; header reads the size; check walks the rest and adds notices."""

    magic: tuple[bytes, ...]
    header: Callable[[bytes], Header]
    check: Callable[[bytes, Header], set[str]]


# Image formats that OpenCV or Pillow may read and we do not: named, so that the refusal is clear.
_OTHERS = {
    b"GIF8": "GIF", b"\0\0\0\x0cjP": "JPEG 2000", b"\xff\x4f\xff\x51": "JPEG 2000",
    b"8BPS": "PSD", b"v/1\x01": "OpenEXR", b"#?RADIANCE": "Radiance HDR", b"\0\0\1\0": "ICO",
    b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL", b"II+\0": "BigTIFF", b"MM\0+": "BigTIFF",
    b"P1": "PNM", b"P2": "PNM", b"P3": "PNM", b"P4": "PNM", b"P5": "PNM", b"P6": "PNM",
}  # fmt: skip


def header_of(data: bytes) -> Header:
    if not data:
        raise ImageRejected("empty", "0 bytes")
    for kind in FORMATS.values():
        if data.startswith(kind.magic):
            return _read_header(kind, data)
    for magic, name in _OTHERS.items():
        if data.startswith(magic):
            raise ImageRejected("unsupported-format", f"{name}; expected {_expected()}")
    if data[4:8] == b"ftyp":
        raise ImageRejected("unsupported-format", f"HEIF or AVIF; expected {_expected()}")
    raise ImageRejected("not-an-image", f"it begins {data[:16]!r}; expected {_expected()}")


def _expected() -> str:
    return ", ".join(FORMATS)


def _read_header(kind: Format, data: bytes) -> Header:
    try:
        header = kind.header(data)
    except (struct.error, IndexError) as error:
        raise ImageRejected("truncated", "the file ends inside its header") from error
    if header.height < 1 or header.width < 1:
        raise ImageRejected("corrupt", f"the header says {header.height}x{header.width} pixels")
    return header


# --- PNG: https://www.w3.org/TR/png-3/ -------------------------------------------------------

_MOST_CHUNKS = 1 << 18  # libpng writes 8 KiB a chunk: 201 MB of pixels make 24,600 at worst

_PNG_KINDS: dict[int, frozenset[str]] = {
    0: frozenset({"grey"}),
    2: frozenset(),
    3: frozenset({"palette"}),
    4: frozenset({"grey", "alpha-dropped"}),
    6: frozenset({"alpha-dropped"}),
}


def _png_header(data: bytes) -> Header:
    length, name, width, height, depth, kind = struct.unpack_from(">I4sIIBB", data, 8)
    if name != b"IHDR" or length != 13 or kind not in _PNG_KINDS:
        raise ImageRejected("corrupt", "a PNG that does not begin with a valid IHDR chunk")
    depths = {16: {"sixteen-bit"}, 8: set[str]()}
    notices = _PNG_KINDS[kind] | depths.get(depth, {"low-bit-depth"})
    if kind == 3:
        notices -= {"low-bit-depth"}
    return Header("PNG", height, width, frozenset(notices), 8)


def _png_check(data: bytes, header: Header) -> set[str]:
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


def _jpeg_header(data: bytes) -> Header:
    notices: set[str] = set()
    for marker, start, end in _jpeg_segments(data, 2):
        if marker == 0xE1 and data[start : start + 6] == b"Exif\0\0":
            notices |= _orientation(data[start + 6 : end])
        elif 0xC0 <= marker <= 0xCF and marker not in _JPEG_NO_FRAMES:
            return _jpeg_frame(marker, data[start:end], notices, end)
        elif marker in (0xDA, 0xD9):
            break
    raise ImageRejected("corrupt", "a JPEG without a frame header")


def _jpeg_frame(marker: int, content: bytes, notices: set[str], end: int) -> Header:
    precision, height, width, components = struct.unpack_from(">BHHB", content)
    kinds = {1: {"grey"}, 3: set[str](), 4: {"cmyk"}}
    if marker not in _JPEG_FRAMES or precision != 8 or components not in kinds:
        raise ImageRejected(
            "unsupported-format",
            f"JPEG of kind SOF{marker - 0xC0}, {precision} bits, {components} components; "
            "expected baseline or progressive, 8 bits, 1, 3 or 4 components",
        )
    return Header("JPEG", height, width, frozenset(notices | kinds[components]), end)


def _jpeg_check(data: bytes, header: Header) -> set[str]:
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


def _bmp_header(data: bytes) -> Header:
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
    return Header("BMP", abs(height), width, frozenset(notices), end)


def _bmp_check(data: bytes, header: Header) -> set[str]:
    if header.end > len(data):
        raise ImageRejected("truncated", f"the pixels end at byte {header.end} of {len(data)}")
    return _trailing(data, header.end)


# --- WebP: RFC 9649 --------------------------------------------------------------------------


def _webp_header(data: bytes) -> Header:
    if data[8:12] != b"WEBP":
        raise ImageRejected("not-an-image", f"RIFF with {data[8:12]!r}; expected WEBP")
    (riff,) = struct.unpack_from("<I", data, 4)
    height, width, notices = _webp_size(data)
    return Header("WebP", height, width, frozenset(notices), riff + 8)


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


def _webp_check(data: bytes, header: Header) -> set[str]:
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


def _tiff_header(data: bytes) -> Header:
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
    return Header(
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


def _tiff_check(data: bytes, header: Header) -> set[str]:
    if header.end > len(data):
        raise ImageRejected("truncated", f"the pixels end at byte {header.end} of {len(data)}")
    return set()


FORMATS = {
    "PNG": Format((b"\x89PNG\r\n\x1a\n",), _png_header, _png_check),
    "JPEG": Format((b"\xff\xd8\xff",), _jpeg_header, _jpeg_check),
    "BMP": Format((b"BM",), _bmp_header, _bmp_check),
    "TIFF": Format((b"II*\0", b"MM\0*"), _tiff_header, _tiff_check),
    "WebP": Format((b"RIFF",), _webp_header, _webp_check),
}
