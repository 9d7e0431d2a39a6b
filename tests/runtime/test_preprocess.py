"""The network's input has the bytes that Python's preprocess makes, resizing included."""

from __future__ import annotations

import ctypes
import json
from dataclasses import replace

import numpy as np
import PIL
import pytest

from cada_deploy.classes import CITYSCAPES_19
from cada_deploy.errors import ArtefactMismatch, UsageError
from cada_deploy.model_spec import InputSpec, ModelSpec, OutputSpec
from cada_deploy.preprocess import to_batch_row
from cada_deploy.presets import PRESETS, preset

from .cada_seg import MISMATCH, USAGE, Library, Refused, frame_of

PILLOW = int(PIL.__version__.partition(".")[0])


def spec_with(image: InputSpec) -> ModelSpec:
    return ModelSpec(CITYSCAPES_19, image, OutputSpec(align_corners=False))


def assert_same_row(
    library: Library, image: np.ndarray, spec: InputSpec, size: tuple[int, int] | None = None
) -> None:
    expected = to_batch_row(np.ascontiguousarray(image), spec, size)
    found = library.preprocess(spec_with(spec), image, size)
    assert found.tobytes() == expected.tobytes(), (image.shape, size, spec)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_preset_layout_and_type(library: Library, name: str, layout: str, dtype: str) -> None:
    image = np.random.default_rng(1).integers(0, 256, (31, 45, 3), np.uint8)
    spec = replace(preset(name)[0], layout=layout, dtype=dtype)
    assert_same_row(library, image, spec)
    assert_same_row(library, image[3:, 5:], spec)
    assert_same_row(library, image, spec, (40, 23))


@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
def test_resizing_has_the_same_bytes_for_many_sizes(library: Library, how: str) -> None:
    spec = InputSpec(colour="RGB", scale=1.0, mean=(0, 0, 0), std=(1, 1, 1), resize=how)
    dice = np.random.default_rng(2)
    sizes = [dice.integers(1, 90, 4).tolist() for _ in range(150)]
    sizes += [[2 * h, 2 * w, h, w] for h, w, _, _ in sizes[:20]]  # OpenCV's case of its own
    sizes += [[h, w, h, v] for h, w, v, _ in sizes[:20]] + [
        [h, w, v, w] for h, w, v, _ in sizes[:20]
    ]
    sizes += [[1, 1, 7, 9], [300, 5, 3, 800], [720, 960, 512, 1024], [512, 1024, 1024, 2048]]
    for height, width, high, wide in sizes:
        columns_first = height - high > max(0, 2 * (width - wide))
        if how == "bicubic" and columns_first and PILLOW < 13:
            continue  # see resize_bicubic.cpp: another order of the passes, another last bit
        image = dice.integers(0, 256, (height, width, 3), np.uint8)
        if height % 3 == 0:  # hard edges overshoot in a bicubic kernel
            image = (image > 127).astype(np.uint8) * np.uint8(255)
        assert_same_row(library, image, spec, (high, wide))


def test_halves_round_as_numpy_does(library: Library) -> None:
    image = np.arange(256 * 3, dtype=np.uint32).astype(np.uint8).reshape(1, 256, 3)
    dice = np.random.default_rng(3)
    for _ in range(60):
        scale, *rest = (2.0 ** dice.uniform(-24, 4, 7)).tolist()
        spec = InputSpec(
            colour="BGR", scale=scale, mean=tuple(rest[:3]), std=tuple(rest[3:]),
            resize="bilinear", dtype="float16",
        )  # fmt: skip
        try:
            assert_same_row(library, image, spec)
        except UsageError:  # Python: out of the range of float16
            with pytest.raises(Refused, match="range of float16") as refused:
                library.preprocess(spec_with(spec), image)
            assert refused.value.code == USAGE


# --- specs that make no sense ------------------------------------------------------------------

GOOD = spec_with(preset("imagenet-rgb")[0]).to_json()


def _changed(part: str, **fields: object) -> dict[str, object]:
    return {**GOOD, part: {**GOOD[part], **fields}}


WRONG = {
    "colour": (_changed("input", colour="GBR"), USAGE, "known: RGB, BGR"),
    "layout": (_changed("input", layout="CHWN"), USAGE, "input.layout"),
    "resize": (_changed("input", resize="area"), USAGE, "known: bilinear, bicubic"),
    "std of zero": (_changed("input", std=[1, 0, 1]), USAGE, "must be positive"),
    "two means": (_changed("input", mean=[1, 2]), USAGE, "three numbers"),
    "scale is text": (_changed("input", scale="1"), USAGE, "input.scale is not a number"),
    "size": (_changed("input", size=[0, 7]), USAGE, "1 to 65535"),
    "unknown key": (_changed("input", color="RGB"), USAGE, "unknown key 'color'"),
    "order": (_changed("output", order="softmax"), USAGE, "known: logits, probs"),
    "meaning and order": (_changed("output", meaning="probabilities"), USAGE, "is 'probs'"),
    "align_corners": (_changed("output", align_corners=1), USAGE, "true or false"),
    "stride": (_changed("output", stride=0), USAGE, "1 to 256"),
    "no classes": (_changed("classes", names=[], label_ids=[], palette=[]), USAGE, "1 to 255"),
    "no names": ({k: v for k, v in GOOD.items() if k != "classes"}, USAGE, "lacks 'classes'"),
    "schema": ({**GOOD, "schema": 2}, MISMATCH, "reads schema 1"),
    "windows": (
        _changed("inference", mode="slide", window=[64, 64], stride=[32, 32]), MISMATCH, "sliding",
    ),
    "scales": (_changed("inference", scales=[0.5, 1.0]), MISMATCH, "several scales"),
    "mirror": (_changed("inference", flip=True), MISMATCH, "mirror"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_spec_is_refused_with_the_reason(library: Library, what: str) -> None:
    data, code, why = WRONG[what]
    with pytest.raises(Refused) as refused:
        library.preprocess(json.dumps(data), np.zeros((4, 4, 3), np.uint8))
    assert refused.value.code == code and why in refused.value.why
    if what not in ("windows", "scales", "mirror"):  # those Python can do
        with pytest.raises((UsageError, ArtefactMismatch)):
            ModelSpec.from_json(data)


GOOD_TEXT = spec_with(preset("imagenet-rgb")[0]).dumps()
TEXTS = [
    "", "{", "[]x", '{"schema": 1', '{"schema": 01}', '{"schema": 1.}', '{"schema": NaN}',
    '{"a": "\\x"}', '{"a": "\\ud800"}', '{"a": "\n"}', '{"a": 1, "a": 1}', "[" * 100_000,
    '{"schema": 1e999}', GOOD_TEXT + ",", "nul", '{"a" 1}', "{'a': 1}",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_text_that_is_no_json_is_refused(library: Library, text: str) -> None:
    with pytest.raises(Refused, match=r"is not (JSON|a table)") as refused:
        _raw(library, text)
    assert refused.value.code in (USAGE, MISMATCH)


def test_json_with_every_escape_is_read(library: Library) -> None:
    spelled = GOOD_TEXT.replace("RGB", "\\u0052G\\u0042").replace(
        '"road"', '"\\ud83d\\ude97 \\n\\/"'
    )
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    expected = to_batch_row(image, preset("imagenet-rgb")[0])
    assert library.preprocess(spelled, image).tobytes() == expected.tobytes()


def _raw(library: Library, text: str) -> None:
    image, row = np.zeros((1, 1, 3), np.uint8), np.zeros(3, np.float32)
    frame = frame_of(image)
    library.check(
        library.calls.cada_seg_preprocess(
            text.encode(), ctypes.byref(frame), 0, 0, ctypes.c_void_p(row.ctypes.data),
            ctypes.c_size_t(row.nbytes),
        )
    )  # fmt: skip
