"""Model files that lie, break off or point elsewhere: each is refused with its code and remedy."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Ran, cada, deliverables, read, rejected
from foreign_models import save_colour_model, spread_colours, write_images
from onnx import TensorProto, helper, numpy_helper

from cada_deploy import model_files, presets
from cada_deploy.errors import UsageError
from cada_deploy.model_spec import METADATA_KEY, ModelSpec

COLOURS = spread_colours(6)
PRESET = ("--preset", "imagenet-rgb")
Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three") / "frames"
    write_images(folder, 3, (24, 32))
    return folder


@pytest.fixture
def run(images: Path, tmp_path: Path) -> Run:
    """pseudo-label of three tiny images with a model; checks that a refusal leaves no OUT."""

    def run(model: Path, *options: str | Path, preset: bool = True) -> Ran:
        out = tmp_path / "out"
        ran = cada(
            "pseudo-label", "--model", model, *(PRESET if preset else ()), "--images", images,
            "--out", out, *options,
        )  # fmt: skip
        if ran.code in (2, 3):
            assert not out.exists(), "refused before anything is written"
        assert ran.code in (0, 6) or ran.err.rstrip().count("\n") < 80
        return ran

    return run


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return save_colour_model(tmp_path / "model.onnx", COLOURS)


# --- not a model --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty", b""),
        ("text", b"This is not a model.\n" * 40),
        ("html", b"<!DOCTYPE html><title>404</title>"),
        ("random", random.Random(5).randbytes(4096)),
        ("zeros", bytes(4096)),
        ("zip", b"PK\x03\x04" + bytes(100)),
    ],
)
def test_a_file_that_is_no_model_is_exit_4(
    run: Run, tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / f"{name}.onnx"
    path.write_bytes(content)
    ran = run(path)
    assert ran.code == 4
    assert ran.said("error:", "ONNX")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.8, 0.99])
def test_a_cut_model_is_exit_4(run: Run, good: Path, share: float) -> None:
    data = good.read_bytes()
    good.write_bytes(data[: int(len(data) * share)])
    assert run(good).code == 4


@pytest.mark.parametrize("seed", range(12))
def test_a_model_with_flipped_bytes_never_ends_in_a_traceback(
    run: Run, good: Path, seed: int
) -> None:
    """A flipped weight still runs (as another digest, so as another run); anything else is told."""
    dice, data = random.Random(seed), bytearray(good.read_bytes())
    for _ in range(3):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    good.write_bytes(bytes(data))
    assert run(good).code in (0, 2, 4, 6)


def test_a_missing_model_a_folder_and_a_pipe_are_exit_2(run: Run, tmp_path: Path) -> None:
    assert run(tmp_path / "none.onnx").said("none.onnx does not exist")
    assert run(tmp_path / "none.onnx").code == 2
    folder = run(tmp_path)
    assert folder.code == 2 and folder.said("is a folder")
    os.mkfifo(tmp_path / "pipe.onnx")
    pipe = run(tmp_path / "pipe.onnx")
    assert pipe.code == 2 and pipe.said("not a regular file")
    device = run(Path("/dev/zero"))
    assert device.code == 2 and device.said("not a regular file")


# --- a model of another kind --------------------------------------------------------------------


def graph(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: dict[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes, "g", inputs, outputs,
        [numpy_helper.from_array(v, k) for k, v in (constants or {}).items()],
    )  # fmt: skip
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def tensor(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def saved(path: Path, model: onnx.ModelProto) -> Path:
    onnx.save(model, path)
    return path


def convolved(classes: int, channels: int = 3) -> tuple[onnx.NodeProto, dict[str, np.ndarray]]:
    weight = np.linspace(-1, 1, classes * channels, dtype=np.float32)
    return (
        helper.make_node("Conv", ["image", "w"], ["scores"]),
        {"w": weight.reshape(classes, channels, 1, 1)},
    )


def test_a_wrong_class_count_is_exit_4(run: Run, good: Path) -> None:
    ran = run(good, "--classes", "camvid-11")
    assert ran.code == 4
    assert ran.said("6 classes", "'camvid-11' has 11", "--classes")


def test_an_unknown_class_set_is_exit_2_with_the_nearest(run: Run, good: Path) -> None:
    ran = run(good, "--classes", "cityscape-19")
    assert ran.code == 2 and ran.said("did you mean 'cityscapes-19'?")


def test_a_label_map_is_exit_4_and_says_export_without_argmax(run: Run, tmp_path: Path) -> None:
    ran = run(save_colour_model(tmp_path / "m.onnx", COLOURS, output_rank=3))
    assert ran.code == 4
    assert ran.said("int64", "without its argmax")


def test_integer_scores_are_exit_4(run: Run, tmp_path: Path) -> None:
    node, constants = convolved(4)
    cast = helper.make_node("Cast", ["scores"], ["whole"], to=TensorProto.INT32)
    model = graph(
        [node, cast], [tensor("image", "N", 3, "H", "W")],
        [tensor("whole", "N", 4, "H", "W", kind=TensorProto.INT32)], constants,
    )  # fmt: skip
    ran = run(saved(tmp_path / "m.onnx", model))
    assert ran.code == 4 and ran.said("int32", "per-class scores")


def test_an_integer_input_is_exit_4(run: Run, tmp_path: Path) -> None:
    node, constants = convolved(4)
    cast = helper.make_node("Cast", ["bytes"], ["image"], to=TensorProto.FLOAT)
    model = graph(
        [cast, node], [tensor("bytes", "N", 3, "H", "W", kind=TensorProto.UINT8)],
        [tensor("scores", "N", 4, "H", "W")], constants,
    )  # fmt: skip
    ran = run(saved(tmp_path / "m.onnx", model))
    assert ran.code == 4 and ran.said("uint8", "float32 or float16")


def two_inputs(path: Path) -> Path:
    node, constants = convolved(4)
    add = helper.make_node("Add", ["first", "second"], ["image"])
    shape = ("N", 3, "H", "W")
    return saved(
        path,
        graph(
            [add, node],
            [tensor("first", *shape), tensor("second", *shape)],
            [tensor("scores", "N", 4, "H", "W")],
            constants,
        ),
    )


def test_two_inputs_are_refused_with_the_way_to_name_one(run: Run, tmp_path: Path) -> None:
    path = two_inputs(tmp_path / "m.onnx")
    ran = run(path)
    assert ran.code == 2
    assert ran.said("2 inputs ['first', 'second']", "[input] name")
    spec = tmp_path / "spec.toml"
    spec.write_text('preset = "imagenet-rgb"\n[classes]\nset = "camvid-11"\n[input]\nname="first"')
    # The other input has nobody to feed it.
    assert run(path, "--spec", spec, preset=False).code == 4


def two_outputs(path: Path) -> Path:
    node, constants = convolved(11)
    double = helper.make_node("Add", ["scores", "scores"], ["auxiliary"])
    shape = ("N", 11, "H", "W")
    outputs = [tensor("auxiliary", *shape), tensor("scores", *shape)]
    return saved(
        path, graph([node, double], [tensor("image", "N", 3, "H", "W")], outputs, constants)
    )


def test_two_outputs_need_a_name_and_run_with_one(run: Run, tmp_path: Path) -> None:
    path = two_outputs(tmp_path / "m.onnx")
    ran = run(path)
    assert ran.code == 2
    assert ran.said("2 outputs ['auxiliary', 'scores']", "[output] name")
    spec = tmp_path / "spec.toml"
    text = 'preset = "imagenet-rgb"\n[classes]\nset = "camvid-11"\n[output]\nname = "{}"\n'
    spec.write_text(text.format("scores"))
    assert run(path, "--spec", spec, preset=False).code == 0
    spec.write_text(text.format("logits"))
    ran = run(path, "--spec", spec, preset=False)
    assert ran.code == 4 and ran.said("no output 'logits'", "auxiliary")


@pytest.mark.parametrize("channels", [1, 4])
def test_another_channel_count_is_exit_4(run: Run, tmp_path: Path, channels: int) -> None:
    node, constants = convolved(4, channels)
    model = graph(
        [node], [tensor("image", "N", channels, "H", "W")], [tensor("scores", "N", 4, "H", "W")],
        constants,
    )  # fmt: skip
    ran = run(saved(tmp_path / "m.onnx", model))
    assert ran.code == 4 and ran.said(f"has {channels} channels", "expected 3")


@pytest.mark.parametrize("said", [11, "C"])
def test_another_class_count_at_run_time_is_exit_4(
    run: Run, tmp_path: Path, said: int | str
) -> None:
    """The file promises 11 classes, or none in particular, and gives 12 on some sizes."""
    node, constants = convolved(11)
    # Pad one more class when the image is 24 rows high: classes = 11 + (H == 24).
    constants |= {
        "two": np.array([2], np.int64), "h24": np.array([24], np.int64),
        "before": np.zeros(5, np.int64), "after": np.zeros(2, np.int64),
    }  # fmt: skip
    nodes = [
        node,
        helper.make_node("Shape", ["image"], ["shape"]),
        helper.make_node("Gather", ["shape", "two"], ["height"], axis=0),
        helper.make_node("Equal", ["height", "h24"], ["is24"]),
        helper.make_node("Cast", ["is24"], ["extra"], to=TensorProto.INT64),
        helper.make_node("Concat", ["before", "extra", "after"], ["pads"], axis=0),
        helper.make_node("Pad", ["scores", "pads"], ["padded"]),
    ]
    model = graph(
        nodes, [tensor("image", "N", 3, "H", "W")], [tensor("padded", "N", said, "h", "w")],
        constants,
    )  # fmt: skip
    ran = run(saved(tmp_path / "m.onnx", model), "--classes", "camvid-11")
    assert ran.code == 4, ran.err
    assert ran.said("gave scores of shape (1, 12, 24, 32)", "(N, 11, h, w)")


def test_a_file_that_names_no_class_count_is_asked(run: Run, tmp_path: Path) -> None:
    node, constants = convolved(11)
    model = graph(
        [node], [tensor("image", "N", 3, "H", "W")], [tensor("scores", "N", "C", "h", "w")],
        constants,
    )  # fmt: skip
    path = saved(tmp_path / "m.onnx", model)
    ran = run(path, "--classes", "cityscapes-19")
    assert ran.code == 4 and ran.said("11 classes", "has 19", "--classes")
    assert run(path, "--classes", "camvid-11").code == 0


def test_a_preset_alone_takes_the_class_count_that_a_run_shows(run: Run, tmp_path: Path) -> None:
    node, constants = convolved(11)
    model = graph(
        [node], [tensor("image", "N", 3, "H", "W")], [tensor("scores", "N", "C", "h", "w")],
        constants,
    )  # fmt: skip
    assert run(saved(tmp_path / "m.onnx", model)).code == 0


def test_a_model_that_cannot_take_the_size_is_exit_4_with_a_hint(run: Run, tmp_path: Path) -> None:
    """A skip connection over a stride of 5 adds up only where 5 divides the size."""
    node, constants = convolved(4)
    nodes = [
        node,
        helper.make_node("MaxPool", ["scores"], ["low"], kernel_shape=[5, 5], strides=[5, 5]),
        helper.make_node("Resize", ["low", "", "factors"], ["up"], mode="nearest"),
        helper.make_node("Add", ["scores", "up"], ["sum"]),
    ]
    constants["factors"] = np.array([1, 1, 5, 5], np.float32)
    model = graph(
        nodes, [tensor("image", "N", 3, "H", "W")], [tensor("sum", "N", 4, "H", "W")], constants
    )
    path = saved(tmp_path / "m.onnx", model)
    ran = run(path)
    assert ran.code == 4
    assert ran.said("(1, 3, 24, 32)", "--size HxW")
    assert run(path, "--size", "25x30").code == 0


# --- external data ------------------------------------------------------------------------------


def external(path: Path, location: str, weights: Path | None = None) -> Path:
    """A colour model whose weights lie in `location`."""
    model = onnx.load(save_colour_model(path, COLOURS))
    data = b""
    for constant in model.graph.initializer:
        raw = numpy_helper.to_array(constant).tobytes()
        constant.ClearField("raw_data")
        constant.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", len(data)), ("length", len(raw))):
            constant.external_data.add(key=key, value=str(value))
        data += raw
    path.write_bytes(model.SerializeToString())
    if weights is not None:
        weights.parent.mkdir(parents=True, exist_ok=True)
        weights.write_bytes(data)
    return path


def test_proper_external_data_work_and_are_part_of_the_digest(
    run: Run, good: Path, tmp_path: Path
) -> None:
    inside = deliverables_of(run, good, tmp_path)
    folder = tmp_path / "split"
    folder.mkdir()
    path = external(folder / "model.onnx", "weights.bin", folder / "weights.bin")
    assert deliverables_of(run, path, tmp_path) == inside
    before = model_files.load_model(path, preset="imagenet-rgb").sha256
    changed = bytearray((folder / "weights.bin").read_bytes())
    changed[-1] ^= 1
    (folder / "weights.bin").write_bytes(bytes(changed))
    assert model_files.load_model(path, preset="imagenet-rgb").sha256 != before


def deliverables_of(run: Run, model: Path, tmp_path: Path) -> dict[str, bytes]:
    out = tmp_path / f"out-{model.parent.name}"
    assert run(model, "--out", out).code == 0
    return {k: v for k, v in deliverables(out).items() if k.startswith("labels/")}


@pytest.mark.parametrize(
    "location", ["../weights.bin", "a/../../weights.bin", "ABSOLUTE", "/etc/passwd", "/dev/zero"]
)
def test_weights_outside_the_folder_are_refused(run: Run, tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    location = str(tmp_path / "weights.bin") if location == "ABSOLUTE" else location
    ran = run(external(folder / "m.onnx", location, tmp_path / "weights.bin"))
    assert ran.code == 4
    assert ran.said("outside its own folder", "refused")


def test_missing_weights_are_named(run: Run, tmp_path: Path) -> None:
    ran = run(external(tmp_path / "m.onnx", "weights.bin"))
    assert ran.code == 4 and ran.said("'weights.bin', which is missing")


@pytest.mark.parametrize("kind", ["symlink", "hard link", "folder link", "folder", "fifo"])
def test_weights_that_are_a_link_or_no_file_are_refused(
    run: Run, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    secret = tmp_path / "secret" / "weights.bin"
    location = "sub/weights.bin" if kind == "folder link" else "weights.bin"
    path = external(folder / "m.onnx", location, secret)
    if kind == "symlink":
        (folder / "weights.bin").symlink_to(secret)
    elif kind == "hard link":
        (folder / "weights.bin").hardlink_to(secret)
    elif kind == "folder link":
        (folder / "sub").symlink_to(secret.parent)
    elif kind == "folder":
        (folder / "weights.bin").mkdir()
    else:
        os.mkfifo(folder / "weights.bin")
    ran = run(path)
    assert ran.code == 4
    assert ran.said("link or not a plain file", "Copy the real file")


@pytest.mark.parametrize("where", ["constant node", "subgraph", "function"])
def test_a_traversal_is_found_wherever_a_tensor_can_hide(
    run: Run, tmp_path: Path, where: str
) -> None:
    """ONNX Runtime reads hard links: a tensor that our own check overlooks would be read."""
    good = external(tmp_path / "m.onnx", "weights.bin", tmp_path / "weights.bin")
    model = onnx.load(good, load_external_data=False)
    hidden = TensorProto(name="h", data_type=TensorProto.FLOAT, dims=[1])
    hidden.data_location = TensorProto.EXTERNAL
    hidden.external_data.add(key="location", value="../secret.bin")
    constant = helper.make_node("Constant", [], ["hidden"], value=hidden)
    if where == "constant node":
        model.graph.node.append(constant)
    elif where == "subgraph":
        branch = helper.make_graph([constant], "b", [], [tensor("hidden", 1)])
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
        model.graph.node.append(
            helper.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=branch)
        )
    else:
        model.functions.append(
            helper.make_function(
                "own", "F", [], ["hidden"], [constant], [helper.make_opsetid("", 18)]
            )
        )
    good.write_bytes(model.SerializeToString())
    ran = run(good)
    assert ran.code == 4
    assert ran.said("../secret.bin", "outside its own folder")


# --- the spec -----------------------------------------------------------------------------------


def with_metadata(path: Path, text: str) -> Path:
    model = onnx.load(save_colour_model(path, COLOURS))
    model.metadata_props.add(key=METADATA_KEY, value=text)
    onnx.save(model, path)
    return path


def own_spec(classes: int = 6) -> dict[str, object]:
    from cada_deploy.classes import anonymous

    chosen_input, chosen_output = presets.preset("imagenet-rgb")
    return ModelSpec(anonymous(classes), chosen_input, chosen_output).to_json()


def test_a_model_with_its_own_spec_needs_nothing_else(run: Run, good: Path, tmp_path: Path) -> None:
    path = with_metadata(tmp_path / "own" / "m.onnx", json.dumps(own_spec()))
    assert run(path, "--out", tmp_path / "own-out", preset=False).code == 0
    assert run(good, "--out", tmp_path / "preset-out").code == 0
    own, other = deliverables(tmp_path / "own-out"), deliverables(tmp_path / "preset-out")
    assert own["labels/frame_000.png"] == other["labels/frame_000.png"]


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("{", 4, "not JSON"),
        ("", 4, "not JSON"),
        ("[1, 2]", 4, "not an object"),
        ("null", 4, "not an object"),
        ({"schema": 2}, 4, "schema 2"),
        ({"schema": "1"}, 4, "schema '1'"),
        ({"inputs": {}}, 2, "did you mean 'input'?"),
        ({"input": {"color": "RGB"}}, 2, "did you mean 'colour'?"),
        ({"output": {"align_corner": True}}, 2, "did you mean 'align_corners'?"),
        ({"inference": {"mode": "slid"}}, 2, "did you mean 'slide'?"),
        ({"input": None}, 2, "input"),
        ({"input": {"colour": "RGB"}}, 2, "input"),
        ({"input.scale": "1"}, 2, "input"),
        ({"input.scale": 0}, 2, "positive"),
        ({"input.scale": float("nan")}, 2, "finite"),
        ({"input.mean": [1, 2]}, 2, "three"),
        ({"input.mean": 3}, 2, "input"),
        ({"input.size": [0, 5]}, 2, "input.size"),
        ({"input.size": 5}, 2, "input"),
        ({"input.layout": "CHW"}, 2, "NCHW"),
        ({"output.stride": 0}, 2, "stride"),
        ({"output.stride": "8"}, 2, "output"),
        ({"output.order": "prob"}, 2, "did you mean 'probs'?"),
        ({"output.meaning": "probabilities"}, 2, "output.order is 'probs'"),
        ({"output.align_corners": "no"}, 2, "align_corners"),
        ({"inference.flip": "no"}, 2, "flip"),
        ({"inference.scales": []}, 2, "scales"),
        ({"inference.scales": 1.0}, 2, "inference"),
        ({"inference.window": [8, 8]}, 2, "slide"),
        ({"inference": {"mode": "slide", "window": [8, 8], "stride": [9, 8]}}, 2, "gaps"),
        ({"inference": {"mode": "slide", "window": [8, 8]}}, 2, "slide"),
        ({"classes": None}, 2, "class set"),
        ({"classes": {"name": "x"}}, 2, "class set"),
        ({"classes.names": ["a"]}, 2, "names"),
        ({"classes.palette": [[0, 0]] * 6}, 2, "colours"),
        ({"classes.label_ids": [1] * 6}, 2, "repeats"),
        ({"classes.label_ids": list(range(300, 306))}, 2, "0..255"),
        ({"provenance": 5}, 2, "provenance"),
        ({"provenance": "text"}, 2, "provenance"),
    ],
    ids=lambda v: json.dumps(v) if not isinstance(v, int) else str(v),
)
def test_a_broken_spec_in_the_file_is_refused_and_named(
    run: Run, tmp_path: Path, text: str | dict[str, object], code: int, said: str
) -> None:
    if isinstance(text, dict):
        spec: dict[str, object] = own_spec()
        for key, value in text.items():
            table, _, field = key.partition(".")
            if field:
                spec[table] |= {field: value}
            else:
                spec[key] = value
        text = json.dumps(spec)
    ran = run(with_metadata(tmp_path / "m.onnx", text), preset=False)
    assert ran.code == code, ran.err
    assert ran.said("error:", said)


def test_a_spec_of_another_class_count_is_exit_4(run: Run, tmp_path: Path) -> None:
    ran = run(with_metadata(tmp_path / "m.onnx", json.dumps(own_spec(7))), preset=False)
    assert ran.code == 4 and ran.said("gives 6 classes", "has 7")


def test_a_foreign_model_without_preset_is_exit_2_and_shows_what_to_write(
    run: Run, good: Path, tmp_path: Path
) -> None:
    ran = run(good, preset=False)
    assert ran.code == 2
    assert ran.said("never guesses", "--preset", "imagenet-rgb", "caffe-bgr", "bdl", "crst")
    template = ran.err[ran.err.index("# How this model") :]
    (tmp_path / "spec.toml").write_text(template)
    assert presets.load_spec(tmp_path / "spec.toml").output.meaning == "logits"


def test_preset_and_spec_together_are_exit_2(run: Run, good: Path, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(presets.spec_template())
    ran = run(good, "--spec", tmp_path / "s.toml")
    assert ran.code == 2 and ran.said("give one of them")


def test_an_unknown_preset_is_exit_2_with_the_known_ones(run: Run, good: Path) -> None:
    ran = run(good, "--preset", "imagenet-bgr", preset=False)
    assert ran.code == 2 and ran.said("'imagenet-bgr'", "imagenet-rgb")
    with pytest.raises(UsageError, match=r"did you mean 'imagenet-rgb'\?"):
        presets.preset("imagenet-rbg")


def test_a_missing_spec_file_is_exit_2(run: Run, good: Path, tmp_path: Path) -> None:
    ran = run(good, "--spec", tmp_path / "none.toml", preset=False)
    assert ran.code == 2 and ran.said("none.toml")


# --- models that must work ----------------------------------------------------------------------


def test_a_fixed_size_model_takes_every_image_at_that_size_and_no_other_size(
    run: Run, tmp_path: Path
) -> None:
    path = save_colour_model(tmp_path / "m.onnx", COLOURS, size=(40, 56))
    ran = run(path, "--size", "48x64")
    assert ran.code == 2
    assert ran.said("takes 40x56 (HxW) and nothing else", "48x64")
    assert run(path, "--size", "40x56").code == 0
    image = read(tmp_path / "out" / "shards" / "000000.scored.json")["images"][0]
    assert (image["input_size"], image["image_size"]) == ([40, 56], [24, 32])


def test_a_spec_that_contradicts_the_fixed_size_is_exit_4(run: Run, tmp_path: Path) -> None:
    path = save_colour_model(tmp_path / "m.onnx", spread_colours(11), size=(40, 56))
    spec = tmp_path / "s.toml"
    spec.write_text('preset = "imagenet-rgb"\n[classes]\nset="camvid-11"\n[input]\nsize=[40, 48]')
    ran = run(path, "--spec", spec, preset=False)
    assert ran.code == 4 and ran.said("40x56", "40x48", "input.size")


@pytest.mark.parametrize("stride", [1, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_strides_and_element_types_run(run: Run, tmp_path: Path, stride: int, dtype: str) -> None:
    path = save_colour_model(tmp_path / "m.onnx", COLOURS, stride=stride, dtype=dtype)
    assert run(path).code == 0
    identity = read(tmp_path / "out" / "run.json")["identity"]
    assert identity["spec"]["input"]["dtype"] == dtype


def test_a_model_of_fixed_batch_2_gives_the_labels_of_the_dynamic_one(
    run: Run, good: Path, tmp_path: Path
) -> None:
    pair = save_colour_model(tmp_path / "two" / "m.onnx", COLOURS, batch=2)
    assert deliverables_of(run, pair, tmp_path) == deliverables_of(run, good, tmp_path)


def test_an_nhwc_model_gives_the_labels_of_the_nchw_one(run: Run, tmp_path: Path) -> None:
    colours = spread_colours(11)
    straight = save_colour_model(tmp_path / "straight" / "m.onnx", colours)
    model = onnx.load(straight)
    turn = helper.make_node("Transpose", ["nhwc"], ["image"], perm=[0, 3, 1, 2])
    model.graph.node.insert(0, turn)
    model.graph.ClearField("input")
    model.graph.input.append(tensor("nhwc", "N", "H", "W", 3))
    (tmp_path / "turned").mkdir()
    turned = saved(tmp_path / "turned" / "m.onnx", model)
    spec = tmp_path / "s.toml"
    spec.write_text(
        'preset = "imagenet-rgb"\n[classes]\nset = "camvid-11"\n[input]\nlayout = "NHWC"\n'
    )
    assert run(turned, "--spec", spec, "--out", tmp_path / "a", preset=False).code == 0
    assert run(straight, "--classes", "camvid-11", "--out", tmp_path / "b").code == 0
    one, other = deliverables(tmp_path / "a"), deliverables(tmp_path / "b")
    assert {k: one[k] for k in one if k.startswith("labels")} == {
        k: other[k] for k in other if k.startswith("labels")
    }
    ran = run(turned)
    assert ran.code == 4 or ran.code == 0, "declared as NCHW the last axis is the width: 3 pixels"
    assert ran.code == 4


def test_an_output_of_probabilities_is_read_through_the_spec(run: Run, tmp_path: Path) -> None:
    """ln of a softmax, centred, is the logits, centred: the `probs` order gives the same labels."""
    colours = spread_colours(11)
    soft = save_colour_model(
        tmp_path / "p" / "m.onnx", colours, meaning="probabilities", sharpness=0.5
    )
    hard = save_colour_model(tmp_path / "l" / "m.onnx", colours, sharpness=0.5)
    text = (
        'preset = "imagenet-rgb"\n[classes]\nset = "camvid-11"\n'
        '[output]\norder = "probs"\nmeaning = "{}"\n'
    )
    pixels = {}
    for model, meaning in ((soft, "probabilities"), (hard, "logits")):
        spec = model.with_suffix(".toml")
        spec.write_text(text.format(meaning))
        out = model.parent / "out"
        ran = run(model, "--spec", spec, "--out", out, preset=False)
        assert ran.code == 0, ran.err
        pixels[meaning] = np.array(
            [row["pixels"] for row in read(out / "thresholds.json")["classes"]]
        )
    moved = np.abs(pixels["probabilities"] - pixels["logits"]).sum()
    assert moved <= 0.005 * pixels["logits"].sum()
    assert (pixels["logits"] > 0).sum() >= 3


# --- scores that are no numbers -----------------------------------------------------------------


def test_nan_scores_in_some_pixels_become_255_and_are_counted(run: Run, tmp_path: Path) -> None:
    ran = run(save_colour_model(tmp_path / "m.onnx", COLOURS, poison=float("nan"), stride=4))
    assert ran.code == 0, ran.err
    found = read(tmp_path / "out" / "thresholds.json")
    assert 0 < found["invalid_pixels"] < 3 * 24 * 32
    predicted = sum(row["predicted"] for row in found["classes"])
    assert predicted + found["invalid_pixels"] == 3 * 24 * 32
    assert sum(row["pixels"] for row in found["classes"]) == predicted


def test_an_image_without_one_finite_score_is_rejected(
    run: Run, images: Path, tmp_path: Path
) -> None:
    """+inf everywhere: by a bias that is not finite."""
    model = onnx.load(save_colour_model(tmp_path / "m.onnx", COLOURS))
    bias = next(t for t in model.graph.initializer if t.name == "bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(6, np.nan, np.float32), "bias"))
    onnx.save(model, tmp_path / "m.onnx")
    ran = run(tmp_path / "m.onnx")
    assert ran.code == 6
    lines = rejected(tmp_path / "out")
    assert [line["reason"] for line in lines] == ["non-finite-scores"] * 3
    assert [line["path"] for line in lines] == sorted(p.name for p in images.iterdir())
    assert list((tmp_path / "out" / "labels").iterdir()) == []
    assert run(tmp_path / "m.onnx", "--allow-rejects", "3").code == 0


# --- engines and devices ------------------------------------------------------------------------


def test_the_torch_engine_refuses_an_onnx_model(run: Run, good: Path) -> None:
    ran = run(good, "--engine", "torch")
    assert ran.code in (2, 3), "3 where torch is not installed"
    assert ran.said("--engine ort") or ran.said("install")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--device", "cuda:0"), 3, "--device cpu"),
        (("--device", "nonsense"), 2, "cpu or cuda:N"),
        (("--device", "cuda"), 2, "cpu or cuda:N"),
        (("--device", "cuda:x"), 2, "cpu or cuda:N"),
        (("--engine", "trt"), 3, "pip install 'cada-deploy[trt]'"),
        (("--engine", "tensorflow"), 2, "'tensorflow'"),
    ],
    ids=str,
)
def test_an_engine_or_device_that_is_not_there_is_never_replaced_quietly(
    run: Run, good: Path, options: tuple[str, str], code: int, said: str
) -> None:
    ran = run(good, *options)
    assert ran.code == code, ran.err
    assert ran.said(said)
