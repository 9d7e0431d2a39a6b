"""Proves that an ONNX file is the same function as a network, and is fed and read the same way.

The truth is the network in PyTorch with its spec, stated here once more in plain NumPy and PyTorch:
how a frame is prepared and how scores become labels. The other side is the file as cada-deploy
would run it, with the spec that stands in its own metadata. Whoever exports calls `prove`; it
writes nothing, and raises CheckFailed where the two are not the same.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import onnx
import onnx.reference
import onnxruntime
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from cada_deploy import model_files, preprocess
from cada_deploy.engines import Engine, open_engine
from cada_deploy.errors import CheckFailed
from cada_deploy.fused import best_kernel
from cada_deploy.model_spec import METADATA_KEY, InferenceSpec, InputSpec, ModelSpec, Size
from cada_deploy.pipeline import Pipeline, Sizes
from cada_deploy.policies.fixed import every_class
from cada_deploy.rejections import ImageRejected
from cada_deploy.scores import Scores
from cada_deploy.stages import StageClock

IMAGE, SCORES, LABELS, CONFIDENCE = "image", "scores", "labels", "confidence"
HEADS = {"scores": (SCORES,), "labels": (LABELS,), "labels+confidence": (LABELS, CONFIDENCE)}

TOLERANCE = 1e-4  # of the largest score: what two convolution libraries may differ by
TIE = 1e-3  # a label may differ where the two best classes are this close in probability
ENTROPY_NATS = 0.01  # beyond what one fp16 step of the scores can do
MEAN_ENTROPY_NATS = 1e-3
CONFIDENCE_ERROR = 5e-3
UNTRACED = ((1, 65, 97), (2, 96, 64), (1, 131, 257))  # N, H, W; not what the exporter traces
REFERENCE: Size = (33, 41)  # onnx.reference is slow NumPy
MOST_PIXELS = 2_100_000  # of the grid on which labels are compared: bounds memory
LINT_S = 600

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Frames = Sequence[tuple[str, Bytes]]  # name, (H, W, 3) RGB


@dataclass(frozen=True)
class Truth:
    """What the file must be: this network, fed and read as this spec says, with this head."""

    network: nn.Module
    spec: ModelSpec
    head: str = "scores"
    batch: int | None = None

    @property
    def classes(self) -> int:
        return len(self.spec.classes)

    def scores(self, x: Floats) -> torch.Tensor:
        """x (N, 3, H, W) prepared -> scores (N, C, h, w)."""
        with torch.inference_mode():
            scores: torch.Tensor = self.network(torch.from_numpy(x))
        return scores


@dataclass(frozen=True)
class Proof:
    """What was compared and how far apart it was. Errors of scores are relative to the largest."""

    sizes: tuple[tuple[int, int, int], ...]  # N, H, W
    score_error: float
    frames: int
    pixels: int
    frame_score_error: float | None
    disagreements: int
    largest_margin: float  # of a disagreement, in probability
    entropy_error_nats: float | None
    mean_entropy_error_nats: float | None
    confidence_error: float | None
    classes_seen: int
    reference: str
    lint: str
    checks: tuple[str, ...] = field(default=("onnx.checker full", "strict shape inference"))

    @property
    def agreement(self) -> float:
        return 1.0 - self.disagreements / self.pixels if self.pixels else 1.0

    def to_json(self) -> dict[str, Any]:
        return {**json.loads(json.dumps(asdict(self))), "agreement": self.agreement}

    def text(self) -> str:
        sizes = ", ".join("x".join(map(str, s)) for s in self.sizes)
        lines = [
            f"ONNX Runtime against PyTorch on NxHxW {sizes}: scores differ by at most "
            f"{self.score_error:.2g} of the largest",
            f"{self.frames} frames through the whole pipeline: {self.agreement:.4%} of "
            f"{self.pixels:,} labels equal ({self.classes_seen} classes seen); "
            + self._disagreements(),
        ]
        if self.entropy_error_nats is not None:
            lines.append(
                f"entropy differs by at most {self.entropy_error_nats:.2g} nats, "
                f"{self.mean_entropy_error_nats:.2g} on average"
            )
        if self.confidence_error is not None:
            lines.append(f"confidence differs by at most {self.confidence_error:.2g}")
        lines += [
            f"onnx.reference: {self.reference}",
            f"{', '.join(self.checks)}: passed; Polygraphy check lint: {self.lint}",
        ]
        return "\n".join(lines)

    def _disagreements(self) -> str:
        if not self.disagreements:
            return "no disagreement"
        return (
            f"{self.disagreements} disagreements, all ties: the best two classes are within "
            f"{self.largest_margin:.2g}"
        )


def prove(truth: Truth, packed: bytes, frames: Frames) -> Proof:
    """Raises CheckFailed where the file is not the truth, or where the truth is not finite."""
    if not frames:
        raise ValueError("a proof needs frames")
    proto = checked(packed)
    spec = stated_spec(proto)
    session = _session(_with_scores(proto).SerializeToString())
    sizes = _sizes(truth)
    score_error = _same_function(truth, session, sizes, frames)
    compared = _compared(truth, spec, packed, session, frames)
    _same_spec(truth.spec, spec)
    return Proof(
        sizes=sizes,
        score_error=score_error,
        frames=len(frames),
        **compared,
        reference=_reference(truth, proto, frames),
        lint=lint(packed, truth),
    )


# --- the file by itself ------------------------------------------------------------------------


def checked(packed: bytes) -> onnx.ModelProto:
    """The model, if it obeys the standard: full checker, strict shapes, nothing unused."""
    proto = onnx.load_model_from_string(packed)
    try:
        onnx.checker.check_model(proto, full_check=True)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckFailed(f"the exported graph is not valid ONNX: {error}") from error
    used = {name for node in proto.graph.node for name in node.input}
    unused = [t.name for t in proto.graph.initializer if t.name not in used]
    if unused:
        raise CheckFailed(
            f"the exported graph holds weights that nothing reads ({', '.join(unused[:3])})"
        )
    return proto


def stated_spec(proto: onnx.ModelProto) -> ModelSpec:
    stated = [p.value for p in proto.metadata_props if p.key == METADATA_KEY]
    if not stated:
        raise CheckFailed("the exported file has no model spec in its metadata")
    return ModelSpec.loads(stated[0])


def _with_scores(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its inner scores as one more output, so that a label head can be looked into.
    A file whose graph has no such tensor is compared by its labels alone."""
    names = {name for node in proto.graph.node for name in node.output}
    if SCORES not in names or SCORES in [o.name for o in proto.graph.output]:
        return proto
    opened = onnx.ModelProto()
    opened.CopyFrom(proto)
    opened.graph.output.append(
        onnx.helper.make_tensor_value_info(SCORES, onnx.TensorProto.FLOAT, None)
    )
    return opened


def _session(packed: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(packed, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ORT raises its own unrelated classes
        raise CheckFailed(f"ONNX Runtime refuses the exported file: {error}") from error


def lint(packed: bytes, truth: Truth) -> str:
    """Polygraphy's `check lint`, in a process of its own (it logs and patches as it likes)."""
    missing = [m for m in ("polygraphy", "onnx_graphsurgeon") if not importlib.util.find_spec(m)]
    if missing:
        packages = " ".join(m.replace("_", "-") for m in missing)
        return f"not run (pip install {packages})"
    height, width = truth.spec.input.size or REFERENCE
    shape = f"{IMAGE}:[{truth.batch or 1},3,{height},{width}]"
    script = "import sys; from polygraphy.tools import main; sys.exit(main())"
    with tempfile.TemporaryDirectory(prefix="cada-lint-") as folder:
        model, report = Path(folder, "model.onnx"), Path(folder, "lint.json")
        model.write_bytes(packed)
        arguments = ["check", "lint", str(model), "--input-shapes", shape, "-o", str(report)]
        try:
            done = subprocess.run(
                [sys.executable, "-c", script, *arguments], capture_output=True, text=True,
                timeout=LINT_S, check=False, env={**os.environ, "POLYGRAPHY_AUTOINSTALL_DEPS": "0"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"not run (it took longer than {LINT_S} s)"
        if not report.exists():
            return f"not run ({_last_line(done.stderr or done.stdout)})"
        entries = json.loads(report.read_text(encoding="utf-8"))["lint_entries"]
    errors = [e for e in entries if e["level"] in ("error", "exception")]
    if errors or done.returncode:
        first = errors[0]["message"] if errors else _last_line(done.stderr or done.stdout)
        raise CheckFailed(f"Polygraphy check lint found {len(errors)} errors, the first: {first}")
    return f"passed, {len(entries)} warnings" if entries else "passed"


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"


# --- the function ------------------------------------------------------------------------------


def _sizes(truth: Truth) -> tuple[tuple[int, int, int], ...]:
    fixed, batch = truth.spec.input.size, truth.batch
    return tuple((batch or n, *(fixed or (h, w))) for n, h, w in UNTRACED)


def _same_function(
    truth: Truth,
    session: onnxruntime.InferenceSession,
    sizes: Sequence[tuple[int, int, int]],
    frames: Frames,
) -> float:
    """The largest relative error over noisy pieces of the frames, prepared as the truth says."""
    draw = np.random.Generator(np.random.PCG64(0))
    errors = [0.0]
    for n, height, width in sizes:
        rows = [_noisy(frames, draw, (height, width)) for _ in range(n)]
        x = np.concatenate([prepared(row, truth.spec.input) for row in rows])
        expected = truth.scores(x).numpy()
        _finite(expected, f"a {height}x{width} input")
        found = _run(session, x)
        if SCORES in found:
            errors.append(_score_error(found[SCORES], expected, f"{n}x3x{height}x{width}"))
        for name in HEADS[truth.head]:
            if name != SCORES and found[name].shape != (n, height, width):
                raise CheckFailed(
                    f"{name} are {found[name].shape} for a {n}x3x{height}x{width} input; expected "
                    f"{(n, height, width)}"
                )
    return max(errors)


def _noisy(frames: Frames, draw: np.random.Generator, size: Size) -> Bytes:
    """A frame brought to `size`, with noise: real colours, and every pixel different."""
    _, image = frames[int(draw.integers(len(frames)))]
    scaled = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    noisy = scaled.astype(np.int16) + draw.integers(-40, 41, scaled.shape, np.int16)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def _run(session: onnxruntime.InferenceSession, x: Floats) -> dict[str, npt.NDArray[Any]]:
    names = [o.name for o in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, {IMAGE: x})))
    except Exception as error:
        raise CheckFailed(f"ONNX Runtime failed on an input of shape {x.shape}: {error}") from error


def _score_error(found: npt.NDArray[Any], expected: npt.NDArray[Any], where: str) -> float:
    if found.shape != expected.shape:
        raise CheckFailed(
            f"scores of {where} are {found.shape} in ONNX and {expected.shape} in PyTorch: a "
            "stride, a padding or the pooling's ceil mode is not the same"
        )
    largest = float(np.abs(expected).max()) or 1.0
    error = float(np.abs(found - expected).max()) / largest
    if not error <= TOLERANCE:
        raise CheckFailed(
            f"scores of {where} differ by {error:.3g} of the largest score; at most {TOLERANCE:g} "
            "was expected: the weights, the branches or the input's preparation are not the same"
        )
    return error


def _finite(scores: npt.NDArray[Any], where: str) -> None:
    bad = int((~np.isfinite(scores)).sum())
    if bad:
        raise CheckFailed(
            f"the network itself is not finite: {bad} of {scores.size} scores of {where} are NaN "
            "or infinite. No label can come from them; take an earlier checkpoint, and check that "
            "the preset is the one it was trained with"
        )


def _reference(truth: Truth, proto: onnx.ModelProto, frames: Frames) -> str:
    """The standard's own evaluator on one small input, up to the scores: a second opinion that
    shares no code with ONNX Runtime."""
    draw = np.random.Generator(np.random.PCG64(1))
    x = prepared(_noisy(frames, draw, REFERENCE), truth.spec.input)
    expected = truth.scores(x).numpy()
    size = f"{REFERENCE[0]}x{REFERENCE[1]}"
    try:
        evaluator = onnx.reference.ReferenceEvaluator(_only_scores(proto))
        (found,) = evaluator.run([SCORES], {IMAGE: x})
    except Exception as error:  # it is written for clarity and does not know every operator
        return f"not run ({type(error).__name__}: {_last_line(str(error))[:120]})"
    error = _score_error(np.asarray(found), expected, f"{size} under onnx.reference")
    return f"passed on {size}, scores differ by at most {error:.2g} of the largest"


def _only_scores(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph up to its scores."""
    cut = onnx.ModelProto()
    cut.CopyFrom(proto)
    makers = {name: node for node in cut.graph.node for name in node.output}
    wanted, kept = [SCORES], set()
    while wanted:
        name = wanted.pop()
        if name in makers and name not in kept:
            kept |= set(makers[name].output)
            wanted += makers[name].input
    nodes = [node for node in cut.graph.node if kept & set(node.output)]
    del cut.graph.node[:]
    cut.graph.node.extend(nodes)
    del cut.graph.output[:]
    cut.graph.output.append(
        onnx.helper.make_tensor_value_info(SCORES, onnx.TensorProto.FLOAT, None)
    )
    return cut


# --- the whole path, from a frame's bytes to labels ---------------------------------------------


def prepared(image: Bytes, spec: InputSpec) -> Floats:
    """(H, W, 3) RGB bytes -> (1, 3, h, w) float32: the projects' own statement, not preprocess.py.

    PIL's BICUBIC or cv2's INTER_LINEAR, the colour order, then (scale * v - mean) / std.
    """
    if spec.size is not None and image.shape[:2] != tuple(spec.size):
        height, width = spec.size
        if spec.resize == "bicubic":
            whole = Image.fromarray(image)
            image = np.array(whole.resize((width, height), Image.Resampling.BICUBIC))
        else:
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    values = image.astype(np.float64)
    if spec.colour == "BGR":
        values = values[:, :, ::-1]
    values = (values * spec.scale - np.array(spec.mean)) / np.array(spec.std)
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None], dtype=np.float32)


@dataclass(frozen=True)
class Reading:
    """What the truth says of one frame on the label grid."""

    labels: npt.NDArray[np.int64]  # (H, W)
    margin: npt.NDArray[np.float64]  # between the two best probabilities
    entropy: npt.NDArray[np.float64]  # nats
    confidence: npt.NDArray[np.float64]
    low: torch.Tensor  # (1, C, h, w) float64, centred
    align_corners: bool

    def explained(self, found: npt.NDArray[np.int64], at: npt.NDArray[np.bool_]) -> bool:
        """Are the disagreements at `at` ties: closer than TIE, or than rounding the scores once to
        fp16 (or the float32 coordinates of a Resize) can move them?"""
        if not at.any() or self.margin[at].max() <= TIE:
            return True
        size = self.labels.shape
        reach = functional.interpolate(
            self.low.abs(), size=size, mode="bilinear", align_corners=self.align_corners
        )[0].numpy()
        rows, columns = np.nonzero(at)
        both = reach[self.labels[at], rows, columns] + reach[found[at], rows, columns]
        # A score s is moved by at most 2^-10 |s|; p_a - p_b then by half of what ln(p_a / p_b) is.
        return bool((self.margin[at] <= TIE + 2.0**-11 * both).all())


def read(scores: torch.Tensor, spec: ModelSpec, grid: Size, *, rounded: bool) -> Reading:
    """scores (1, C, h, w) of the network -> labels as its project makes them: interpolate and
    softmax (order logits), or softmax and interpolate (order probs). rounded: scores go through
    fp16 as docs/mathematics.md says; float64 from there on."""
    low = scores - scores.amax(1, keepdim=True)
    low = low.clamp(min=-65504).half().double() if rounded else low.double()
    align = spec.output.align_corners
    if spec.output.order == "probs":
        p = functional.interpolate(low.softmax(1), size=grid, mode="bilinear", align_corners=align)
    else:
        p = functional.interpolate(low, size=grid, mode="bilinear", align_corners=align).softmax(1)
    best = p.topk(min(2, p.shape[1]), dim=1).values[0]
    margin = best[0] - best[1] if len(best) > 1 else best[0]
    entropy = -torch.special.xlogy(p, p).sum(1)[0]
    labels = p.argmax(1)[0]
    return Reading(labels.numpy(), margin.numpy(), entropy.numpy(), best[0].numpy(), low, align)


def _compared(
    truth: Truth,
    spec: ModelSpec,
    packed: bytes,
    session: onnxruntime.InferenceSession,
    frames: Frames,
) -> dict[str, Any]:
    """Every frame's labels on both sides. spec is the file's own."""
    tally = _Tally()
    if truth.head == "scores":
        with _pipeline(packed) as (pipeline, recorded):
            for name, image in frames:
                _through_pipeline(truth, pipeline, recorded, name, image, tally)
    else:
        for name, image in frames:
            _through_labels(truth, spec, session, name, image, tally)
    return tally.to_json()


@contextmanager
def _pipeline(packed: bytes) -> Iterator[tuple[Pipeline, _Recorded]]:
    """cada-deploy's own path with nothing said but the file. Windows, scales and mirrors, which
    only repeat the network, are left out."""
    with tempfile.TemporaryDirectory(prefix="cada-proof-") as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(packed)
        model = model_files.load_model(path)
        recorded = _Recorded(open_engine("ort", model, "cpu", torch.get_num_threads()))
        plain = replace(model.spec, inference=InferenceSpec())
        yield Pipeline(recorded, best_kernel(1), plain), recorded


class _Recorded:
    """An engine that keeps the last scores it gave."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name, self.version = engine.name, engine.version
        self.device, self.classes = engine.device, engine.classes
        self.last: npt.NDArray[Any] | None = None

    def infer(self, batch: npt.NDArray[Any]) -> Scores:
        scores = self._engine.infer(batch)
        self.last = np.asarray(scores.array)
        return scores


class _Tally:
    """Adds up what the frames show."""

    def __init__(self) -> None:
        self.pixels = self.disagreements = 0
        self.largest_margin = 0.0
        self.score_errors: list[float] = []
        self.entropy: list[tuple[float, float]] = []
        self.confidence: list[float] = []
        self.seen: set[int] = set()

    def labels(self, name: str, reading: Reading, found: npt.NDArray[Any]) -> None:
        found = found.astype(np.int64)
        if found.shape != reading.labels.shape:
            raise CheckFailed(
                f"labels of {name} are {found.shape}; expected {reading.labels.shape}"
            )
        classes = reading.low.shape[1]
        differ = found != reading.labels
        self.pixels += differ.size
        self.seen |= set(np.unique(reading.labels).tolist())
        if not differ.any():
            return
        self.disagreements += int(differ.sum())
        self.largest_margin = max(self.largest_margin, float(reading.margin[differ].max()))
        if found.max() >= classes or not reading.explained(found, differ):
            raise CheckFailed(
                f"{int(differ.sum())} of {differ.size} labels of {name} differ, where the two best "
                f"classes are up to {reading.margin[differ].max():.3g} apart; at most {TIE:g} was "
                "expected: align_corners, the order of upsampling and softmax, or the input's "
                "preparation are not the same"
            )

    def entropies(self, name: str, reading: Reading, found: npt.NDArray[Any]) -> None:
        error = np.abs(found - reading.entropy)
        step = float(np.spacing(np.float16(reading.low.abs().max())))
        worst, mean = float(error.max()), float(error.mean())
        if not (worst <= ENTROPY_NATS + step and mean <= MEAN_ENTROPY_NATS):
            raise CheckFailed(
                f"the entropy of {name} differs by up to {worst:.3g} nats ({mean:.3g} on average); "
                f"at most {ENTROPY_NATS + step:.3g} ({MEAN_ENTROPY_NATS:g}) was expected: "
                "align_corners, or the order of upsampling and softmax, is not the same"
            )
        self.entropy.append((worst, mean))

    def to_json(self) -> dict[str, Any]:
        return {
            "pixels": self.pixels,
            "frame_score_error": max(self.score_errors) if self.score_errors else None,
            "disagreements": self.disagreements,
            "largest_margin": self.largest_margin,
            "entropy_error_nats": max(w for w, _ in self.entropy) if self.entropy else None,
            "mean_entropy_error_nats": (
                sum(m for _, m in self.entropy) / len(self.entropy) if self.entropy else None
            ),
            "confidence_error": max(self.confidence) if self.confidence else None,
            "classes_seen": len(self.seen),
        }


def _through_pipeline(
    truth: Truth, pipeline: Pipeline, recorded: _Recorded, name: str, image: Bytes, tally: _Tally
) -> None:
    expected = truth.scores(prepared(image, truth.spec.input))
    _finite(expected.numpy(), name)
    grid = _grid(image)
    clock = StageClock()
    try:
        scores = pipeline.scores(image, clock)
    except ImageRejected as error:
        raise CheckFailed(f"{name}: {error}; in PyTorch its scores are finite") from error
    assert recorded.last is not None
    tally.score_errors.append(_score_error(recorded.last, expected.numpy(), name))
    reading = read(expected, truth.spec, grid, rounded=True)
    sized = replace(pipeline, sizes=Sizes(label=grid))
    found = sized.select(
        scores, _size(image), _size(image), every_class(truth.classes, 0.0), clock, entropy=True
    )
    assert found.entropy is not None
    tally.labels(name, reading, found.labels)
    tally.entropies(name, reading, found.entropy)


def _through_labels(
    truth: Truth,
    spec: ModelSpec,
    session: onnxruntime.InferenceSession,
    name: str,
    image: Bytes,
    tally: _Tally,
) -> None:
    """A label head makes its map at the size of the network's input."""
    x = prepared(image, truth.spec.input)
    expected = truth.scores(x)
    _finite(expected.numpy(), name)
    size = preprocess.input_size(spec.input, _size(image))
    row = preprocess.to_batch_row(image, spec.input, size)
    feed = np.repeat(row, truth.batch or 1, axis=0)
    found = _run(session, np.asarray(feed, np.float32))
    if SCORES in found:
        error = _score_error(found[SCORES][:1], expected.numpy(), name)
        tally.score_errors.append(error)
    reading = read(expected, truth.spec, (x.shape[2], x.shape[3]), rounded=False)
    labels = found[LABELS]
    if labels.dtype != np.uint8:
        raise CheckFailed(f"labels are {labels.dtype}; expected uint8")
    tally.labels(name, reading, labels[0])
    if truth.head == "labels+confidence":
        error = float(np.abs(found[CONFIDENCE][0] - reading.confidence).max())
        if not error <= CONFIDENCE_ERROR:
            raise CheckFailed(
                f"confidence of {name} differs by {error:.3g}; at most {CONFIDENCE_ERROR:g} was "
                "expected: align_corners or the order of upsampling and softmax is not the same"
            )
        tally.confidence.append(error)


def _size(image: Bytes) -> Size:
    return image.shape[0], image.shape[1]


def _grid(image: Bytes) -> Size:
    """The image's own size, or a smaller one where probabilities at float64 would fill memory."""
    height, width = _size(image)
    shrink = min(1.0, (MOST_PIXELS / (height * width)) ** 0.5)
    return max(1, int(height * shrink)), max(1, int(width * shrink))


def _same_spec(truth: ModelSpec, found: ModelSpec) -> None:
    """What frames of their own size cannot show (the resize filter, the class names) is compared
    as it is written."""
    wanted, stated = truth.to_json(), found.to_json()
    for part in ("classes", "input", "output", "inference", "preset", "weights_sha256"):
        if wanted[part] != stated[part]:
            raise CheckFailed(
                f"the file's spec says {part} {stated[part]}; expected {wanted[part]}"
            )
