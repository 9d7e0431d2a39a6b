"""cada_seg's labels are those of `cada-deploy predict`, byte for byte, for many kinds of model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from command_line import cada
from foreign_models import fitted_colours, save_colour_model, street_like
from onnx import helper

from cada_deploy.classes import anonymous
from cada_deploy.demo import DEMO_MODEL
from cada_deploy.model_spec import ModelSpec
from cada_deploy.predictor import load
from cada_deploy.presets import preset

from .cada_seg import DONE, REJECTED, Library, run, with_spec

CLASSES = 7


def labels_of(out: Path, kind: str = "labels") -> dict[str, np.ndarray]:
    """Every PNG of a kind by relative path, as its decoder gives it."""
    root = out / kind
    found = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        assert pixels is not None and pixels.ndim == 2, path
        found[str(path.relative_to(root))] = pixels
    return found


def assert_same(ours: Path, theirs: Path, kind: str = "labels") -> dict[str, np.ndarray]:
    one, two = labels_of(ours, kind), labels_of(theirs, kind)
    assert one and one.keys() == two.keys()
    for name, pixels in one.items():
        assert pixels.dtype == two[name].dtype
        np.testing.assert_array_equal(pixels, two[name], err_msg=name)
    return one


def spec_of(name: str, classes: int = CLASSES, **changes: dict[str, object]) -> ModelSpec:
    image, scores = preset(name)
    return ModelSpec(
        anonymous(classes),
        replace(image, **changes.get("input", {})),
        replace(scores, **changes.get("output", {})),
    )


def colour_model(path: Path, spec: ModelSpec, **kinds: object) -> Path:
    """A model that knows the colours of street-like frames, its spec inside."""
    pictures = [street_like(48, 64, seed) for seed in range(4)]
    plain = save_colour_model(
        path.with_suffix(".plain.onnx"), fitted_colours(pictures, len(spec.classes)), **kinds
    )
    if spec.input.layout == "NHWC":
        _turned(plain)
    return with_spec(plain, spec, path)


def _turned(path: Path) -> None:
    """The same network with its image in NHWC."""
    model = onnx.load(path)
    image = model.graph.input[0]
    turn = helper.make_node("Transpose", ["nhwc"], [image.name], perm=[0, 3, 1, 2])
    kind = image.type.tensor_type.elem_type
    model.graph.node.insert(0, turn)
    del model.graph.input[:]
    model.graph.input.append(helper.make_tensor_value_info("nhwc", kind, ["N", "H", "W", 3]))
    onnx.save(model, path)


def test_the_demo_model_on_golden_frames(
    program: Path, ort: Path, golden: Path, tmp_path: Path
) -> None:
    ours = run(
        program, "--model", DEMO_MODEL, "--images", golden, "--out", tmp_path / "ours",
        "--ort-library", ort, "--entropy",
    )  # fmt: skip
    assert ours.code == DONE, ours.err
    theirs = cada(
        "predict", "--model", DEMO_MODEL, "--images", golden, "--out", tmp_path / "theirs",
        "--entropy", "--quiet",
    )  # fmt: skip
    assert theirs.code == 0, theirs.err
    found = assert_same(tmp_path / "ours", tmp_path / "theirs")
    assert len(found) == 5 and len({int(v) for f in found.values() for v in np.unique(f)}) > 3
    deep = assert_same(tmp_path / "ours", tmp_path / "theirs", "entropy")
    assert all(pixels.dtype == np.uint16 for pixels in deep.values())


KINDS = {
    "imagenet": (spec_of("imagenet-rgb"), {}),
    "caffe": (spec_of("caffe-bgr", input={"scale": 0.02, "mean": (2.0, 2.3, 2.4)}), {}),
    "bdl": (spec_of("bdl", input={"scale": 0.02, "mean": (2.0, 2.3, 2.4)}), {"stride": 4}),
    "crst": (spec_of("crst"), {"stride": 1}),
    "probabilities": (
        spec_of("imagenet-rgb", output={"meaning": "probabilities", "order": "probs"}),
        {"meaning": "probabilities"},
    ),
    "halves": (spec_of("imagenet-rgb"), {"dtype": "float16"}),
    "nhwc": (spec_of("imagenet-rgb", input={"layout": "NHWC"}), {}),
    "fixed size": (spec_of("imagenet-rgb"), {"size": (40, 72)}),
    "fixed size, bicubic": (spec_of("imagenet-rgb", input={"resize": "bicubic"}),
                            {"size": (72, 40)}),
    "fixed batch": (spec_of("imagenet-rgb"), {"batch": 3}),
    "invalid pixels": (spec_of("imagenet-rgb"), {"poison": float("nan")}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(kind: str, library: Library, ort: Path, tmp_path: Path) -> None:
    spec, options = KINDS[kind]
    path = colour_model(tmp_path / "m.onnx", spec, **options)
    theirs = load(path)
    ours = library.open(path, ort)
    for seed, size in enumerate([(48, 64), (37, 91)]):
        image = street_like(*size, seed=seed)
        expected = theirs.predict(image)
        labels, entropy, confidence, result = library.label(ours, image)
        np.testing.assert_array_equal(labels, expected.labels)
        assert entropy.tobytes() == expected.entropy.tobytes()
        assert confidence.tobytes() == expected.confidence.tobytes()
        assert result.invalid == (labels == 255).sum()
        assert len(np.unique(labels)) >= 3
        assert (kind == "invalid pixels") == (result.invalid > 0)
    assert library.calls.cada_seg_backend(ours).startswith(b"onnxruntime ")
    library.close(ours)


def test_network_and_label_size_can_be_asked_for(
    library: Library, ort: Path, tmp_path: Path
) -> None:
    path = colour_model(tmp_path / "m.onnx", spec_of("caffe-bgr", input={"scale": 0.02}))
    image = street_like(50, 70, seed=3)
    expected = load(path, size=(64, 96)).predict(image, size=(31, 45))
    ours = library.open(path, ort, input_height=64, input_width=96, threads=2)
    labels, entropy, _, _ = library.label(ours, image, (31, 45))
    np.testing.assert_array_equal(labels, expected.labels)
    assert entropy.tobytes() == expected.entropy.tobytes()
    library.close(ours)


def test_rows_may_have_gaps_and_frames_may_change_size(
    library: Library, ort: Path, tmp_path: Path
) -> None:
    path = colour_model(tmp_path / "m.onnx", spec_of("imagenet-rgb"))
    whole = street_like(60, 90, seed=5)
    theirs, ours = load(path), library.open(path, ort)
    for height, width in ((60, 90), (8, 8), (33, 40), (60, 90)):
        part = whole[:height, :width]
        labels, *_ = library.label(ours, part)
        np.testing.assert_array_equal(labels, theirs.predict(np.ascontiguousarray(part)).labels)
    library.close(ours)


@pytest.mark.parametrize("isa", ["scalar", "baseline", "avx2"])
def test_every_instruction_set_gives_the_same_files(
    isa: str, program: Path, ort: Path, golden: Path, tmp_path: Path
) -> None:
    common = ("--model", DEMO_MODEL, "--images", golden, "--ort-library", ort, "--quiet")
    forced = run(program, *common, "--out", tmp_path / "one", CADA_FORCE_ISA=isa)
    if forced.code == 3 and forced.said("instruction set"):
        pytest.skip(f"not run: this processor or build has no {isa}")
    assert (forced.code, forced.err) == (DONE, "")
    assert run(program, *common, "--out", tmp_path / "two", "--threads=2").code == DONE
    assert_same(tmp_path / "one", tmp_path / "two")


def test_the_summary_has_every_stage(
    program: Path, ort: Path, golden: Path, tmp_path: Path
) -> None:
    ran = run(
        program, "--model", DEMO_MODEL, "--images", golden / "street.1.png",
        "--out", tmp_path, CADA_ORT_LIBRARY=str(ort),
    )  # fmt: skip
    assert ran.code == DONE and ran.out == ""
    stages = ("read", "decode", "preprocess", "network", "encode", "fuse", "write", "whole")
    assert ran.said("1 of 1 images labelled, 0 rejected; onnxruntime ", "latency ms p50/p90/p99:")
    assert ran.said(*(f" {stage} " for stage in stages))
    assert list(labels_of(tmp_path)) == ["street.1.png"]


def test_an_image_without_a_finite_score_is_rejected(
    program: Path, ort: Path, tmp_path: Path
) -> None:
    spec = spec_of("imagenet-rgb")
    path = colour_model(tmp_path / "m.onnx", spec, poison=float("nan"))
    bright = np.full((16, 16, 3), 255, np.uint8)
    cv2.imwrite(str(tmp_path / "bright.png"), bright)
    cv2.imwrite(str(tmp_path / "dark.png"), bright // 8)
    (tmp_path / "list").write_text("# two\nbright.png\r\n\n../nowhere.png\ndark.png\n")
    ran = run(
        program, "--model", path, "--images", tmp_path / "list", "--out", tmp_path / "out",
        "--ort-library", ort,
    )  # fmt: skip
    assert ran.code == REJECTED
    assert ran.said("rejected bright.png: non-finite-scores", "rejected nowhere.png: missing")
    assert ran.said("1 of 3 images labelled, 2 rejected")
    assert list(labels_of(tmp_path / "out")) == ["dark.png"]
