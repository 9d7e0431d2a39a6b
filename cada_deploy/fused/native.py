"""The fused kernel on the CPU: kernels/*.cpp behind ctypes, which lets go of the GIL while it runs.

Arrays are checked here, at the border; the C side trusts them. The instruction set is the best this
processor has; CADA_FORCE_ISA (avx512, avx2, baseline, scalar) forces one, for tests and doubts.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy.errors import EnvironmentLacks, RunFailed, UsageError, nearest
from cada_deploy.fused import (
    DTYPES,
    MEANINGS,
    ORDERS,
    WEIGHTINGS,
    Evidence,
    Labels,
    Selection,
    check_encoded,
    check_mask,
    check_raw,
    check_rule,
    position,
)
from cada_deploy.model_spec import Size
from cada_deploy.policies import COMPARATORS, MEASURES, Rule
from cada_deploy.scores import EncodedScores
from cada_deploy.statistics import HISTOGRAM_BINS, ClassStatistics

NAME = "native"
INSTRUCTION_SETS = ("avx512", "avx2", "baseline", "scalar")  # best first; neon is to come

_LIBRARY = "libcada_fused.so"
_ABI_VERSION = 1
_NO_MEMORY = 2
_UNSUPPORTED_ISA = 3


class _Frame(ctypes.Structure):
    _fields_ = (
        ("scores", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("classes", ctypes.c_int32),
        ("low_height", ctypes.c_int32),
        ("low_width", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("align_corners", ctypes.c_int32),
        ("order", ctypes.c_int32),
    )


class _Rule(ctypes.Structure):
    _fields_ = (
        ("thresholds", ctypes.c_void_p),
        ("class_weights", ctypes.c_void_p),
        ("measure", ctypes.c_int32),
        ("comparator", ctypes.c_int32),
    )


class Kernel:
    """A fused back end (see FusedKernel). Holds no state but the number of threads, which changes
    no bit of any result."""

    name = NAME
    bit_exact = True

    def __init__(self, threads: int = 1) -> None:
        if threads < 1:
            raise UsageError(f"threads is {threads}; expected 1 or more")
        self._library = _library()
        self._threads = threads

    @property
    def isa(self) -> str:
        """The instruction set in use: avx512, avx2, baseline or scalar."""
        return _isa(self._library)

    def encode(self, scores: npt.NDArray[Any], meaning: str) -> npt.NDArray[np.float16]:
        check_raw(scores.shape, scores.dtype)
        raw = np.ascontiguousarray(scores)
        encoded = np.empty(raw.shape, np.float16)
        frames = int(np.prod(raw.shape[:-3], dtype=np.int64))
        self._call(
            "cada_encode",
            raw.ctypes.data,
            DTYPES.index(raw.dtype),
            position("meaning", meaning, MEANINGS),
            ctypes.c_int64(frames),
            raw.shape[-3],
            ctypes.c_int64(raw.shape[-2] * raw.shape[-1]),
            encoded.ctypes.data,
            self._threads,
        )
        return encoded

    def accumulate(
        self,
        scores: EncodedScores,
        size: Size,
        weighting: str,
        mask: Labels | None = None,
        *,
        labels: bool = False,
        entropy: bool = False,
    ) -> Evidence:
        frame = _BorrowedFrame.of(scores, size, mask)
        classes = scores.classes
        pixels = np.zeros(classes, np.int64)
        sums = np.zeros((classes, classes), np.int64)
        histogram = np.zeros((classes, HISTOGRAM_BINS), np.int64)
        left_out = np.zeros(2, np.int64)  # invalid, masked
        label_map = np.empty(size, np.uint8) if labels else None
        entropy_map = np.empty(size, np.float32) if entropy else None
        self._call(
            "cada_accumulate",
            ctypes.byref(frame.fields),
            position("weighting", weighting, WEIGHTINGS),
            self._threads,
            pixels.ctypes.data,
            sums.ctypes.data,
            histogram.ctypes.data,
            left_out[:1].ctypes.data,
            left_out[1:].ctypes.data,
            _address(label_map),
            _address(entropy_map),
        )
        invalid, masked = map(int, left_out)
        statistics = ClassStatistics(weighting, pixels, sums, histogram, invalid, masked)
        return Evidence(statistics, label_map, entropy_map)

    def count(
        self, scores: EncodedScores, size: Size, rules: Sequence[Rule], mask: Labels | None = None
    ) -> npt.NDArray[np.int64]:
        frame = _BorrowedFrame.of(scores, size, mask)
        borrowed = [_BorrowedRule.of(rule, scores.classes) for rule in rules]
        selected = np.zeros((len(rules), scores.classes), np.int64)
        self._call(
            "cada_count",
            ctypes.byref(frame.fields),
            (_Rule * len(rules))(*(rule.fields for rule in borrowed)),
            len(rules),
            self._threads,
            selected.ctypes.data,
        )
        return selected

    def select(
        self,
        scores: EncodedScores,
        size: Size,
        rule: Rule,
        mask: Labels | None = None,
        *,
        entropy: bool = False,
        confidence: bool = False,
    ) -> Selection:
        frame = _BorrowedFrame.of(scores, size, mask)
        borrowed = _BorrowedRule.of(rule, scores.classes)
        labels = np.empty(size, np.uint8)
        predicted = np.zeros(scores.classes, np.int64)
        selected = np.zeros(scores.classes, np.int64)
        left_out = np.zeros(2, np.int64)  # invalid, masked
        entropy_map = np.empty(size, np.float32) if entropy else None
        confidence_map = np.empty(size, np.float32) if confidence else None
        self._call(
            "cada_select",
            ctypes.byref(frame.fields),
            ctypes.byref(borrowed.fields),
            self._threads,
            labels.ctypes.data,
            predicted.ctypes.data,
            selected.ctypes.data,
            left_out[:1].ctypes.data,
            left_out[1:].ctypes.data,
            _address(entropy_map),
            _address(confidence_map),
        )
        invalid, masked = map(int, left_out)
        return Selection(labels, predicted, selected, invalid, masked, entropy_map, confidence_map)

    def _call(self, function: str, *arguments: object) -> None:
        code = getattr(self._library, function)(*arguments)
        if code == 0:
            return
        sentence = self._library.cada_error_text(code).decode()
        if code == _NO_MEMORY:
            raise RunFailed(f"{sentence}; use fewer threads or smaller labels")
        raise AssertionError(f"{function}: {sentence}")


# ---- arrays at the border ----


@dataclass(frozen=True)
class _BorrowedFrame:
    """The C struct, and the arrays its pointers point into."""

    fields: _Frame
    arrays: tuple[npt.NDArray[Any], ...]

    @classmethod
    def of(cls, scores: EncodedScores, size: Size, mask: Labels | None) -> _BorrowedFrame:
        array = scores.array
        check_encoded(array.shape, array.dtype, scores.upsampling, size)
        if mask is not None:
            check_mask(mask.shape, mask.dtype, size)
        arrays = tuple(np.ascontiguousarray(a) for a in (array, mask) if a is not None)
        fields = _Frame(
            arrays[0].ctypes.data,
            arrays[1].ctypes.data if mask is not None else None,
            *array.shape,
            *size,
            int(scores.upsampling.align_corners),
            ORDERS.index(scores.upsampling.order),
        )
        return cls(fields, arrays)


@dataclass(frozen=True)
class _BorrowedRule:
    fields: _Rule
    arrays: tuple[npt.NDArray[np.float32], ...]

    @classmethod
    def of(cls, rule: Rule, classes: int) -> _BorrowedRule:
        check_rule(rule, classes)
        arrays = [rule.float32_thresholds]
        if rule.class_weights is not None:
            arrays.append(np.array(rule.class_weights, np.float32))
        fields = _Rule(
            arrays[0].ctypes.data,
            arrays[1].ctypes.data if rule.class_weights is not None else None,
            MEASURES.index(rule.measure),
            COMPARATORS.index(rule.comparator),
        )
        return cls(fields, tuple(arrays))


def _address(array: npt.NDArray[Any] | None) -> int | None:
    return None if array is None else array.ctypes.data


# ---- the library ----


def _places() -> Iterator[Path]:
    """Beside this file in an ordinary installation; in site-packages in an editable one."""
    yield Path(__file__).with_name(_LIBRARY)
    try:
        installed = distribution("cada-deploy")
    except PackageNotFoundError:
        return
    yield Path(str(installed.locate_file(f"cada_deploy/fused/{_LIBRARY}")))


def _built() -> Path | None:
    return next((place for place in _places() if place.is_file()), None)


def is_built() -> bool:
    """Whether this installation has the library (there was a compiler when it was installed)."""
    return _built() is not None


@cache
def _library() -> ctypes.CDLL:
    """The loaded library, its instruction set chosen. Raises EnvironmentLacks if there is none."""
    path = _built()
    if path is None:
        raise EnvironmentLacks(
            "this installation has no compiled kernel (there was no C++ compiler when it was "
            "installed); install g++ and reinstall cada-deploy"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise EnvironmentLacks(
            f"{path} cannot be loaded ({error}); reinstall cada-deploy"
        ) from error
    found = library.cada_abi_version()
    if found != _ABI_VERSION:
        raise EnvironmentLacks(
            f"{path} has ABI version {found}; this package needs {_ABI_VERSION}; "
            "reinstall cada-deploy"
        )
    _declare(library)
    _choose(library, os.environ.get("CADA_FORCE_ISA", ""))
    return library


def _declare(library: ctypes.CDLL) -> None:
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.cada_encode.argtypes = (pointer, int32, int32, int64, int32, int64, pointer, int32)
    library.cada_accumulate.argtypes = (pointer, int32, int32, *[pointer] * 7)
    library.cada_count.argtypes = (pointer, pointer, int32, int32, pointer)
    library.cada_select.argtypes = (pointer, pointer, int32, *[pointer] * 7)
    library.cada_choose_isa.argtypes = (ctypes.c_char_p,)
    library.cada_isa.restype = ctypes.c_char_p
    library.cada_error_text.restype = ctypes.c_char_p


def _isa(library: ctypes.CDLL) -> str:
    name: bytes = library.cada_isa()
    return name.decode()


def _choose(library: ctypes.CDLL, name: str) -> None:
    if name and name not in INSTRUCTION_SETS:
        raise UsageError(f"CADA_FORCE_ISA is {name!r}; {nearest(name, INSTRUCTION_SETS)}")
    if library.cada_choose_isa(name.encode()) == _UNSUPPORTED_ISA:
        raise EnvironmentLacks(
            f"the instruction set {name!r} was forced, but this processor or this build does not "
            "have it; unset CADA_FORCE_ISA for the best there is"
        )


def choose_isa(name: str = "") -> str:
    """Force an instruction set for the whole process ("" = the best) and return the one in use.
    For tests and benchmarks; results do not depend on it."""
    _choose(_library(), name)
    return _isa(_library())
