"""Finding images by name, and what each stored kind of pixel becomes."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from cada_deploy.errors import RunFailed, UsageError
from cada_deploy.image_files import (
    ImageRef,
    check_out_not_inside,
    check_output_names,
    find_images,
    output_stem,
)
from cada_deploy.images import LIMITS, Limits, decode, examine, peek_size, read_bytes
from cada_deploy.rejections import NOTICES, ImageRejected

H, W = 23, 37
_Y, _X = np.mgrid[:H, :W]
RGB = np.stack([_X * 6, _Y * 11, (_X * _Y) % 251], axis=-1).astype(np.uint8)
ALPHA = (_X * 5).astype(np.uint8)


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def png(depth: int, kind: int, rows: list[bytes], width: int, *extra: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = (chunk(b"IHDR", header), *extra, chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def touch(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def names(refs: list[ImageRef]) -> list[bytes]:
    return [ref.relative for ref in refs]


# --- finding ---------------------------------------------------------------------------------


def test_folder_is_read_recursively_and_sorted_by_bytes(tmp_path: Path) -> None:
    for name in ("b.PNG", "a/z.jpg", "a.jpeg", "a/é.webp", "B.tif", "c.TiFF", "d.bmp"):
        touch(tmp_path / name)
    for name in ("readme.txt", ".hidden.png", ".git/x.png", "a/.cache/y.png", "noext"):
        touch(tmp_path / name)
    found = find_images(tmp_path)
    assert names(found) == sorted(
        [b"b.PNG", b"a/z.jpg", b"a.jpeg", "a/é.webp".encode(), b"B.tif", b"c.TiFF", b"d.bmp"]
    )
    assert all(ref.size_bytes == 1 and ref.path.read_bytes() == b"x" for ref in found)


def test_links_to_files_and_folders_are_followed_once(tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    touch(source / "real/a.png")
    touch(elsewhere / "deep/b.png")
    touch(elsewhere / "deep2/c.png")
    (source / "file.png").symlink_to(elsewhere / "deep/b.png")
    (source / "aaa").symlink_to(source / "real")  # a second way to a real folder
    (source / "link1").symlink_to(elsewhere)
    (source / "link2").symlink_to(elsewhere)  # a second link to one folder
    (source / "real/loop").symlink_to(source)
    (source / "up").symlink_to(tmp_path)  # above the source
    (elsewhere / "self").symlink_to(elsewhere / "self")
    (elsewhere / "back").symlink_to(source / "real")
    assert names(find_images(source)) == [
        b"file.png", b"link1/deep/b.png", b"link1/deep2/c.png", b"real/a.png",
    ]  # fmt: skip


def test_a_source_may_be_a_link(tmp_path: Path) -> None:
    touch(tmp_path / "real/a.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert names(find_images(tmp_path / "link")) == [b"a.png"]


def test_one_image_is_a_source(tmp_path: Path) -> None:
    (ref,) = find_images(touch(tmp_path / "a.JPG"))
    assert ref.relative == b"a.JPG" and ref.path == tmp_path / "a.JPG"


def test_list_file(tmp_path: Path) -> None:
    touch(tmp_path / "data/b.png")
    touch(tmp_path / "data/frame.0001")
    outside = touch(tmp_path / "other/c.png")
    list_file = touch(
        tmp_path / "data/list.txt",
        b"\xef\xbb\xbf# cities\r\n\nb.png\r\n./sub/../b2.png\n../other/c.png\n  \n"
        + os.fsencode(outside)
        + b"\nframe.0001\n\xff\xfe.png",
    )
    found = {ref.relative: ref for ref in find_images(list_file)}
    absolute = os.fsencode(outside).lstrip(b"/")
    assert sorted(found) == sorted(
        [b"b.png", b"b2.png", b"other/c.png", absolute, b"frame.0001", b"\xff\xfe.png"]
    )
    assert found[b"b.png"].size_bytes == 1
    assert found[b"other/c.png"].path.samefile(outside)
    assert found[b"b2.png"].size_bytes == 0  # missing: rejected when it is read
    with pytest.raises(ImageRejected, match="missing"):
        read_bytes(found[b"b2.png"].path)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "all blank"), (b"# a\n\n", "all blank"), (b"PK\0\3", "NUL bytes")],
)
def test_lists_of_nothing_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        find_images(touch(tmp_path / "list.txt", content))


def test_an_empty_folder_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found nothing"):
        find_images(tmp_path)
    touch(tmp_path / "a.gif"), touch(tmp_path / "b.gif"), touch(tmp_path / "notes")
    with pytest.raises(UsageError, match=r"2 x '.gif', 1 x 'no suffix'; expected .*\.png"):
        find_images(tmp_path)


def test_no_such_source(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be opened"):
        find_images(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="neither a folder nor a list"):
        find_images(tmp_path / "fifo")


@pytest.mark.parametrize(
    ("relative", "stem"),
    [
        (b"a.png", b"a"), (b"a/b.JPEG", b"a/b"), (b"a.b.tif", b"a.b"), (b"a", b"a"),
        (b"frame.0001", b"frame.0001"), (b"x.png/y.png", b"x.png/y"), (b".png", b".png"),
        (b"a/.png", b"a/.png"), (b"\xff.webp", b"\xff"),
    ],
)  # fmt: skip
def test_output_stem(relative: bytes, stem: bytes) -> None:
    assert output_stem(relative) == stem


def refs(*relative: bytes) -> list[ImageRef]:
    return [ImageRef(Path("/in") / os.fsdecode(r), r, 1) for r in relative]


def test_two_inputs_with_one_output() -> None:
    check_output_names(refs(b"a.png", b"b/a.png", b"A.png", b"a/a.png"))
    with pytest.raises(UsageError, match=r"/in/a\.png and /in/a\.jpg"):
        check_output_names(refs(b"a.png", b"a.jpg"))
    with pytest.raises(UsageError, match=r"/in/a\.png and /in/a\.png"):
        check_output_names(refs(b"a.png", b"a.png"))
    with pytest.raises(UsageError, match="needs a folder of that name"):
        check_output_names(refs(b"a.png", b"a.png/b.jpg"))


def test_out_may_not_lie_in_the_input(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (tmp_path / "link").symlink_to(source)
    check_out_not_inside(source, tmp_path / "out")
    check_out_not_inside(source, tmp_path / "in2")
    check_out_not_inside(touch(tmp_path / "list.txt"), tmp_path / "out")
    for out in (source, source / "out/deep", tmp_path / "link/out", source / ".." / "in" / "x"):
        with pytest.raises(UsageError, match="inside the input folder"):
            check_out_not_inside(source, out)


# --- reading ---------------------------------------------------------------------------------


def test_read_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5
    path = touch(tmp_path / "a.png", content)
    assert read_bytes(path) == content
    assert read_bytes(path, Limits(max_bytes=len(content))) == content
    assert read_bytes(touch(tmp_path / "empty.png", b"")) == b""
    with pytest.raises(ImageRejected, match="too-large: 1280 bytes; at most 1279"):
        read_bytes(path, Limits(max_bytes=len(content) - 1))


def test_no_file_handle_left_is_not_the_images_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(24, "Too many open files")

    path = touch(tmp_path / "a.png")
    monkeypatch.setattr(os, "open", full)
    with pytest.raises(RunFailed, match="Too many open files"):
        read_bytes(path)


# --- decoding: what each kind of stored pixel becomes ------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}), ("TIFF", {"compression": "packbits"}),
        ("WEBP", {"lossless": True}),
    ],
)  # fmt: skip
def test_lossless_formats_keep_every_pixel(kind: str, options: dict[str, object]) -> None:
    data = stored(Image.fromarray(RGB), kind, **options)
    found = decode(data)
    assert np.array_equal(found.image, RGB) and found.notices == ()
    assert found.image.dtype == np.uint8 and found.image.flags.c_contiguous
    assert peek_size(data) == (H, W)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("TIFF", {"compression": "jpeg"}),
    ],
)
def test_lossy_formats_agree_with_pillow(kind: str, options: dict[str, object]) -> None:
    smooth = cv2.GaussianBlur(RGB, (0, 0), 3)
    data = stored(Image.fromarray(smooth), kind, quality=95, **options)
    found = decode(data)
    by_pillow = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(found.image.astype(int) - by_pillow).max() <= 2  # RGB, not BGR
    assert found.notices == ()


def test_grey_is_repeated() -> None:
    grey = Image.fromarray(RGB[..., 0])
    for kind in ("PNG", "TIFF"):
        found = decode(stored(grey, kind))
        assert np.array_equal(found.image, np.repeat(RGB[..., :1], 3, axis=2))
        assert found.notices == ("grey",)
    assert decode(stored(grey, "JPEG")).notices == ("grey",)
    assert decode(stored(grey, "BMP")).notices == ("palette",)  # BMP has no grey of its own


def test_few_bits_are_stretched() -> None:
    for depth in (1, 2, 4):
        values = (_X[:, :32] % 2**depth).astype(np.uint8)
        packed = np.zeros((H, 32 * depth // 8), np.uint8)
        for k in range(8 // depth):
            packed |= values[:, k :: 8 // depth] << (8 - depth * (k + 1))
        found = decode(png(depth, 0, [row.tobytes() for row in packed], 32))
        assert np.array_equal(found.image[..., 0], values * (255 // (2**depth - 1)))
        assert found.notices == ("low-bit-depth", "grey")


def test_of_sixteen_bits_the_high_byte_is_used() -> None:
    v = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    grey, colour = v, np.dstack([v, 65535 - v, v[::-1]])
    for suffix in (".png", ".tiff"):
        found = decode(cv2.imencode(suffix, grey)[1].tobytes())
        assert np.array_equal(found.image, np.repeat((v >> 8)[..., None], 3, axis=2)), suffix
        assert found.notices == ("sixteen-bit", "grey")
        found = decode(cv2.imencode(suffix, colour)[1].tobytes())
        assert np.array_equal(found.image, colour[..., ::-1] >> 8), suffix
        assert found.notices == ("sixteen-bit",)


def test_palette_is_looked_up() -> None:
    indexed = Image.fromarray(RGB).quantize(17)
    colours = np.array(indexed.convert("RGB"))
    for kind in ("PNG", "BMP", "TIFF"):
        found = decode(stored(indexed, kind))
        assert np.array_equal(found.image, colours) and found.notices == ("palette",), kind
    found = decode(stored(indexed, "PNG", transparency=3))
    assert np.array_equal(found.image, colours)
    assert found.notices == ("palette", "alpha-dropped")


def test_alpha_is_dropped_and_not_multiplied_in() -> None:
    with_alpha = Image.fromarray(np.dstack([RGB, ALPHA]))
    for kind, options in (("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True, "exact": True})):
        found = decode(stored(with_alpha, kind, **options))
        assert np.array_equal(found.image, RGB) and found.notices == ("alpha-dropped",), kind
    grey = Image.fromarray(np.dstack([RGB[..., 0], ALPHA]), "LA")
    found = decode(stored(grey, "PNG"))
    assert np.array_equal(found.image[..., 1], RGB[..., 0])
    assert found.notices == ("grey", "alpha-dropped")
    found = decode(stored(Image.fromarray(RGB), "PNG", transparency=(0, 0, 0)))
    assert np.array_equal(found.image, RGB) and found.notices == ("alpha-dropped",)


def test_alpha_in_tiff_is_refused_because_opencv_multiplies_it_in() -> None:
    with pytest.raises(ImageRejected, match=r"unsupported-format.*alpha yes"):
        decode(stored(Image.fromarray(np.dstack([RGB, ALPHA])), "TIFF"))


def test_cmyk_is_converted_without_a_profile() -> None:
    inks = Image.fromarray(cv2.GaussianBlur(RGB, (0, 0), 3)).convert("CMYK")
    for kind in ("JPEG", "TIFF"):
        data = stored(inks, kind)
        by_pillow = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        found = decode(data)
        assert np.abs(found.image.astype(int) - by_pillow).max() <= 1, kind
        assert found.notices == ("cmyk",)


def test_exif_rotation_is_ignored_and_told() -> None:
    exif = Image.Exif()
    for turn in range(1, 9):
        exif[274] = turn
        for kind, options in (("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
            data = stored(Image.fromarray(RGB), kind, exif=exif.tobytes(), **options)
            found = decode(data)
            plain = decode(stored(Image.fromarray(RGB), kind, **options))
            assert np.array_equal(found.image, plain.image), (kind, turn)
            assert found.notices == (("exif-orientation",) if turn > 1 else ()), (kind, turn)
            assert peek_size(data) == (H, W)
    exif[274] = 6
    with pytest.raises(ImageRejected, match="orientation 6"):  # OpenCV turns it whatever we say
        decode(stored(Image.fromarray(RGB), "TIFF", exif=exif))


def test_bytes_after_the_end_are_told() -> None:
    for kind in ("PNG", "JPEG", "BMP", "WEBP"):
        plain = stored(Image.fromarray(RGB), kind)
        found = decode(plain + b"\xff\xd9 more")
        assert found.notices == ("trailing-bytes",), kind
        assert np.array_equal(found.image, decode(plain).image)


def test_gamma_is_ignored() -> None:
    rows = [row.tobytes() for row in RGB]
    found = decode(png(8, 2, rows, W, chunk(b"gAMA", struct.pack(">I", 100000))))
    assert np.array_equal(found.image, RGB)


def test_headers_agree_with_pillow() -> None:
    for height, width in ((1, 1), (1, 300), (299, 1), (257, 129)):
        image = Image.fromarray(np.zeros((height, width, 3), np.uint8))
        for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP"):
            for data in (stored(image, kind), stored(image.convert("RGBA"), "WEBP")):
                assert peek_size(data) == (height, width)
                assert decode(data).image.shape == (height, width, 3)


def test_examine_tells_what_decode_tells() -> None:
    data = stored(Image.fromarray(RGB[..., 0]), "PNG")
    found = examine(data)
    assert (found.format, found.height, found.width) == ("PNG", H, W)
    assert found.notices == decode(data).notices


def test_limits() -> None:
    data = stored(Image.fromarray(RGB), "PNG")
    assert decode(data, Limits(max_pixels=H * W)).image.shape == (H, W, 3)
    with pytest.raises(ImageRejected, match="too-large: 23x37"):
        decode(data, Limits(max_pixels=H * W - 1))
    with pytest.raises(ImageRejected, match="too-large"):
        decode(data, Limits(max_side=36))
    with pytest.raises(UsageError, match="max_pixels"):
        Limits(max_pixels=1 << 29)
    assert LIMITS.max_pixels == 8192 * 8192


def test_decode_from_many_threads_gives_the_same_pixels() -> None:
    data = [stored(Image.fromarray(np.roll(RGB, k, axis=1)), "PNG") for k in range(8)]
    wrong: list[int] = []

    def work(k: int) -> None:
        for _ in range(20):
            if not np.array_equal(decode(data[k]).image, np.roll(RGB, k, axis=1)):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("module", ["images", "preprocess", "labels"])
def test_opencv_is_guarded_quiet_and_single_threaded_and_torch_stays_out(module: str) -> None:
    code = (
        f"import os, sys; import cada_deploy.{module}; import cv2, numpy as np;"
        "assert os.environ['OPENCV_IO_MAX_IMAGE_PIXELS'] == str(1 << 28);"
        "assert cv2.getNumThreads() == 1; assert 'torch' not in sys.modules;"
        "assert cv2.imdecode(np.frombuffer(b'BM' + bytes(60), np.uint8), 1) is None"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENCV_")}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, env=environment
    )
    assert done.stderr == b""


def test_notices_come_in_their_order() -> None:
    assert list(NOTICES) == sorted(NOTICES, key=list(NOTICES).index)
    exif = Image.Exif()
    exif[274] = 3
    data = stored(Image.fromarray(RGB[..., 0]), "JPEG", exif=exif.tobytes()) + b"tail"
    assert decode(data).notices == ("exif-orientation", "grey", "trailing-bytes")


def test_a_decoder_that_delivers_another_size_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = stored(Image.fromarray(RGB), "PNG")
    for shape in ((W, H, 3), (H, W - 1, 3), (H, W), (H, W, 4)):
        monkeypatch.setattr(cv2, "imdecode", lambda *_, s=shape: np.zeros(s, np.uint8))
        with pytest.raises(ImageRejected, match="corrupt: the"):
            decode(data)
