"""The discriminators: BDL's names and shapes, the paper's strides, and maps that are too small."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from cada_deploy.training.models import deeplab  # noqa: E402
from cada_deploy.training.models.deeplab import DeepLabV2  # noqa: E402
from cada_deploy.training.models.discriminators import (  # noqa: E402
    OutputDiscriminator,
    StyleDiscriminator,
)
from cada_deploy.training.models.small import SmallDeepLab  # noqa: E402
from cada_deploy.training.style import style_vector  # noqa: E402

from cada_deploy.errors import UsageError  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# FCDiscriminator of BDL and AdaptSegNet for 19 classes, ndf 64.
BDL = {
    "conv1.weight": (64, 19, 4, 4),
    "conv1.bias": (64,),
    "conv2.weight": (128, 64, 4, 4),
    "conv2.bias": (128,),
    "conv3.weight": (256, 128, 4, 4),
    "conv3.bias": (256,),
    "conv4.weight": (512, 256, 4, 4),
    "conv4.bias": (512,),
    "classifier.weight": (1, 512, 4, 4),
    "classifier.bias": (1,),
}


@pytest.mark.parametrize("stride", [16, 32])
def test_names_and_shapes_are_bdls(stride: int) -> None:
    with torch.device("meta"):
        state = OutputDiscriminator(19, stride).state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == BDL


@pytest.mark.parametrize(
    ("stride", "size", "expected"),
    [
        (16, (512, 1024), (31, 63)),
        (32, (512, 1024), (16, 32)),
        (16, (720, 1280), (44, 79)),
        (16, (32, 32), (1, 1)),
        (32, (32, 47), (1, 1)),
        (16, (49, 101), (2, 5)),
    ],
)
def test_the_map_is_of_the_stated_stride(
    stride: int, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    with torch.device("meta"):
        logits = OutputDiscriminator(19, stride)(torch.empty(2, 19, *size))
    assert logits.shape == (2, 1, *expected)


def test_a_logit_sees_its_own_patch_only() -> None:
    discriminator = OutputDiscriminator(3)
    probabilities = torch.rand(1, 3, 256, 256, requires_grad=True)
    discriminator(probabilities)[0, 0, 0, 0].backward()
    assert probabilities.grad is not None
    seen = probabilities.grad[0].abs().sum(0) > 0
    # 4x4 kernels, four of stride 2 and one of 1: 46 + 16 * 3 = 94 pixels, padded by 31 in front.
    assert seen[:63, :63].any() and not seen[63:].any() and not seen[:, 63:].any()


@pytest.mark.parametrize("size", [(31, 64), (64, 31), (1, 1)])
@pytest.mark.parametrize("stride", [16, 32])
def test_a_map_that_is_too_small_is_refused(stride: int, size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=rf"{size[0]}x{size[1]}; expected at least 32x32.*crops"):
        OutputDiscriminator(3, stride)(torch.empty(1, 3, *size))


def test_another_stride_is_refused() -> None:
    with pytest.raises(UsageError, match="stride 8; expected 16 or 32"):
        OutputDiscriminator(19, 8)


def test_the_style_discriminator_is_four_one_dimensional_convolutions() -> None:
    layers = [m for m in StyleDiscriminator().modules() if isinstance(m, torch.nn.Conv1d)]
    assert [(m.in_channels, m.out_channels) for m in layers] == [
        (1, 64), (64, 128), (128, 256), (256, 1)
    ]  # fmt: skip
    assert all(m.kernel_size == (4,) and m.stride == (2,) and m.padding == (1,) for m in layers)


@pytest.mark.parametrize(("length", "logits"), [(16, 1), (32, 2), (64, 4), (256, 16), (512, 32)])
def test_it_gives_a_sixteenth_as_many_logits(length: int, logits: int) -> None:
    assert StyleDiscriminator()(torch.randn(3, length)).shape == (3, logits)


@pytest.mark.parametrize("shape", [(2, 15), (2, 0), (32,), (2, 32, 1), (2, 64, 8, 8)])
def test_a_style_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"expected \(N, L\) with L of at least 16"):
        StyleDiscriminator()(torch.zeros(shape))


def test_style_comes_from_the_ends_of_the_front_sub_encoders() -> None:
    x = torch.randn(2, 3, 64, 96)
    network = SmallDeepLab(5).eval()
    with torch.no_grad():
        scores, (first, second) = network.with_style(x)
        assert torch.equal(scores, network(x))
        assert torch.equal(first, network.stem(x)) and torch.equal(second, network.front(first))
        assert first.shape == (2, 32, 16, 24) and second.shape == (2, 64, 8, 12)
        assert network.with_style(x, ["trunk"])[1][0].shape == (2, 64, 8, 12)
        mean = first.numpy().astype("float64").mean((2, 3))
        assert abs(style_vector(first).numpy() - mean).max() <= 1e-6
    with pytest.raises(UsageError, match=r"no block is called 'fornt'.*did you mean 'front'"):
        network.with_style(x, ["fornt"])


def test_style_of_resnet_is_of_layer1_and_layer2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deeplab, "BLOCKS", (2, 1, 1, 1))  # not 101 layers: filling those takes long
    torch.manual_seed(0)
    network = DeepLabV2(classes=3).build().eval()
    x = torch.randn(1, 3, 33, 65)
    with torch.no_grad():
        scores, (first, second) = network.with_style(x)
        stem = network.maxpool(network.relu(network.bn1(network.conv1(x))))
        assert torch.equal(first, network.layer1(stem)) and first.shape[1] == 256
        assert torch.equal(second, network.layer2(first)) and second.shape[1] == 512
        assert torch.equal(scores, network(x))
        assert first.min() >= 0 and second.min() >= 0
        again, chosen = network.with_style(x, ["stem", "layer4"])
        assert torch.equal(again, scores) and [f.shape[1] for f in chosen] == [64, 2048]
    with pytest.raises(UsageError, match="no block is called 'layer5'"):
        network.with_style(x, ["layer5"])


def test_the_decoder_is_what_the_paper_trains_ten_times_faster() -> None:
    with torch.device("meta"):
        assert DeepLabV2("multi").build().decoder == ("layer5", "layer6")
    assert SmallDeepLab().decoder == ("classifier",)
