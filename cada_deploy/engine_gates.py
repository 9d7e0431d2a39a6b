"""The checks that a built engine must pass before anybody may use it, for any kind of engine.

A builder can report success and be wrong: TensorRT 10.11 and 11.1 give wrong scores for SegFormer
at batch > 1 (NVIDIA/TensorRT#4853), and a network that was to be fp16 has come out as fp32. Each
gate states what it found; every comparison is written so that NaN, or not knowing, fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy.engine_plans import Gate, Machine, Profile, parsed_version, shown
from cada_deploy.engines import Engine
from cada_deploy.errors import CadaError, CheckFailed, UsageError
from cada_deploy.image_files import find_images
from cada_deploy.images import decode, read_bytes
from cada_deploy.model_spec import ModelSpec, Size
from cada_deploy.preprocess import to_batch_row
from cada_deploy.rejections import ImageRejected
from cada_deploy.scenes import SOURCE, TARGET, scene

Array = npt.NDArray[Any]
Frame = npt.NDArray[np.uint8]

MOST_FRAMES = 4
REPEATS = 3  # the third run of a shape may be the first from a CUDA graph


# --- what is looked at -------------------------------------------------------------------------


@dataclass(frozen=True)
class Frames:
    """Images (H, W, 3) uint8 RGB, and how they are told of."""

    images: tuple[Frame, ...]
    text: str


def chosen_frames(folder: Any, size: Size) -> Frames:
    """Some of a folder's images, spread evenly; drawn scenes when there is no folder."""
    if folder is None:
        drawn = [scene(20 + k, (SOURCE, TARGET)[k % 2], size).image for k in range(MOST_FRAMES)]
        return Frames(tuple(drawn), f"{MOST_FRAMES} drawn street scenes (no --images were given)")
    refs = find_images(folder)
    count = min(MOST_FRAMES, len(refs))
    images, refused = [], ""
    for k in range(count):
        ref = refs[(2 * k + 1) * len(refs) // (2 * count)]
        try:
            images.append(decode(read_bytes(ref.path)).image)
        except ImageRejected as error:
            refused = f"{ref.path.name}: {error}"
    if not images:
        raise UsageError(f"--images {folder}: none of {count} images can be read; {refused}")
    return Frames(tuple(images), f"{len(images)} of {len(refs)} images of {folder}")


def batches(frames: Frames, spec: ModelSpec, profile: Profile) -> list[Array]:
    """Rows of different frames at every size that the profile names: more rows than the engine's
    batch, so that a full and a padded one are seen."""
    sizes = dict.fromkeys((profile.optimum, profile.minimum, profile.maximum))
    return [_rows(frames.images, spec, size, profile.batch + 1) for size in sizes]


def _rows(images: Sequence[Frame], spec: ModelSpec, size: Size, count: int) -> Array:
    """Mirrored and turned copies stand in for images that are not there: no two rows are equal."""
    rows = []
    for k in range(max(count, 2)):
        image = images[k % len(images)]
        turned = np.rot90(image, 2 * (k // len(images) // 2 % 2))
        image = turned[:, ::-1] if k // len(images) % 2 else turned
        rows.append(to_batch_row(np.ascontiguousarray(image), spec.input, size))
    return np.concatenate(rows)


# --- how far apart is too far ------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """Between an engine and ONNX Runtime on the same graph. margin: where the labels differ, how
    far the reference's two best probabilities may be apart. error: mean difference of the
    probabilities. agreement: share of equal labels."""

    agreement: float
    margin: float
    error: float


# Chosen, not measured: float32 is summed in another order and nothing else; of the rest, what
# rounding to that type may move. They are to be judged on real GPUs (docs/tensorrt.md).
LIMITS = {
    "float32": Limits(0.999, 1e-2, 1e-4),
    "float16": Limits(0.995, 0.1, 5e-3),
    "bfloat16": Limits(0.98, 0.3, 2e-2),
    "int8": Limits(0.98, 0.3, 2e-2),
    "float8": Limits(0.98, 0.3, 2e-2),
}


# --- the gates ---------------------------------------------------------------------------------


def examine(
    engine: Engine,
    reference: Engine,
    rows: Sequence[Array],
    precision: str,
    inspected: str,
    meaning: str = "logits",
) -> tuple[Gate, ...]:
    """Every gate, whatever the earlier ones found. `rows` are batches (N, ...) of frames,
    `inspected` is TensorRT's inspector JSON."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("precision", lambda: _precision(precision, inspected)),
        ("parity", lambda: _parity(engine, reference, rows, LIMITS[precision], meaning)),
        ("neighbours", lambda: _neighbours(engine, rows)),
        ("order", lambda: _order(engine, rows)),
        ("repeat", lambda: _repeat(engine, rows)),
        ("nan", lambda: _nan(engine, reference, rows)),
    ]
    return tuple(_gate(name, check) for name, check in checks)


class _Failed(Exception):
    """A gate's finding when it does not pass."""


def _gate(name: str, check: Callable[[], str]) -> Gate:
    try:
        return Gate(name, True, check())
    except _Failed as error:
        return Gate(name, False, str(error))
    except CadaError as error:  # an engine that cannot run the frames has not passed
        return Gate(name, False, f"not run: {error}")


def require(gates: Sequence[Gate], what: str, known: Sequence[str] = ()) -> None:
    """Raises CheckFailed with every gate that did not pass, and what is known of this version."""
    failed = [f"{gate.name}: {gate.found}" for gate in gates if not gate.passed]
    if failed:
        told = [f"known of this version: {text}" for text in known]
        raise CheckFailed(
            f"{what} was built, but is wrong, so it is not kept:\n  "
            + "\n  ".join([*failed, *told])
            + "\nUse --engine ort, or another TensorRT version"
        )


def _scores(engine: Engine, rows: Array) -> Array:
    return np.asarray(engine.infer(rows).array)


def _parity(
    engine: Engine, reference: Engine, batches: Sequence[Array], limits: Limits, meaning: str
) -> str:
    agreed, pixels, worst, error, sizes = 0, 0, 0.0, 0.0, []
    for rows in batches:
        expected, found = _scores(reference, rows), _scores(engine, rows)
        sizes.append(_named(rows))
        if found.shape != expected.shape:
            raise _Failed(
                f"scores of shape {found.shape} at {sizes[-1]}, expected {expected.shape}"
            )
        if wrong := _where_not_finite(found, expected):
            raise _Failed(f"{wrong} at {sizes[-1]}")
        p, q = _probabilities(expected, meaning), _probabilities(found, meaning)
        differs = p.argmax(1) != q.argmax(1)
        second, first = np.sort(p, axis=1)[:, -2:].swapaxes(0, 1) if p.shape[1] > 1 else (p, p)
        # np.maximum keeps a NaN, which then fails every comparison below.
        worst = float(np.maximum(worst, np.where(differs, first - second, 0.0).max()))
        error = float(np.maximum(error, np.abs(p - q).mean()))
        agreed += int((~differs).sum())
        pixels += differs.size
    agreement = agreed / pixels
    text = (
        f"{agreement:.4%} of the labels are ONNX Runtime's, the others lie within a margin of "
        f"{worst:.3g}, probabilities differ by {error:.3g} on average ({', '.join(sizes)})"
    )
    if agreement >= limits.agreement and worst <= limits.margin and error <= limits.error:
        return text
    raise _Failed(
        f"{text}; expected at least {limits.agreement:.1%}, at most {limits.margin:g} and "
        f"{limits.error:g}"
    )


def _where_not_finite(found: Array, expected: Array) -> str:
    """What is wrong when the two are not finite in the same places; empty when they are."""
    ours, theirs = ~np.isfinite(found), ~np.isfinite(expected)
    if (ours == theirs).all():
        return ""
    return f"{ours.sum()} scores are not finite, {theirs.sum()} of ONNX Runtime's"


def _probabilities(scores: Array, meaning: str) -> npt.NDArray[np.float64]:
    """(N, C, h, w) in float64. What is not finite is the same in both: it counts as no evidence."""
    wide = np.nan_to_num(scores.astype(np.float64), nan=0.0, posinf=0.0, neginf=-1e4)
    if meaning == "probabilities":
        return wide
    e = np.exp(wide - wide.max(1, keepdims=True))
    result: npt.NDArray[np.float64] = e / e.sum(1, keepdims=True)
    return result


def _neighbours(engine: Engine, batches: Sequence[Array]) -> str:
    """A row among others has the bits that it has among copies of itself."""
    count = 0
    for rows in batches:
        together = _scores(engine, rows)
        for k in range(len(rows)):
            alone = _scores(engine, np.repeat(rows[k : k + 1], len(rows), axis=0))
            for position, row in enumerate(alone):
                if not _same(row, together[k]):
                    raise _Failed(
                        f"row {k} of {len(rows)} at {_named(rows)} has other scores among others "
                        f"than {position} places into a batch of itself; {_apart(row, together[k])}"
                    )
                count += 1
    return f"{count} rows have the same bits alone and among others"


def _order(engine: Engine, batches: Sequence[Array]) -> str:
    for rows in batches:
        forward = _scores(engine, rows)
        backward = _scores(engine, np.ascontiguousarray(rows[::-1]))
        if not _same(backward[::-1], forward):
            raise _Failed(
                f"the rows of a batch at {_named(rows)} have other scores in the other order; "
                f"{_apart(backward[::-1], forward)}"
            )
    return "the rows of a batch have the same bits in any order"


def _repeat(engine: Engine, batches: Sequence[Array]) -> str:
    for rows in batches:
        first = _scores(engine, rows)
        for time in range(1, REPEATS):
            again = _scores(engine, rows)
            if not _same(again, first):
                raise _Failed(
                    f"run {time + 1} of the same frames at {_named(rows)} gives other scores; "
                    + _apart(again, first)
                )
    return f"{REPEATS} runs of the same frames give the same bits"


def _nan(engine: Engine, reference: Engine, batches: Sequence[Array]) -> str:
    """A frame of NaN does not touch its neighbours. That NaN comes through is told and not asked:
    max(0, NaN) is 0 in many kernels, and no image holds one."""
    rows = batches[0].copy()
    expected = _scores(engine, rows)
    rows[0] = np.nan
    found = _scores(engine, rows)
    if not _same(found[1:], expected[1:]):
        raise _Failed(f"a frame of NaN changes its neighbours; {_apart(found[1:], expected[1:])}")
    ours = np.isnan(found[0]).mean()
    theirs = np.isnan(_scores(reference, rows[:1])[0]).mean()
    return (
        f"a frame of NaN leaves its neighbours alone; of its own scores {ours:.0%} are NaN "
        f"(ONNX Runtime: {theirs:.0%})"
    )


def _same(a: Array, b: Array) -> bool:
    return np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


def _apart(a: Array, b: Array) -> str:
    with np.errstate(invalid="ignore"):
        difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return f"they differ by up to {np.nanmax(difference, initial=0.0):.3g}"


def _named(rows: Array) -> str:
    """`2 x 512x1024` of a batch in either layout."""
    size = rows.shape[2:] if rows.shape[1] == 3 else rows.shape[1:3]
    return f"{len(rows)} x {shown((size[0], size[1]))}"


# --- what was really built ---------------------------------------------------------------------


# As the inspector words it: "Half", "Row major linear FP16 format", "Int8", "Float", ...
_WORDS = {
    "float8": r"fp8|float8|e4m3\w*",
    "int8": r"int8",
    "bfloat16": r"bf16|bfloat16",
    "float16": r"half|fp16|float16",
    "float32": r"float|fp32|float32",
}
# 10.x: "Format/Datatype"; 11.x has it in two fields.
_FIELDS = {"format/datatype", "datatype", "format"}


def built_precisions(inspected: str) -> dict[str, int]:
    """How many layers have an input or an output of each type. Raises ValueError for what is not
    an inspector's JSON with its details."""
    data = json.loads(inspected)
    layers = data.get("Layers") if isinstance(data, dict) else data
    if not isinstance(layers, list):
        raise ValueError("it lists no layers")
    counts = dict.fromkeys(_WORDS, 0)
    for layer in layers:
        for kind in _types_of(layer):
            counts[kind] += 1
    if not any(counts.values()):
        raise ValueError("no layer says what type its tensors have")
    return counts


def _types_of(layer: Any) -> set[str]:
    if not isinstance(layer, dict):
        return set()
    tensors = [*(layer.get("Inputs") or ()), *(layer.get("Outputs") or ())]
    texts = [
        str(value).lower()
        for tensor in tensors
        if isinstance(tensor, dict)
        for name, value in tensor.items()
        if name.lower() in _FIELDS
    ]
    return {kind for text in texts for kind in _words_in(text)}


def _words_in(text: str) -> Iterator[str]:
    for kind, pattern in _WORDS.items():
        if re.search(rf"\b(?:{pattern})\b", text):
            yield kind


def _precision(asked: str, inspected: str) -> str:
    try:
        counts = built_precisions(inspected)
    except ValueError as error:
        raise _Failed(f"the engine does not say what it is made of: {error}") from error
    text = ", ".join(f"{kind} in {count} layers" for kind, count in counts.items() if count)
    if asked == "float32":
        narrow = [kind for kind, count in counts.items() if count and kind != "float32"]
        if narrow:
            raise _Failed(f"the graph is float32, the engine has {text}")
    elif not counts[asked]:
        raise _Failed(f"the graph is {asked}, the engine has {text}: it was built wider")
    return text


# --- known faults ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What others found wrong in some versions: [first, last] by their leading numbers."""

    first: tuple[int, ...]
    last: tuple[int, ...]
    reason: str
    source: str
    capability: tuple[int, int] | None = None

    def concerns(self, machine: Machine) -> bool:
        here = parsed_version(machine.tensorrt)
        inside = self.first <= here and here[: len(self.last)] <= self.last
        return inside and self.capability in (None, machine.compute_capability)


# Reports of others; none was reproduced here. They are told when they fit, and the gates decide.
FAULTS = (
    Fault(
        (10, 11),
        (11, 1),
        "SegFormer gives wrong scores at batch > 1, in fp32 too (seen in 10.11 and 11.1)",
        "https://github.com/NVIDIA/TensorRT/issues/4853",
    ),
    Fault(
        (10, 13, 3, 9),
        (10, 13, 3, 9),
        "a fusion of matrix products at batch 1 gives wrong values on Thor",
        "https://github.com/NVIDIA/TensorRT-Edge-LLM/issues/151",
        (11, 0),
    ),
    Fault(
        (10, 14),
        (11, 1),
        "detection transformers give wrong outputs in fp32 (seen in 10.14 and 11.1)",
        "https://github.com/NVIDIA/TensorRT/issues/4813",
    ),
    Fault(
        (11, 1),
        (11, 2),
        "If, Transpose and Resize in a row give wrong values",
        "https://github.com/NVIDIA/TensorRT/issues/4846",
    ),
)


def known_faults(machine: Machine, faults: Iterable[Fault] = FAULTS) -> list[str]:
    return [f"{fault.reason} ({fault.source})" for fault in faults if fault.concerns(machine)]
