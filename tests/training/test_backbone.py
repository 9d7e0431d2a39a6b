"""Backbones from local files, in each layout that trainings begin from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from cada_deploy.training.checkpoints import load_backbone, load_checkpoint  # noqa: E402
from cada_deploy.training.models.deeplab import DeepLab, DeepLabV2  # noqa: E402
from cada_deploy.training.models.small import SmallDeepLab  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from cada_deploy.errors import ArtefactMismatch, UsageError  # noqa: E402

from . import checkpoint_files as files  # noqa: E402

State = dict[str, Any]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def single() -> State:
    """BDL's names and shapes, the trunk of constants but for the first convolution."""
    state = dict(files.hollow_state(DeepLabV2("single")))
    return state | {"conv1.weight": torch.full((64, 3, 7, 7), 0.5)}


@pytest.fixture(scope="module")
def trunk(single: State) -> State:
    return {k: v for k, v in single.items() if not k.startswith("layer5")}


def empty(head: str = "single") -> DeepLab:
    """A network whose every weight is 7."""
    with torch.device("meta"):
        network = DeepLabV2(head).build()
    network.to_empty(device="cpu")
    for tensor in network.state_dict().values():
        tensor.fill_(7)
    return network


def saved(tree: object, path: Path, legacy: bool = False) -> Path:
    torch.save(tree, path, _use_new_zipfile_serialization=not legacy)
    return path


def filled(network: DeepLab, trunk: State) -> None:
    """Holds the trunk's values, and heads that nobody touched."""
    for name, tensor in network.state_dict().items():
        if name.startswith(("layer5.", "layer6.")):
            assert (tensor == 7).all(), name
        elif not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, trunk[name]), name


def test_adaptsegnets_scale_file(tmp_path: Path, single: State, trunk: State) -> None:
    init = {f"Scale.{k}": v for k, v in single.items() if "num_batches" not in k}
    path = saved(init, tmp_path / "DeepLab_resnet_pretrained_init.pth", legacy=True)
    network = empty("multi")
    report = load_backbone(path, network)
    assert report.complete and report.layout == "legacy" and report.stripped == ("Scale.",)
    assert len(report.matched) == 520 and report.filled == 104
    assert "the head was dropped: 8 tensors of layer5" in report.text()
    assert hashlib.sha256(path.read_bytes()).hexdigest() in report.text()
    filled(network, trunk)
    with pytest.raises(ArtefactMismatch, match=r"initial weights.*load_backbone"):
        load_checkpoint(path)
    assert load_checkpoint(path, arch="deeplabv2-single").report.stripped == ("Scale.",)


def test_torchvisions_resnet_with_a_word_about_its_stride(tmp_path: Path, trunk: State) -> None:
    whole = trunk | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    path = saved(whole, tmp_path / "resnet101.pth")
    network = empty()
    report = load_backbone(path, network)
    assert report.complete and report.layout == "zip" and len(report.matched) == 624
    assert "stride on the 3x3" in report.text() and "2 tensors of fc" in report.text()
    filled(network, trunk)
    with pytest.raises(ArtefactMismatch, match="without a segmentation head"):
        load_checkpoint(path)


def test_a_trained_checkpoint_gives_its_trunk(tmp_path: Path, trunk: State) -> None:
    path = files.hollow_checkpoint(tmp_path / "best.pth", "maxsquare")
    network = empty()
    report = load_backbone(path, network)
    assert report.complete and report.nesting == ("state_dict",) and report.stripped == ("module.",)
    assert "16 tensors of layer5, layer6" in report.text()
    first = torch.full_like(trunk["conv1.weight"], 0.01)
    filled(network, trunk | {"conv1.weight": first})


def test_safetensors_in_half_precision(tmp_path: Path, trunk: State) -> None:
    half = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in trunk.items()}
    save_file(half, tmp_path / "resnet101.safetensors")
    network = empty()
    report = load_backbone(tmp_path / "resnet101.safetensors", network)
    assert report.layout == "safetensors" and report.converted == {"float16": 520}
    filled(network, {k: v.float() for k, v in half.items()})
    assert network.conv1.weight.dtype == torch.float32


def test_what_does_not_fit_changes_nothing(tmp_path: Path, trunk: State) -> None:
    path = tmp_path / "resnet.pth"
    network = empty()
    lacking = {k: v for k, v in trunk.items() if k != "layer4.2.bn3.bias"}
    with pytest.raises(ArtefactMismatch, match=r"(?s)the trunk .*missing: layer4\.2\.bn3\.bias"):
        load_backbone(saved(lacking, path), network)
    shallow = {k: v for k, v in trunk.items() if not k.startswith("layer3.22")}  # not the 101
    with pytest.raises(ArtefactMismatch, match=r"missing: layer3\.22\."):
        load_backbone(saved(shallow, path), network)
    broken = trunk | {"bn1.weight": torch.full((64,), float("nan"))}
    with pytest.raises(ArtefactMismatch, match=r"bn1\.weight has 64 of 64 .*NaN"):
        load_backbone(saved(broken, path), network)
    assert all((t == 7).all() for t in network.state_dict().values())


def test_the_small_network_takes_no_backbone(tmp_path: Path, trunk: State) -> None:
    with pytest.raises(UsageError, match=r"SmallDeepLab has no trunk.*leave the weights away"):
        load_backbone(saved(trunk, tmp_path / "resnet101.pth"), SmallDeepLab(3))
    with pytest.raises(UsageError, match="no checkpoint at"):
        load_backbone(tmp_path / "absent.pth", empty())
