"""Image files are read as strictly as Python reads them, and give the same pixels."""

from __future__ import annotations

import io
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from cada_deploy.images import decode
from cada_deploy.rejections import ImageRejected
from cada_deploy.scenes import SOURCE, scene

from .cada_seg import REJECTED, Library, Refused

DICE = np.random.default_rng(11)
COLOUR = DICE.integers(0, 256, (23, 37, 3), np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _deep() -> bytes:
    pixels = DICE.integers(0, 65536, (23, 37, 3), np.uint16)
    return bytes(cv2.imencode(".png", pixels)[1].tobytes())


def _alpha() -> Image.Image:
    return Image.fromarray(DICE.integers(0, 256, (23, 37, 4), np.uint8), "RGBA")


PICTURE = Image.fromarray(COLOUR)
GREY = Image.fromarray(COLOUR[..., 0].copy())
PNGS = {
    "colour": saved(PICTURE, "PNG"),
    "one pixel": saved(PICTURE.crop((0, 0, 1, 1)), "PNG"),
    "grey": saved(GREY, "PNG"),
    "two colours": saved(GREY.convert("1"), "PNG"),
    "palette": saved(PICTURE.quantize(17), "PNG"),
    "palette of 4 bits": saved(PICTURE.quantize(13), "PNG", bits=4),
    "palette with a transparent colour": saved(PICTURE.quantize(9), "PNG", transparency=3),
    "transparent colour": saved(PICTURE, "PNG", transparency=(1, 2, 3)),
    "transparent grey": saved(GREY, "PNG", transparency=7),
    "alpha": saved(_alpha(), "PNG"),
    "grey and alpha": saved(_alpha().convert("LA"), "PNG"),
    "16 bits": _deep(),
    "16 bits grey": saved(Image.fromarray(DICE.integers(0, 65536, (5, 9), dtype=np.uint16)), "PNG"),
    "gamma": b"".join(
        (
            saved(PICTURE, "PNG")[:33],
            (4).to_bytes(4, "big") + b"gAMA" + (100_000).to_bytes(4, "big"),
            zlib.crc32(b"gAMA" + (100_000).to_bytes(4, "big")).to_bytes(4, "big"),
            saved(PICTURE, "PNG")[33:],
        )
    ),
    "trailing bytes": saved(PICTURE, "PNG") + b"more",
}


@pytest.mark.parametrize("kind", PNGS)
def test_a_png_gives_the_same_pixels(library: Library, kind: str) -> None:
    np.testing.assert_array_equal(library.decode(PNGS[kind]), decode(PNGS[kind]).image)


def _street() -> Image.Image:
    return Image.fromarray(scene(5, SOURCE, (64, 128)).image)


JPEGS = {
    "4:4:4": {"quality": 95, "subsampling": 0},
    "4:2:2": {"quality": 90, "subsampling": 1},
    "4:2:0": {"quality": 75, "subsampling": 2},
    "progressive": {"quality": 85, "progressive": True},
    "grey": {"quality": 85},
}


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_gives_the_same_pixels_or_nearly(library: Library, kind: str) -> None:
    """What two builds of libjpeg may differ in is the rounding of chroma and colour: at most 2 of
    255 here. With one line of libjpeg-turbo there is no difference at all."""
    street = _street().convert("L") if kind == "grey" else _street().crop((0, 0, 117, 61))
    data = saved(street, "JPEG", **JPEGS[kind])
    ours, theirs = library.decode(data).astype(int), decode(data).image.astype(int)
    assert ours.shape == theirs.shape
    assert abs(ours - theirs).max() <= 2


def test_an_exif_rotation_is_ignored(library: Library) -> None:
    exif = Image.Exif()
    exif[274] = 6
    data = saved(_street(), "JPEG", exif=exif.tobytes())
    assert library.decode(data).shape == (64, 128, 3)


def _with_chunk(name: bytes, content: bytes = b"") -> bytes:
    whole = PNGS["colour"]
    crc = zlib.crc32(name + content).to_bytes(4, "big")
    return whole[:33] + len(content).to_bytes(4, "big") + name + content + crc + whole[33:]


def _flipped(at: int) -> bytes:
    data = bytearray(PNGS["colour"])
    data[at] ^= 1
    return bytes(data)


def _claims(height: int, width: int) -> bytes:
    ihdr = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    start = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + ihdr
    return start + zlib.crc32(ihdr).to_bytes(4, "big") + PNGS["colour"][33:]


def _short_pixels() -> bytes:
    """Every checksum fits, but the pixels end early."""
    content = zlib.compress(b"\0" + bytes(3 * 37))
    chunk = len(content).to_bytes(4, "big") + b"IDAT" + content
    crc = zlib.crc32(b"IDAT" + content).to_bytes(4, "big")
    return PNGS["colour"][:33] + chunk + crc + PNGS["colour"][-12:]


JPEG = saved(PICTURE, "JPEG")
BAD = {
    "empty": b"",
    "text": b"hello, I am no image",
    "bmp": saved(PICTURE, "BMP"),
    "gif": saved(PICTURE, "GIF"),
    "webp": saved(PICTURE, "WEBP"),
    "cut": PNGS["colour"][:-20],
    "cut in the header": PNGS["colour"][:20],
    "no IEND": PNGS["colour"][:-12],
    "a flipped bit in the pixels": _flipped(60),
    "a flipped bit in IHDR": _flipped(18),
    "a flipped bit in IEND": _flipped(len(PNGS["colour"]) - 1),
    "animated": _with_chunk(b"acTL", bytes(8)),
    "a chunk of no letters": _with_chunk(b"1234"),
    "an unknown critical chunk": _with_chunk(b"ABCD"),
    "too many pixels": _claims(30_000, 30_000),
    "no pixels": _claims(0, 37),
    "two billion a side": _claims(1 << 31, 1 << 31),
    "pixels that end early": _short_pixels(),
    "jpeg without its end": JPEG[:-2],
    "half a jpeg": JPEG[: len(JPEG) // 2],
    "jpeg header": JPEG[:30],
    "cmyk jpeg": saved(PICTURE.convert("CMYK"), "JPEG"),
    "lossless jpeg": JPEG.replace(b"\xff\xc0", b"\xff\xc3", 1),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_rejected_for_the_reason_that_python_has(library: Library, what: str) -> None:
    with pytest.raises(Refused) as refused:
        library.decode(BAD[what])
    assert refused.value.code == REJECTED
    if what in ("bmp", "webp", "cmyk jpeg"):  # which Python reads
        assert refused.value.why.startswith("unsupported-format: ")
        return
    with pytest.raises(ImageRejected) as theirs:
        decode(BAD[what])
    assert refused.value.why.split(":")[0] == theirs.value.reason, (refused.value, theirs.value)


def test_no_cut_or_flipped_file_gets_through_or_crashes(library: Library) -> None:
    """Every cut of a PNG is refused; JPEGs with flipped bytes are judged as Python judges them."""
    data = PNGS["palette"]
    for end in range(len(data)):
        with pytest.raises(Refused):
            library.decode(data[:end])
    for _ in range(300):
        broken = bytearray(JPEG)
        for at in DICE.integers(2, len(JPEG), 3):
            broken[at] = DICE.integers(256)
        assert _outcome(library, bytes(broken)) == _python(bytes(broken))


def _outcome(library: Library, data: bytes) -> object:
    try:
        return library.decode(data).shape
    except Refused as refused:
        return refused.why.split(":")[0]


def _python(data: bytes) -> object:
    try:
        return decode(data).image.shape
    except ImageRejected as rejected:
        return rejected.reason
