"""One pixel's mathematics, on each instruction set: how far exp and ln are from the truth, and that
fused and unfused arithmetic are exactly what IEEE says, whatever the compiler would have liked."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cada_deploy.errors import EnvironmentLacks
from cada_deploy.fused import native

REPOSITORY = Path(__file__).parents[2]
EXP_ERROR = 1.96e-7  # relative, stated in kernels/pixel.h
LN_ERROR = 8.0e-8
Floats = npt.NDArray[np.float32]


@cache
def _probe() -> ctypes.CDLL | None:
    """The library of single functions that the build leaves in build/, never installed."""
    built = sorted(
        REPOSITORY.glob("build/*/libcada_probe.so"), key=lambda path: path.stat().st_mtime
    )
    return ctypes.CDLL(str(built[-1])) if built else None


def _instruction_sets() -> list[str]:
    if not native.is_built():
        return []
    usable = []
    for name in native.INSTRUCTION_SETS:
        try:
            native.choose_isa(name)
        except EnvironmentLacks:
            continue
        usable.append(name)
    native.choose_isa()
    return usable


@pytest.fixture(params=_instruction_sets())
def isa(request: pytest.FixtureRequest) -> str:
    if _probe() is None:
        pytest.skip("not run: no build/*/libcada_probe.so (pip install -e . builds it)")
    return str(request.param)


def _call(function: str, isa: str, *inputs: Floats) -> Floats:
    count = len(inputs[0])
    padded = [np.ascontiguousarray(np.pad(x, (0, -count % 16))) for x in inputs]
    result = np.empty_like(padded[0])
    arguments: list[Any] = [ctypes.c_void_p(a.ctypes.data) for a in (*padded, result)]
    call: Callable[..., None] = getattr(_probe(), f"cada_probe_{function}_{isa}")
    call(*arguments, ctypes.c_int64(len(result)))
    return result[:count]


def _correctly_fused(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c in exact rationals, rounded once."""

    def one(x: np.float32, y: np.float32, z: np.float32) -> np.float32:
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        return _nearest_float32(exact)

    return np.array([one(*abc) for abc in zip(a, b, c)], np.float32)


def _nearest_float32(exact: Fraction) -> np.float32:
    """Nearest, ties to even, through the integer grid of the result's exponent."""
    if exact == 0:
        return np.float32(0)
    size = abs(exact)
    exponent = max(size.numerator.bit_length() - size.denominator.bit_length(), -126)
    while size < Fraction(2) ** exponent and exponent > -126:
        exponent -= 1
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    steps = round(size / Fraction(2) ** (exponent - 23))  # Python's round: ties to even
    if exponent > 127:
        return np.float32(math.copysign(math.inf, exact))
    value = math.ldexp(steps, exponent - 23)
    with np.errstate(over="ignore"):
        return np.float32(math.copysign(value, exact))


def _awkward() -> tuple[Floats, Floats, Floats]:
    """Cancellation, ties, huge against tiny, subnormals: where a double sum rounds twice."""
    special = np.array(
        [0, 1, -1, 1 + 2**-23, 1 - 2**-24, 2**-12, 2**-24, 3, 2**23, 2**24 - 1, 1e30, -1e-30,
         2**-126, 2**-149, 16777215, 0.1, 65504, -17.328],
        np.float32,
    )  # fmt: skip
    a, b, c = (g.ravel() for g in np.meshgrid(special, special, special))
    return a, b, c


def test_exp_is_within_its_stated_error(isa: str) -> None:
    x = -np.concatenate(
        [np.linspace(0, 17.3286, 400_001), np.logspace(-12, 1, 50_000)[:-1]]
    ).astype(np.float32)
    x = x[x > np.float32(-17.3286796)]
    truth = np.exp(x.astype(np.float64))
    relative = np.abs(_call("exp", isa, x) - truth) / truth
    assert np.all(relative <= EXP_ERROR)


def test_exp_is_one_at_zero_and_nothing_from_the_cut_on(isa: str) -> None:
    cut = np.float32(-17.3286796)
    x = np.array([0, -0.0, cut, np.nextafter(cut, np.float32(0)), -18, -1e5, np.nan], np.float32)
    e = _call("exp", isa, x)
    assert e[[0, 1]].tolist() == [1, 1]
    assert e[[2, 4, 5, 6]].tolist() == [0, 0, 0, 0]
    assert 2.9e-8 < e[3] < 3e-8


def test_ln_is_within_its_stated_error_from_2_to_the_minus_126_up(isa: str) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [
            np.logspace(-37.9, 38, 300_000),
            rng.uniform(0.5, 2, 300_000),
            1 + rng.uniform(-1, 1, 100_000) * 1e-4,
            [1e-30, 2.0**-126, 2.0**-25, 1.0],
        ]
    ).astype(np.float32)
    truth = np.log(x.astype(np.float64))
    error = np.abs(_call("ln", isa, x) - truth)
    assert np.all(error <= LN_ERROR * np.abs(truth))
    assert _call("ln", isa, np.ones(1, np.float32))[0] == 0


def test_fused_is_rounded_once_on_awkward_values(isa: str) -> None:
    a, b, c = _awkward()
    found = _call("fused", isa, a, b, c)
    assert np.all(found == _correctly_fused(a, b, c))


def test_emulated_fused_equals_the_instruction_on_random_values(isa: str) -> None:
    if "avx2" not in _instruction_sets():
        pytest.skip("not run: this processor has no FMA to compare with")
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, (3, 3_000_000), np.uint32)
    # Exponents near each other, so that every way of cancelling occurs; and, in a third, any.
    near = (bits & np.uint32(0x807FFFFF)) | ((100 + (bits >> 23) % 54) << 23).astype(np.uint32)
    near[:, ::3] = bits[:, ::3]
    a, b, c = near.view(np.float32)
    with np.errstate(all="ignore"):
        hardware, found = _call("fused", "avx2", a, b, c), _call("fused", isa, a, b, c)
    same = hardware.view(np.uint32) == found.view(np.uint32)
    assert np.all(same | (np.isnan(hardware) & np.isnan(found)))


def test_the_compiler_contracts_nothing(isa: str) -> None:
    """a * b + c as two operations is two roundings, as NumPy does it; and it differs from one."""
    rng = np.random.default_rng(2)
    a, b, c = rng.normal(size=(3, 100_000)).astype(np.float32)
    found = _call("unfused", isa, a, b, c)
    assert np.array_equal(found, a * b + c)
    assert np.count_nonzero(found != _call("fused", isa, a, b, c)) > 1000


def test_every_instruction_set_gives_the_same_bits() -> None:
    if _probe() is None or not _instruction_sets():
        pytest.skip("not run: no build/*/libcada_probe.so (pip install -e . builds it)")
    x = -np.linspace(0, 20, 100_000).astype(np.float32)
    s = np.logspace(-37, 38, 100_000).astype(np.float32)
    for function, values in (("exp", x), ("ln", s)):
        bits = {_call(function, isa, values).tobytes() for isa in _instruction_sets()}
        assert len(bits) == 1
