"""The batch row equals the plain formula bit for bit; presets and TOML specs say what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cada_deploy import preprocess
from cada_deploy.classes import BUILT_IN, CITYSCAPES_19
from cada_deploy.errors import UsageError
from cada_deploy.model_spec import InputSpec, ModelSpec
from cada_deploy.preprocess import input_size, resize, to_batch_row
from cada_deploy.presets import PRESETS, load_spec, preset, spec_from_toml, spec_template

IMAGE = np.random.default_rng(7).integers(0, 256, (37, 53, 3), dtype=np.uint8)
PLAIN = InputSpec(colour="RGB", scale=1.0, mean=(0, 0, 0), std=(1, 1, 1), resize="bilinear")


def formula(pixels: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Resized (H, W, 3) uint8 RGB -> the row, written out."""
    x = pixels.astype(np.float32)
    if spec.colour == "BGR":
        x = x[..., ::-1]
    x = np.float32(spec.scale) * x
    x = x - np.array(spec.mean, np.float32)
    x = x / np.array(spec.std, np.float32)
    if spec.layout == "NCHW":
        x = x.transpose(2, 0, 1)
    return x[None].astype(spec.dtype)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("size", [None, (37, 53), (19, 64)])
def test_equals_the_formula_bit_for_bit(
    name: str, layout: str, dtype: str, size: tuple[int, int] | None
) -> None:
    spec = replace(preset(name)[0], layout=layout, dtype=dtype)
    row = to_batch_row(IMAGE, spec, size)
    pixels = IMAGE if size is None else resize(IMAGE, size, spec.resize)
    assert same_bits(row, formula(pixels, spec))
    assert row.flags.c_contiguous and row.flags.writeable
    assert same_bits(row, to_batch_row(IMAGE, spec, size))


NUMBERS = st.floats(-300, 300, width=32)
POSITIVE = st.floats(2.0**-10, 300, width=32)


@settings(max_examples=150, deadline=None)
@given(
    scale=POSITIVE,
    mean=st.tuples(NUMBERS, NUMBERS, NUMBERS),
    std=st.tuples(POSITIVE, POSITIVE, POSITIVE),
    colour=st.sampled_from(["RGB", "BGR"]),
    layout=st.sampled_from(["NCHW", "NHWC"]),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_any_statistics_equal_the_formula(
    scale: float,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    colour: str,
    layout: str,
    shape: tuple[int, int],
) -> None:
    spec = InputSpec(colour, scale, mean, std, "bilinear", layout=layout)
    image = np.resize(np.arange(256, dtype=np.uint8), (*shape, 3))
    assert same_bits(to_batch_row(image, spec), formula(image, spec))


def test_writes_into_a_row_of_a_batch() -> None:
    for layout, shape in (("NCHW", (4, 3, 37, 53)), ("NHWC", (4, 37, 53, 3))):
        spec = replace(preset("caffe-bgr")[0], layout=layout)
        batch = np.full(shape, np.nan, np.float32)
        for k in range(4):
            image = np.roll(IMAGE, k, axis=0)
            row = to_batch_row(image, spec, out=batch[k : k + 1])
            assert np.shares_memory(row, batch) and same_bits(
                batch[k : k + 1], formula(image, spec)
            )
    with pytest.raises(ValueError, match="expected contiguous"):
        to_batch_row(IMAGE, PLAIN, out=np.empty((1, 3, 53, 37), np.float32))
    with pytest.raises(ValueError, match="expected contiguous"):
        to_batch_row(IMAGE, PLAIN, out=np.empty((1, 3, 37, 53), np.float16))


def test_views_are_taken_as_they_are() -> None:
    spec = preset("imagenet-rgb")[0]
    for view in (IMAGE[::-1, ::-1], IMAGE[3:30, 5:40], IMAGE[..., ::-1], IMAGE.transpose(1, 0, 2)):
        assert same_bits(to_batch_row(view, spec), formula(view, spec))
        smaller = to_batch_row(view, spec, (11, 13))
        assert same_bits(smaller, to_batch_row(np.ascontiguousarray(view), spec, (11, 13)))


def test_resize_filters_are_the_named_ones() -> None:
    for size in ((20, 31), (80, 100), (1, 1), (37, 53)):
        width_height = size[::-1]
        bilinear = cv2.resize(IMAGE, width_height, interpolation=cv2.INTER_LINEAR)
        assert np.array_equal(resize(IMAGE, size, "bilinear"), bilinear)
        bicubic = Image.fromarray(IMAGE).resize(width_height, Image.Resampling.BICUBIC)
        assert np.array_equal(resize(IMAGE, size, "bicubic"), np.array(bicubic))
    stripes = np.zeros((8, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.ptp(resize(stripes, (8, 16), "bicubic")[:, 2:-2]) <= 2  # antialiased: even grey


@pytest.mark.parametrize(
    "image", [IMAGE[..., 0], IMAGE.astype(np.float32), IMAGE[..., :2], IMAGE[:0]]
)
def test_other_arrays_are_our_own_bug(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected \(H, W, 3\) uint8"):
        to_batch_row(image, PLAIN)


def test_statistics_outside_float16_are_refused() -> None:
    spec = replace(PLAIN, scale=1000.0, dtype="float16")
    with pytest.raises(UsageError, match="range of float16"):
        to_batch_row(IMAGE, spec)
    assert np.isfinite(to_batch_row(IMAGE, replace(spec, dtype="float32"))).all()


def test_input_size() -> None:
    fixed = replace(PLAIN, size=(512, 1024))
    assert input_size(PLAIN, (37, 53), None) == (37, 53)
    assert input_size(PLAIN, (37, 53), (10, 20)) == (10, 20)
    assert input_size(fixed, (37, 53), None) == (512, 1024)
    assert input_size(fixed, (37, 53), (512, 1024)) == (512, 1024)
    with pytest.raises(UsageError, match=r"512x1024 \(HxW\).*--size is 10x20"):
        input_size(fixed, (37, 53), (10, 20))


# --- presets ---------------------------------------------------------------------------------


def test_the_preset_table_of_the_design() -> None:
    table = {
        name: (i.colour, i.resize, o.align_corners, o.order) for name, (i, o) in PRESETS.items()
    }
    assert table == {
        "imagenet-rgb": ("RGB", "bilinear", False, "logits"),
        "caffe-bgr": ("BGR", "bicubic", True, "logits"),
        "bdl": ("BGR", "bicubic", True, "probs"),
        "crst": ("RGB", "bilinear", True, "logits"),
    }
    with pytest.raises(UsageError, match="did you mean 'caffe-bgr'"):
        preset("caffe-rgb")


def test_crst_is_what_its_code_does_step_by_step() -> None:
    """yzou2/CRST: BGR from OpenCV, /255, minus and divided by BGR-ordered numbers, then turned."""
    bgr = IMAGE[..., ::-1].astype(np.float32) / np.float32(255)
    bgr = (bgr - np.array([0.406, 0.456, 0.485], np.float32)) / np.array(
        [0.225, 0.224, 0.229], np.float32
    )
    theirs = bgr[..., ::-1].transpose(2, 0, 1)[None]
    ours = to_batch_row(IMAGE, preset("crst")[0])
    assert np.abs(ours - theirs).max() <= 1e-6  # v * (1/255) and v / 255 differ in the last bit


def test_caffe_subtracts_the_blue_mean_from_blue() -> None:
    row = to_batch_row(IMAGE, preset("caffe-bgr")[0])
    assert np.abs(row[0, 0] - (IMAGE[..., 2] - 104.00698793)).max() <= 2e-5
    assert np.abs(row[0, 2] - (IMAGE[..., 0] - 122.67891434)).max() <= 2e-5


# --- specs from TOML -------------------------------------------------------------------------


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "model.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_template_is_a_valid_spec(tmp_path: Path) -> None:
    spec = load_spec(toml(tmp_path, spec_template()))
    expected_input, expected_output = preset("imagenet-rgb")
    assert spec.input == expected_input and spec.output == expected_output
    assert spec.classes == CITYSCAPES_19 and spec.inference.plain
    assert ModelSpec.loads(spec.dumps()) == spec


def test_every_commented_line_of_the_template_is_valid_too(tmp_path: Path) -> None:
    text = spec_template().replace('set = "cityscapes-19"', "").replace("# ", "", 1)
    lines = [
        line[2:] if line.startswith("# ") and ("=" in line or "[" in line) else line
        for line in text.splitlines()
    ]
    spec = load_spec(toml(tmp_path, "\n".join(lines[1:])))
    assert spec.preset == "imagenet-rgb" and spec.input.size == (1024, 2048)
    assert spec.classes.names == ("road", "car") and spec.inference.mode == "slide"
    assert spec.output.stride == 8


def test_a_preset_is_a_base_that_tables_override(tmp_path: Path) -> None:
    text = 'preset = "bdl"\n[classes]\nset = "camvid-11"\n[input]\nsize = [360, 480]\n'
    spec = load_spec(toml(tmp_path, text + "[output]\nstride = 8\n"))
    assert spec.input == replace(preset("bdl")[0], size=(360, 480))
    assert spec.output == replace(preset("bdl")[1], stride=8)
    assert spec.preset == "bdl" and spec.classes == BUILT_IN["camvid-11"]


def test_classes_option_wins_and_something_must_name_them(tmp_path: Path) -> None:
    path = toml(tmp_path, 'preset = "crst"\n')
    assert load_spec(path, CITYSCAPES_19).classes == CITYSCAPES_19
    assert "classes" not in spec_from_toml(path)
    with pytest.raises(UsageError, match=r"names no classes.*--classes"):
        load_spec(path)


GOOD = 'preset = "crst"\n[classes]\nset = "cityscapes-19"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = [", "is not TOML"),
        ("presett = 'crst'", "unknown key 'presett'.*did you mean 'preset'"),
        ("preset = 'crsst'", "did you mean 'crst'"),
        ("preset = 3", "preset is 3"),
        ("input = 3", r"expected a table: \[input\]"),
        (GOOD + "[input]\ncolor = 'RGB'", "unknown key 'color'.*did you mean 'colour'"),
        (GOOD + "[input]\ncolour = 'RBG'", "input.colour is 'RBG'"),
        (GOOD + "[input]\nscale = true", "input.scale is True"),
        (GOOD + "[input]\nscale = '1'", "input.scale is '1'"),
        (GOOD + "[input]\nmean = [1, 2]", "input.mean is .*expected 3 x"),
        (GOOD + "[input]\nmean = 5", "input.mean is 5"),
        (GOOD + "[input]\nstd = [1, 0, 1]", "must be positive"),
        (GOOD + "[input]\nmean = [1, nan, 1]", "finite"),
        (GOOD + "[input]\nsize = [1, 2.5]", "input.size"),
        (GOOD + "[input]\nsize = [0, 5]", "input.size"),
        (GOOD + "[output]\nalign_corners = 1", "output.align_corners is 1"),
        (GOOD + "[output]\nstride = [8, 8]", "output.stride"),
        (GOOD + "[output]\nmeaning = 'probabilities'", "output.order is 'probs'"),
        (GOOD + "[inference]\nmode = 'slid'", "inference.mode"),
        (GOOD + "[inference]\nscales = 1.0", "inference.scales is 1.0; expected a list of"),
        ("[classes]\nset = 'cityscapes-19'\n[output]\nalign_corners = false", "input"),
        ("[classes]\nset = 'cityscapes19'", "did you mean 'cityscapes-19'"),
        ("[classes]\nset = 'camvid-11'\nnames = ['a']", "leave out the other keys"),
        ("[classes]\nnames = 'a'\nlabel_ids = [1]\npalette = [[1, 2, 3]]", "classes.names is 'a'"),
        ("[classes]\nname = ['a']\nlabel_id = [1]", "unknown key 'label_id'"),
        (GOOD.replace("\nset", "\nsett"), "unknown key 'sett'"),
    ],
)
def test_wrong_specs_are_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){words}") as caught:
        load_spec(toml(tmp_path, text))
    assert "model.toml" in str(caught.value)


def test_no_such_spec(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the spec"):
        load_spec(tmp_path / "none.toml")
    (tmp_path / "bin.toml").write_bytes(b"\xff\xfe\0")
    with pytest.raises(UsageError, match="is not TOML"):
        load_spec(tmp_path / "bin.toml")


def test_the_resizing_library_is_part_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow 13 orders its passes by size, which decides the last bit: such runs do not mix."""
    assert preprocess.resize_identity("bilinear") == "opencv"
    found = set()
    for version in ("12.3.0", "13.0.0", "14.1"):
        monkeypatch.setattr(preprocess.metadata, "version", lambda _, v=version: v)
        found.add((version, preprocess.resize_identity("bicubic")))
    assert found == {("12.3.0", "pillow-12"), ("13.0.0", "pillow-13"), ("14.1", "pillow-13")}
