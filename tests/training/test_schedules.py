"""Learning rates by the paper's numbers, as pure functions; parameter groups; optimisers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from cada_deploy.training import batch_norm, schedules  # noqa: E402
from cada_deploy.training.models.deeplab import DeepLabV2  # noqa: E402
from cada_deploy.training.models.small import SmallDeepLab  # noqa: E402
from cada_deploy.training.schedules import (  # noqa: E402
    PAPER,
    SMALL,
    DiscriminatorPlan,
    NetworkPlan,
)

from cada_deploy.errors import UsageError  # noqa: E402

STEPS = st.integers(0, 400_000)


@given(STEPS)
def test_the_papers_rates_are_its_formulas(step: int) -> None:
    left = max(np.float64(0), 1 - np.float64(step) / 250_000)
    assert abs(PAPER.rate_at(step) - 2.5e-4 * left**0.9) <= 1e-18
    stairs, smooth = DiscriminatorPlan(), DiscriminatorPlan(stairs=False)
    assert stairs.rate_at(step) == pytest.approx(1e-4 * 10.0 ** -(step // 50_000), rel=1e-12)
    assert smooth.rate_at(step) == pytest.approx(1e-4 * 10.0 ** -(step / 50_000), rel=1e-12)


@given(STEPS)
def test_rates_never_rise_and_stairs_stand_above_the_slope(step: int) -> None:
    for plan in (PAPER, DiscriminatorPlan(), DiscriminatorPlan(stairs=False)):
        assert 0 <= plan.rate_at(step + 1) <= plan.rate_at(step)
    smooth = DiscriminatorPlan(stairs=False).rate_at(step)
    assert DiscriminatorPlan().rate_at(step) >= smooth * (1 - 1e-12)


def test_the_stairs_are_where_the_paper_puts_them() -> None:
    rates = [DiscriminatorPlan().rate_at(s) for s in (0, 49_999, 50_000, 99_999, 100_000)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6], rel=1e-12)
    assert PAPER.rate_at(0) == 2.5e-4 and PAPER.rate_at(250_000) == PAPER.rate_at(300_000) == 0.0


def test_the_warm_up_is_linear_and_ends() -> None:
    assert [schedules.warm_up(s, 4) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert schedules.warm_up(0, 0) == 1
    plan = NetworkPlan(learning_rate=1.0, poly_steps=100, warmup=10)
    assert plan.rate_at(4) == pytest.approx(0.5 * 0.96**0.9, rel=1e-12)


@pytest.mark.parametrize("head", ["single", "multi"])
def test_encoder_and_decoder_are_every_parameter_once(head: str) -> None:
    with torch.device("meta"):
        network = DeepLabV2(head).build()
    optimiser: Any = PAPER.optimiser(network)
    encoder, decoder = optimiser.param_groups
    named = {p: n for n, p in network.named_parameters()}
    assert [g["name"] for g in optimiser.param_groups] == ["encoder", "decoder"]
    assert {named[p].partition(".")[0] for p in decoder["params"]} == set(network.decoder)
    whole = [*encoder["params"], *decoder["params"]]
    assert len(whole) == len(named) and {named[p] for p in whole} == set(named.values())


def test_the_papers_optimisers_have_its_numbers() -> None:
    with torch.device("meta"):
        network = DeepLabV2().build()
    optimiser: Any = PAPER.optimiser(network)
    assert isinstance(optimiser, torch.optim.SGD)
    for group in optimiser.param_groups:
        assert group["momentum"] == 0.9 and group["weight_decay"] == 5e-4
        assert not group["nesterov"] and group["dampening"] == 0
    schedules.set_rate(optimiser, PAPER.rate_at(0))
    assert [g["lr"] for g in optimiser.param_groups] == [2.5e-4, 2.5e-3]
    schedules.set_rate(optimiser, PAPER.rate_at(125_000))
    half = 2.5e-4 * 0.5**0.9
    assert [g["lr"] for g in optimiser.param_groups] == pytest.approx([half, 10 * half])
    judges: Any = DiscriminatorPlan().optimiser([torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)])
    assert isinstance(judges, torch.optim.Adam) and not isinstance(judges, torch.optim.AdamW)
    (group,) = judges.param_groups
    assert group["lr"] == 1e-4 and group["betas"] == (0.9, 0.99) and len(group["params"]) == 4
    schedules.set_rate(judges, 1e-5)  # a group without a factor has the rate itself
    assert group["lr"] == 1e-5


def test_the_small_networks_defaults_are_adamw() -> None:
    optimiser: Any = SMALL.optimiser(SmallDeepLab(3))
    assert isinstance(optimiser, torch.optim.AdamW)
    assert all(g["weight_decay"] == 1e-2 and g["factor"] == 1.0 for g in optimiser.param_groups)
    assert SMALL.rate_at(49) == pytest.approx(2e-3 * (1 - 49 / 2000) ** 0.9)


def test_what_is_frozen_is_not_optimised() -> None:
    network = SmallDeepLab(3)
    batch_norm.train(network, "frozen")
    encoder, decoder = schedules.parameter_groups(network, 10.0)
    assert all(p.ndim == 4 for p in encoder["params"]) and decoder["factor"] == 10.0
    for parameter in network.classifier.parameters():
        parameter.requires_grad_(False)
    assert [g["name"] for g in schedules.parameter_groups(network, 10.0)] == ["encoder"]


def test_a_plan_refuses_nonsense() -> None:
    with pytest.raises(UsageError, match="did you mean 'adamw'"):
        NetworkPlan("adam_w")
    for wrong in ({"poly_steps": 0}, {"warmup": -1}, {"learning_rate": float("nan")}):
        with pytest.raises(UsageError, match="expected a positive rate"):
            NetworkPlan(**wrong)  # type: ignore[arg-type]
