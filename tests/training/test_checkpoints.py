"""The loader: whose file it is, that nothing in it runs, and that what does not fit is said."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from cada_deploy.training import families, source  # noqa: E402
from cada_deploy.training.aspp_evidence import (  # noqa: E402
    AsppEvidence,
    branch_evidence,
    decide,
)
from cada_deploy.training.checkpoints import (  # noqa: E402
    Loaded,
    load_backbone,
    load_checkpoint,
)
from cada_deploy.training.models.deeplab import DeepLab, DeepLabV2  # noqa: E402
from cada_deploy.training.models.small import SmallDeepLab  # noqa: E402
from foreign_models import street_like  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from cada_deploy.errors import ArtefactMismatch, CadaError, UsageError  # noqa: E402

from . import checkpoint_files as files  # noqa: E402

State = dict[str, Any]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small() -> State:
    """The tensors of a small network, to wrap, spoil and hide."""
    torch.manual_seed(0)
    return dict(SmallDeepLab(7).state_dict())


@pytest.fixture(scope="module")
def single() -> State:
    """BDL's names and shapes, the trunk of constants."""
    return dict(files.hollow_state(DeepLabV2("single")))


def _saved(tree: object, path: Path, legacy: bool = False) -> Path:
    torch.save(tree, path, _use_new_zipfile_serialization=not legacy)
    return path


# --- each project's own file ---------------------------------------------------------------------


@pytest.mark.parametrize("family", files.FAMILIES)
def test_each_projects_file_is_known_by_its_tensors(family: str, tmp_path: Path) -> None:
    layout = files.FAMILIES[family]
    path = files.hollow_checkpoint(tmp_path / layout.file_name, family)
    loaded = load_checkpoint(path, classes=19)
    assert loaded.architecture == layout.architecture
    assert layout.preset in loaded.family.presets
    report = loaded.report
    assert report.complete and report.percent == 100 and not report.missing
    assert report.filled == (0 if layout.counters else 104)
    assert report.layout == ("legacy" if layout.legacy else "zip")
    assert report.nesting == ((layout.wrapped,) if layout.wrapped else ())
    assert report.stripped == ((layout.prefix,) if layout.prefix else ())
    expected = files.hollow_state(layout.architecture)
    assert not loaded.model.training
    for name, tensor in loaded.model.state_dict().items():
        assert tensor.is_contiguous() and tensor.device.type == "cpu", name
        if not name.endswith("num_batches_tracked"):
            assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name]), name
    assert f"{layout.architecture.aspp_branches} of 4" in loaded.describe()
    assert "100 %" in loaded.describe()


def test_a_made_checkpoint_predicts_boldly_and_variedly(tmp_path: Path) -> None:
    frames = [street_like(90, 120, seed=k) for k in range(8)]
    loaded = load_checkpoint(files.make_checkpoint(tmp_path / "gta5_80000.pth", "bdl", frames))
    assert loaded.architecture == DeepLabV2("single")
    unseen = [street_like(90, 120, seed=k) for k in range(50, 54)]
    for group, confidence in ((frames, 0.6), (unseen, 0.4)):
        with torch.inference_mode():
            scores = loaded.model(files.network_input(group, "bdl"))
        assert scores.shape == (len(group), 19, 12, 16)
        sure, labels = scores.softmax(1).max(1)
        assert float(sure.mean()) > confidence
        assert (torch.bincount(labels.flatten(), minlength=19) > 10).sum() >= 8


def test_its_own_trainings_file_loads(tmp_path: Path) -> None:
    training = source.Training(source.Recipe(steps=1))
    training.save(tmp_path)
    loaded = load_checkpoint(tmp_path / source.CHECKPOINT)
    assert loaded.architecture == families.Small(19) and loaded.evidence is None
    assert loaded.report.layout == "safetensors" and loaded.report.stripped == ("model.",)
    x = torch.randn(1, 3, 40, 56)
    with torch.inference_mode():  # the trainer's is channels_last: other sums, other last bits
        assert (loaded.model(x) - training.model.eval()(x)).abs().max() <= 1e-5


# --- layouts -------------------------------------------------------------------------------------

WRAPPINGS: Mapping[str, Callable[[State], object]] = {
    "flat": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "optimizer": {"state": {}}, "epoch": 3},
    "model": lambda s: {"model": s, "iteration": 4},
    "model_state": lambda s: {"DeepLab": {"model_state": s, "optimizer_state": {"state": {}}}},
    "module": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "with numpy": lambda s: {"state_dict": s, "best_iou": np.float64(0.5), "at": np.int64(7),
                             "prototypes": np.zeros((19, 3), np.float32)},
}  # fmt: skip


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "zip"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_nesting_and_prefixes_are_seen_through(
    wrapping: str, legacy: bool, small: State, tmp_path: Path
) -> None:
    loaded = load_checkpoint(_saved(WRAPPINGS[wrapping](small), tmp_path / "m.pth", legacy))
    assert loaded.architecture == families.Small(7) and loaded.report.complete
    assert torch.equal(loaded.model.state_dict()["classifier.2.bias"], small["classifier.2.bias"])


def test_the_model_is_preferred_to_its_average_and_this_is_said(
    small: State, tmp_path: Path
) -> None:
    average = {k: torch.zeros_like(v) for k, v in small.items()}
    loaded = load_checkpoint(_saved({"ema_model": average, "model": small}, tmp_path / "m.pth"))
    assert loaded.report.nesting == ("model",)
    assert any("ema_model" in note and "not used" in note for note in loaded.report.notes)


def test_counters_may_be_missing_whatever_the_files_metadata_says(
    small: State, tmp_path: Path
) -> None:
    bare = OrderedDict((k, v) for k, v in small.items() if "num_batches" not in k)
    bare._metadata = OrderedDict({"": {"version": 1}, "stem.0.1": {"version": 2}})  # type: ignore[attr-defined]
    loaded = load_checkpoint(_saved(bare, tmp_path / "m.pth"))
    assert loaded.report.complete and loaded.report.filled == 12
    assert "12 num_batches_tracked were missing" in loaded.report.text()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_are_converted_and_reported(
    dtype: str, small: State, tmp_path: Path
) -> None:
    kind = getattr(torch, dtype)
    cast = {k: v.to(kind) if v.is_floating_point() else v for k, v in small.items()}
    save_file(cast, tmp_path / "m.safetensors")
    loaded = load_checkpoint(tmp_path / "m.safetensors")
    floats = sum(v.is_floating_point() for v in small.values())
    assert loaded.report.converted == {dtype: floats}
    assert f"{floats} tensors converted from {dtype} to float32" in loaded.report.text()
    assert all(v.dtype in (torch.float32, torch.int64) for v in loaded.model.state_dict().values())


def test_tensors_that_share_memory_in_the_file_are_parted(small: State, tmp_path: Path) -> None:
    bias = small["classifier.0.bias"].clone()
    tied = small | {"classifier.0.bias": bias, "classifier.1.bias": bias}
    model = load_checkpoint(_saved(tied, tmp_path / "m.pth")).model.state_dict()
    first, second = model["classifier.0.bias"], model["classifier.1.bias"]
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


def test_the_digest_is_the_files(small: State, tmp_path: Path) -> None:
    import hashlib

    path = _saved(small, tmp_path / "m.pth")
    assert load_checkpoint(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


# --- code in a file ------------------------------------------------------------------------------


class Evil:
    """Unpickling it touches a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


class Sly(Evil):
    """The same by way of a builtin."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"__import__('pathlib').Path({str(self.canary)!r}).touch()",)


def _zip_saved(tree: object, path: Path) -> None:
    torch.save(tree, path)


def _legacy_saved(tree: object, path: Path) -> None:
    torch.save(tree, path, _use_new_zipfile_serialization=False)


def _pickled(tree: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(tree))


@pytest.mark.parametrize("write", [_zip_saved, _legacy_saved, _pickled])
@pytest.mark.parametrize("kind", [Evil, Sly])
@pytest.mark.parametrize("beside_weights", [True, False])
def test_code_in_a_file_is_refused_and_does_not_run(
    write: Callable[[object, Path], None],
    kind: type[Evil],
    beside_weights: bool,
    small: State,
    tmp_path: Path,
) -> None:
    canary = tmp_path / "canary"
    evil = kind(canary)
    write({"state_dict": small, "extra": evil} if beside_weights else evil, tmp_path / "m.pth")
    with pytest.raises(
        ArtefactMismatch, match=r"names (posix\.system|(builtins\.)?eval|torch\._utils).* run"
    ):
        load_checkpoint(tmp_path / "m.pth")
    with pytest.raises(ArtefactMismatch):
        load_backbone(tmp_path / "m.pth", DeepLab.__new__(DeepLab))
    assert not canary.exists()
    if write is _pickled and not beside_weights:  # the canary sings when the file is believed
        pickle.loads((tmp_path / "m.pth").read_bytes())
        assert canary.exists()


def test_a_whole_pickled_network_is_refused_with_the_way_out(tmp_path: Path) -> None:
    _zip_saved(SmallDeepLab(2), tmp_path / "m.pth")
    with pytest.raises(ArtefactMismatch, match=r"SmallDeepLab.*torch\.save\(model\.state_dict"):
        load_checkpoint(tmp_path / "m.pth")


def test_numpy_objects_are_not_let_in_by_the_allow_list(small: State, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    array = np.array([Evil(canary), None], dtype=object)
    _zip_saved({"state_dict": small, "extra": array}, tmp_path / "m.pth")
    with pytest.raises(ArtefactMismatch, match="Nothing in it was run"):
        load_checkpoint(tmp_path / "m.pth")
    assert not canary.exists()


# --- files that are no checkpoint ----------------------------------------------------------------


def test_a_file_cut_short_anywhere_is_an_error(small: State, tmp_path: Path) -> None:
    save_file(small, tmp_path / "whole.safetensors")
    wholes = {
        "zip": _saved(small, tmp_path / "zip.pth").read_bytes(),
        "legacy": _saved(small, tmp_path / "old.pth", legacy=True).read_bytes(),
        "safetensors": (tmp_path / "whole.safetensors").read_bytes(),
    }
    cut = tmp_path / "cut.pth"
    for kind, data in wholes.items():
        for share in (0.001, 0.01, 0.3, 0.9, 0.9999):
            cut.write_bytes(data[: max(1, int(len(data) * share))])
            with pytest.raises(ArtefactMismatch) as caught:
                load_checkpoint(cut)
            assert "cut.pth" in str(caught.value) and "expected" in str(caught.value), kind


def test_any_flipped_byte_of_a_header_is_an_error_or_harmless(small: State, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    bent = tmp_path / "bent.pth"
    for legacy in (True, False):
        whole = bytearray(_saved(small, tmp_path / "m.pth", legacy).read_bytes())
        for position in draw.integers(0, 3000, 40):
            data = whole.copy()
            data[position] ^= int(draw.integers(1, 256))
            bent.write_bytes(data)
            try:
                load_checkpoint(bent)
            except CadaError:
                continue


CONTENTS: Mapping[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "text": (b"epoch 3, loss 0.4\n", "text beginning with 'epoch 3, loss 0.4'"),
    "web page": (b"<!DOCTYPE html><title>Google Drive - Virus scan</title>", "a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
    "zeros": (bytes(4096), "zero bytes"),
    "noise": (b"\x91\x17\xfe\x00garbage\xff" * 99, "unknown kind"),
    "pickle": (pickle.dumps({"a": 1}), "a pickle, not written by torch.save"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_what_is_no_checkpoint_is_named(kind: str, tmp_path: Path) -> None:
    data, said = CONTENTS[kind]
    (tmp_path / "m.pth").write_bytes(data)
    with pytest.raises(ArtefactMismatch, match=said) as caught:
        load_checkpoint(tmp_path / "m.pth")
    assert "m.pth" in str(caught.value) and "expected" in str(caught.value)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(UsageError, match="is a folder"):
        load_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(UsageError, match="no ordinary file"):
        load_checkpoint(tmp_path / "pipe.pth")


def _rezipped(data: Path, out: Path, change: Mapping[str, bytes], compress: bool = False) -> Path:
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(data) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, change.get(name.rpartition("/")[2], old.read(name)))
    return out


def test_zips_of_another_kind(small: State, tmp_path: Path) -> None:
    path = _saved(small, tmp_path / "m.pth")
    newer = _rezipped(path, tmp_path / "newer.pth", {"version": b"11\n"})
    with pytest.raises(ArtefactMismatch, match="format '11'; expected 1 to 10"):
        load_checkpoint(newer)
    packed = _rezipped(path, tmp_path / "packed.pth", {}, compress=True)
    with pytest.raises(ArtefactMismatch, match="compressed zip"):
        load_checkpoint(packed)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ArtefactMismatch, match=r"zip without a checkpoint.*readme\.txt"):
        load_checkpoint(tmp_path / "other.zip")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("m/code/__torch__.py", "")
    with pytest.raises(ArtefactMismatch, match="TorchScript"):
        load_checkpoint(tmp_path / "script.pt")


TREES: Mapping[str, tuple[object, str]] = {
    "optimiser": (
        {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "state of an optimiser and no weights",
    ),
    "nested optimiser": (
        {"epoch": 3, "optimizer": {"state": {0: {"m": torch.zeros(3)}}, "param_groups": []}},
        "state of an optimiser and no weights",
    ),
    "one tensor": (torch.zeros(3), "holds a Tensor, not a dictionary"),
    "list": ([torch.zeros(3)], "holds a list"),
    "numbers": ({"epoch": 3}, "no named tensors"),
    "unknown": ({"encoder.weight": torch.zeros(3)}, "no family that is known"),
}


@pytest.mark.parametrize("kind", TREES)
def test_checkpoints_without_a_model_that_is_known(kind: str, tmp_path: Path) -> None:
    tree, said = TREES[kind]
    with pytest.raises(ArtefactMismatch, match=said):
        load_checkpoint(_saved(tree, tmp_path / "m.pth"))


# --- weights that do not fit ---------------------------------------------------------------------


def test_half_of_the_names_is_an_error_unless_asked_for(small: State, tmp_path: Path) -> None:
    half = {k: v for k, v in small.items() if not k.startswith("trunk.")}
    half["trunk.0.first.0.weight"] = torch.zeros(64, 64, 1, 1)
    half["attention.weight"] = torch.zeros(4)
    path = _saved(half, tmp_path / "m.pth")
    with pytest.raises(ArtefactMismatch, match="--allow-partial") as caught:
        load_checkpoint(path)
    for said in (r"missing: trunk.0.first.1.weight", "unexpected: attention.weight",
                 "(64, 64, 1, 1), expected (64, 64, 3, 3)"):  # fmt: skip
        assert said in str(caught.value)
    report = load_checkpoint(path, allow_partial=True).report
    assert report.allow_partial and not report.complete and 0 < report.percent < 100
    assert report.unexpected == ("attention.weight",)
    assert [m.name for m in report.mismatched] == ["trunk.0.first.0.weight"]
    assert "a partial load was allowed" in report.text() and report.to_json()["partial"]


def test_a_partial_load_is_the_same_every_time(small: State, tmp_path: Path) -> None:
    half = {k: v for k, v in small.items() if not k.startswith("trunk.")}
    path = _saved(half, tmp_path / "m.pth")
    first, second = (load_checkpoint(path, allow_partial=True).model for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, small: State, tmp_path: Path) -> None:
    bad = small["trunk.1.second.0.weight"].clone()
    bad[0, 0, 0, :2] = value
    path = _saved(small | {"trunk.1.second.0.weight": bad}, tmp_path / "m.pth")
    with pytest.raises(ArtefactMismatch, match=r"trunk\.1\.second\.0\.weight has 2 of 36864"):
        load_checkpoint(path)


def test_other_tensors_that_no_network_computes_with(small: State, tmp_path: Path) -> None:
    name = "classifier.0.bias"
    spoilt = {
        "negative variance": {"stem.0.1.running_var": -torch.ones(16)},
        "int8": {name: torch.zeros(7, dtype=torch.int8)},
        "sparse": {name: torch.zeros(7).to_sparse()},
        "complex64": {name: torch.zeros(7, dtype=torch.complex64)},
    }
    for said, change in spoilt.items():
        with pytest.raises(ArtefactMismatch, match=f"{next(iter(change))}.*{said}"):
            load_checkpoint(_saved(small | change, tmp_path / "m.pth"))


def test_the_class_count_is_the_heads(tmp_path: Path, single: State) -> None:
    path = files.hollow_checkpoint(tmp_path / "voc.pth", "bdl", classes=21)
    with pytest.raises(ArtefactMismatch, match="head for 21 classes; expected 19"):
        load_checkpoint(path, classes=19)
    assert load_checkpoint(path).classes == 21
    mixed = single | {"layer5.conv2d_list.1.bias": torch.zeros(21)}
    with pytest.raises(ArtefactMismatch, match=r"\[19, 21\] classes; expected one number"):
        load_checkpoint(_saved(mixed, tmp_path / "mixed.pth"))


def test_an_architecture_that_was_asked_for_must_fit(tmp_path: Path, small: State) -> None:
    path = _saved(small, tmp_path / "m.pth")
    assert load_checkpoint(path, arch="deeplab-small").classes == 7
    with pytest.raises(ArtefactMismatch, match=r"holds deeplab-small.*expected deeplabv2-multi"):
        load_checkpoint(path, arch="deeplabv2-multi")
    with pytest.raises(UsageError, match="did you mean 'deeplabv2-clan'"):
        load_checkpoint(path, arch="deeplabv2-clam")
    with pytest.raises(UsageError, match="expected auto, 2 or 4"):
        load_checkpoint(path, aspp_branches=3)  # type: ignore[arg-type]


# --- families that are known and not run ---------------------------------------------------------

STRANGERS: Mapping[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "CAG": (
        {"backbone.conv1.weight": (8, 3, 7, 7), "aspp.aspp1.atrous_conv.weight": (4, 8, 1, 1),
         "decoder.last_conv.0.weight": (4, 4, 3, 3)},
        "CAG_UDA",
    ),
    "ProDA": (
        {"layer4.2.conv3.weight": (8, 8, 1, 1), "layer5.conv2d_list.0.0.weight": (4, 8, 1, 1),
         "layer5.bottleneck.0.se.0.weight": (4, 4), "layer5.head.1.weight": (19, 4, 1, 1)},
        "ProDA",
    ),
    "Seg-Uncertainty": (
        {"layer5.conv2d_list.0.0.weight": (4, 8, 1, 1), "layer5.bottleneck.0.weight": (4, 4, 3, 3),
         "layer6.conv2d_list.0.0.weight": (4, 8, 1, 1), "layer6.head.1.weight": (19, 4, 1, 1)},
        "Seg-Uncertainty",
    ),
    "DAFormer": (
        {"model.backbone.patch_embed1.proj.weight": (8, 3, 7, 7),
         "ema_model.decode_head.conv_seg.weight": (19, 8, 1, 1),
         "imnet_model.backbone.norm1.weight": (8,)},
        "DAFormer",
    ),
    "HRDA": (
        {"model.backbone.patch_embed1.proj.weight": (8, 3, 7, 7),
         "model.decode_head.head.conv_seg.weight": (19, 8, 1, 1),
         "model.scale_attention.conv_seg.weight": (19, 8, 1, 1)},
        "HRDA or MIC",
    ),
    "BDL VGG": (
        {"conv1_1.weight": (8, 3, 3, 3), "fc6.weight": (8, 8, 7, 7),
         "score_pool3.weight": (19, 8, 1, 1)},
        "BDL's VGG-16",
    ),
    "VGG": (
        {"features.0.weight": (8, 3, 3, 3), "classifier.conv2d_list.0.weight": (19, 8, 3, 3)},
        "VGG-16",
    ),
    "SegFormer": ({"segformer.encoder.patch.weight": (8, 3, 7, 7)}, "SegFormer"),
    "torchvision": (
        {"backbone.layer4.0.conv1.weight": (8, 8, 1, 1), "classifier.4.weight": (19, 8, 1, 1)},
        "torchvision's DeepLabV3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", STRANGERS)
def test_families_that_it_cannot_run_are_named_with_the_way_out(
    family: str, tmp_path: Path
) -> None:
    shapes, said = STRANGERS[family]
    tree = {"meta": {"epoch": 1}, "state_dict": {n: torch.zeros(s) for n, s in shapes.items()}}
    with pytest.raises(ArtefactMismatch, match=said) as caught:
        load_checkpoint(_saved(tree, tmp_path / "m.pth"))
    for word in ("torch.onnx.export", "--engine ort", "--preset"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "names", [["conv1", "conv2", "conv3", "conv4", "classifier"], ["0", "2", "4", "6", "8"]]
)
def test_a_discriminator_is_explained(names: list[str], tmp_path: Path) -> None:
    widths = [19, 64, 128, 256, 512, 1]
    tensors: State = {}
    for name, inputs, outputs in zip(names, widths, widths[1:]):
        tensors[f"{name}.weight"] = torch.zeros(1).expand(outputs, inputs, 4, 4)
        tensors[f"{name}.bias"] = torch.zeros(outputs)
    with pytest.raises(ArtefactMismatch, match=r"discriminator.*give the file beside it"):
        load_checkpoint(_saved(tensors, tmp_path / "GTA5_100000_D.pth"))


# --- the 2-of-4 ASPP trap ------------------------------------------------------------------------


def _head(
    draw: torch.Generator,
    trained: tuple[bool, ...],
    *,
    channels: int = 2048,
    kept_idle: float = 1.0,
    dtype: torch.dtype = torch.float32,
    **update: Any,
) -> list[AsppEvidence]:
    evidence = []
    for k, works in enumerate(trained):
        options = update if works else {"energy": 0.0, "kept": kept_idle}
        weight, bias = files.branch(draw, 19, channels, **options)
        evidence.append(branch_evidence(weight.to(dtype), bias.to(dtype), branch=k))
    return evidence


TWO, FOUR, NONE = (True, True, False, False), (True,) * 4, (False,) * 4


def _update(k: int) -> dict[str, Any]:
    """Updates weak and strong, some decayed, and every third of the kind that is hardest to see."""
    hard = k % 3 == 0
    return {
        "energy": (0.3, 0.5, 1.0, 2.0, 8.0)[k % 5] if hard else (0.04, 0.08, 0.3, 1.0, 8.0)[k % 5],
        "rank": (64, 128, 256, 512)[k % 4] if hard else (1, 4, 16, 64)[k % 4],
        "balanced": hard,
        "kept": (1.0, 0.95, 0.6)[k // 3 % 3],
        "tap_likeness": (0.0, 0.3, 0.7, 1.0)[k // 5 % 4],
        "channels": (1024, 2048)[k % 2],
    }


@pytest.mark.parametrize("trained, expected", [(TWO, 2), (FOUR, 4), (NONE, None)])
def test_the_branches_are_told_right_on_100_files_of_each_kind(
    trained: tuple[bool, ...], expected: int | None
) -> None:
    draw = torch.Generator().manual_seed(11)
    for k in range(100):
        decision = decide({"layer5": _head(draw, trained, **_update(k))}, ["layer5"])
        assert decision.branches == expected, f"{_update(k)}\n{decision.describe()}"


def test_idle_branches_are_told_when_they_were_decayed_or_rounded() -> None:
    draw = torch.Generator().manual_seed(12)
    for kept in (0.99, 0.7, 0.05, 1e-3):
        evidence = _head(draw, TWO, kept_idle=kept, energy=0.5)
        assert decide({"layer5": evidence}, ["layer5"]).branches == 2, kept
    for dtype in (torch.float16, torch.bfloat16):
        for trained, expected in ((TWO, 2), (FOUR, 4)):
            evidence = _head(draw, trained, dtype=dtype, energy=0.5)
            assert decide({"layer5": evidence}, ["layer5"]).branches == expected, dtype


LIMITS = [  # energy of the update, balanced, verdicts that are allowed
    (0.015, False, {"trained", "undecidable"}),
    (0.03, False, {"trained"}),
    (0.03, True, {"trained", "undecidable"}),
    (0.3, True, {"trained"}),
]


@pytest.mark.parametrize("energy, balanced, allowed", LIMITS)
def test_weak_updates_are_seen_down_to_the_limits_that_the_module_states(
    energy: float, balanced: bool, allowed: set[str]
) -> None:
    draw = torch.Generator().manual_seed(13)
    for rank in (8, 64, 512):
        for likeness in (0.0, 0.5, 1.0):
            for _ in range(3):
                weight, bias = files.branch(
                    draw, 19, 2048,
                    energy=energy, rank=rank, tap_likeness=likeness, balanced=balanced,
                )  # fmt: skip
                assert branch_evidence(weight, bias).verdict in allowed, (rank, likeness)


def test_idle_branches_of_unequal_scale_are_undecidable() -> None:
    draw = torch.Generator().manual_seed(17)
    heads = _head(draw, TWO, energy=0.5)
    heads[3] = branch_evidence(*files.branch(draw, 19, 2048, kept=0.9), branch=3)
    decision = decide({"layer5": heads}, ["layer5"])
    assert decision.branches is None and "unequal scales" in decision.reason


def test_what_is_neither_is_undecidable() -> None:
    draw = torch.Generator().manual_seed(14)
    shape = (19, 1024, 3, 3)
    bias = torch.zeros(19)
    uniform = (torch.rand(shape, generator=draw) * 2 - 1) * 0.01
    wide = torch.randn(shape, generator=draw) * 0.02
    moved = torch.randn(shape, generator=draw) * 0.01 + 0.001
    for weight in (uniform, wide, moved, torch.zeros(shape), torch.ones(shape)):
        assert branch_evidence(weight, bias).verdict == "undecidable"
    fresh = torch.randn(shape, generator=draw) * 0.01
    assert branch_evidence(fresh, bias).verdict == "untrained"
    assert branch_evidence(fresh, bias + 0.5).verdict == "undecidable"


def test_heads_must_not_contradict_each_other() -> None:
    draw = torch.Generator().manual_seed(15)
    heads = {t: _head(draw, t, channels=1024, energy=0.5) for t in (TWO, FOUR, NONE)}

    def says(aux: tuple[bool, ...], main: tuple[bool, ...], both: bool = False) -> int | None:
        names = ["layer5", "layer6"] if both else ["layer6"]
        return decide({"layer5": heads[aux], "layer6": heads[main]}, names).branches

    assert says(TWO, TWO) == 2 and says(FOUR, FOUR) == 4
    assert says(TWO, FOUR) is None and says(FOUR, TWO) is None
    assert says(NONE, FOUR) == 4  # an auxiliary head that was never trained has no say
    assert says(FOUR, NONE) is None
    assert says(NONE, FOUR, both=True) is None  # CLAN sums both
    assert decide({"layer5": heads[FOUR]}, ["layer5"]).evidence == tuple(heads[FOUR])


def _with_branches(state: State, draw: torch.Generator, trained: tuple[bool, ...]) -> State:
    changed = dict(state)
    for k, works in enumerate(trained):
        weight, bias = files.branch(draw, 19, 2048, energy=0.5 if works else 0.0)
        changed[f"layer5.conv2d_list.{k}.weight"] = weight
        changed[f"layer5.conv2d_list.{k}.bias"] = bias
    return changed


def test_undecidable_files_need_the_option_which_is_named(single: State, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(16)
    odd = _with_branches(single, draw, (True, False, True, False))
    path = _saved(odd, tmp_path / "m.pth")
    with pytest.raises(ArtefactMismatch, match="Give --aspp-branches 2") as caught:
        load_checkpoint(path)
    assert "branch 3 (dilation 24): untrained; structure z" in str(caught.value)
    loaded: Loaded = load_checkpoint(path, aspp_branches=2)
    assert loaded.architecture == DeepLabV2("single", aspp_branches=2)
    assert "undecidable" in loaded.describe()


def test_asking_against_the_evidence_is_done_and_recorded(single: State, tmp_path: Path) -> None:
    loaded = load_checkpoint(_saved(single, tmp_path / "m.pth"), aspp_branches=2)
    assert loaded.architecture == DeepLabV2("single", aspp_branches=2)
    assert "2 ASPP branches were asked for; its tensors say 4" in loaded.report.notes
