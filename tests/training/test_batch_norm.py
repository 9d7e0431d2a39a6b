"""Batch-norm policies, and re-estimated statistics against NumPy's over the whole set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from cada_deploy.training.batch_norm import POLICIES, norms, reestimate, train  # noqa: E402
from cada_deploy.training.models.small import SmallDeepLab  # noqa: E402

from cada_deploy.errors import RunFailed, UsageError  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(seed: int = 0) -> SmallDeepLab:
    torch.manual_seed(seed)
    made = SmallDeepLab(3)
    for norm in norms(made):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.uniform_(norm.bias, -0.5, 0.5)
    return made


def images(count: int, seed: int = 0) -> Any:
    draw = np.random.default_rng(seed)
    return torch.from_numpy(draw.normal(0.4, 1.3, (count, 3, 32, 40)).astype(np.float32))


def statistics(of: Any) -> list[Any]:
    return [t.clone() for n in norms(of) for t in (n.running_mean, n.running_var)]


def inputs_of(of: Any, norm: Any, batches: list[Any]) -> Any:
    """What that norm sees, every norm before it normalising by the batch: (N, C, h, w) float64."""
    seen: list[Any] = []
    handle = norm.register_forward_pre_hook(lambda _, x: seen.append(x[0].double().numpy()))
    with torch.no_grad():
        of.train()
        for batch in batches:
            of(batch)
    handle.remove()
    return np.concatenate(seen)


# --- re-estimation -------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[6], [3, 3], [1, 4, 2], [2] * 5])
def test_running_statistics_are_numpys_over_the_set(sizes: list[int]) -> None:
    batches = list(images(sum(sizes)).split(sizes))
    reference = network()
    expected = [inputs_of(reference, norm, batches) for norm in norms(reference)]
    found = network()
    assert reestimate(found, iter(batches)) == sum(sizes)
    for norm, x in zip(norms(found), expected):
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
        assert abs(norm.running_mean.numpy() - mean).max() <= 1e-6 * max(1, abs(mean).max())
        assert abs(norm.running_var.numpy() / variance - 1).max() <= 1e-6
        assert norm.num_batches_tracked == len(sizes)


@settings(max_examples=10)
@given(st.permutations(range(5)), st.sampled_from([1, 2, 5]))
def test_the_first_norm_knows_neither_order_nor_batches(order: list[int], size: int) -> None:
    frames = images(5)
    one, other = network(), network()
    reestimate(one, [frames])
    reestimate(other, frames[order].split(size))
    first, second = norms(one)[0], norms(other)[0]
    assert abs(first.running_mean - second.running_mean).max() <= 1e-6
    assert abs(first.running_var / second.running_var - 1).max() <= 1e-6


def test_the_same_images_give_the_same_bits() -> None:
    batches = images(6).split(2)
    one, other = network(), network()
    with torch.no_grad():
        other.train()(images(4, seed=9))  # a past of other statistics, and another mode
    other.eval()
    reestimate(one, batches)
    reestimate(other, batches)
    for a, b in zip(statistics(one), statistics(other)):
        assert torch.equal(a, b)


def test_one_batch_then_inference_is_that_batch_normalised_by_itself() -> None:
    frames = images(4)
    found = network()
    reestimate(found, [frames])
    with torch.no_grad():
        by_itself = network().train()(frames)
        assert abs(found.eval()(frames) - by_itself).max() <= 1e-4


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_but_the_statistics_changes(policy: str) -> None:
    found = network()
    train(found, policy)
    before = {n: p.clone() for n, p in found.named_parameters()}
    modes = [m.training for m in found.modules()]
    reestimate(found, images(4).split(2))
    assert [m.training for m in found.modules()] == modes
    assert all(n.track_running_stats and not n._forward_pre_hooks for n in norms(found))
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None, name


def test_a_failure_leaves_the_network_as_it_was() -> None:
    found = network().eval()
    before = statistics(found)

    def broken() -> Iterator[Any]:
        yield images(2)
        raise OSError("the disk is gone")

    frames = images(2)
    frames[0, 0, 0, 0] = float("nan")
    for batches, error in ((broken(), OSError), ([frames], RunFailed), ([], UsageError)):
        with pytest.raises(error):
            reestimate(found, batches)
        assert all(torch.equal(a, b) for a, b in zip(statistics(found), before))
        assert not any(m.training for m in found.modules())
        assert all(n.track_running_stats and not n._forward_pre_hooks for n in norms(found))


# --- policies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_moves_what_it_says_and_nothing_else(policy: str) -> None:
    chosen = POLICIES[policy]
    found = network().eval()
    statistic = statistics(found)
    affine = [p.clone() for n in norms(found) for p in n.parameters()]
    weight = found.classifier[0].weight.clone()
    for _ in range(2):
        train(found, policy)
        optimiser = torch.optim.SGD([p for p in found.parameters() if p.requires_grad], lr=0.1)
        optimiser.zero_grad()
        found(images(2)).square().mean().backward()
        optimiser.step()
        found.eval()  # an evaluation in between does not undo the policy
    moved = any(not torch.equal(a, b) for a, b in zip(statistics(found), statistic))
    assert moved == chosen.batch_statistics
    now = [p for n in norms(found) for p in n.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(now, affine)) == chosen.affine
    assert not torch.equal(found.classifier[0].weight, weight)


def test_frozen_statistics_normalise_training_as_inference_does() -> None:
    found = network()
    reestimate(found, [images(4)])
    train(found, "frozen")
    frames = images(2, seed=3)
    with torch.no_grad():
        assert torch.equal(found(frames), found.eval()(frames))


def test_a_policy_can_be_changed_back() -> None:
    found = network()
    train(found, "frozen")
    train(found, "train")
    assert all(p.requires_grad for p in found.parameters())
    assert all(m.training for m in found.modules())


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'frozen-stat'.*did you mean 'frozen-stats'"):
        train(network(), "frozen-stat")
