"""Exports are proven equal, and a planted wrong one is caught.

Networks here have shallow trunks; one whole ResNet-101 goes through the command line, and all
families do when CADA_SOAK=1.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")
pytest.importorskip("onnxscript", reason="the extra `train` is not installed")

from cada_deploy.training import export, proof  # noqa: E402
from cada_deploy.training.checkpoint_spec import stated_spec, with_names  # noqa: E402
from cada_deploy.training.models import deeplab  # noqa: E402
from cada_deploy.training.models.small import SmallDeepLab  # noqa: E402
from command_line import cada, child_environment  # noqa: E402
from onnx import numpy_helper  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from cada_deploy import scenes  # noqa: E402
from cada_deploy.errors import ArtefactMismatch, CheckFailed  # noqa: E402
from cada_deploy.model_files import load_model  # noqa: E402
from cada_deploy.model_spec import METADATA_KEY, ModelSpec  # noqa: E402

from . import checkpoint_files as files  # noqa: E402

SOAK = os.environ.get("CADA_SOAK") == "1"
SIZE = (97, 161)
FRAMES = [
    ("day", scenes.scene(41, scenes.SOURCE, SIZE).image),
    ("dusk", scenes.scene(42, scenes.TARGET, SIZE).image),
]


@pytest.fixture(scope="module", autouse=True)
def shallow() -> Iterator[None]:
    """One block a stage, for the loader too; and one thread, so that two cores serve two tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deeplab, "BLOCKS", (1, 1, 1, 1))
        yield
    torch.set_num_threads(threads)


def spec_for(preset: str, classes: int = 19) -> ModelSpec:
    named = Path("network.pth")
    spec = stated_spec(named, classes, preset=preset, spec_file=None, classes=None)
    return with_names(spec, stride=8)


def truth_of(family: str, head: str = "scores") -> proof.Truth:
    layout = files.FAMILIES[family]
    images = [image for _, image in FRAMES]
    network = files.fitted_network(layout.architecture, images, layout.preset, seed=3)
    return proof.Truth(network, export._for_file(spec_for(layout.preset), head, None), head)


@pytest.fixture(scope="module")
def truth() -> proof.Truth:
    return truth_of("advent")


@pytest.fixture(scope="module")
def exported(truth: proof.Truth) -> export.Packed:
    return export.export_network(truth, FRAMES)


@pytest.fixture(scope="module")
def label_truth(truth: proof.Truth) -> proof.Truth:
    head = "labels+confidence"
    return proof.Truth(truth.network, export._for_file(truth.spec, head, None), head)


@pytest.fixture(scope="module")
def label_model(label_truth: proof.Truth) -> bytes:
    return export.packed_with(export.onnx_from_network(label_truth), label_truth.spec)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the second opinions, which planted faults do not need."""
    monkeypatch.setattr(proof, "lint", lambda *_: "left out")
    monkeypatch.setattr(proof, "_reference", lambda *_: "left out")


# --- what is right ------------------------------------------------------------------------------


def test_an_export_is_proven_on_sizes_and_frames_that_it_was_not_traced_with(
    truth: proof.Truth, exported: export.Packed
) -> None:
    found = exported.proof
    assert len(set(found.sizes)) >= 3 and (*export.TRACED,) not in found.sizes
    assert any(h % 2 and w % 2 for _, h, w in found.sizes)
    assert found.score_error <= 1e-4 and found.frame_score_error <= 1e-4
    assert found.agreement >= 0.9999 and found.largest_margin <= proof.TIE
    assert found.mean_entropy_error_nats <= 1e-4
    assert found.classes_seen >= 8, "too few classes to say anything"
    assert found.reference.startswith("passed on 33x41")
    assert found.lint.startswith(("passed", "not run"))
    assert "proof" not in truth.spec.provenance
    spec = proof.stated_spec(onnx.load_model_from_string(exported.packed))
    assert spec.provenance["proof"] == json.loads(json.dumps(found.to_json()))
    assert spec.provenance["torch"] == torch.__version__


def test_the_file_has_stable_names_and_nothing_to_spare(
    truth: proof.Truth, exported: export.Packed
) -> None:
    model = onnx.load_model_from_string(exported.packed)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"image": ["N", 3, "H", "W"], "scores": ["N", 19, "h", "w"]}
    kinds = {n.op_type for n in model.graph.node}
    assert kinds == {"Conv", "Relu", "Add", "MaxPool"}, "batch norms are folded"
    # The auxiliary head (layer5, 4 x 19 x 1024 x 9 weights) is dead and gone.
    weights = sum(int(np.prod(t.dims)) for t in model.graph.initializer)
    whole = sum(p.numel() for p in truth.network.parameters())
    assert weights < whole - 4 * 19 * 1024 * 9
    assert str(Path(deeplab.__file__).parent).encode() not in exported.packed, "no stack traces"
    assert [p.key for p in model.metadata_props] == [METADATA_KEY]


def test_label_heads_are_proven_and_our_own_runtime_refuses_them(
    label_truth: proof.Truth, label_model: bytes, tmp_path: Path
) -> None:
    found = proof.prove(label_truth, label_model, FRAMES)
    assert found.largest_margin <= proof.TIE and found.confidence_error <= 1e-3
    model = onnx.load_model_from_string(label_model)
    resize = [n for n in model.graph.node if n.op_type == "Resize"]
    assert len(resize) == 1 and not resize[0].input[2] and resize[0].input[3], "sizes, not scales"
    assert [o.name for o in model.graph.output] == ["labels", "confidence"]
    path = tmp_path / "labels.onnx"
    path.write_bytes(label_model)
    with pytest.raises(ArtefactMismatch, match="label map cannot be thresholded"):
        load_model(path)


def test_probabilities_are_upsampled_in_the_graph_where_the_preset_says_so(
    truth: proof.Truth, quick: None
) -> None:
    spec = export._for_file(spec_for("bdl"), "labels+confidence", SIZE)
    static = proof.Truth(truth.network, spec, "labels+confidence", batch=2)
    made = export.export_network(static, FRAMES)
    model = onnx.load_model_from_string(made.packed)
    kinds = [n.op_type for n in model.graph.node]
    assert kinds.index("Softmax") < kinds.index("Resize") < kinds.index("ArgMax")
    assert "Shape" not in kinds, "a fixed size is a constant"
    dims = [d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim]
    assert dims == [2, *SIZE]
    assert set(made.proof.sizes) == {(2, *SIZE)}


def test_a_fixed_size_resizes_frames_as_the_preset_says(quick: None) -> None:
    network = lively_small()
    spec = export._for_file(spec_for("caffe-bgr"), "scores", (64, 96))
    made = export.export_network(proof.Truth(network, spec, "scores", 1), FRAMES)
    assert made.proof.frame_score_error <= 1e-4
    assert made.spec.input.size == (64, 96)


def lively_small(classes: int = 19) -> SmallDeepLab:
    """A small network whose norms know the frames and whose predictions vary."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        network = SmallDeepLab(classes).train()
        for norm in (m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.momentum = 1.0
        spec = spec_for("imagenet-rgb").input
        network(torch.cat([torch.from_numpy(proof.prepared(i, spec)) for _, i in FRAMES]))
        for branch in network.classifier:
            branch.weight.mul_(12)
    return network.eval()


# --- what is wrong ------------------------------------------------------------------------------


def respecified(packed: bytes, change: Callable[[ModelSpec], ModelSpec]) -> bytes:
    model = onnx.load_model_from_string(packed)
    return export.packed_with(model, change(proof.stated_spec(model)))


def regraphed(packed: bytes, change: Callable[[onnx.GraphProto], None]) -> bytes:
    model = onnx.load_model_from_string(packed)
    change(model.graph)
    return bytes(model.SerializeToString())


def output(**facts: Any) -> Callable[[ModelSpec], ModelSpec]:
    return lambda spec: replace(spec, output=replace(spec.output, **facts))


def fed(**facts: Any) -> Callable[[ModelSpec], ModelSpec]:
    return lambda spec: replace(spec, input=replace(spec.input, **facts))


WRONG_SPECS = {
    "align_corners flipped": (output(align_corners=False), "align_corners"),
    "softmax before upsampling": (output(order="probs"), "entropy|labels"),
    "BGR for RGB": (fed(colour="RGB"), "scores of day differ"),
    "another mean": (fed(mean=(0.0, 116.66876762, 122.67891434)), "scores of day differ"),
    "another scale": (fed(scale=1 / 255), "scores of day differ"),
    "another filter": (fed(resize="bilinear"), "spec says input"),
    "another stride": (output(stride=4), "spec says output"),
}


@pytest.mark.parametrize("planted", WRONG_SPECS)
def test_a_planted_wrong_spec_is_caught(
    planted: str, truth: proof.Truth, exported: export.Packed, quick: None
) -> None:
    change, said = WRONG_SPECS[planted]
    with pytest.raises(CheckFailed, match=said):
        proof.prove(truth, respecified(exported.packed, change), FRAMES)


def _floor_pooling(graph: onnx.GraphProto) -> None:
    (pool,) = (n for n in graph.node if n.op_type == "MaxPool")
    (mode,) = (a for a in pool.attribute if a.name == "ceil_mode")
    assert mode.i == 1
    mode.i = 0


def _without_a_branch(graph: onnx.GraphProto) -> None:
    """The last Add of the head passes its first input on."""
    last = next(n for n in graph.node if "scores" in n.output)
    assert last.op_type == "Add"
    dropped = last.input[1]
    branch = next(n for n in graph.node if dropped in n.output)
    assert branch.op_type == "Conv"
    unused = set(branch.input[1:])
    last.op_type = "Identity"
    del last.input[1]
    graph.node.remove(branch)
    for tensor in [t for t in graph.initializer if t.name in unused]:
        graph.initializer.remove(tensor)


def _another_dilation(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("dilations", "pads") and list(attribute.ints)[:2] == [18, 18]:
                attribute.ints[:] = [12] * len(attribute.ints)


def _half_a_percent(graph: onnx.GraphProto) -> None:
    """The smallest norm folded wrongly: one bias of the stem, by 0.5 % of the largest."""
    stem = next(n for n in graph.node if "image" in n.input)
    tensor = next(t for t in graph.initializer if t.name == stem.input[2])
    values = numpy_helper.to_array(tensor).copy()
    values[0] += 0.005 * np.abs(values).max()
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


WRONG_GRAPHS = {
    "ceil mode lost": (_floor_pooling, "ceil mode"),
    "an ASPP branch dropped": (_without_a_branch, "branches"),
    "a dilation changed": (_another_dilation, "differ by"),
    "a bias half a percent off": (_half_a_percent, "differ by"),
}


@pytest.mark.parametrize("planted", WRONG_GRAPHS)
def test_a_planted_wrong_graph_is_caught(
    planted: str, truth: proof.Truth, exported: export.Packed, quick: None
) -> None:
    change, said = WRONG_GRAPHS[planted]
    with pytest.raises(CheckFailed, match=said):
        proof.prove(truth, regraphed(exported.packed, change), FRAMES)


def _half_pixel(graph: onnx.GraphProto) -> None:
    (resize,) = (n for n in graph.node if n.op_type == "Resize")
    (mode,) = (a for a in resize.attribute if a.name == "coordinate_transformation_mode")
    assert mode.s == b"align_corners"
    mode.s = b"half_pixel"


def _nearest(graph: onnx.GraphProto) -> None:
    (resize,) = (n for n in graph.node if n.op_type == "Resize")
    next(a for a in resize.attribute if a.name == "mode").s = b"nearest"


def _labels_from_the_least(graph: onnx.GraphProto) -> None:
    next(n for n in graph.node if n.op_type == "ArgMax").op_type = "ArgMin"


WRONG_HEADS = {
    "align_corners flipped": (_half_pixel, "labels of day differ"),
    "nearest for linear": (_nearest, "labels of day differ"),
    "the least likely class": (_labels_from_the_least, "labels of day differ"),
}


@pytest.mark.parametrize("planted", WRONG_HEADS)
def test_a_planted_wrong_head_is_caught(
    planted: str, label_truth: proof.Truth, label_model: bytes, quick: None
) -> None:
    change, said = WRONG_HEADS[planted]
    with pytest.raises(CheckFailed, match=said):
        proof.prove(label_truth, regraphed(label_model, change), FRAMES)


def test_two_branches_are_not_four(
    truth: proof.Truth, exported: export.Packed, quick: None
) -> None:
    """The trap itself: the same tensors, another sum."""
    truth.network.layer6.branches = 2
    try:
        with pytest.raises(CheckFailed, match="differ by"):
            proof.prove(truth, exported.packed, FRAMES)
    finally:
        truth.network.layer6.branches = 4


def test_unused_weights_and_a_missing_spec_are_caught(
    truth: proof.Truth, exported: export.Packed
) -> None:
    def spare(graph: onnx.GraphProto) -> None:
        graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "spare"))

    with pytest.raises(CheckFailed, match=r"nothing reads \(spare\)"):
        proof.prove(truth, regraphed(exported.packed, spare), FRAMES)
    model = onnx.load_model_from_string(exported.packed)
    del model.metadata_props[:]
    with pytest.raises(CheckFailed, match="no model spec"):
        proof.prove(truth, model.SerializeToString(), FRAMES)


def test_a_network_that_is_not_finite_on_frames_is_refused(quick: None) -> None:
    network = lively_small()
    with torch.no_grad():  # every weight is a number, and their product is none
        network.stem[0][0].weight.fill_(3e38)
    truth = proof.Truth(network, export._for_file(spec_for("imagenet-rgb"), "scores", None))
    with pytest.raises(CheckFailed, match=r"network itself is not finite.*NaN or infinite"):
        export.export_network(truth, FRAMES)


def test_too_large_for_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "LARGEST", 1_000_000)
    truth = proof.Truth(lively_small(), spec_for("imagenet-rgb"))
    with pytest.raises(ArtefactMismatch, match="one ONNX file holds 2 GiB"):
        export.export_network(truth, FRAMES)


def test_polygraphy_is_not_needed_and_its_absence_is_said(
    exported: export.Packed, truth: proof.Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof.importlib.util, "find_spec", lambda name: None)
    said = proof.lint(exported.packed, truth)
    assert said == "not run (pip install polygraphy onnx-graphsurgeon)"


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "checkpoint.safetensors"
    save_file({f"model.{k}": v.contiguous() for k, v in lively_small().state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BDL's names and shapes: for what is refused before a network runs."""
    return files.hollow_checkpoint(tmp_path_factory.mktemp("hollow") / "gta5.pth", "bdl")


def test_export_writes_one_file_and_says_what_it_did(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new folder" / "model.onnx"
    ran = cada("export", small_checkpoint, "-o", out)
    assert ran.code == 0, ran.err
    assert ran.said("80 tensors matched (100 %)", "proven equal", "onnx.reference: passed")
    assert [p.name for p in out.parent.iterdir()] == ["model.onnx"]
    spec = load_model(out).spec
    assert spec.preset == "imagenet-rgb" and spec.output.stride == 8
    assert spec.provenance["family"] == "deeplab-small"
    again = cada("export", small_checkpoint, "-o", out)
    assert again.code == 2 and again.said("exists", "--overwrite")


def test_a_failed_check_is_exit_5_and_leaves_no_file(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = export.onnx_from_network

    def wrong(truth: proof.Truth) -> onnx.ModelProto:
        model = right(truth)
        _half_a_percent(model.graph)
        return model

    monkeypatch.setattr(export, "onnx_from_network", wrong)
    ran = cada("export", small_checkpoint, "-o", tmp_path / "model.onnx")
    assert ran.code == 5 and ran.said("differ by", "was not written")
    assert not list(tmp_path.iterdir())


def test_a_preset_is_required_and_the_likely_ones_are_named(hollow: Path, tmp_path: Path) -> None:
    ran = cada("export", hollow, "-o", tmp_path / "m.onnx")
    assert ran.code == 2 and ran.said("never guesses", "bdl or caffe-bgr or crst", "[input]")


def test_usage_errors(hollow: Path, small_checkpoint: Path, tmp_path: Path) -> None:
    given = ("export", small_checkpoint, "-o", tmp_path / "m.onnx")
    spec = tmp_path / "spec.toml"
    spec.write_text('preset = "imagenet-rgb"\n[classes]\nset = "cityscapes-19"\n'
                    "[input]\nsize = [64, 128]\n")  # fmt: skip
    for more, said in [
        (["--size", "big"], "HEIGHTxWIDTH"),
        (["--spec", spec, "--size", "64x96"], "leave one of them out"),
        (["--spec", spec, "--preset", "bdl"], "give one of them"),
        (["--images", tmp_path / "nowhere"], "nowhere"),
        (["--arch", "unet"], "no architecture is called 'unet'"),
        (["--batch", "0"], "batch"),
    ]:
        ran = cada(*given, *more)
        assert ran.code == 2 and ran.said(said), (more, ran.err)
    assert cada("export", tmp_path / "none.pth", "-o", tmp_path / "m.onnx").code == 2
    ran = cada("export", small_checkpoint, "-o", tmp_path / "m.trt")
    assert ran.code == 2 and ran.said("ends in .onnx")
    ran = cada("export", tmp_path / "m.onnx", "-o", tmp_path / "n.onnx")
    assert ran.code == 2 and ran.said("an ONNX model already")
    (tmp_path / "folder.onnx").mkdir()
    ran = cada("export", small_checkpoint, "-o", tmp_path / "folder.onnx", "--overwrite")
    assert ran.code == 2 and ran.said("is a folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.onnx", "spec.toml"]


class _Boom:
    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ["CADA_TEST_BOOM"],))


def test_checkpoints_that_do_not_fit_are_exit_4(
    hollow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = dict(torch.load(hollow, weights_only=True))
    boom = tmp_path / "ran"
    monkeypatch.setenv("CADA_TEST_BOOM", str(boom))
    half = {k: v for n, (k, v) in enumerate(state.items()) if n % 2 or "conv2d_list" in k}
    cases: dict[str, tuple[Any, str]] = {
        "half.pth": (half, "missing"),
        "optimiser.pth": ({"optimizer": {"state": {}, "param_groups": []}}, "optimiser"),
        "code.pth": ({"state_dict": state, "boom": _Boom()}, "mkdir"),
    }
    for name, (content, said) in cases.items():
        torch.save(content, tmp_path / name)
        ran = cada("export", tmp_path / name, "-o", tmp_path / "m.onnx", "--preset", "bdl")
        assert ran.code == 4 and said in ran.err, (name, ran.err)
    assert not boom.exists()
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(_Boom()))
    for name in ("text.pth", "pickle.pth"):
        ran = cada("export", tmp_path / name, "-o", tmp_path / "m.onnx", "--preset", "bdl")
        assert ran.code == 4, ran.err
    assert not boom.exists() and not (tmp_path / "m.onnx").exists()
    other = files.hollow_checkpoint(tmp_path / "21.pth", "bdl", classes=21)
    ran = cada("export", other, "-o", tmp_path / "m.onnx", "--preset", "bdl",
               "--classes", "cityscapes-19")  # fmt: skip
    assert ran.code == 4 and ran.said("21 classes", "19")


def test_undecidable_branches_name_the_option_and_where_it_belongs(
    hollow: Path, tmp_path: Path
) -> None:
    state = dict(torch.load(hollow, weights_only=True))
    draw = torch.Generator().manual_seed(9)
    for part, value in zip(("weight", "bias"), files.branch(draw, 19, 2048)):
        state[f"layer5.conv2d_list.1.{part}"] = value  # the second branch looks untrained
    torch.save(state, tmp_path / "odd.pth")
    ran = cada("export", tmp_path / "odd.pth", "-o", tmp_path / "m.onnx", "--preset", "bdl")
    assert ran.code == 4 and ran.said("--aspp-branches 2", "layer5 branch 1")
    frame = tmp_path / "in" / "a.png"
    frame.parent.mkdir()
    Image.fromarray(FRAMES[0][1]).save(frame)
    ran = cada("pseudo-label", "--engine", "torch", "--model", tmp_path / "odd.pth", "--preset",
               "bdl", "--images", frame.parent, "--out", tmp_path / "o")  # fmt: skip
    assert ran.code == 4 and ran.said("That option belongs to `cada-deploy export`")


def test_without_torch_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from cada_deploy.cli import main\n"
        f"main(['export', 'x.pth', '-o', {str(tmp_path / 'm.onnx')!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=child_environment(),
        check=False,
    )  # fmt: skip
    assert done.returncode == 3 and "pip install 'cada-deploy[cpu,train]'" in done.stderr


# --- whole networks -----------------------------------------------------------------------------

WHOLE = list(files.FAMILIES) if SOAK else ["bdl-2019"]


@pytest.mark.parametrize("family", WHOLE)
def test_a_whole_resnet101_in_its_projects_layout(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deeplab, "BLOCKS", (3, 4, 23, 3))
    layout = files.FAMILIES[family]
    images = [image for _, image in FRAMES]
    checkpoint = files.make_checkpoint(tmp_path / layout.file_name, family, images)
    out = tmp_path / "model.onnx"
    ran = cada("export", checkpoint, "-o", out, "--preset", layout.preset)
    assert ran.code == 0, ran.err
    spec = load_model(out).spec
    provenance = spec.provenance
    assert provenance["aspp"]["branches"] == layout.architecture.aspp_branches
    assert provenance["proof"]["score_error"] <= 1e-4
    assert provenance["proof"]["classes_seen"] >= 5
    assert spec.weights_sha256 == provenance["checkpoint_sha256"]
    if SOAK:
        dusk = tmp_path / "dusk"
        scenes.write_set(dusk, scenes.TARGET_DEMO)
        labelled = cada("pseudo-label", "--model", out, "--images", dusk / "images", "--out",
                        tmp_path / "o", "--quiet")  # fmt: skip
        assert labelled.code == 0, labelled.err
