"""Label PNGs keep every value, in every kind of file they may come in; the rest is refused."""

from __future__ import annotations

import io
import math
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cada_deploy.classes import CITYSCAPES_19
from cada_deploy.errors import ArtefactMismatch
from cada_deploy.labels import (
    INVALID_16,
    LARGEST_16,
    encode_colour_png,
    encode_confidence_png16,
    encode_entropy_png16,
    encode_label_png,
    overlay,
    read_label_png,
)

EVERY = np.arange(256, dtype=np.uint8).reshape(16, 16)
SHAPES = [(1, 1), (1, 7), (7, 1), (31, 17), (64, 128)]


def stored(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)))


@settings(max_examples=100, deadline=None)
@given(
    shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**32 - 1), level=st.integers(1, 9),
    values=st.sampled_from([2, 19, 256]),
)  # fmt: skip
def test_label_maps_survive_the_file(
    shape: tuple[int, int], seed: int, level: int, values: int
) -> None:
    labels = np.random.default_rng(seed).integers(0, values, shape).astype(np.uint8)
    data = encode_label_png(labels, level)
    assert np.array_equal(read_label_png(data), labels)
    assert data == encode_label_png(labels.copy(), level)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "L" and np.array_equal(np.array(image), labels)


def test_views_and_levels() -> None:
    assert np.array_equal(read_label_png(encode_label_png(EVERY.T[::-1])), EVERY.T[::-1])
    smooth = np.repeat(np.repeat(EVERY % 19, 32, axis=0), 32, axis=1)
    assert len(encode_label_png(smooth, 9)) < len(encode_label_png(smooth, 1))
    for level in (0, 10):
        with pytest.raises(ValueError, match="level"):
            encode_label_png(EVERY, level)
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        encode_label_png(np.zeros((2, 2, 3), np.uint8))


def test_a_palettes_indices_are_the_ids() -> None:
    """GTA5's and Pascal VOC's files: OpenCV would give colours."""
    image = Image.new("P", (16, 16))
    image.putdata((EVERY % 35).ravel().tolist())
    image.putpalette([(k * 7) % 256 for k in range(768)])
    for options in ({}, {"bits": 8}, {"transparency": 0}):
        assert np.array_equal(read_label_png(stored(image, **options)), EVERY % 35)
    few = Image.new("P", (16, 16))
    few.putdata((EVERY % 4).ravel().tolist())
    few.putpalette([9, 9, 9] * 4)
    for bits in (2, 4):
        assert np.array_equal(read_label_png(stored(few, bits=bits)), EVERY % 4)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (stored(Image.fromarray(EVERY).convert("RGB")), "three 8-bit colour channels"),
        (stored(Image.fromarray(EVERY).convert("RGBA")), "alpha-dropped"),
        (stored(Image.fromarray(EVERY).convert("LA")), "alpha-dropped"),
        (stored(Image.fromarray(EVERY.astype(np.uint16))), "sixteen-bit"),
        (stored(Image.fromarray(EVERY).convert("1")), "low-bit-depth"),
        (stored(Image.fromarray(EVERY), "JPEG"), "is a JPEG"),
        (stored(Image.fromarray(EVERY), "BMP"), "is a BMP"),
        (encode_label_png(EVERY)[:-5], "truncated"),
        (encode_label_png(EVERY)[:-1] + b"x", "bad-checksum"),
        (b"", "empty"),
        (b"not an image at all", "not-an-image"),
    ],
)
def test_everything_else_is_refused_and_says_so(data: bytes, words: str) -> None:
    with pytest.raises(ArtefactMismatch, match=f"gt_7.png .*{words}"):
        read_label_png(data, "gt_7.png")


def test_a_png_with_too_few_pixels_is_damaged() -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + crc

    for kind, palette in ((0, b""), (3, chunk(b"PLTE", bytes(9)))):
        begin = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, kind, 0, 0, 0)) + palette
        for pixels in (zlib.compress(bytes(17)), b"junk", b""):
            data = b"\x89PNG\r\n\x1a\n" + begin + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
            with pytest.raises(ArtefactMismatch, match="corrupt"):
                read_label_png(data)


def test_colours() -> None:
    found = by_pillow(encode_colour_png(EVERY, CITYSCAPES_19))
    assert found.shape == (16, 16, 3)
    for label in (0, 8, 18):
        assert tuple(found[label == EVERY][0]) == CITYSCAPES_19.palette[label]
    assert not found[EVERY >= 19].any()


def test_overlay() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    colours = CITYSCAPES_19.colours[EVERY]
    for alpha in (0.0, 0.25, 0.5, 0.7, 1.0):
        found = overlay(image, EVERY, CITYSCAPES_19, alpha)
        share = round(256 * alpha) / 256
        exact = np.floor(image * (1 - share) + colours * share + 0.5)
        assert np.array_equal(found[EVERY < 19], exact[EVERY < 19].astype(np.uint8))
        assert np.array_equal(found[EVERY >= 19], image[EVERY >= 19])
        assert found.dtype == np.uint8
    white = np.full((16, 16, 3), 255, np.uint8)
    assert (overlay(white, EVERY, CITYSCAPES_19, 0.0) == 255).all()
    for wrong in (image[:8], image[..., :1]):
        with pytest.raises(ValueError, match="labels"):
            overlay(wrong, EVERY, CITYSCAPES_19)
    with pytest.raises(ValueError, match="alpha"):
        overlay(image, EVERY, CITYSCAPES_19, float("nan"))


def deep(data: bytes) -> np.ndarray:
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert found is not None and found.dtype == np.uint16 and found.ndim == 2
    return found


def test_confidence() -> None:
    values = np.array([[0.0, 1.0, 0.5, 1 / 19], [np.nan, -0.1, 1.1, 0.999999]], np.float32)
    expected = [[0, 65535, 32768, 3449], [0, 0, 65535, 65535]]
    assert deep(encode_confidence_png16(values)).tolist() == expected
    rng = np.random.default_rng(1)
    many = rng.random((64, 64)).astype(np.float32)
    found = deep(encode_confidence_png16(many)) / 65535
    assert np.abs(found - many).max() <= 0.5 / 65535 + 1e-9


def test_entropy() -> None:
    largest = math.log(19)
    values = np.array(
        [[0.0, largest, largest * 1.0001, largest / 3], [np.nan, np.inf, -np.inf, -1e-7]],
        np.float32,
    )
    expected = [[0, LARGEST_16, LARGEST_16, 21845], [INVALID_16, INVALID_16, INVALID_16, 0]]
    assert deep(encode_entropy_png16(values, 19)).tolist() == expected
    assert deep(encode_entropy_png16(np.array([[0.0, np.nan]]), 1)).tolist() == [[0, INVALID_16]]
    rng = np.random.default_rng(2)
    many = (rng.random((64, 64)) * largest * 0.999).astype(np.float32)
    found = deep(encode_entropy_png16(many, 19)) * (largest / 65535)
    assert np.abs(found - many).max() <= 0.5 * largest / 65535 + 1e-9
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        encode_entropy_png16(np.zeros((2, 2, 2), np.float32), 19)
