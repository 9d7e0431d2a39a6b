"""DeepLabV2-ResNet101: names, counts, sizes and sums as the projects have them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from cada_deploy.training.models.deeplab import (  # noqa: E402
    HEADS,
    Bottleneck,
    DeepLab,
    DeepLabV2,
    score_size,
)

from cada_deploy.errors import UsageError  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=sorted(HEADS))
def shape_only(request: pytest.FixtureRequest) -> DeepLab:
    with torch.device("meta"):
        return DeepLabV2(request.param).build().eval()


# Counts of keys with and without num_batches_tracked, and millions of parameters: uda.md 2a.
COUNTS = {
    "single": (632, 528, 43.90),
    "single-layer6": (632, 528, 43.90),
    "multi": (640, 536, 44.60),
    "clan": (640, 536, 45.30),
}


def test_counts_are_the_projects_own(shape_only: DeepLab) -> None:
    keys, without_counters, millions = COUNTS[shape_only.architecture.head]
    names = shape_only.state_dict().keys()
    assert len(names) == keys
    assert sum("num_batches_tracked" not in n for n in names) == without_counters
    assert round(sum(p.numel() for p in shape_only.parameters()) / 1e6, 2) == millions
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer3.22.bn3.bias",
            "layer3.0.downsample.0.weight", "layer4.0.downsample.1.weight"} <= names  # fmt: skip
    for name, channels in shape_only.head.classifiers.items():
        weight = shape_only.state_dict()[f"{name}.conv2d_list.3.weight"]
        assert weight.shape == (19, channels, 3, 3)


# uda.md 2a, and odd sizes
SIZES = {
    (512, 1024): (65, 129),
    (1024, 2048): (129, 257),
    (720, 1280): (91, 161),
    (360, 480): (46, 61),
    (513, 1025): (65, 129),
}
ODD = [(1, 1), (2, 3), (7, 9), (17, 33), (90, 120), (131, 257), (250, 333), (511, 1023)]


def test_sizes_follow_ceil_mode(shape_only: DeepLab) -> None:
    # The trunk is one for all heads: every size for one of them, a single size for the others.
    whole = shape_only.architecture.head == "single"
    for height, width in [*SIZES, *ODD] if whole else [(131, 257)]:
        expected = SIZES.get((height, width), score_size(height, width))
        found = shape_only(torch.empty(2, 3, height, width, device="meta"))
        assert found.shape == (2, 19, *expected)
    assert {size: score_size(*size) for size in SIZES} == SIZES


def test_sizes_by_rule_and_by_layers_agree_everywhere() -> None:
    with torch.device("meta"):
        stem = torch.nn.Sequential(
            torch.nn.Conv2d(1, 1, 7, 2, 3),
            torch.nn.MaxPool2d(3, 2, 1, ceil_mode=True),
            torch.nn.Conv2d(1, 1, 1, 2),
        )
        for n in range(1, 400):
            assert stem(torch.empty(1, 1, n, 40)).shape[2] == score_size(n, 40)[0], n


def test_the_trunk_is_caffes(shape_only: DeepLab) -> None:
    first = shape_only.layer2[0]
    assert isinstance(first, Bottleneck)
    assert first.conv1.stride == (2, 2) and first.conv2.stride == (1, 1)
    for stage, dilation in (("layer1", 1), ("layer2", 1), ("layer3", 2), ("layer4", 4)):
        for block in getattr(shape_only, stage):
            assert block.conv2.dilation == (dilation,) * 2 == block.conv2.padding
    assert shape_only.maxpool.ceil_mode and shape_only.bn1.eps == 1e-5


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("branches", [2, 4])
def test_scores_are_the_sums_that_the_project_evaluates(head: str, branches: int) -> None:
    with torch.device("meta"):
        network = DeepLabV2(head, classes=5, aspp_branches=branches).build()
    for name in network.head.classifiers:
        getattr(network, name).to_empty(device="cpu")
    middle, deep = torch.randn(2, 1024, 9, 13), torch.randn(2, 2048, 9, 13)
    for name in network.head.classifiers:
        for parameter in getattr(network, name).parameters():
            torch.nn.init.normal_(parameter, 0, 0.01)
    network.features = lambda _: (middle, deep)  # type: ignore[method-assign]

    def by_hand(name: str) -> torch.Tensor:
        x = middle if network.head.classifiers[name] == 1024 else deep
        convolutions = getattr(network, name).conv2d_list[:branches]
        total = torch.zeros(2, 5, 9, 13, dtype=torch.float64)
        for conv, dilation in zip(convolutions, (6, 12, 18, 24)):
            total += torch.nn.functional.conv2d(
                x.double(), conv.weight.double(), conv.bias.double(), 1, dilation, dilation
            )
        return total

    with torch.no_grad():
        outputs = network.forward_all(torch.empty(2, 3, 65, 97))
        scores = network(torch.empty(2, 3, 65, 97))
        expected = sum(by_hand(name) for name in network.head.main)
        auxiliary = by_hand("layer5") if head == "multi" else None
    assert torch.equal(scores, outputs.scores)
    assert (scores - expected).abs().max() <= 1e-4
    assert (outputs.auxiliary is None) == (auxiliary is None)
    if auxiliary is not None:
        assert (outputs.auxiliary - auxiliary).abs().max() <= 1e-4
    assert len(outputs.parts) == (2 if head == "clan" else 1)


def test_it_runs_on_a_small_image() -> None:
    torch.manual_seed(0)
    network = DeepLabV2(classes=3).build().eval()
    assert network.classes == 3 and network.output_stride == 8
    with torch.inference_mode():
        assert torch.isfinite(network(torch.randn(1, 3, 33, 50))).all()


def test_nonsense_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'multi'"):
        DeepLabV2("mult")
    with pytest.raises(UsageError, match="2 or 4"):
        DeepLabV2(aspp_branches=3)
    with pytest.raises(UsageError, match="at least 1"):
        DeepLabV2(classes=0)
