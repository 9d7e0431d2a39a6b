"""Runs on hostile inputs, options and folders: each is told with its code, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from command_line import (
    EVIDENCE,
    Ran,
    cada,
    child,
    child_environment,
    deliverables,
    read,
    rejected,
    temporary_files,
)
from foreign_models import save_colour_model, spread_colours, street_like, write_images

from cada_deploy.labels import read_label_png
from cada_deploy.model_spec import METADATA_KEY
from cada_deploy.rejections import REASONS

Run = Callable[..., Ran]


def png(image: np.ndarray) -> bytes:
    ok, data = cv2.imencode(".png", image[..., ::-1] if image.ndim == 3 else image)
    assert ok
    return bytes(data)


def picture(path: Path | bytes, seed: int = 0, size: tuple[int, int] = (24, 32)) -> None:
    Path(os.fsdecode(path)).parent.mkdir(parents=True, exist_ok=True)
    Path(os.fsdecode(path)).write_bytes(png(street_like(*size, seed=seed)))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "frames", 3, (24, 32))
    return tmp_path / "frames"


@pytest.fixture
def run(colour_model: Path, images: Path, tmp_path: Path) -> Run:
    """pseudo-label of `images` into `tmp_path/out`; later options win."""

    def run(*options: str | Path) -> Ran:
        return cada(
            "pseudo-label", "--model", colour_model, "--preset", "imagenet-rgb", "--images", images,
            "--out", tmp_path / "out", "--shard-size", "2", *options,
        )  # fmt: skip

    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def label_of(out: Path, stem: str) -> np.ndarray:
    return read_label_png((out / "labels" / f"{stem}.png").read_bytes())


# --- inputs that cannot be a run -----------------------------------------------------------------


def test_no_image_is_exit_2(run: Run, tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    ran = run("--images", tmp_path / "empty")
    assert ran.code == 2 and ran.said("empty")
    ran = run("--images", tmp_path / "nowhere")
    assert ran.code == 2 and ran.said("nowhere")
    (tmp_path / "list.txt").write_text("# only a remark\n\n")
    assert run("--images", tmp_path / "list.txt").code == 2
    assert not out.exists()


def test_out_inside_the_input_is_exit_2(run: Run, images: Path) -> None:
    for place in (images, images / "labels", images / "a" / ".." / "b"):
        ran = run("--out", place)
        assert ran.code == 2, ran.err
    assert sorted(p.name for p in images.iterdir()) == [f"frame_00{k}.png" for k in range(3)]


def test_an_input_inside_out_is_allowed_where_it_cannot_be_overwritten(
    run: Run, images: Path, tmp_path: Path
) -> None:
    shutil.copytree(images, tmp_path / "out" / "frames")
    assert run("--images", tmp_path / "out" / "frames").code == 0


def test_two_inputs_of_one_output_name_are_exit_2_and_both_are_named(
    run: Run, images: Path, out: Path
) -> None:
    (images / "frame_001.jpg").write_bytes((images / "frame_001.png").read_bytes())
    ran = run()
    assert ran.code == 2
    assert ran.said("frame_001.jpg", "frame_001.png")
    assert not out.exists()


def test_out_that_is_a_file_is_told(run: Run, out: Path) -> None:
    out.write_text("mine")
    ran = run()
    assert ran.code == 1 and ran.said("cannot write", str(out))
    assert out.read_text() == "mine"


# --- OUT of another run --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--size", "16x24"), "--size"),
        (("--label-size", "16x24"), "--label-size"),
        (("--label-size", "model"), "--label-size"),
        (("--stats-size", "16x24"), "--stats-size"),
        (("--centroid", "mean"), "--centroid: confidence there, mean now"),
        (("--ignore-rows", "0:4"), "--ignore-rows"),
        (("--preset", "caffe-bgr"), "the model's spec"),
        (("--shard-size", "1"), "begun with --shard-size 2"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_another_run_on_the_same_out_is_exit_4_and_says_what_differs(
    run: Run, out: Path, change: tuple[str, str], named: str
) -> None:
    assert run().code == 0
    before = deliverables(out)
    ran = run(*change)
    assert ran.code == 4, ran.err
    assert ran.said(named, "another --out")
    assert deliverables(out) == before


def test_another_model_and_other_inputs_are_named(
    run: Run, images: Path, out: Path, tmp_path: Path
) -> None:
    assert run().code == 0
    other = save_colour_model(tmp_path / "other.onnx", spread_colours(6, seed=9))
    ran = run("--model", other)
    assert ran.code == 4 and ran.said("the model file")
    picture(images / "one_more.png")
    ran = run()
    assert ran.code == 4 and ran.said("the list of images")
    (images / "one_more.png").unlink()
    assert run().code == 0
    with (images / "frame_000.png").open("ab") as file:
        file.write(b"\0")
    ran = run()
    assert ran.code == 4 and ran.said("the list of images (names and sizes)")


def test_predict_never_writes_over_pseudo_labels(run: Run, images: Path, out: Path) -> None:
    assert run().code == 0
    before = deliverables(out)
    model = read(out / "run.json")["settings"]["model"]
    ran = cada(
        "predict", "--model", model, "--preset", "imagenet-rgb", "--images", images, "--out", out
    )
    assert ran.code == 4 and ran.said("what the run is for")
    assert deliverables(out) == before


def test_a_folder_with_labels_of_nobody_is_exit_4(run: Run, out: Path) -> None:
    (out / "labels").mkdir(parents=True)
    (out / "labels" / "precious.png").write_bytes(b"truth")
    ran = run()
    assert ran.code == 4 and ran.said("no run.json")
    assert [p.name for p in (out / "labels").iterdir()] == ["precious.png"]


def test_an_empty_existing_out_is_fine(run: Run, out: Path) -> None:
    (out / "labels").mkdir(parents=True)
    assert run().code == 0


# --- bad images ----------------------------------------------------------------------------------


def test_bad_images_are_rejected_one_by_one_and_the_run_goes_on(
    run: Run, images: Path, out: Path
) -> None:
    good = (images / "frame_000.png").read_bytes()
    flipped = bytearray(good)
    flipped[len(flipped) // 2] ^= 0xFF
    bad = {
        "a_cut.png": (good[: len(good) // 2], "truncated"),
        "b_empty.jpg": (b"", "empty"),
        "c_text.png": (b"<html>Not found</html>", "not-an-image"),
        "d_flipped.png": (bytes(flipped), "bad-checksum"),
        "e_gif.png": (b"GIF89a" + bytes(40), "unsupported-format"),
    }
    for name, (data, _) in bad.items():
        (images / name).write_bytes(data)
    (images / "f_folder.png").mkdir()
    os.mkfifo(images / "g_fifo.png")
    (images / "h_dangling.png").symlink_to("nowhere")
    expected = {name: reason for name, (_, reason) in bad.items()}
    expected |= {"g_fifo.png": "not-a-file", "h_dangling.png": "missing"}

    ran = run()
    assert ran.code == 6, ran.err
    assert ran.said(f"{len(expected)} inputs were rejected", "rejected.jsonl", "a_cut.png")
    lines = rejected(out)
    assert {line["path"]: line["reason"] for line in lines} == expected
    assert [line["path"] for line in lines] == sorted(expected)
    assert all(line["reason"] in REASONS and line["detail"] for line in lines)
    assert sorted(p.name for p in (out / "labels").iterdir()) == [
        f"frame_00{k}.png" for k in range(3)
    ]
    assert read(out / "run.json")["results"]["rejected"] == len(expected)

    assert run("--allow-rejects", str(len(expected) - 1)).code == 6
    assert run("--allow-rejects", str(len(expected))).code == 0
    assert run().code == 6, "the code does not depend on what is done already"


def test_a_run_of_nothing_but_bad_images_still_ends(run: Run, images: Path, out: Path) -> None:
    for path in images.iterdir():
        path.write_bytes(b"no")
    ran = run()
    assert ran.code == 6, ran.err
    assert len(rejected(out)) == 3
    found = read(out / "thresholds.json")
    assert found["selected_fraction"] == 0.0
    assert all(row["threshold"] is None for row in found["classes"])


def test_an_image_that_changes_between_the_phases_is_noticed(
    run: Run, images: Path, out: Path
) -> None:
    """Without a cache the network runs twice; it must not label other pixels than it scored."""
    assert run("--cache", "off").code == 0
    data = (images / "frame_001.png").read_bytes()
    other = png(street_like(24, 32, seed=77))
    (images / "frame_001.png").write_bytes(other + bytes(max(0, len(data) - len(other))))
    ran = cada("select", out, "--delta", "0.1")
    assert ran.code == 4
    assert ran.said("frame_001.png has changed since it was scored")


def test_an_image_that_vanishes_after_scoring_does_not_matter_with_a_cache(
    run: Run, images: Path, out: Path, tmp_path: Path
) -> None:
    assert run("--delta", "0.1").code == 0
    expected = deliverables(out)
    assert run("--out", tmp_path / "other").code == 0
    shutil.rmtree(images)
    ran = cada("select", tmp_path / "other", "--delta", "0.1")
    assert ran.code == 0, ran.err
    assert deliverables(tmp_path / "other") == expected


# --- sizes ---------------------------------------------------------------------------------------


def test_images_of_many_sizes_get_labels_of_their_own_size(
    run: Run, images: Path, out: Path
) -> None:
    sizes = {"one": (1, 1), "row": (1, 40), "column": (40, 1), "odd": (23, 37), "big": (90, 70)}
    for seed, (name, size) in enumerate(sizes.items()):
        picture(images / f"{name}.png", seed, size)
    assert run().code == 0
    for name, size in sizes.items():
        assert label_of(out, name).shape == size
    assert label_of(out, "frame_000").shape == (24, 32)


def test_label_size_and_statistics_size(run: Run, images: Path, tmp_path: Path) -> None:
    picture(images / "other.png", 5, (40, 56))
    pixels = {}
    for name, options, shapes in [
        ("fixed", ("--label-size", "20x30"), [(20, 30), (20, 30)]),
        ("model", ("--size", "16x24", "--label-size", "model"), [(16, 24), (16, 24)]),
        ("stats", ("--stats-size", "10x12"), [(24, 32), (40, 56)]),
        ("plain", (), [(24, 32), (40, 56)]),
    ]:
        out = tmp_path / name
        assert run("--out", out, *options).code == 0
        assert [label_of(out, "frame_000").shape, label_of(out, "other").shape] == shapes
        rows = read(out / "thresholds.json")["classes"]
        pixels[name] = sum(r["pixels"] for r in rows), sum(r["predicted"] for r in rows)
    assert pixels == {
        "fixed": (4 * 600, 4 * 600),
        "model": (4 * 384, 4 * 384),
        "stats": (4 * 120, 3 * 768 + 2240),
        "plain": (3 * 768 + 2240, 3 * 768 + 2240),
    }


# --- names ---------------------------------------------------------------------------------------

STRANGE = [
    b"plain.png",
    b"with space.png",
    b"new\nline.png",
    b"-leading-dash.png",
    b"--out.png",
    b'quote\'s "double".png',
    b"percent%s%d%%.png",
    b"back\\slash.png",
    b"$(touch owned);`id`.png",
    "\u00fcml\u00e4ut-\u4eba\u9053-\U0001f6b2.png".encode(),
    "e\u0301 and \u00e9.png".encode(),
    b"bytes-\xff\xfe.png",
    b"latin-\xe9.PNG",
    b"dir \xff/inner\xfe.png",
    b"deep/er/and/deeper.png",
    b"x" * 251 + b".png",
    b"two.dots.png.png",
]


def test_names_of_any_bytes_get_labels_of_the_same_bytes(
    run: Run, images: Path, out: Path, tmp_path: Path
) -> None:
    shutil.rmtree(images)
    root = os.fsencode(images)
    for seed, name in enumerate(STRANGE):
        picture(root + b"/" + name, seed)
    (images / "bad\udcff\n.png").write_bytes(b"nothing to see")
    ran = run("--overlay", "--scope", "image", "--allow-rejects", "1")
    assert ran.code == 0, ran.err
    labels = os.fsencode(out / "labels")
    found = {
        os.path.relpath(folder + b"/" + name, labels)
        for folder, _, names in os.walk(labels)
        for name in names
    }
    assert found == {name[:-4] + b".png" for name in STRANGE}
    (bad,) = rejected(out)
    assert "path" not in bad and bad["path_b64"] == "YmFk/woucG5n"
    assert temporary_files(out) == []
    # A child process resumes and selects by the same names; nothing is done twice.
    first = deliverables(out)
    model = read(out / "run.json")["settings"]["model"]
    again = child(
        "pseudo-label", "--model", model, "--preset", "imagenet-rgb", "--images", images, "--out",
        out, "--overlay", "--scope", "image", "--allow-rejects", "1",
    )  # fmt: skip
    assert again.code == 0, again.err
    assert deliverables(out) == first
    assert not (tmp_path / "owned").exists() and not Path("owned").exists()


def test_folders_and_models_with_names_that_are_no_utf8(colour_model: Path, tmp_path: Path) -> None:
    root = os.fsencode(tmp_path)
    images, out, model = root + b"/in\xff", root + b"/out\xfe", root + b"/m\xfd.onnx"
    for k in range(2):
        picture(images + b"/%d.png" % k, k)
    shutil.copy(colour_model, os.fsdecode(model))
    arguments = (
        "pseudo-label", "--preset", "imagenet-rgb", "--model", model,
        "--images", images, "--out", out,
    )  # fmt: skip
    for cache in ("on", "off"):
        ran = child(*arguments, "--cache", cache)
        assert ran.code == 0, ran.err
        ran = child("select", out, "--delta", "0.1")
        assert ran.code == 0, ran.err
        shutil.rmtree(os.fsdecode(out))
    (Path(os.fsdecode(images)) / "new.png").write_bytes(b"")
    ran = child(*arguments)
    assert ran.code == 6 and "Traceback" not in ran.err


# --- ignored pixels ------------------------------------------------------------------------------


def test_masked_pixels_get_no_label_and_enter_no_statistic(
    run: Run, out: Path, tmp_path: Path
) -> None:
    mask = np.zeros((24, 32), np.uint8)
    mask[18:, :] = 1
    mask[3, 5] = 255
    (tmp_path / "mask.png").write_bytes(png(mask))
    assert run("--ignore-mask", tmp_path / "mask.png", "--delta", "-100").code == 0
    found = read(out / "thresholds.json")
    assert found["masked_pixels"] == 3 * (6 * 32 + 1)
    assert sum(row["pixels"] for row in found["classes"]) == 3 * (18 * 32 - 1)
    for k in range(3):
        label = label_of(out, f"frame_00{k}")
        assert ((label == 255) == (mask != 0)).all(), "at this Delta all others are kept"
    first = deliverables(out)
    (tmp_path / "mask.png").unlink()
    assert cada("select", out, "--delta", "-100").code == 0, "the run keeps its own copy"
    assert deliverables(out) == first


def test_rows_and_mask_add_up_and_rows_equal_the_mask_of_those_rows(
    run: Run, tmp_path: Path
) -> None:
    mask = np.zeros((24, 32), np.uint8)
    mask[:4] = mask[-3:] = 7
    (tmp_path / "mask.png").write_bytes(png(mask))
    assert run("--out", tmp_path / "a", "--ignore-mask", tmp_path / "mask.png").code == 0
    assert run("--out", tmp_path / "b", "--ignore-rows", "0:4", "--ignore-rows", "-3:").code == 0
    one, other = deliverables(tmp_path / "a"), deliverables(tmp_path / "b")
    assert one.pop("statistics.json") != other.pop("statistics.json"), "two runs, two ids"
    assert one == other


def test_a_mask_of_another_size_rejects_the_image(
    run: Run, images: Path, out: Path, tmp_path: Path
) -> None:
    picture(images / "other.png", 5, (40, 56))
    (tmp_path / "mask.png").write_bytes(png(np.ones((40, 56), np.uint8)))
    ran = run("--ignore-mask", tmp_path / "mask.png")
    assert ran.code == 6
    assert {line["path"]: line["reason"] for line in rejected(out)} == {
        f"frame_00{k}.png": "mask-size" for k in range(3)
    }
    assert "40x56" in rejected(out)[0]["detail"] and "24x32" in rejected(out)[0]["detail"]
    assert (label_of(out, "other") == 255).all()


def test_a_mask_that_is_no_map_of_ids_is_refused(run: Run, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    for data, said in [
        (png(np.zeros((24, 32, 3), np.uint8)), "8-bit channel"),
        (b"", "empty"),
        (b"P5 1 1 255 \0", "unsupported-format"),
        (png(np.zeros((24, 32), np.uint8))[:-20], "truncated"),
        (png(np.zeros((24, 32), np.uint16)), "8-bit channel"),
    ]:
        path.write_bytes(data)
        ran = run("--ignore-mask", path)
        assert ran.code in (2, 4), ran.err
        assert ran.said(said)
    ran = run("--ignore-mask", tmp_path / "none.png")
    assert ran.code == 2 and ran.said("--ignore-mask", "none.png")
    ran = run("--ignore-mask", tmp_path)
    assert ran.code == 2 and ran.said("--ignore-mask")
    assert not out.exists()


# --- option values -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--delta", "abc"), "'abc' is not a number"),
        (("--delta", ""), "--delta"),
        (("--delta", "nan"), "out of range"),
        (("--delta", "inf"), "out of range"),
        (("--delta", "1e7"), "out of range"),
        (("--delta", "%"), "not a number"),
        (("--delta", "0.1,0.2"), "2 values for 6 classes"),
        (("--delta", "0.1,,0.2,0,0,0"), "not a number"),
        (("--delta", "car=0.1"), "names no class"),
        (("--delta", "class-1=0.1,class-1=0.2"), "twice"),
        (("--delta", "class-1=0.1,0.2"), "names no class"),
        (("--delta", "class-1=x"), "'x' is not a number"),
        (("--centroid", "median"), "'median'"),
        (("--scope", "video"), "'video'"),
        (("--policy", "adaptive"), "'adaptive'"),
        (("--policy", "fixed", "--threshold", "1.5"), "--threshold is 1.5"),
        (("--policy", "fixed", "--threshold", "nan"), "--threshold is nan"),
        (("--policy", "fixed", "--threshold", "x"), "'x' is not a valid float"),
        (("--policy", "fixed", "--delta", "0.1"), "belong to --policy category-adaptive"),
        (("--policy", "fixed", "--scope", "image"), "belong to --policy category-adaptive"),
        (("--threshold", "0.5"), "belongs to --policy fixed"),
        (("--size", "512"), "HEIGHTxWIDTH"),
        (("--size", "x"), "HEIGHTxWIDTH"),
        (("--size", "0x5"), "1 to 65535"),
        (("--size", "-5x5"), "HEIGHTxWIDTH"),
        (("--size", "5x70000"), "1 to 65535"),
        (("--size", "5x5x5"), "HEIGHTxWIDTH"),
        (("--size", "\u00b2x\u00b2"), "HEIGHTxWIDTH"),
        (("--label-size", "full"), "HEIGHTxWIDTH"),
        (("--stats-size", "image"), "HEIGHTxWIDTH"),
        (("--ignore-rows", "5"), "START:STOP"),
        (("--ignore-rows", ":"), "START:STOP"),
        (("--ignore-rows", "a:b"), "START:STOP"),
        (("--ignore-rows", "1:2:3"), "START:STOP"),
        (("--ids", "color"), "'color'"),
        (("--cache", "maybe"), "'maybe'"),
        (("--workers", "0"), "--workers"),
        (("--workers", "two"), "--workers"),
        (("--batch-size", "0"), "--batch-size"),
        (("--shard-size", "-1"), "--shard-size"),
        (("--allow-rejects", "-1"), "--allow-rejects"),
        (("--imags", "x"), "--images"),
        (("stray",), "stray"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_a_bad_option_is_exit_2_with_a_sentence_and_no_out(
    run: Run, out: Path, options: tuple[str, ...], said: str
) -> None:
    ran = run(*options)
    assert ran.code == 2, ran.err
    assert said in ran.err
    assert not out.exists()


# --- damaged records -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"null", b'{"schema": 2}', b'{"schema": 1}', b"\xff\xfe", b'"text"',
     b'{"schema": 1, "identity": 5, "run_id": "x", "shard_size": "a", "image_count": 0}'],
    ids=repr,
)  # fmt: skip
def test_a_damaged_run_json_is_exit_4_for_every_command(
    run: Run, out: Path, images: Path, damage: bytes
) -> None:
    assert run().code == 0
    (out / "run.json").write_bytes(damage)
    for ran in (run(), cada("select", out)):
        assert ran.code == 4, ran.err
        assert ran.said("run.json") or ran.said(str(out))


def test_select_of_what_is_no_run_is_exit_2(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere", Path("/dev/null")):
        ran = cada("select", place)
        assert ran.code == 2, ran.err
        assert ran.said("no run.json")


MANIFEST_DAMAGE: dict[str, Callable[[dict], object]] = {
    "empty": lambda _: b"",
    "cut": lambda d: json.dumps(d).encode()[:-50],
    "list": lambda d: [d],
    "no statistics": lambda d: {k: v for k, v in d.items() if k != "statistics"},
    "no images": lambda d: {k: v for k, v in d.items() if k != "images"},
    "fewer images": lambda d: {**d, "images": d["images"][:-1]},
    "other images": lambda d: {**d, "images": d["images"][::-1]},
    "another run": lambda d: {**d, "run_id": "0" * 64},
    "another shard": lambda d: {**d, "shard": 7},
    "pixels not numbers": lambda d: {**d, "statistics": {**d["statistics"], "pixels": ["x"] * 6}},
    "fewer classes": lambda d: {**d, "statistics": {**d["statistics"], "pixels": ["1"]}},
    "image without size": lambda d: {
        **d, "images": [{k: v for k, v in i.items() if k != "image_size"} for i in d["images"]]
    },
    "bad base64": lambda d: {
        **d, "images": [{**i, "path_b64": "!"} for i in d["images"]]
    },
    "score file gone": lambda d: {**d, "scores": {"file": "999999.safetensors", "bytes": 5}},
    "flipped count": lambda d: {
        **d, "statistics": {**d["statistics"], "pixels": ["7", *d["statistics"]["pixels"][1:]]}
    },
    "flipped sum": lambda d: {
        **d, "statistics": {**d["statistics"], "sums": [["7"] * 6] * 6}
    },
}  # fmt: skip


@pytest.mark.parametrize("damage", MANIFEST_DAMAGE)
def test_a_damaged_scored_manifest_is_done_again(run: Run, out: Path, damage: str) -> None:
    assert run().code == 0
    expected = deliverables(out)
    path = out / "shards" / "000000.scored.json"
    value = MANIFEST_DAMAGE[damage](read(path))
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    ran = run()
    assert ran.code == 0, ran.err
    assert deliverables(out) == expected


@pytest.mark.parametrize("damage", ["empty", "cut", "list", "no images", "another run"])
def test_a_damaged_selected_manifest_is_done_again(run: Run, out: Path, damage: str) -> None:
    assert run().code == 0
    expected = deliverables(out)
    path = out / "shards" / "000001.selected.json"
    value = MANIFEST_DAMAGE[damage](read(path))
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    assert run().code == 0
    assert deliverables(out) == expected


@pytest.mark.parametrize("damage", ["cut", "deleted", "empty", "longer"])
def test_a_score_file_of_another_length_is_scored_again(run: Run, out: Path, damage: str) -> None:
    assert run().code == 0
    expected = deliverables(out)
    path = out / "scores" / "000000.safetensors"
    data = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes({"cut": data[:-3], "empty": b"", "longer": data + b"\0"}[damage])
    ran = cada("select", out, "--delta", "0.1")
    assert ran.code == 4 and ran.said("no whole scores for shard 000000", "again to complete")
    assert run().code == 0
    assert path.read_bytes() == data
    assert deliverables(out) == expected


@pytest.mark.parametrize("where", [0, 9, 60, -1, -100])
def test_a_flipped_byte_in_a_score_file_is_told_and_the_remedy_works(
    run: Run, out: Path, where: int
) -> None:
    assert run().code == 0
    path = out / "scores" / "000000.safetensors"
    data = bytearray(path.read_bytes())
    data[where] ^= 0x10
    path.write_bytes(bytes(data))
    ran = cada("select", out, "--delta", "0.1")
    assert ran.code == 4, ran.err
    assert ran.said("000000.safetensors", "delete this file")
    path.unlink()
    assert run("--delta", "0.1").code == 0


def test_a_deleted_or_cut_label_is_written_again(run: Run, out: Path) -> None:
    assert run().code == 0
    expected = deliverables(out)
    (out / "labels" / "frame_000.png").unlink()
    (out / "labels" / "frame_002.png").write_bytes(b"\x89PNG")
    assert run().code == 0
    assert deliverables(out) == expected


def test_a_changed_copy_of_the_mask_is_noticed(run: Run, out: Path, tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_bytes(png(np.eye(24, 32, dtype=np.uint8)))
    assert run("--ignore-mask", tmp_path / "mask.png").code == 0
    for data in (png(np.ones((24, 32), np.uint8)), b"", None):
        if data is None:
            (out / "ignored.png").unlink()
        else:
            (out / "ignored.png").write_bytes(data)
        ran = cada("select", out)
        assert ran.code == 4, ran.err
        assert ran.said("ignored.png") or ran.said("label map")


def test_select_of_an_unfinished_run_is_exit_4(run: Run, out: Path) -> None:
    assert run().code == 0
    (out / "shards" / "000001.scored.json").unlink()
    before = (out / "thresholds.json").read_bytes()
    ran = cada("select", out)
    assert ran.code == 4
    assert ran.said("shard 000001 (1 of 2)", "same pseudo-label command again")
    assert (out / "thresholds.json").read_bytes() == before


def test_select_with_statistics_of_another_weighting_is_exit_4(run: Run, out: Path) -> None:
    assert run().code == 0
    for centroid in ("mean", "literal"):
        ran = cada("select", out, "--centroid", centroid)
        assert ran.code == 4
        assert ran.said("confidence-weighted", f"pseudo-label --centroid {centroid}")
    assert cada("select", out, "--policy", "fixed").code == 0


def test_select_after_the_model_changed_needs_it_only_without_a_cache(
    run: Run, colour_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "m.onnx"
    shutil.copy(colour_model, model)
    assert run("--model", model, "--out", tmp_path / "on").code == 0
    assert run("--model", model, "--out", tmp_path / "off", "--cache", "off").code == 0
    save_colour_model(model, spread_colours(6, seed=4))
    assert cada("select", tmp_path / "on", "--delta", "0.1").code == 0
    ran = cada("select", tmp_path / "off", "--delta", "0.1")
    assert ran.code == 4 and ran.said("m.onnx is not the model this run was made with")
    model.unlink()
    assert cada("select", tmp_path / "off", "--delta", "0.1").code == 2


def test_select_into_the_input_folder_is_exit_2(run: Run, out: Path, images: Path) -> None:
    assert run().code == 0
    ran = cada("select", out, "--out", images / "again")
    assert ran.code == 2
    assert not (images / "again").exists()


# --- the disk plan -------------------------------------------------------------------------------


def short_of_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = type(shutil.disk_usage("/"))(10**9, 10**9 - free, free)
    monkeypatch.setattr("cada_deploy.disk_plan.shutil.disk_usage", lambda _: usage)


def test_the_plan_says_what_the_cache_needs(run: Run, out: Path) -> None:
    ran = run()
    assert ran.said("the score cache needs about", "free")
    assert len(list((out / "scores").iterdir())) == 2
    stored = sum(p.stat().st_size for p in (out / "scores").iterdir())
    assert stored < 10_000
    assert run("--quiet", "--out", out.parent / "quiet").err == ""


def test_auto_turns_the_cache_off_when_the_disk_is_short_and_says_so(
    run: Run, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_disk(monkeypatch, 20)
    ran = run()
    assert ran.code == 0, ran.err
    assert ran.said("20 B free", "too little", "the cache is off", "runs twice")
    assert list((out / "scores").iterdir()) == []


def test_on_refuses_a_short_disk_and_off_does_not_ask(
    run: Run, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_disk(monkeypatch, 20)
    ran = run("--cache", "on")
    assert ran.code == 1
    assert ran.said("20 B free", "Free some space", "--cache off")
    assert not (out / "run.json").exists()
    ran = run("--cache", "off")
    assert ran.code == 0 and "score cache needs" not in ran.err


# --- what is written -----------------------------------------------------------------------------


def test_ids_of_the_data_set_are_written_on_request(run: Run, images: Path, tmp_path: Path) -> None:
    """--ids label: label ids and 0; the same pixels, through the class set's table."""
    model = save_colour_model(tmp_path / "m.onnx", spread_colours(19))
    assert run("--model", model, "--out", tmp_path / "train").code == 0
    assert run("--model", model, "--out", tmp_path / "label", "--ids", "label").code == 0
    from cada_deploy.classes import CITYSCAPES_19

    for k in range(3):
        train = label_of(tmp_path / "train", f"frame_00{k}")
        assert (train != 255).any()
        assert (
            label_of(tmp_path / "label", f"frame_00{k}") == CITYSCAPES_19.label_id_table[train]
        ).all()
    both = [(tmp_path / name / "thresholds.json").read_bytes() for name in ("train", "label")]
    assert both[0] == both[1]


def test_maps_on_request_agree_with_the_rule(run: Run, out: Path) -> None:
    assert run("--entropy", "--confidence", "--overlay").code == 0
    for folder in ("labels", "overlay", "confidence", "entropy"):
        assert len(list((out / folder).iterdir())) == 3
    data = (out / "confidence" / "frame_000.png").read_bytes()
    confidence = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert confidence.dtype == np.uint16 and confidence.shape == (24, 32)
    assert confidence.min() >= 65535 // 6


def test_the_evidence_is_only_there_when_the_run_is_whole(
    run: Run, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run().code == 0
    path = out / "labels" / "frame_002.png"
    path.unlink()
    path.mkdir()  # nothing can be written there
    ran = run("--delta", "0.3")
    assert ran.code == 1 and ran.said("frame_002.png")
    assert not (out / "thresholds.json").exists()
    assert read(out / "run.json")["status"] == "running"
    path.rmdir()
    assert run("--delta", "0.3").code == 0
    assert all((out / name).exists() for name in EVIDENCE)


def test_a_run_needs_neither_a_terminal_nor_a_home(run: Run, images: Path, tmp_path: Path) -> None:
    model = save_colour_model(tmp_path / "m.onnx", spread_colours(6))
    environment = child_environment()
    for name in ("HOME", "TERM", "LANG", "LC_ALL", "USER"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "cada_deploy", "pseudo-label", "--model", model, "--preset",
         "imagenet-rgb", "--images", images, "--out", tmp_path / "bare"],
        env=environment | {"LC_ALL": "C"}, stdin=subprocess.DEVNULL, capture_output=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert METADATA_KEY.encode() not in done.stderr
