"""Model files that are well: what is read from them. The hostile ones are in hostile/."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from foreign_models import save_colour_model, spread_colours, street_like

from cada_deploy import presets
from cada_deploy.classes import BUILT_IN, CITYSCAPES_19
from cada_deploy.engines import open_engine
from cada_deploy.errors import ArtefactMismatch
from cada_deploy.fused import best_kernel
from cada_deploy.labelling import ModelChoice
from cada_deploy.model_files import load_model, metadata
from cada_deploy.model_spec import METADATA_KEY, InferenceSpec, ModelSpec
from cada_deploy.pipeline import Pipeline
from cada_deploy.stages import StageClock


def saved(path: Path, classes: int, **options: object) -> Path:
    return save_colour_model(path, spread_colours(classes), **options)  # type: ignore[arg-type]


def test_a_preset_takes_names_type_and_size_from_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", 6, size=(40, 56), batch=2, dtype="float16")
    model = load_model(path, preset="caffe-bgr")
    assert model.spec.input.name == "image" and model.spec.output.name == "logits"
    assert model.spec.input.size == (40, 56) and model.spec.input.dtype == "float16"
    assert model.batch == 2 and model.declared_classes == 6
    assert model.spec.preset == "caffe-bgr"
    assert model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.content == path.read_bytes()


@pytest.mark.parametrize(
    ("classes", "name"), [(19, "cityscapes-19"), (6, "unnamed-6"), (1, "unnamed-1")]
)
def test_19_classes_are_cityscapes_and_others_get_plain_names(
    classes: int, name: str, tmp_path: Path
) -> None:
    model = load_model(saved(tmp_path / "m.onnx", classes), preset="imagenet-rgb")
    assert model.spec.classes.name == name and len(model.spec.classes) == classes


def test_a_named_class_set_must_fit(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", 11)
    model = load_model(path, preset="imagenet-rgb", classes=BUILT_IN["camvid-11"])
    assert model.spec.classes.name == "camvid-11"
    with pytest.raises(ArtefactMismatch, match=r"11 classes.*19"):
        load_model(path, preset="imagenet-rgb", classes=CITYSCAPES_19)


def test_the_spec_travels_inside_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", 19)
    spec = load_model(path, preset="bdl").spec
    proto = onnx.load(path)
    for key, value in metadata(spec).items():
        proto.metadata_props.add(key=key, value=value)
    onnx.save(proto, path)
    assert load_model(path).spec == spec
    assert ModelSpec.loads(metadata(spec)[METADATA_KEY]) == spec
    # --preset and --spec speak louder than the file.
    assert load_model(path, preset="imagenet-rgb").spec.preset == "imagenet-rgb"


def test_an_initializer_listed_as_input_is_no_input(tmp_path: Path) -> None:
    """Old exporters (IR version 3) list every weight among the inputs."""
    path = saved(tmp_path / "m.onnx", 4)
    proto = onnx.load(path)
    for weight in proto.graph.initializer:
        proto.graph.input.append(
            onnx.helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
        )
    onnx.save(proto, path)
    assert load_model(path, preset="imagenet-rgb").input.name == "image"


def test_a_preset_takes_any_number_of_classes_also_when_only_a_run_shows_it(
    tmp_path: Path,
) -> None:
    path = save_colour_model(tmp_path / "m.onnx", spread_colours(5))
    proto = onnx.load(path)
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "C"
    onnx.save(proto, path)
    model, engine = ModelChoice(path, preset="imagenet-rgb").load()
    assert engine.classes == 5
    assert model.spec.classes.names == tuple(f"class-{k}" for k in range(5))
    with pytest.raises(ArtefactMismatch, match="gives 5 classes"):
        ModelChoice(path, preset="imagenet-rgb", classes=CITYSCAPES_19).load()


@pytest.mark.parametrize(
    "inference", [{"mode": "slide", "window": (24, 24), "stride": (8, 8)}, {"scales": (0.5, 1.0)}]
)
def test_a_fixed_size_network_refuses_other_sizes_at_once(
    tmp_path: Path, inference: dict[str, object]
) -> None:
    path = save_colour_model(tmp_path / "m.onnx", spread_colours(19), size=(32, 32))
    image, scores = presets.preset("imagenet-rgb")
    spec = ModelSpec(CITYSCAPES_19, image, scores, InferenceSpec(**inference))
    with pytest.raises(ArtefactMismatch, match="32x32"):
        load_model(path, spec=spec)


def test_a_fixed_size_network_slides_over_larger_frames(tmp_path: Path) -> None:
    colours = spread_colours(19)
    fixed = save_colour_model(tmp_path / "fixed.onnx", colours, stride=1, size=(32, 32))
    free = save_colour_model(tmp_path / "free.onnx", colours, stride=1)
    image, scores = presets.preset("imagenet-rgb")
    slide = InferenceSpec("slide", (32, 32), (16, 16))
    frame = street_like(48, 80, seed=1)
    got = []
    for path, inference in ((fixed, slide), (free, InferenceSpec())):
        model = load_model(path, spec=ModelSpec(CITYSCAPES_19, image, scores, inference))
        engine = open_engine("ort", model, "cpu")
        pipeline = Pipeline(engine, best_kernel(), model.spec)
        got.append(pipeline.scores(frame, StageClock()).array)
    assert got[0].shape == got[1].shape == (19, 48, 80)
    # The mean over overlapping windows may differ in the last bit of float32, before rounding.
    assert np.abs(got[0].astype(np.float64) - got[1]).max() <= 0.07
