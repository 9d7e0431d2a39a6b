"""Every fused back end against the float64 reference, and the compiled ones against their oracle.

The reference says what is correct, to a tolerance; the scalar kernel says the bits. Each
instruction set that this processor has is a back end of its own here, and says which one it is.
The CUDA kernels run on this processor, through tests/cuda_executor; with CADA_TEST_CUDA=cuda:0 in
the environment they run on that GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cuda_executor import build
from cuda_executor.layer import ProcessorDevice
from hypothesis import given, settings
from hypothesis import strategies as st

from cada_deploy import fused
from cada_deploy.device import Device, open_device
from cada_deploy.errors import ArtefactMismatch, CadaError, EnvironmentLacks, UsageError
from cada_deploy.fused import (
    Evidence,
    FusedKernel,
    Selection,
    cuda,
    native,
    open_kernel,
    reference,
)
from cada_deploy.policies import Rule
from cada_deploy.scores import EncodedScores, Upsampling
from cada_deploy.statistics import UNIT, ClassStatistics

ENTROPY_TOLERANCE = 2e-5  # nats; 255 float32 additions of values up to 5.5
PROBABILITY_TOLERANCE = 5e-6
# A class sum may be off by its rounding and by the float32 error of every pixel's probability.
SUM_TOLERANCE = PROBABILITY_TOLERANCE * UNIT

ORDERS = [Upsampling(order, align) for order in ("logits", "probs") for align in (False, True)]


def _available() -> list[str]:
    if not native.is_built():
        return []
    found = []
    for isa in native.INSTRUCTION_SETS:
        try:
            native.choose_isa(isa)
        except EnvironmentLacks:
            continue
        found.append(isa)
    native.choose_isa()
    return found


AVAILABLE = _available()
GPU = os.environ.get("CADA_TEST_CUDA", "")
CUDA = ["gpu" if GPU else "executor"]
BACK_ENDS = [
    f"{back_end}-{way}"
    for back_end in fused.back_ends()
    for way in {"native": AVAILABLE, "cuda": CUDA}.get(back_end, ["numpy"])
]


def _cuda_device(seed: int = 0) -> Device:
    if GPU:
        return open_device(GPU)
    if build.compiler() is None:
        pytest.skip("not run: needs g++ for the CUDA executor")
    return ProcessorDevice(seed=seed)


@pytest.fixture(params=BACK_ENDS)
def kernel(request: pytest.FixtureRequest) -> Iterator[FusedKernel]:
    back_end, _, isa = str(request.param).partition("-")
    if back_end == "cuda":
        yield cuda.Kernel(device=_cuda_device())
        return
    if back_end != "native":
        yield open_kernel(back_end, threads=2)
        return
    try:
        native.choose_isa(isa)
        opened = native.Kernel(threads=2)
        assert opened.isa == isa  # the path that the test names is the path that runs
        yield opened
        assert opened.isa == isa
    finally:
        native.choose_isa()


@dataclass(frozen=True)
class Case:
    name: str
    raw: npt.NDArray[np.float32]  # (C, h, w)
    size: tuple[int, int]
    masked: float = 0.0

    @property
    def mask(self) -> npt.NDArray[np.uint8] | None:
        if not self.masked:
            return None
        return (np.random.default_rng(7).random(self.size) < self.masked).astype(np.uint8) * 255

    @property
    def classes(self) -> int:
        return int(self.raw.shape[0])


def _noise(classes: int, h: int, w: int, scale: float = 3.0) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng([classes, h, w])
    return (rng.normal(size=(classes, h, w)) * scale).astype(np.float32)


def _smooth(classes: int, h: int, w: int) -> npt.NDArray[np.float32]:
    """Regions of one winner, so that whole blocks are settled."""
    rng = np.random.default_rng([classes, h, w])
    y, x = np.mgrid[:h, :w]
    centre = rng.random((classes, 2)) * (h, w)
    near = (y - centre[:, :1, None]) ** 2 + (x - centre[:, 1:, None]) ** 2
    return (-0.35 * near + rng.random((classes, 1, 1))).astype(np.float32)


def _with(raw: npt.NDArray[np.float32], value: float, share: float) -> npt.NDArray[np.float32]:
    damaged = raw.copy()
    damaged[np.random.default_rng(3).random(raw.shape) < share] = value
    return damaged


CASES = [
    Case("one pixel, one class", _noise(1, 1, 1), (1, 1)),
    Case("one low pixel, many out", _noise(19, 1, 1), (5, 7)),
    Case("one out of many low pixels", _noise(19, 13, 11), (1, 1)),
    Case("one class", _noise(1, 3, 5), (17, 23)),
    Case("two classes, primes", _noise(2, 7, 5), (31, 131)),
    Case("prime sizes", _noise(19, 11, 13), (53, 67), masked=0.2),
    Case("regions", _smooth(19, 9, 33), (64, 256)),
    Case("regions, masked", _smooth(19, 9, 33), (64, 257), masked=0.1),
    Case("65 classes", _noise(65, 4, 5), (19, 37)),
    Case("255 classes", _noise(255, 3, 4), (11, 35)),
    Case("equal logits", np.zeros((19, 3, 4), np.float32), (13, 36)),
    Case("huge logits", _noise(19, 5, 6, 1e30), (23, 41)),
    Case("steep logits", _noise(19, 5, 6, 3e4), (23, 41)),
    Case("tiny differences", _noise(5, 5, 6, 1e-6), (23, 41)),
    Case("-inf as a mask of classes", _with(_noise(19, 5, 6), -np.inf, 0.08), (23, 41)),
    Case("NaN", _with(_noise(19, 9, 12), np.nan, 0.004), (37, 100), masked=0.1),
    Case("+inf", _with(_noise(3, 9, 12), np.inf, 0.03), (37, 100)),
    Case("NaN in regions", _with(_smooth(7, 9, 33), np.nan, 0.005), (64, 256)),
    Case("all invalid", np.full((4, 3, 3), np.nan, np.float32), (9, 40)),
    Case("all classes -inf", np.full((4, 3, 3), -np.inf, np.float32), (9, 40)),
    Case("same size", _noise(7, 20, 37), (20, 37)),
    Case("shrinking", _noise(5, 61, 150), (9, 20), masked=0.3),
    Case("shrinking a lot", _noise(5, 3, 2000), (2, 40)),
    Case("grows one way, shrinks the other", _noise(5, 50, 3), (7, 90)),
    Case("everything masked", _noise(5, 4, 4), (12, 40), masked=1.0),
]
# Where every class of a pixel has a tap near -65504, float32 interpolation loses digits: the bits
# must still agree everywhere, but the distance to the float64 truth is outside the tolerance.
MOSTLY_FORBIDDEN = Case("many -inf", _with(_noise(19, 5, 6), -np.inf, 0.3), (23, 41))


def _rules(classes: int) -> list[Rule]:
    spread = np.linspace(0.15, 0.9, classes)
    some = tuple(None if c % 5 == 3 else float(t) for c, t in enumerate(spread))
    nothing: tuple[float | None, ...] = (None,) * classes
    weights = tuple(np.linspace(0.4, 1.7, classes).tolist())
    return [
        Rule("entropy", "<", some),
        Rule("entropy", "<=", (0.0,) * classes),
        Rule("confidence", ">=", some),
        Rule("margin", ">", some),
        Rule("ratio", ">", some, weights),
        Rule("confidence", ">", nothing),
    ]


def _encoded(case: Case, upsampling: Upsampling) -> EncodedScores:
    return EncodedScores(reference.Kernel().encode(case.raw, "logits"), upsampling)


def _top_two_gap(scores: EncodedScores, size: tuple[int, int]) -> npt.NDArray[np.float64]:
    """(H, W): how much more probable the winner is than the next; NaN where invalid."""
    gaps = []
    for rows in reference._rows(scores, size, None):
        gaps.append(rows.confidence - reference._runner_up(rows.probabilities))
    gap: npt.NDArray[np.float64] = np.concatenate(gaps)
    return gap


def _identity(evidence: Evidence) -> tuple[Any, ...]:
    """Every bit of it."""
    assert evidence.labels is not None and evidence.entropy is not None
    return (
        evidence.statistics.to_json(),
        evidence.labels.tobytes(),
        evidence.entropy.tobytes(),
    )


def _selection_identity(selection: Selection) -> tuple[Any, ...]:
    assert selection.entropy is not None and selection.confidence is not None
    return (
        selection.labels.tobytes(),
        selection.predicted.tolist(),
        selection.selected.tolist(),
        selection.invalid,
        selection.masked,
        selection.entropy.tobytes(),
        selection.confidence.tobytes(),
    )


# ---- against the reference ----


@pytest.mark.parametrize("upsampling", ORDERS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_evidence_is_the_references(
    kernel: FusedKernel, case: Case, upsampling: Upsampling
) -> None:
    scores = _encoded(case, upsampling)
    truth = reference.Kernel().accumulate(
        scores, case.size, "confidence", case.mask, labels=True, entropy=True
    )
    found = kernel.accumulate(scores, case.size, "confidence", case.mask, labels=True, entropy=True)
    assert found.labels is not None and truth.labels is not None
    assert found.entropy is not None and truth.entropy is not None
    assert found.labels.shape == found.entropy.shape == case.size

    doubtful = _top_two_gap(scores, case.size) <= PROBABILITY_TOLERANCE
    agree = found.labels == truth.labels
    assert np.all(agree | doubtful)
    assert np.array_equal(np.isnan(found.entropy), np.isnan(truth.entropy))
    valid = ~np.isnan(truth.entropy)
    error = np.abs(found.entropy[valid].astype(np.float64) - truth.entropy[valid])
    assert np.all(error <= ENTROPY_TOLERANCE)

    ours, theirs = found.statistics, truth.statistics
    assert (ours.invalid, ours.masked) == (theirs.invalid, theirs.masked)
    assert ours.pixels.sum() == theirs.pixels.sum()
    if agree.all():
        assert np.array_equal(ours.pixels, theirs.pixels)
        off = np.abs((ours.sums - theirs.sums).astype(np.float64))
        room = ours.pixels.astype(np.float64) * SUM_TOLERANCE
        assert np.all(off <= room[:, None])
        assert np.array_equal(ours.histogram.sum(1), ours.pixels)


@pytest.mark.parametrize("upsampling", ORDERS[::3], ids=str)
@pytest.mark.parametrize("case", [CASES[i] for i in (1, 4, 5, 8, 15, 21)], ids=lambda c: c.name)
def test_selection_is_the_references(
    kernel: FusedKernel, case: Case, upsampling: Upsampling
) -> None:
    scores = _encoded(case, upsampling)
    for rule in _rules(case.classes):
        truth = reference.Kernel().select(
            scores, case.size, rule, case.mask, entropy=True, confidence=True
        )
        found = kernel.select(scores, case.size, rule, case.mask, entropy=True, confidence=True)
        assert found.entropy is not None and truth.entropy is not None
        assert found.confidence is not None and truth.confidence is not None
        # Random scores: a threshold or a tie within float32 error of a pixel is rare, not absent.
        assert np.mean(found.labels == truth.labels) >= 0.999
        assert (found.invalid, found.masked) == (truth.invalid, truth.masked)
        valid = ~np.isnan(truth.confidence)
        assert np.array_equal(np.isnan(found.confidence), ~valid)
        near = np.abs(found.confidence - truth.confidence)[valid] <= PROBABILITY_TOLERANCE
        assert np.mean(near) >= 0.999 if near.size else True
        near = np.abs(found.entropy - truth.entropy)[valid] <= ENTROPY_TOLERANCE
        assert np.all(near)


# ---- the bits ----


def _all_of(kernel: FusedKernel, case: Case, upsampling: Upsampling) -> list[Any]:
    scores = EncodedScores(kernel.encode(case.raw, "logits"), upsampling)
    everything: list[Any] = [scores.array.tobytes()]
    for weighting in ("confidence", "mean"):
        everything.append(
            _identity(
                kernel.accumulate(
                    scores, case.size, weighting, case.mask, labels=True, entropy=True
                )
            )
        )
    rules = _rules(case.classes)
    everything.append(kernel.count(scores, case.size, rules, case.mask).tolist())
    for rule in rules:
        everything.append(
            _selection_identity(
                kernel.select(scores, case.size, rule, case.mask, entropy=True, confidence=True)
            )
        )
    return everything


def _on(isa: str, threads: int, case: Case, upsampling: Upsampling) -> list[Any]:
    assert native.choose_isa(isa) == isa
    try:
        return _all_of(native.Kernel(threads), case, upsampling)
    finally:
        native.choose_isa()


needs_native = pytest.mark.skipif(not AVAILABLE, reason="not run: no compiled kernel here")


@needs_native
@pytest.mark.parametrize("upsampling", ORDERS, ids=str)
def test_many_forbidden_classes_cost_digits_but_no_label(upsampling: Upsampling) -> None:
    case = MOSTLY_FORBIDDEN
    scores = _encoded(case, upsampling)
    truth = reference.Kernel().accumulate(
        scores, case.size, "confidence", labels=True, entropy=True
    )
    found = native.Kernel(1).accumulate(scores, case.size, "confidence", labels=True, entropy=True)
    assert found.labels is not None and found.entropy is not None and truth.entropy is not None
    assert np.array_equal(found.labels, truth.labels)
    assert np.array_equal(np.isnan(found.entropy), np.isnan(truth.entropy))
    valid = ~np.isnan(truth.entropy)
    error = np.abs(found.entropy[valid].astype(np.float64) - truth.entropy[valid])
    assert error.size and np.all(error <= 5e-4)


@needs_native
@pytest.mark.parametrize("upsampling", ORDERS, ids=str)
@pytest.mark.parametrize("case", [*CASES, MOSTLY_FORBIDDEN], ids=lambda case: case.name)
def test_every_instruction_set_and_thread_count_gives_the_oracles_bits(
    case: Case, upsampling: Upsampling
) -> None:
    oracle = _on("scalar", 1, case, upsampling)
    for isa in AVAILABLE:
        for threads in (1, 3):
            assert _on(isa, threads, case, upsampling) == oracle, (isa, threads)


@needs_native
@pytest.mark.parametrize("upsampling", ORDERS, ids=str)
@pytest.mark.parametrize("case", [*CASES, MOSTLY_FORBIDDEN], ids=lambda case: case.name)
def test_the_cuda_kernels_give_the_oracles_bits_in_any_order_of_threads(
    case: Case, upsampling: Upsampling
) -> None:
    oracle = _on("scalar", 1, case, upsampling)
    orders = (1,) if GPU or os.environ.get(build.SANITIZED) else (0, 1)
    for seed in orders:
        assert _all_of(cuda.Kernel(device=_cuda_device(seed)), case, upsampling) == oracle


@needs_native
def test_more_than_511_pixels_of_one_class_in_every_lane() -> None:
    """The 32-bit partial sums must be flushed in time: every probability is 1."""
    certain = np.full((2, 2, 2), -100, np.float32)
    certain[0] = 0
    case = Case("certain", certain, (1030, 64))
    for isa in AVAILABLE:
        native.choose_isa(isa)
        try:
            scores = _encoded(case, ORDERS[0])
            found = native.Kernel(1).accumulate(scores, case.size, "mean").statistics
            assert found.sums[0, 0] == 1030 * 64 * UNIT
        finally:
            native.choose_isa()


@needs_native
def test_the_callers_rounding_mode_does_not_reach_the_bits() -> None:
    import ctypes

    libm = ctypes.CDLL("libm.so.6")
    upward, nearest = 0x800, 0  # FE_UPWARD, FE_TONEAREST on x86-64
    if libm.fegetround() != nearest:
        pytest.skip("not run: another rounding mode is set, or this is not x86-64")
    plain = _on("avx2" if "avx2" in AVAILABLE else AVAILABLE[0], 2, CASES[5], ORDERS[0])
    libm.fesetround(upward)
    try:
        turned = _on("avx2" if "avx2" in AVAILABLE else AVAILABLE[0], 2, CASES[5], ORDERS[0])
        assert libm.fegetround() == upward  # and it is put back
    finally:
        libm.fesetround(nearest)
    assert turned == plain


# ---- encoding ----


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_encoding_is_centred_and_rounded_once(kernel: FusedKernel, dtype: Any) -> None:
    with np.errstate(over="ignore"):
        raw = np.stack([_noise(19, 5, 37, 10.0), _noise(19, 5, 37, 1e-5)]).astype(dtype)
    z = raw.astype(np.float32)
    expected = np.maximum(z - z.max(1, keepdims=True), np.float32(-65504)).astype(np.float16)
    found = kernel.encode(raw, "logits")
    assert found.dtype == np.float16
    assert found.tobytes() == expected.tobytes()


def test_subnormal_scores_are_exact(kernel: FusedKernel) -> None:
    """Every fp16 value up to twice the least normal one, and halfway between: nearest, ties to
    even, nothing flushed to zero."""
    steps = -np.arange(0.5, 2200, 0.5, np.float32) * np.float32(2.0**-24)
    raw = np.stack([np.zeros_like(steps), steps])[:, None, :]
    expected = raw.astype(np.float16)
    assert np.unique(expected[1]).size > 1024  # NumPy, for one, keeps them apart
    assert kernel.encode(raw, "logits").tobytes() == expected.tobytes()


def test_encoding_of_awkward_values(kernel: FusedKernel) -> None:
    inf, nan = np.inf, np.nan
    columns = np.array(
        [
            [1, -inf, 2],  # -inf is a legal mask: it clamps
            [3e38, -3e38, 0],  # the difference overflows: it clamps
            [nan, 0, 1],
            [inf, 0, 1],
            [-inf, -inf, -inf],
            [0, -65519, -65520],  # both round to the least finite score
        ],
        np.float32,
    ).T[:, None, :]
    found = kernel.encode(columns, "logits")[:, 0]
    bits = found.view(np.uint16)
    assert found[:, 0].tolist() == [-1, -65504, 0]
    assert found[:, 1].tolist() == [0, -65504, -65504]
    assert np.all(bits[:, 2:5] == 0x7E00)
    assert found[:, 5].tolist() == [0, -65504, -65504]


def test_probabilities_enter_as_logarithms(kernel: FusedKernel) -> None:
    inf, nan = np.inf, np.nan
    p = np.array(
        [
            [1, 0, 0],
            [0.5, 0.25, 0.25],
            [1e-30, 1e-35, 1],
            [-0.1, 0.6, 0.5],
            [nan, 1, 0],
            [inf, 0, 0],
        ],
        np.float32,
    ).T[:, None, :]
    found = kernel.encode(p, "probabilities")[:, 0]
    least = np.log(1e-30)
    with np.errstate(divide="ignore"):
        expected = np.array(
            [
                [0, least, least],
                [0, np.log(0.5), np.log(0.5)],
                [least, least, 0],
                [least - np.log(np.float32(0.6)), 0, np.log(5 / 6)],
            ]
        ).T
    error = np.abs(found[:, :4].astype(np.float64) - expected)
    assert np.all(error <= np.abs(expected) * 2.0**-10)
    assert np.all(found[:, 4:].view(np.uint16) == 0x7E00)


@needs_native
@pytest.mark.parametrize("meaning", ["logits", "probabilities"])
def test_encodings_bits_do_not_depend_on_threads_or_instruction_set(meaning: str) -> None:
    raw = np.abs(_noise(19, 67, 131)) if meaning == "probabilities" else _noise(19, 67, 131)
    raw = np.stack([raw, _with(raw, np.nan, 0.01)])
    native.choose_isa("scalar")
    try:
        oracle = native.Kernel(1).encode(raw, meaning).tobytes()
        for isa in AVAILABLE:
            native.choose_isa(isa)
            for threads in (1, 4):
                assert native.Kernel(threads).encode(raw, meaning).tobytes() == oracle
                half = raw.astype(np.float16)
                wide = half.astype(np.float32)
                kernel = native.Kernel(threads)
                assert (
                    kernel.encode(half, meaning).tobytes() == kernel.encode(wide, meaning).tobytes()
                )
    finally:
        native.choose_isa()


# ---- laws ----


@st.composite
def _problems(draw: st.DrawFn) -> tuple[Case, Upsampling]:
    classes = draw(st.sampled_from([1, 2, 3, 7, 19, 33]))
    low = st.integers(1, 12)
    h, w = draw(low), draw(low)
    size = (draw(st.integers(1, 40)), draw(st.integers(1, 90)))
    raw = _noise(classes, h, w, draw(st.sampled_from([1e-3, 1.0, 5.0, 100.0])))
    if draw(st.booleans()):
        raw = _with(raw, draw(st.sampled_from([np.nan, -np.inf])), 0.05)
    masked = draw(st.sampled_from([0.0, 0.3]))
    return Case("drawn", raw, size, masked), draw(st.sampled_from(ORDERS))


def _fast() -> FusedKernel:
    return open_kernel("native" if AVAILABLE else "reference")


@settings(max_examples=60, deadline=None)
@given(_problems())
def test_count_is_what_select_keeps(problem: tuple[Case, Upsampling]) -> None:
    case, upsampling = problem
    kernel, scores, rules = _fast(), _encoded(case, upsampling), _rules(case.classes)
    counted = kernel.count(scores, case.size, rules, case.mask)
    assert counted.shape == (len(rules), case.classes)
    for row, rule in zip(counted, rules):
        selection = kernel.select(scores, case.size, rule, case.mask)
        kept = np.bincount(selection.labels.ravel(), minlength=256)
        assert row.tolist() == selection.selected.tolist() == kept[: case.classes].tolist()
        assert kept[case.classes : 255].sum() == 0
        assert np.all(selection.selected <= selection.predicted)
        pixels = case.size[0] * case.size[1]
        assert selection.predicted.sum() + selection.invalid + selection.masked == pixels


@settings(max_examples=60, deadline=None)
@given(_problems(), st.sampled_from(["confidence", "mean"]))
def test_every_pixel_is_counted_once(problem: tuple[Case, Upsampling], weighting: str) -> None:
    case, upsampling = problem
    scores = _encoded(case, upsampling)
    found = _fast().accumulate(scores, case.size, weighting, case.mask, labels=True)
    statistics = found.statistics
    pixels = case.size[0] * case.size[1]
    assert statistics.pixels.sum() + statistics.invalid + statistics.masked == pixels
    assert statistics.masked == (0 if case.mask is None else np.count_nonzero(case.mask))
    assert np.array_equal(statistics.histogram.sum(1), statistics.pixels)
    assert found.labels is not None
    assert np.count_nonzero(found.labels != 255) == statistics.pixels.sum()
    if weighting == "mean":  # probabilities add up to one
        total = statistics.sums.sum(1).astype(np.float64)
        expected = statistics.pixels.astype(np.float64) * UNIT
        assert np.all(np.abs(total - expected) <= statistics.pixels * (case.classes + 20.0))


@settings(max_examples=60, deadline=None)
@given(_problems(), st.floats(0, 4), st.floats(0, 4))
def test_a_higher_entropy_threshold_never_drops_a_pixel(
    problem: tuple[Case, Upsampling], one: float, other: float
) -> None:
    case, upsampling = problem
    kernel, scores = _fast(), _encoded(case, upsampling)
    low, high = sorted((one, other))
    few = kernel.select(scores, case.size, Rule("entropy", "<", (low,) * case.classes), case.mask)
    many = kernel.select(scores, case.size, Rule("entropy", "<", (high,) * case.classes), case.mask)
    kept = few.labels != 255
    assert np.array_equal(few.labels[kept], many.labels[kept])


@needs_native
@settings(max_examples=40, deadline=None)
@given(_problems(), st.integers(1, 9))
def test_threads_and_instruction_sets_change_nothing(
    problem: tuple[Case, Upsampling], threads: int
) -> None:
    oracle = _on("scalar", 1, *problem)
    for isa in AVAILABLE:
        assert _on(isa, threads, *problem) == oracle, isa


@needs_native
def test_a_frame_is_the_sum_of_its_masked_halves() -> None:
    case = CASES[6]
    scores, kernel = _encoded(case, ORDERS[0]), native.Kernel(2)
    left = (np.random.default_rng(0).random(case.size) < 0.5).astype(np.uint8)
    whole = kernel.accumulate(scores, case.size, "mean").statistics
    parts = [
        kernel.accumulate(scores, case.size, "mean", mask).statistics for mask in (left, 1 - left)
    ]
    together = parts[0] + parts[1]
    assert np.array_equal(together.sums, whole.sums)
    assert np.array_equal(together.histogram, whole.histogram)


@needs_native
def test_scores_that_nobody_centred_are_still_the_oracles() -> None:
    """The shortcut for settled cells holds only where the maximum is 0; others must not take it."""
    raw = _smooth(5, 9, 17).astype(np.float16)
    raw -= raw.max(0)
    for shift in (np.float16(0.5), np.float16(-0.5)):
        scores = EncodedScores(raw + shift, Upsampling("logits", False))
        identities = []
        for isa in AVAILABLE:
            native.choose_isa(isa)
            evidence = native.Kernel(1).accumulate(
                scores, (64, 128), "mean", labels=True, entropy=True
            )
            identities.append(_identity(evidence))
        native.choose_isa()
        assert all(identity == identities[-1] for identity in identities)


# ---- the border ----


def test_nonsense_is_refused(kernel: FusedKernel) -> None:
    scores = _encoded(CASES[5], ORDERS[0])
    size, rule = CASES[5].size, _rules(19)[0]
    wrong: list[tuple[type[CadaError], Any]] = [
        (ArtefactMismatch, lambda: kernel.encode(np.zeros((3, 3), np.float32), "logits")),
        (ArtefactMismatch, lambda: kernel.encode(np.zeros((2, 3, 3)), "logits")),
        (ArtefactMismatch, lambda: kernel.encode(np.zeros((256, 1, 1), np.float32), "logits")),
        (UsageError, lambda: kernel.encode(np.zeros((2, 1, 1), np.float32), "odds")),
        (UsageError, lambda: kernel.accumulate(scores, size, "literal")),
        (UsageError, lambda: kernel.accumulate(scores, (0, 5), "mean")),
        (
            ArtefactMismatch,
            lambda: kernel.accumulate(scores, size, "mean", np.zeros((2, 2), np.uint8)),
        ),
        (
            ArtefactMismatch,
            lambda: kernel.accumulate(
                EncodedScores(np.zeros((2, 3, 3), np.float32), ORDERS[0]),  # type: ignore[arg-type]
                size,
                "mean",
            ),
        ),
        (
            UsageError,
            lambda: kernel.accumulate(
                EncodedScores(scores.array, Upsampling("nearest", False)), size, "mean"
            ),
        ),
        (ArtefactMismatch, lambda: kernel.select(scores, size, Rule("entropy", "<", (1.0,)))),
        (ArtefactMismatch, lambda: kernel.count(scores, size, [rule, Rule("margin", ">", (1.0,))])),
    ]
    for kind, call in wrong:
        with pytest.raises(kind):
            call()


def test_arrays_that_are_not_contiguous_are_read_right(kernel: FusedKernel) -> None:
    case = CASES[5]
    scores = _encoded(case, ORDERS[0])
    mask = case.mask
    assert mask is not None
    strided = EncodedScores(np.asfortranarray(scores.array), scores.upsampling)
    one = kernel.accumulate(scores, case.size, "mean", mask).statistics
    other = kernel.accumulate(strided, case.size, "mean", np.asfortranarray(mask)).statistics
    assert one == other


def test_no_rules_no_counts(kernel: FusedKernel) -> None:
    scores = _encoded(CASES[5], ORDERS[0])
    assert kernel.count(scores, CASES[5].size, []).shape == (0, 19)


def test_statistics_arrive_as_the_value_they_are(kernel: FusedKernel) -> None:
    found = kernel.accumulate(_encoded(CASES[5], ORDERS[0]), CASES[5].size, "mean")
    assert isinstance(found.statistics, ClassStatistics)
    assert found.labels is None and found.entropy is None


@needs_native
def test_an_unknown_or_impossible_instruction_set_is_an_error() -> None:
    with pytest.raises(UsageError, match="avx512"):
        native.choose_isa("avx51")
    for isa in set(native.INSTRUCTION_SETS) - set(AVAILABLE):
        with pytest.raises(EnvironmentLacks):
            native.choose_isa(isa)
    assert native.Kernel().isa in AVAILABLE


def test_without_a_library_the_reference_stands_in_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_built", lambda: None)
    with pytest.warns(RuntimeWarning, match="not bit-identical"):
        kernel = fused.best_kernel(2)
    assert (kernel.name, kernel.bit_exact) == ("reference", False)
    native._library.cache_clear()
    with pytest.raises(EnvironmentLacks, match="g\\+\\+"):
        native.Kernel()


def test_an_unknown_back_end_is_named() -> None:
    with pytest.raises(UsageError, match="native"):
        open_kernel("nativ")
