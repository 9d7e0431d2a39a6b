"""The losses, against float64 NumPy statements of the paper's formulas; laws; and directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from cada_deploy.training import losses  # noqa: E402
from cada_deploy.training.losses import Domain, Weights  # noqa: E402
from cada_deploy.training.models.discriminators import (  # noqa: E402
    OutputDiscriminator,
    StyleDiscriminator,
)
from cada_deploy.training.style import style_vector  # noqa: E402
from cada_deploy.training.upsampling import ORDERS, Upsampling  # noqa: E402

from cada_deploy.errors import UsageError  # noqa: E402

Array = npt.NDArray[Any]
CLASSES = 4
SAME = Upsampling(align_corners=False)
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the formulas, in float64 --------------------------------------------------------------------


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


def upsampled(z: Array, size: tuple[int, int], align_corners: bool) -> Array:
    """(N, C, h, w) -> (N, C, H, W), one axis after the other."""
    for axis, after in zip((2, 3), size):
        before = z.shape[axis]
        at = np.arange(after, dtype=np.float64)
        if align_corners:
            at = at * (before - 1) / max(after - 1, 1)
        else:
            at = np.maximum((at + 0.5) * before / after - 0.5, 0)
        low = np.minimum(np.floor(at).astype(int), before - 1)
        high = np.minimum(low + 1, before - 1)
        shape = [1] * 4
        shape[axis] = after
        part = (at - low).reshape(shape)
        z = z.take(low, axis) * (1 - part) + z.take(high, axis) * part
    return z


def predicted(z: Array, size: tuple[int, int], how: Upsampling) -> Array:
    if how.order == "logits":
        return softmax(upsampled(z, size, how.align_corners))
    return upsampled(softmax(z), size, how.align_corners)


def cross_entropy(p: Array, labels: Array, weights: Array, literal: bool) -> float:
    """Eq. 4, pixel by pixel."""
    total = counted = 0.0
    for n, y, x in np.ndindex(*labels.shape):
        if labels[n, y, x] != 255:
            total -= weights[n, y, x] * math.log(p[n, labels[n, y, x], y, x])
            counted += weights[n, y, x]
    if literal:
        return float(total / labels.size)
    return float(total / counted) if counted else 0.0


def bce(logits: Array, label: float) -> float:
    z = logits.astype(np.float64)
    d = 1 / (1 + np.exp(-z))
    return float(-(label * np.log(d) + (1 - label) * np.log(1 - d)).mean())


def drawn(seed: int, size: tuple[int, int] = (6, 7)) -> tuple[Array, Array, Array]:
    """Scores (2, C, 3, 4), labels (2, H, W) with ignored pixels, weights."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, CLASSES, (2, *size))
    labels[draw.random(labels.shape) < 0.3] = 255
    return 3 * draw.standard_normal((2, CLASSES, 3, 4)), labels, draw.random(labels.shape)


def loss_of(scores: Array, labels: Array, how: Upsampling = SAME, **options: Any) -> float:
    if "weights" in options:
        options["weights"] = torch.from_numpy(options["weights"])
    found = losses.segmentation(torch.from_numpy(scores), torch.from_numpy(labels), how, **options)
    return value(found)


def value(loss: Any) -> float:
    return float(loss.detach())


# --- Eq. 4 and Eq. 6 -----------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("divide_by", ["valid", "all"])
@pytest.mark.parametrize("weighted", [False, True])
def test_segmentation_is_equation_4(
    order: str, align_corners: bool, divide_by: str, weighted: bool
) -> None:
    how = Upsampling(align_corners, order)
    scores, labels, weights = drawn(1)
    p = predicted(scores, (6, 7), how)
    options: dict[str, Any] = {"weights": weights} if weighted else {}
    expected = cross_entropy(
        p, labels, weights if weighted else np.ones(labels.shape), divide_by == "all"
    )
    found = loss_of(scores, labels, how, divide_by=divide_by, **options)
    assert abs(found - expected) <= 1e-12
    single = loss_of(scores.astype(np.float32), labels, how, divide_by=divide_by, **options)
    assert abs(single - expected) <= 1e-5
    given_as = (torch.from_numpy(scores), torch.from_numpy(labels), how)
    weight = torch.from_numpy(weights) if weighted else None
    ssl = losses.self_supervised(*given_as, divide_by=divide_by, weights=weight)  # type: ignore[arg-type]
    assert value(ssl) == found


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("align_corners", [False, True])
def test_probabilities_are_upsampled_in_the_order_of_the_spec(
    order: str, align_corners: bool
) -> None:
    how = Upsampling(align_corners, order)
    scores = drawn(2)[0]
    found = how.probabilities(torch.from_numpy(scores), (9, 13)).numpy()
    assert abs(found - predicted(scores, (9, 13), how)).max() <= 1e-12
    logs = how.log_probabilities(torch.from_numpy(scores), (9, 13)).numpy()
    assert abs(np.exp(logs) - found).max() <= 1e-12
    with pytest.raises(UsageError, match="did you mean 'logits'"):
        Upsampling(align_corners, "logit")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_mixed_precision_are_widened_first(dtype: torch.dtype) -> None:
    scores, labels, _ = drawn(3)
    half = torch.from_numpy(scores).to(dtype)
    found = losses.segmentation(half, torch.from_numpy(labels), SAME)
    assert found.dtype == torch.float32
    assert value(found) == value(losses.segmentation(half.float(), torch.from_numpy(labels), SAME))


@given(SEEDS, st.sampled_from(ORDERS), st.sampled_from(["valid", "all"]), st.booleans())
def test_nothing_that_counts_gives_zero_and_a_gradient_of_zero(
    seed: int, order: str, divide_by: Any, by_weight: bool
) -> None:
    values, labels, _ = drawn(seed)
    scores = torch.from_numpy(values).requires_grad_()
    nothing = torch.zeros(labels.shape) if by_weight else None
    truth = torch.from_numpy(labels if by_weight else np.full_like(labels, 255))
    loss = losses.self_supervised(
        scores, truth, Upsampling(True, order), weights=nothing, divide_by=divide_by
    )
    loss.backward()
    assert value(loss) == 0.0
    assert scores.grad is not None and (scores.grad == 0).all()


@given(SEEDS)
def test_weight_zero_is_the_same_as_ignored(seed: int) -> None:
    scores, labels, weights = drawn(seed)
    gone = weights < 0.5
    zeroed, ignored = np.where(gone, 0.0, weights), np.where(gone, 255, labels)
    assert loss_of(scores, labels, weights=zeroed) == loss_of(scores, ignored, weights=weights)


@given(SEEDS, st.integers(-3, 3))
def test_the_mean_does_not_know_the_scale_of_weights(seed: int, exponent: int) -> None:
    scores, labels, weights = drawn(seed)
    scale = 2.0**exponent  # exact
    assert loss_of(scores, labels, weights=weights * scale) == loss_of(
        scores, labels, weights=weights
    )
    # Dividing by all pixels keeps the scale: a map of low confidence counts less.
    literal = loss_of(scores, labels, weights=weights * scale, divide_by="all")
    assert literal == scale * loss_of(scores, labels, weights=weights, divide_by="all")


@given(SEEDS)
def test_ignored_pixels_have_no_say_whatever_their_weight(seed: int) -> None:
    scores, labels, weights = drawn(seed)
    absurd = np.where(labels == 255, np.nan, weights)
    assert loss_of(scores, labels, weights=absurd) == loss_of(scores, labels, weights=weights)
    ones = np.ones(labels.shape)
    assert loss_of(scores, labels, weights=ones) == loss_of(scores, labels)


def test_the_ignored_value_is_an_option_and_a_typo_is_not() -> None:
    scores, labels, _ = drawn(4)
    other = np.where(labels == 255, 250, labels)
    assert loss_of(scores, other, ignore=250) == loss_of(scores, labels)
    with pytest.raises(UsageError, match="did you mean 'valid'"):
        loss_of(scores, labels, divide_by="vali")


def test_scores_that_are_not_finite_are_not_hidden() -> None:
    scores, labels, _ = drawn(5)
    scores[0, 0] = np.nan
    assert math.isnan(loss_of(scores, labels))


# --- the adversarial losses ----------------------------------------------------------------------


def test_adversarial_losses_are_the_formulas() -> None:
    draw = np.random.default_rng(6)
    s, t = 3 * draw.standard_normal((2, 1, 3, 5)), 3 * draw.standard_normal((2, 1, 4, 4))
    of_source, of_target = torch.from_numpy(s), torch.from_numpy(t)
    # Source is labelled 0, target 1; the network wants each taken for the other.
    assert abs(value(losses.adversarial(of_target)) - bce(t, 0)) <= 1e-12
    assert abs(value(losses.adversarial(of_source, Domain.SOURCE)) - bce(s, 1)) <= 1e-12
    expected = (bce(s, 0) + bce(t, 1)) / 2
    assert abs(value(losses.discrimination(of_source, of_target)) - expected) <= 1e-12


def _features(seed: int, count: int = 2) -> list[Any]:
    torch.manual_seed(seed)
    return [torch.rand(count, c, 5, 6, dtype=torch.float64).requires_grad_() for c in (32, 64)]


def _style_discriminators() -> list[Any]:
    torch.manual_seed(0)
    return [StyleDiscriminator().double() for _ in range(2)]


@pytest.mark.parametrize("direction", ["target", "source", "both"])
def test_style_is_the_sum_over_both_sub_encoders(direction: Any) -> None:
    judges, source, target = _style_discriminators(), _features(1), _features(2, count=3)
    loss = losses.style_adversarial(judges, source, target, direction)

    def summed(features: list[Any], label: float) -> float:
        vectors = [f.detach().mean((2, 3)) for f in features]
        return sum(bce(d(v).detach().numpy(), label) for d, v in zip(judges, vectors))

    sides = {"target": summed(target, 0), "source": summed(source, 1)}
    sides["both"] = (sides["target"] + sides["source"]) / 2
    assert abs(value(loss) - sides[direction]) <= 1e-12
    loss.backward()
    _only_moves(direction, source, target)

    d_loss = losses.style_discrimination(judges, source, target)
    expected = 0.0
    for judge, s, t in zip(judges, source, target):
        s, t = (judge(f.detach().mean((2, 3))).detach().numpy() for f in (s, t))
        expected += (bce(s, 0) + bce(t, 1)) / 2
    assert abs(value(d_loss) - expected) <= 1e-12


def _only_moves(direction: str, source: list[Any], target: list[Any]) -> None:
    for name, features in (("source", source), ("target", target)):
        for f in features:
            moved = f.grad is not None and bool((f.grad != 0).any())
            assert moved == (direction in (name, "both")), name


def test_the_discriminators_loss_does_not_reach_the_features() -> None:
    judges, source, target = _style_discriminators(), _features(1), _features(2)
    losses.style_discrimination(judges, source, target).backward()
    assert all(f.grad is None for f in [*source, *target])
    assert all(p.grad is not None for d in judges for p in d.parameters())


def test_an_output_discriminators_step_lowers_its_loss_and_the_networks_raises_it() -> None:
    torch.manual_seed(1)
    judge = OutputDiscriminator(CLASSES)
    scores = [torch.randn(2, CLASSES, 8, 8) for _ in range(2)]
    scores[1].requires_grad_()

    def maps() -> list[Any]:
        return [SAME.probabilities(s, (64, 64)) for s in scores]

    def judged() -> Any:
        return losses.discrimination(*(judge(p.detach()) for p in maps()))

    before = judged()
    _descend(before, list(judge.parameters()), 1e-2)
    after = judged()
    assert value(after) < value(before)
    cost = losses.adversarial(judge(maps()[1]))
    _descend(cost, [scores[1]], 10.0)
    assert value(losses.adversarial(judge(maps()[1]))) < value(cost)
    assert value(judged()) > value(after)


@pytest.mark.parametrize("direction", ["target", "source", "both"])
def test_a_style_discriminators_step_lowers_its_loss_and_the_networks_raises_it(
    direction: Any,
) -> None:
    judges, source, target = _style_discriminators(), _features(1), _features(2)
    before = losses.style_discrimination(judges, source, target)
    _descend(before, [p for d in judges for p in d.parameters()], 1e-2)
    after = losses.style_discrimination(judges, source, target)
    assert value(after) < value(before)
    cost = losses.style_adversarial(judges, source, target, direction)
    sides = {"target": target, "source": source, "both": [*source, *target]}
    _descend(cost, sides[direction], 10.0)
    assert value(losses.style_adversarial(judges, source, target, direction)) < value(cost)
    assert value(losses.style_discrimination(judges, source, target)) > value(after)


def _descend(loss: Any, parameters: list[Any], rate: float) -> None:
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        parameter.data -= rate * gradient


# --- the MSE constraints of Table 3 --------------------------------------------------------------


def _gram(f: Array) -> list[Array]:
    c, h, w = f.shape[1:]
    return [np.einsum("nchw,ndhw->ncd", f, f).mean(0) / (c * h * w)]


def _mean_std(f: Array) -> list[Array]:
    mean, variance = f.mean((2, 3)), f.var((2, 3))
    return [mean.mean(0), np.sqrt(variance + 1e-5).mean(0)]


@pytest.mark.parametrize(
    ("loss", "describe"),
    [(losses.style_gram, _gram), (losses.style_mean_std, _mean_std)],
    ids=["gram", "mean-std"],
)
@pytest.mark.parametrize("direction", ["target", "source", "both"])
def test_mse_constraints_are_the_formulas(
    loss: Any, describe: Callable[[Array], list[Array]], direction: Any
) -> None:
    source, target = _features(3), _features(4, count=3)  # of unequal batches: they are no pairs
    found = loss(source, target, direction)
    expected = 0.0
    for s, t in zip(source, target):
        pairs = zip(describe(s.detach().numpy()), describe(t.detach().numpy()))
        expected += sum(float(((a - b) ** 2).mean()) for a, b in pairs)
    assert abs(value(found) - expected) <= 1e-14
    found.backward()
    _only_moves(direction, source, target)
    assert value(loss(source, source)) == 0.0


def test_a_constant_channel_has_a_finite_gradient() -> None:
    flat = [torch.ones(1, 16, 4, 4, requires_grad=True)]
    losses.style_mean_std([torch.rand(1, 16, 4, 4)], flat).backward()
    assert flat[0].grad is not None and torch.isfinite(flat[0].grad).all()


def test_style_losses_refuse_what_they_cannot_mean() -> None:
    judges, features = _style_discriminators(), _features(1)
    with pytest.raises(UsageError, match="did you mean 'target'"):
        losses.style_adversarial(judges, features, features, "targte")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="did you mean 'both'"):
        losses.style_gram(features, features, "bot")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least one"):
        losses.style_mean_std([], [])
    with pytest.raises(ValueError, match="shorter"):
        losses.style_adversarial(judges, features, features[:1])


def test_style_vectors_are_channel_means() -> None:
    f = _features(5)[0].detach()
    assert abs(style_vector(f).numpy() - f.numpy().mean((2, 3))).max() <= 1e-15


# --- Eq. 5 ---------------------------------------------------------------------------------------


def test_the_total_is_equation_5() -> None:
    terms = [torch.tensor(v, dtype=torch.float64) for v in (2.0, 3.0, 5.0, 7.0)]
    assert Weights() == Weights(segmentation=1.0, output=1e-3, style=1e-3, self_supervised=1.0)
    total = losses.domain_adaptation(*terms[:3])
    assert abs(value(total) - (2 + 3e-3 + 5e-3)) <= 1e-15
    assert value(losses.domain_adaptation(terms[0])) == 2.0
    assert value(losses.domain_adaptation(terms[0], style=terms[2])) == 2 + 1e-3 * 5
    weights = Weights(0.5, 0.25, 0.125, 2.0)
    total = losses.domain_adaptation(*terms[:3], weights)
    assert value(total) == 1 + 0.75 + 0.625
    assert value(losses.self_training(total, terms[3], weights)) == 1 + 0.75 + 0.625 + 14


@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf])
def test_weights_that_mean_nothing_are_refused(value: float) -> None:
    with pytest.raises(UsageError, match="weight style is"):
        Weights(style=value)
