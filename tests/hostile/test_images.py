"""Files that lie, break off or wait: each is refused with its reason, and nothing hangs."""

from __future__ import annotations

import io
import os
import re
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from cada_deploy.errors import UsageError
from cada_deploy.image_files import check_output_names, find_images
from cada_deploy.images import decode, peek_size, read_bytes
from cada_deploy.rejections import REASONS, ImageRejected

H, W = 96, 128
_Y, _X = np.mgrid[:H, :W]
RGB = np.stack([_X * 2 % 256, _Y * 2 % 256, (_X * _Y) % 256], axis=-1).astype(np.uint8)
PICTURE = Image.fromarray(RGB)


def stored(kind: str, image: Image.Image = PICTURE, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + crc


def png_of(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def ihdr(width: int, height: int, depth: int = 8, kind: int = 2) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))


IEND = chunk(b"IEND", b"")
PIXELS = zlib.compress(b"".join(b"\0" + row.tobytes() for row in RGB))
PNG, JPEG = stored("PNG"), stored("JPEG", quality=90)
PROGRESSIVE = stored("JPEG", quality=90, progressive=True)
BMP, TIFF, WEBP = stored("BMP"), stored("TIFF"), stored("WEBP")
LZW = stored("TIFF", compression="tiff_lzw")
WEBP_LOSSLESS = stored("WEBP", lossless=True)


def reason_of(data: bytes) -> str:
    with pytest.raises(ImageRejected) as caught:
        decode(data)
    assert caught.value.reason in REASONS and caught.value.detail
    return caught.value.reason


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


# --- cut short -------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [PNG, JPEG, PROGRESSIVE, BMP, TIFF, LZW, WEBP, WEBP_LOSSLESS])
def test_cut_files_are_truncated_wherever_the_cut_is(whole: bytes) -> None:
    cuts = {1, 2, 3, 4, 12, 100, len(whole) // 2, len(whole) // 3, len(whole) - 20}
    for cut in cuts:
        assert reason_of(whole[:-cut]) in ("truncated", "corrupt"), cut
    assert reason_of(whole[:-2]) == "truncated"
    assert reason_of(whole[: len(whole) // 2]) == "truncated"


def test_every_prefix_of_a_file_is_refused() -> None:
    small = PICTURE.resize((9, 7))
    for kind in ("PNG", "JPEG", "BMP", "WEBP", "TIFF"):
        whole = stored(kind, small)
        for end in range(len(whole)):
            if kind == "TIFF" and end >= len(whole) - 4:
                continue  # a TIFF may be followed by padding that belongs to nothing
            with pytest.raises(ImageRejected):
                decode(whole[:end])


def test_empty() -> None:
    assert reason_of(b"") == "empty"
    with pytest.raises(ImageRejected, match="empty"):
        peek_size(b"")


def test_a_jpeg_thumbnail_does_not_pass_for_the_end() -> None:
    exif = Image.Exif()
    exif[270] = "x" * 50 + "\xff\xd8 \xff\xd9"
    whole = stored("JPEG", exif=exif.tobytes())
    decode(whole)
    assert reason_of(whole[: len(whole) // 2]) == "truncated"


# --- checksums and structure -----------------------------------------------------------------


def test_png_with_a_wrong_checksum_anywhere() -> None:
    body = PNG.index(b"IDAT")
    assert reason_of(flipped(PNG, body + 50)) == "bad-checksum"
    assert reason_of(flipped(PNG, len(PNG) - 1)) == "bad-checksum"  # IEND: OpenCV 5 accepts it
    text = png_of(ihdr(W, H), flipped(chunk(b"tEXt", b"a\0b"), 9), chunk(b"IDAT", PIXELS), IEND)
    assert reason_of(text) == "bad-checksum"


def test_png_whose_checksums_are_right_and_whose_pixels_are_not() -> None:
    short = zlib.compress(zlib.decompress(PIXELS)[:1000])
    cut = PIXELS[: len(PIXELS) // 2]
    wrong_adler = PIXELS[:-1] + bytes([PIXELS[-1] ^ 1])
    for pixels in (short, cut, wrong_adler, b"", b"junk"):
        assert reason_of(png_of(ihdr(W, H), chunk(b"IDAT", pixels), IEND)) == "corrupt"
    assert reason_of(png_of(ihdr(W, H), IEND)) == "corrupt"
    assert reason_of(png_of(chunk(b"tEXt", b"ab"), ihdr(W, H), IEND)) == "corrupt"
    assert reason_of(png_of(ihdr(W, H), b"\0\0\0\1\1\2\3\4abcde")) == "corrupt"


def test_png_of_endless_small_chunks_is_refused_quickly() -> None:
    begin = time.monotonic()
    assert reason_of(png_of(ihdr(W, H), chunk(b"IDAT", b"") * 300_000, IEND)) == "corrupt"
    assert time.monotonic() - begin < 5


def test_jpeg_of_endless_scans_is_refused() -> None:
    at = PROGRESSIVE.rindex(b"\xff\xda")
    scan = PROGRESSIVE[at:-2]
    assert reason_of(PROGRESSIVE[:-2] + scan * 200 + b"\xff\xd9") == "unsupported-format"


def test_jpeg_whose_structure_is_broken() -> None:
    assert reason_of(b"\xff\xd8\xff\xd9") == "corrupt"
    assert reason_of(b"\xff\xd8\xff\xe0\0\1") == "corrupt"
    assert reason_of(JPEG[:2] + b"junk" + JPEG[2:]) in ("corrupt", "not-an-image")
    frame = JPEG.index(b"\xff\xc0")
    lossless = JPEG[: frame + 1] + b"\xc3" + JPEG[frame + 2 :]
    assert reason_of(lossless) == "unsupported-format"
    twelve_bits = JPEG[: frame + 4] + b"\x0c" + JPEG[frame + 5 :]
    assert reason_of(twelve_bits) == "unsupported-format"
    no_height = JPEG[: frame + 5] + b"\0\0" + JPEG[frame + 7 :]
    assert reason_of(no_height) == "corrupt"


# --- not what it says it is ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp", "a.bmp"])
def test_text_under_an_images_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"<!DOCTYPE html><p>404 not found</p>" * 20)
    (ref,) = find_images(tmp_path)
    assert reason_of(read_bytes(ref.path)) == "not-an-image"


def test_a_jpeg_called_png_is_a_jpeg(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(JPEG)
    (ref,) = find_images(tmp_path)
    assert decode(read_bytes(ref.path)).image.shape == (H, W, 3)


def test_formats_without_a_defined_reading() -> None:
    ppm = b"P6\n2 2\n255\n" + bytes(12)
    heif = b"\0\0\0\x18ftypheic" + bytes(50)
    for data in (stored("GIF"), ppm, heif, stored("JPEG2000"), b"II+\0" + bytes(50)):
        assert reason_of(data) == "unsupported-format"
    assert reason_of(b"BMW is a car" * 9) == "not-an-image"
    assert reason_of(b"RIFF\0\0\0\0WAVEfmt " * 9) == "not-an-image"
    for mode in ("F", "I", "LA", "RGBA"):
        assert reason_of(stored("TIFF", PICTURE.convert("RGBA").convert(mode))) == (
            "unsupported-format"
        ), mode
    assert reason_of(stored("BMP")[:28] + b"\x10\0" + stored("BMP")[30:]) == "unsupported-format"


def test_animations_and_pages() -> None:
    more = {"save_all": True, "append_images": [Image.fromarray(255 - RGB)]}
    for kind in ("PNG", "WEBP", "TIFF"):
        assert reason_of(stored(kind, **more)) == "multi-frame", kind


# --- sizes that lie --------------------------------------------------------------------------


def huge_headers() -> dict[str, bytes]:
    jpeg = bytearray(JPEG)
    frame = JPEG.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    bmp = bytearray(BMP)
    bmp[18:26] = struct.pack("<ii", 1 << 20, -(1 << 20))
    lossless = bytearray(WEBP_LOSSLESS)
    lossless[21:25] = struct.pack("<I", (1 << 28) - 1)
    extended = b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xff" * 6 + b"VP8 \0\0\0\0"
    tiff = bytearray(TIFF)
    for tag in (256, 257):
        entry = tiff.index(struct.pack("<HHI", tag, 4, 1))
        tiff[entry + 8 : entry + 12] = struct.pack("<I", 1 << 20)
    return {
        "png": png_of(ihdr(1 << 20, 1 << 20), chunk(b"IDAT", b"x"), IEND),
        "jpeg": bytes(jpeg), "bmp": bytes(bmp), "webp": bytes(lossless), "webp-x": extended,
        "tiff": bytes(tiff),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "webp", "webp-x", "tiff"])
def test_a_header_of_millions_a_side_is_judged_before_decoding(kind: str) -> None:
    data = huge_headers()[kind]
    begin = time.monotonic()
    assert reason_of(data) == "too-large"
    assert time.monotonic() - begin < 0.5
    assert min(peek_size(data)) >= 16384


def test_a_header_that_is_not_the_pixels() -> None:
    """The decoder must deliver what the header promised; nothing is padded."""
    tall = png_of(ihdr(W, H + 1), chunk(b"IDAT", PIXELS), IEND)
    assert reason_of(tall) == "corrupt"
    frame = JPEG.index(b"\xff\xc0")
    twice = JPEG[:2] + JPEG[frame : frame + 19] + JPEG[2:]
    assert reason_of(twice) == "corrupt"


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (0, 0)])
def test_no_pixels_at_all(width: int, height: int) -> None:
    assert reason_of(png_of(ihdr(width, height), chunk(b"IDAT", b""), IEND)) == "corrupt"
    bmp = bytearray(BMP)
    bmp[18:26] = struct.pack("<ii", width, height)
    assert reason_of(bytes(bmp)) == "corrupt"


BOMB = """
import resource, struct, sys, time, zlib
from cada_deploy.images import decode, peek_size
from cada_deploy.rejections import ImageRejected
def chunk(n, c): return struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c))
side = 30000
pack = zlib.compressobj(9)
row = bytes(1 + side // 8)
pixels = b"".join(pack.compress(row) for _ in range(side)) + pack.flush()
header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
data = (b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", header)
    + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
try:
    decode(data)
except ImageRejected as error:
    assert error.reason == "too-large", error
else:
    raise SystemExit("decoded")
took = time.monotonic() - begin
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert peek_size(data) == (side, side)
print(len(data), grown, took)
"""


def test_a_bomb_of_900_megapixels_in_100_kilobytes_costs_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BOMB], capture_output=True, text=True, check=True, timeout=60
    )
    size, grown_kib, seconds = map(float, done.stdout.split())
    assert size < 300_000
    assert grown_kib < 2_000 and seconds < 0.5


def test_tiff_directories_that_claim_the_moon() -> None:
    header = b"II*\0" + struct.pack("<IH", 8, 65535)
    many = header + struct.pack("<HHII", 273, 4, 0xFFFFFFFF, 8) * 3
    assert reason_of(many) == "truncated"
    loop = header + struct.pack("<HHII", 256, 4, 1, 9) * 65535 + struct.pack("<I", 8)
    assert reason_of(loop) == "corrupt"
    far = TIFF.replace(TIFF[4:8], b"\xff\xff\xff\xff", 1)
    assert reason_of(far) == "truncated"


def test_hostile_exif_never_spoils_a_good_image() -> None:
    good = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 274, 3, 1, 6, 0)
    assert decode(stored("JPEG", exif=b"Exif\0\0" + good)).notices == ("exif-orientation",)
    for exif in (
        b"",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        good[:-8],
        b"MM\0*" + good[4:],
        b"\xff" * 99,
    ):
        assert decode(stored("JPEG", exif=b"Exif\0\0" + exif)).notices == ()
        png = png_of(ihdr(W, H), chunk(b"eXIf", exif), chunk(b"IDAT", PIXELS), IEND)
        assert decode(png).notices == ()


# --- names and kinds of files ----------------------------------------------------------------


NAMES = [
    b"\xff\xfe.png", b"a b.png", b"a\nb.png", b"-rf.png", "ž日本\U0001f600.png".encode(),
    b"%s%n.png", b"'\".png", b"x" * 240 + b".png", b"$(touch x).png", b" .png", b"\\.png",
]  # fmt: skip


def test_odd_names(tmp_path: Path) -> None:
    for name in NAMES:
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:  # noqa: PTH123
            file.write(PNG)
    found = find_images(tmp_path)
    assert [ref.relative for ref in found] == sorted(NAMES)
    for ref in found:
        assert np.array_equal(decode(read_bytes(ref.path)).image, RGB)
    check_output_names(found)


def test_messages_about_odd_names_are_one_line_of_valid_text(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff\n"
    os.mkdir(folder)  # noqa: PTH102
    for name in (b"\xfe.png", b"\xfe.jpg"):
        with open(folder + b"/" + name, "wb") as file:  # noqa: PTH123
            file.write(PNG)
    with pytest.raises(UsageError) as caught:
        check_output_names(find_images(tmp_path))
    str(caught.value).encode()
    assert "\n" not in str(caught.value)
    os.mkdir(folder + b"/none")  # noqa: PTH102
    with pytest.raises(UsageError, match="no image in folder") as caught:
        find_images(Path(os.fsdecode(folder + b"/none")))
    str(caught.value).encode()


def test_broken_links_become_rejections(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b.png").symlink_to(tmp_path / "b.png")
    for ref in find_images(tmp_path):
        assert ref.size_bytes == 0
        with pytest.raises(ImageRejected, match="missing"):
            read_bytes(ref.path)
    assert len(find_images(tmp_path)) == 2


def test_loops_of_links_end(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/x.png").write_bytes(PNG)
    for k in range(5):
        (tmp_path / f"a/b/loop{k}").symlink_to(tmp_path / "a")
        (tmp_path / f"root{k}").symlink_to("/")
    begin = time.monotonic()
    assert [ref.relative for ref in find_images(tmp_path)] == [b"a/b/x.png"]
    assert time.monotonic() - begin < 1


def test_a_fifo_a_socket_a_device_and_a_folder_do_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "null.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as unix:
        monkeypatch.chdir(tmp_path)  # socket paths are short
        unix.bind("socket.png")
        found = find_images(tmp_path)
        assert [ref.relative for ref in found] == [b"fifo.png", b"null.png", b"socket.png"]
        for path in (*(ref.path for ref in found), tmp_path / "folder.png"):
            with pytest.raises(ImageRejected, match="not-a-file"):
                read_bytes(path)


def test_a_file_nobody_may_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("not run: this user (root?) may read every file")
    with pytest.raises(ImageRejected, match="unreadable"):
        read_bytes(path)


def test_a_read_error_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    for number, reason in (
        (5, "unreadable"),
        (13, "unreadable"),
        (116, "unreadable"),
        (2, "missing"),
    ):

        def fails(*_: object, code: int = number) -> int:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patched:
            patched.setattr(os, "open", fails)
            with pytest.raises(ImageRejected, match=f"{reason}: {re.escape(os.strerror(number))}"):
                read_bytes(path)


# --- chance ----------------------------------------------------------------------------------

SMALL = PICTURE.resize((20, 13))
SEEDS = [
    stored("PNG", SMALL), stored("JPEG", SMALL), stored("JPEG", SMALL, progressive=True),
    stored("BMP", SMALL), stored("TIFF", SMALL), stored("TIFF", SMALL, compression="tiff_lzw"),
    stored("WEBP", SMALL), stored("WEBP", SMALL, lossless=True), stored("PNG", SMALL.quantize(7)),
]  # fmt: skip


def survives(data: bytes) -> None:
    """It decodes to the size its header has, or is rejected: nothing else may happen."""
    try:
        found = decode(data)
    except ImageRejected as error:
        assert error.reason in REASONS
        return
    assert found.image.shape == (*peek_size(data), 3) and found.image.dtype == np.uint8


@settings(max_examples=600, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6
    ),
    cut=st.floats(0.2, 1.0),
)
def test_mutated_bytes(seed: bytes, edits: list[tuple[float, int]], cut: float) -> None:
    data = bytearray(seed)
    for place, value in edits:
        data[int(place * len(data))] = value
    survives(bytes(data[: int(cut * len(data)) if cut < 0.9 else len(data)]))


@settings(max_examples=400, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.binary(min_size=1, max_size=4))
def test_mutated_chunks_with_right_checksums(place: float, value: bytes) -> None:
    """Behind a right CRC the damage reaches libpng."""
    content = bytearray(ihdr(20, 13)[8:-4] + zlib.compress(bytes(13 * 61)))
    at = int(place * len(content))
    content[at : at + len(value)] = value
    survives(png_of(chunk(b"IHDR", bytes(content[:13])), chunk(b"IDAT", bytes(content[13:])), IEND))


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200), seed=st.sampled_from(SEEDS), keep=st.integers(2, 60))
@example(data=b"", seed=SEEDS[0], keep=8)
def test_random_bytes_behind_a_true_beginning(data: bytes, seed: bytes, keep: int) -> None:
    survives(data)
    survives(seed[:keep] + data)
