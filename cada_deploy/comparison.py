"""Are two models equal for this job? Labels, entropies, and which pseudo labels change.

A and B are any two of checkpoint, exported program, ONNX file and TensorRT engine; A is taken as
the truth. Both see the same images, each with its own spec, and are compared on the images' own
grid. Scores wait in a temporary folder until the thresholds are known, so memory does not grow
with the set. Nothing here draws a page or prints; comparison_page.py does.
"""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy.classes import ClassSet
from cada_deploy.engine_plans import Build
from cada_deploy.engines import builds, default_device, load_model, open_engine
from cada_deploy.errors import ArtefactMismatch, RunFailed, UsageError, nearest
from cada_deploy.fused import UNSELECTED, Evidence, best_kernel
from cada_deploy.image_files import ImageRef, find_images
from cada_deploy.metrics import ConfusionMatrix, confusion_matrix, empty_matrix
from cada_deploy.model_files import Model, check_classes
from cada_deploy.model_spec import Size
from cada_deploy.pipeline import Pipeline, Sizes
from cada_deploy.policies import Rule
from cada_deploy.progress import progress
from cada_deploy.rejections import ImageRejected
from cada_deploy.score_cache import ScoreFile, read_scores
from cada_deploy.scores import EncodedScores
from cada_deploy.selection import Selecting
from cada_deploy.stages import StageClock
from cada_deploy.statistics import ClassStatistics

TIE = 1e-3  # a margin in probability below which a disagreement is nobody's fault
MOST_PICTURES = 6
ENGINES = {
    ".onnx": "ort",
    ".engine": "trt",
    ".plan": "trt",
    **dict.fromkeys((".pth", ".pt", ".pkl", ".safetensors", ".ckpt", ".tar", ".pt2"), "torch"),
}

# Margins are binned for the median: 200 bins a decade, 1.2 % wide, from 1e-8 to 1.
_MARGIN_EDGES = np.logspace(-8, 0, 1601)

Labels = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Asked:
    """What to compare, and how."""

    a: Path
    b: Path
    images: Path
    preset: str | None = None
    spec_file: Path | None = None
    classes: ClassSet | None = None
    size: Size | None = None
    limit: int | None = None
    selecting: Selecting = Selecting()
    workers: int = 1
    quiet: bool = False
    engine_b: str | None = None  # None: the one that runs B's kind of file
    build: Build | None = None

    def __post_init__(self) -> None:
        if self.selecting.scope != "dataset":
            raise UsageError("compare needs --scope dataset: one image has no other's thresholds")
        if self.preset and self.spec_file:
            raise UsageError("--preset and --spec both say how to feed the model; give one of them")


@dataclass(frozen=True)
class Side:
    """One of the two models, open. letter is A or B."""

    letter: str
    path: Path
    sha256: str
    engine: str
    pipeline: Pipeline

    def to_json(self) -> dict[str, Any]:
        spec = self.pipeline.spec
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "engine": self.engine,
            "preset": spec.preset,
            "align_corners": spec.output.align_corners,
            "order": spec.output.order,
        }


@dataclass(frozen=True)
class Margins:
    """Top-2 probability margins under A where the labels differ and A has one."""

    count: int = 0
    ties: int = 0  # below TIE
    largest: float = 0.0
    median: float | None = None

    @property
    def ties_share(self) -> float | None:
        return self.ties / self.count if self.count else None


@dataclass(frozen=True)
class Change:
    """What becomes of the pixels of one class that A selects. lost: B selects nothing there;
    relabelled: B selects another class; gained: B selects this class where A selects nothing."""

    selected: int
    kept: int
    lost: int
    relabelled: int
    gained: int

    @property
    def loss(self) -> float:
        """Share of A's selected pixels that are lost or relabelled."""
        return (self.lost + self.relabelled) / self.selected if self.selected else 0.0


@dataclass(frozen=True, eq=False)
class Picture:
    """One of the frames that differ most: image (H, W, 3), labels of both, A's margin where they
    differ (NaN elsewhere)."""

    name: str
    image: npt.NDArray[np.uint8]
    a: Labels
    b: Labels
    margin: npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Everything that was found. Shares are 0..1, entropies in nats."""

    a: Side
    b: Side
    classes: ClassSet
    images: int
    rejected: tuple[tuple[str, str], ...]  # name, why; neither side counts
    one_sided: tuple[tuple[str, str], ...]  # name, whose scores were not finite
    matrix: ConfusionMatrix  # row A, column B
    pixels: int  # that have a label on either side
    disagreements: int
    margins: Margins
    entropy_error_max: float
    entropy_error_mean: float
    rule_a: Rule
    rule_b: Rule
    own: tuple[Change, ...]  # A under A's thresholds against B under B's
    same: tuple[Change, ...]  # both under A's thresholds
    pictures: tuple[Picture, ...] = field(repr=False, default=())

    @property
    def agreement(self) -> float:
        return 1.0 - self.disagreements / self.pixels if self.pixels else float("nan")

    @property
    def class_agreement(self) -> npt.NDArray[np.float64]:
        """(C,) of A's pixels of each class, the share that B labels alike; NaN for none."""
        right = np.diagonal(self.matrix.counts[:, :-1]).astype(np.float64)
        whole = self.matrix.labelled
        result = np.full(len(whole), np.nan)
        np.divide(right, whole, out=result, where=whole > 0)
        return result

    def to_json(self) -> dict[str, Any]:
        rows = zip(
            self.classes.names, self.matrix.labelled.tolist(), self.class_agreement.tolist(),
            self.matrix.iou.tolist(), self.rule_a.thresholds, self.rule_b.thresholds, self.own,
            self.same,
        )  # fmt: skip
        return {
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "images": self.images,
            "rejected": [list(r) for r in self.rejected],
            "one_sided": [list(r) for r in self.one_sided],
            "pixels": self.pixels,
            "agreement": _number(self.agreement),
            "disagreements": self.disagreements,
            "margins": {**vars(self.margins), "ties_share": self.margins.ties_share},
            "entropy_error_nats": {"max": self.entropy_error_max, "mean": self.entropy_error_mean},
            "mean_iou": _number(self.matrix.mean_iou),
            "classes": {
                name: {
                    "pixels": pixels,
                    "agreement": _number(agreement),
                    "iou": _number(iou),
                    "threshold_a": threshold_a,
                    "threshold_b": threshold_b,
                    "own_thresholds": {**vars(own), "loss": own.loss},
                    "same_thresholds": {**vars(same), "loss": same.loss},
                }
                for name, pixels, agreement, iou, threshold_a, threshold_b, own, same in rows
            },
        }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


@dataclass(frozen=True)
class Gates:
    """How far apart is too far; None = not asked."""

    min_agreement: float | None = None
    max_entropy_error: float | None = None
    max_selected_loss: float | None = None
    max_margin: float | None = None

    @property
    def asked(self) -> bool:
        return any(v is not None for v in vars(self).values())

    def failures(self, found: Comparison) -> list[str]:
        """Every gate that does not hold, with its figures. Written so that NaN fails."""
        failed = []
        wanted = self.min_agreement
        if wanted is not None and not found.agreement >= wanted:
            failed.append(f"--min-agreement {wanted:g}: the labels agree in {found.agreement:.6f}")
        limit = self.max_entropy_error
        if limit is not None and not found.entropy_error_max <= limit:
            failed.append(
                f"--max-entropy-error {limit:g}: entropies differ by {found.entropy_error_max:.4g}"
            )
        limit = self.max_margin
        if limit is not None and not found.margins.largest <= limit:
            failed.append(
                f"--max-margin {limit:g}: labels differ where A's two best classes are "
                f"{found.margins.largest:.4g} apart"
            )
        failed += self._losses(found)
        if self.asked and found.one_sided:
            names = ", ".join(f"{name} ({whose})" for name, whose in found.one_sided[:3])
            failed.append(f"only one model gives finite scores for {names}")
        return failed

    def _losses(self, found: Comparison) -> list[str]:
        limit, failed = self.max_selected_loss, []
        if limit is None:
            return []
        for which, changes in (("its own", found.own), ("A's", found.same)):
            over = [
                (change.loss, name, change.selected)
                for name, change in zip(found.classes.names, changes)
                if not change.loss <= limit
            ]
            if over:
                loss, name, selected = max(over)
                failed.append(
                    f"--max-selected-loss {limit:g}: with {which} thresholds B loses {loss:.4f} of "
                    f"the {selected} pixels that A selects as {name}"
                    + (f", and too much of {len(over) - 1} more classes" if len(over) > 1 else "")
                )
        return failed


def compare(asked: Asked) -> Comparison:
    """Run both models over the images. Raises ArtefactMismatch when their class sets differ."""
    refs = _chosen(find_images(asked.images), asked.limit)
    a = _side("A", asked.a, engine_of(asked.a), asked)
    b = _side("B", asked.b, asked.engine_b or engine_of(asked.b), asked)
    _check_same_classes(a, b)
    with tempfile.TemporaryDirectory(prefix="cada-compare-") as folder:
        return _Run(asked, a, b, refs, Path(folder)).run()


def engine_of(path: Path) -> str:
    """The engine that runs a kind of file. Raises UsageError for a kind that is not known."""
    if path.suffix not in ENGINES:
        raise UsageError(f"{path}: which model is it? {nearest(path.suffix, ENGINES)}")
    return ENGINES[path.suffix]


def _chosen(refs: Sequence[ImageRef], limit: int | None) -> list[ImageRef]:
    """All of them, or `limit` spread evenly."""
    if limit is None or limit >= len(refs):
        return list(refs)
    return [refs[(2 * k + 1) * len(refs) // (2 * limit)] for k in range(limit)]


def _side(letter: str, path: Path, name: str, asked: Asked) -> Side:
    model = _loaded(name, path, asked)
    engine = open_engine(name, model, default_device(name), 1)
    spec = check_classes(path, model.spec, engine.classes, model.classes_named)
    sizes = Sizes(input=None if spec.input.size else asked.size)
    pipeline = Pipeline(engine, best_kernel(1), spec, sizes)
    return Side(letter, path, model.sha256, f"{name} {engine.version}", pipeline)


def _loaded(engine: str, path: Path, asked: Asked) -> Model:
    """--preset and --spec are for the one that has no spec of its own."""
    build = asked.build if builds(engine) else None
    try:
        return load_model(engine, path, classes=asked.classes, build=build)
    except UsageError:
        if not (asked.preset or asked.spec_file):
            raise
    return load_model(
        engine,
        path,
        preset=asked.preset,
        spec_file=asked.spec_file,
        classes=asked.classes,
        build=build,
    )


def _check_same_classes(a: Side, b: Side) -> None:
    ours, theirs = a.pipeline.spec.classes, b.pipeline.spec.classes
    if ours.names != theirs.names:
        raise ArtefactMismatch(
            f"{a.path.name} labels {len(ours)} classes of {ours.name!r} but {b.path.name} labels "
            f"{len(theirs)} of {theirs.name!r}; two models compare only on one class set "
            "(--classes names it for a foreign model)"
        )


# --- one frame ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Difference:
    """What one frame shows, and the scores that the second pass needs."""

    size: Size
    network: tuple[Size, Size]
    scores: tuple[EncodedScores, EncodedScores]
    statistics: tuple[ClassStatistics, ClassStatistics]
    matrix: ConfusionMatrix
    pixels: int
    disagreements: int
    margins: npt.NDArray[np.float64]
    entropy_max: float
    entropy_sum: float
    entropy_pixels: int

    @property
    def weight(self) -> float:
        """How much there is to look at: an unsure pixel counts little."""
        return float(self.margins.sum()) + self.disagreements - len(self.margins)


@dataclass(frozen=True)
class _Refused:
    name: str
    why: str
    whose: str = ""  # "A", "B" when only that one's scores are not finite


def margins_at(
    scores: EncodedScores, size: Size, rows: Integers, columns: Integers
) -> npt.NDArray[np.float64]:
    """Difference of the two largest probabilities at some pixels of the label grid, in float64."""
    low = scores.array.astype(np.float64)
    upsampling = scores.upsampling
    probabilities = upsampling.order == "probs"
    if probabilities:
        low = _softmax(low)
    y0, y1, fy = _taps(rows, size[0], low.shape[1], upsampling.align_corners)
    x0, x1, fx = _taps(columns, size[1], low.shape[2], upsampling.align_corners)
    above = low[:, y0, x0] + fx * (low[:, y0, x1] - low[:, y0, x0])
    below = low[:, y1, x0] + fx * (low[:, y1, x1] - low[:, y1, x0])
    values = above + fy * (below - above)
    if not probabilities:
        values = _softmax(values)
    if len(values) == 1:
        return np.asarray(values[0])
    best = np.partition(values, len(values) - 2, axis=0)[-2:]
    return np.asarray(best[1] - best[0])


def _softmax(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    powers = np.exp(values - values.max(axis=0))
    return np.asarray(powers / powers.sum(axis=0))


def _taps(
    at: Integers, size: int, low: int, align_corners: bool
) -> tuple[Integers, Integers, npt.NDArray[np.float64]]:
    if align_corners:
        place = at * ((low - 1) / (size - 1) if size > 1 else 0.0)
    else:
        place = np.clip((at + 0.5) * (low / size) - 0.5, 0, low - 1)
    first: Integers = np.minimum(place.astype(np.int64), low - 1)
    second: Integers = np.minimum(first + 1, low - 1)
    return first, second, np.asarray(place - first, np.float64)


class _Run:
    """Two passes over the images, their sums, and the frames worth a look."""

    def __init__(self, asked: Asked, a: Side, b: Side, refs: list[ImageRef], folder: Path) -> None:
        self.asked, self.a, self.b, self.refs = asked, a, b, refs
        self.classes = a.pipeline.spec.classes
        self.files = (folder / "a.safetensors", folder / "b.safetensors")
        weighting, count = asked.selecting.weighting, len(self.classes)
        self.weighting = weighting
        self.statistics = [ClassStatistics.zero(count, weighting) for _ in range(2)]
        self.matrix = empty_matrix(self.classes)
        self.pixels = self.disagreements = self.ties = self.entropy_pixels = 0
        self.largest = self.entropy_max = self.entropy_sum = 0.0
        self.bins = np.zeros(len(_MARGIN_EDGES) + 1, np.int64)
        self.sizes: dict[int, tuple[Size, tuple[Size, Size]]] = {}  # by position of the image
        self.refused: list[_Refused] = []
        self.worst: list[tuple[float, int]] = []  # a heap: the least of the worst on top

    def run(self) -> Comparison:
        with ThreadPoolExecutor(self.asked.workers) as pool:
            self._first_pass(pool)
            if not self.sizes:
                raise RunFailed(
                    f"none of {len(self.refs)} images could be compared; the first: "
                    f"{self.refused[0].name}: {self.refused[0].why}"
                )
            rules = [self.asked.selecting.rule(s, self.classes) for s in self.statistics]
            own, same = self._second_pass(pool, rules[0], rules[1])
        return Comparison(
            a=self.a,
            b=self.b,
            classes=self.classes,
            images=len(self.sizes),
            rejected=tuple((r.name, r.why) for r in self.refused if not r.whose),
            one_sided=tuple((r.name, f"not {r.whose}") for r in self.refused if r.whose),
            matrix=self.matrix,
            pixels=self.pixels,
            disagreements=self.disagreements,
            margins=self._margins(),
            entropy_error_max=self.entropy_max,
            entropy_error_mean=self.entropy_sum / max(self.entropy_pixels, 1),
            rule_a=rules[0],
            rule_b=rules[1],
            own=own,
            same=same,
            pictures=tuple(self._pictures()),
        )

    def _in_turn(self, pool: ThreadPoolExecutor, work: Any, items: Sequence[int]) -> Iterator[Any]:
        """Results in order, a few frames ahead at most: memory does not grow with the set."""
        step = 2 * self.asked.workers
        for start in range(0, len(items), step):
            yield from pool.map(work, items[start : start + step])

    def _first_pass(self, pool: ThreadPoolExecutor) -> None:
        with ExitStack() as stack:
            files = [stack.enter_context(ScoreFile(f, len(self.refs))) for f in self.files]
            bar = stack.enter_context(progress("comparing", len(self.refs), quiet=self.asked.quiet))
            found = self._in_turn(pool, self._look, range(len(self.refs)))
            for position, difference in enumerate(found):
                if isinstance(difference, _Refused):
                    self.refused.append(difference)
                else:
                    for file, scores in zip(files, difference.scores):
                        file.append(position, scores.array)
                    self._add(position, difference)
                bar.advance()
            for file in files:
                file.commit()

    def _look(self, position: int) -> _Difference | _Refused:
        ref, clock = self.refs[position], StageClock()
        try:
            image = self.a.pipeline.open_frame(ref, clock).image
        except ImageRejected as error:
            return _Refused(_name(ref), str(error))
        scores: list[EncodedScores | str] = []
        for side in (self.a, self.b):
            try:
                scores.append(side.pipeline.scores(image, clock))
            except ImageRejected as error:
                scores.append(str(error))
        a, b = scores
        if isinstance(a, str) or isinstance(b, str):
            if isinstance(a, str) and isinstance(b, str):
                return _Refused(_name(ref), a)
            return _Refused(_name(ref), a if isinstance(a, str) else str(b),
                            "A" if isinstance(a, str) else "B")  # fmt: skip
        return self._difference((image.shape[0], image.shape[1]), a, b)

    def _difference(self, size: Size, a: EncodedScores, b: EncodedScores) -> _Difference:
        seen: list[Evidence] = [
            side.pipeline.kernel.accumulate(scores, size, self.weighting, labels=True, entropy=True)
            for side, scores in ((self.a, a), (self.b, b))
        ]
        of_a, of_b = seen
        assert of_a.labels is not None and of_b.labels is not None
        assert of_a.entropy is not None and of_b.entropy is not None
        differ = of_a.labels != of_b.labels
        rows, columns = np.nonzero(differ & (of_a.labels != UNSELECTED))
        error = np.abs(of_a.entropy.astype(np.float64) - of_b.entropy)
        error = error[np.isfinite(error)]
        either = (of_a.labels != UNSELECTED) | (of_b.labels != UNSELECTED)
        network = (self.a.pipeline.input_size(size), self.b.pipeline.input_size(size))
        return _Difference(
            size=size,
            network=network,
            scores=(a, b),
            statistics=(of_a.statistics, of_b.statistics),
            matrix=confusion_matrix(of_b.labels, of_a.labels, self.classes),
            pixels=int(either.sum()),
            disagreements=int(differ.sum()),
            margins=margins_at(a, size, rows, columns),
            entropy_max=float(error.max(initial=0.0)),
            entropy_sum=float(error.sum()),
            entropy_pixels=error.size,
        )

    def _add(self, position: int, found: _Difference) -> None:
        self.sizes[position] = (found.size, found.network)
        for k, statistics in enumerate(found.statistics):
            self.statistics[k] += statistics
        self.matrix += found.matrix
        self.pixels += found.pixels
        self.disagreements += found.disagreements
        self.ties += int((found.margins < TIE).sum())
        self.largest = max(self.largest, float(found.margins.max(initial=0.0)))
        self.bins += np.bincount(
            np.digitize(found.margins, _MARGIN_EDGES), minlength=len(self.bins)
        )
        self.entropy_max = max(self.entropy_max, found.entropy_max)
        self.entropy_sum += found.entropy_sum
        self.entropy_pixels += found.entropy_pixels
        if found.disagreements:
            heapq.heappush(self.worst, (found.weight, -position))
            if len(self.worst) > MOST_PICTURES:
                heapq.heappop(self.worst)

    def _margins(self) -> Margins:
        count = int(self.bins.sum())
        if not count:
            return Margins()
        middle = int(np.searchsorted(np.cumsum(self.bins), (count + 1) // 2))
        edge = _MARGIN_EDGES[min(middle, len(_MARGIN_EDGES) - 1)]
        return Margins(count, self.ties, self.largest, min(float(edge), self.largest))

    def _cached(self, position: int) -> tuple[EncodedScores, EncodedScores]:
        a, b = (
            EncodedScores(read_scores(file, position), side.pipeline.upsampling)
            for side, file in zip((self.a, self.b), self.files)
        )
        return a, b

    def _second_pass(
        self, pool: ThreadPoolExecutor, rule_a: Rule, rule_b: Rule
    ) -> tuple[tuple[Change, ...], tuple[Change, ...]]:
        def cut(position: int) -> tuple[Integers, Integers]:
            a, b = self._cached(position)
            size, _ = self.sizes[position]
            kernels = self.a.pipeline.kernel, self.b.pipeline.kernel
            mine = kernels[0].select(a, size, rule_a).labels
            own = kernels[1].select(b, size, rule_b).labels
            same = kernels[1].select(b, size, rule_a).labels
            return _pairs(mine, own), _pairs(mine, same)

        own = np.zeros((256, 256), np.int64)
        same = np.zeros((256, 256), np.int64)
        with progress("selecting", len(self.sizes), quiet=self.asked.quiet) as bar:
            for pair in self._in_turn(pool, cut, list(self.sizes)):
                own += pair[0]
                same += pair[1]
                bar.advance()
        count = len(self.classes)
        return changes(own, count), changes(same, count)

    def _pictures(self) -> Iterator[Picture]:
        for _, negative in sorted(self.worst, reverse=True):
            ref, (size, _) = self.refs[-negative], self.sizes[-negative]
            try:
                image = self.a.pipeline.open_frame(ref, StageClock()).image
            except ImageRejected:  # it was read a moment ago; the figures stand without it
                continue
            scores = self._cached(-negative)
            a, b = (
                self.a.pipeline.kernel.accumulate(s, size, self.weighting, labels=True).labels
                for s in scores
            )
            assert a is not None and b is not None
            rows, columns = np.nonzero((a != b) & (a != UNSELECTED))
            margin = np.full(size, np.nan, np.float32)
            margin[rows, columns] = margins_at(scores[0], size, rows, columns)
            margin[(a != b) & (a == UNSELECTED)] = 1.0
            yield Picture(_name(ref), image, a, b, margin)


def _name(ref: ImageRef) -> str:
    return ref.relative.decode(errors="backslashreplace")


def _pairs(a: Labels, b: Labels) -> Integers:
    """(256, 256): how often A's byte (row) meets B's (column)."""
    pairs = a.astype(np.uint16).ravel() << np.uint16(8) | b.ravel()
    return np.bincount(pairs, minlength=65536).reshape(256, 256)


def changes(table: Integers, classes: int) -> tuple[Change, ...]:
    """Per class, from the counts of all pairs of selected labels (UNSELECTED among them)."""
    made = []
    for k in range(classes):
        selected, kept = int(table[k].sum()), int(table[k, k])
        lost, gained = int(table[k, UNSELECTED]), int(table[UNSELECTED, k])
        made.append(Change(selected, kept, lost, selected - kept - lost, gained))
    return tuple(made)
