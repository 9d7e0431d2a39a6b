"""The host on one machine: worker threads do frames, the main thread commits shards in order.

Decoding, ONNX Runtime, the fused kernel, hashing and PNG encoding all release the GIL, so each
worker takes one image through every stage and W workers keep W cores busy. At most workers + 2
images are in flight: memory does not depend on how many there are.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cada_deploy import durable
from cada_deploy.errors import ArtefactMismatch
from cada_deploy.image_files import ImageRef
from cada_deploy.manifests import (
    OutputFile,
    Rejected,
    RunFolder,
    ScoredImage,
    ScoredShard,
    SelectedImage,
    SelectedShard,
    sealed,
)
from cada_deploy.outputs import LabelFiles
from cada_deploy.pipeline import Frame, Pipeline, ScoredFrame
from cada_deploy.policies import Rule
from cada_deploy.rejections import ImageRejected
from cada_deploy.score_cache import READ_ERRORS, ScoreFile, digest, read_scores
from cada_deploy.scores import EncodedScores
from cada_deploy.shards import Shard
from cada_deploy.stages import StageClock, total_seconds
from cada_deploy.statistics import ClassStatistics, merged

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], None]


def ordered_map(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """work(item) on `workers` threads, results in the order of items, workers + 2 in flight.

    The first exception, in order, is raised; nothing new is started after it.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="cada-worker")
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) >= workers + 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# --- phase one: scored -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scored:
    image: ScoredImage
    scores: npt.NDArray[np.float16] | None
    statistics: ClassStatistics | None
    seconds: dict[str, float]


def score_shards(
    pipeline: Pipeline,
    folder: RunFolder,
    run_id: str,
    shards: Sequence[Shard],
    *,
    weighting: str,
    cache: bool,
    workers: int,
    batch_size: int,
    advance: Advance,
) -> Iterator[ScoredShard]:
    """Run the network over every image of `shards` and commit one manifest a shard, in order."""
    groups = [group for shard in shards for group in _groups(shard.images, batch_size)]
    results = _flat(
        ordered_map(lambda g: _score_group(pipeline, g, weighting, cache), groups, workers)
    )
    for shard in shards:
        yield _commit_scored(pipeline, folder, run_id, shard, results, weighting, cache, advance)


def _groups(images: Sequence[ImageRef], size: int) -> list[Sequence[ImageRef]]:
    return [images[i : i + size] for i in range(0, len(images), size)]


def _flat(groups: Iterable[list[Result]]) -> Iterator[Result]:
    for group in groups:
        yield from group


def _score_group(
    pipeline: Pipeline, group: Sequence[ImageRef], weighting: str, cache: bool
) -> list[_Scored]:
    """Decode the images of a group, send what decoded through the network, and record each."""
    opened = [_opened(pipeline, ref) for ref in group]
    frames = [o.frame for o in opened if o.frame is not None]
    clock = StageClock()
    scored = iter(pipeline.score_frames(frames, weighting, clock))
    results = [o.result if o.frame is None else _recorded(o, next(scored), cache) for o in opened]
    return [replace(results[0], seconds=total_seconds([results[0].seconds, clock.seconds])),
            *results[1:]]  # fmt: skip


@dataclass(frozen=True)
class _Opened:
    """An image that was read: its frame, or None where it was rejected (the result says why)."""

    frame: Frame | None
    result: _Scored


def _opened(pipeline: Pipeline, ref: ImageRef) -> _Opened:
    clock = StageClock()
    record = ScoredImage(ref.relative, ref.size_bytes)
    try:
        frame = pipeline.open_frame(ref, clock)
    except ImageRejected as error:
        return _Opened(None, _rejected(record, error, clock.seconds))
    record = ScoredImage(
        ref.relative,
        frame.size_bytes,
        frame.sha256,
        frame.size,
        pipeline.input_size(frame.size),
        "",
        frame.notices,
    )
    return _Opened(frame, _Scored(record, None, None, clock.seconds))


def _recorded(opened: _Opened, scored: ScoredFrame | ImageRejected, cache: bool) -> _Scored:
    record, seconds = opened.result.image, opened.result.seconds
    if isinstance(scored, ImageRejected):
        return _rejected(record, scored, seconds)
    statistics = scored.evidence.statistics
    if not cache:
        return _Scored(record, None, statistics, seconds)
    clock = StageClock()
    with clock.stage("cache write"):
        record = replace(record, scores_sha256=digest(scored.scores.array))
    return _Scored(record, scored.scores.array, statistics, total_seconds([seconds, clock.seconds]))


def _rejected(record: ScoredImage, error: ImageRejected, seconds: dict[str, float]) -> _Scored:
    why = Rejected(error.reason, error.detail)
    return _Scored(replace(record, rejected=why), None, None, seconds)


def _commit_scored(
    pipeline: Pipeline,
    folder: RunFolder,
    run_id: str,
    shard: Shard,
    results: Iterator[_Scored],
    weighting: str,
    cache: bool,
    advance: Advance,
) -> ScoredShard:
    clock = StageClock()
    images: list[ScoredImage] = []
    parts: list[ClassStatistics] = []
    seconds: list[dict[str, float]] = [clock.seconds]
    path = folder.score_file(shard.index)
    with ExitStack() as stack:
        score_file = stack.enter_context(ScoreFile(path, len(shard.images))) if cache else None
        for position in range(len(shard.images)):
            result = next(results)
            images.append(result.image)
            seconds.append(result.seconds)
            if result.statistics is not None:
                parts.append(result.statistics)
            if score_file is not None and result.scores is not None:
                with clock.stage("cache write"):
                    score_file.append(position, result.scores)
            advance(1)
        with clock.stage("commit"):
            size = score_file.commit() if score_file is not None else 0
    manifest = ScoredShard(
        run_id,
        shard.index,
        tuple(images),
        merged(parts, len(pipeline.spec.classes), weighting),
        (path.name, size) if cache else None,
        total_seconds(seconds),
    )
    durable.write_json(folder.scored_manifest(shard.index), sealed(manifest.to_json()))
    return manifest


# --- phase two: selected -----------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where one image's scores come from: its file, and the cache if there is one."""

    ref: ImageRef
    known: ScoredImage | None = None
    score_file: Path | None = None
    position: int = 0


@dataclass(frozen=True)
class RuleFor:
    """The rule of a run, or how to make each image's own from its own statistics."""

    digest: str
    fixed: Rule | None
    per_image: Callable[[ClassStatistics], Rule] | None = None
    weighting: str = "confidence"


@dataclass(frozen=True)
class _Cut:
    image: SelectedImage
    predicted: npt.NDArray[np.int64]
    selected: npt.NDArray[np.int64]
    invalid: int
    masked: int
    notices: tuple[str, ...]
    seconds: dict[str, float]


def select_shards(
    pipeline: Pipeline,
    folder: RunFolder,
    run_id: str,
    shards: Sequence[tuple[int, Sequence[Source]]],
    rule: RuleFor,
    files: LabelFiles,
    *,
    workers: int,
    advance: Advance,
) -> Iterator[SelectedShard]:
    """Cut the labels of every shard (index, its images) and commit one manifest each, in order."""
    sources = [source for _, group in shards for source in group]
    cuts = ordered_map(lambda s: _cut(pipeline, folder, s, rule, files), sources, workers)
    for index, group in shards:
        yield _commit_selected(pipeline, folder, run_id, index, len(group), cuts, rule, advance)


def _cut(
    pipeline: Pipeline, folder: RunFolder, source: Source, rule: RuleFor, files: LabelFiles
) -> _Cut:
    clock = StageClock()
    nothing = np.zeros(len(pipeline.spec.classes), np.int64)
    notices: tuple[str, ...] = ()
    try:
        scores, image, known = scores_of(pipeline, source, files.needs_image, clock)
        notices = known.notices
        assert known.image_size and known.input_size
        own = rule.fixed or own_rule(pipeline, scores, known, rule, clock)
        selection = pipeline.select(
            scores,
            known.image_size,
            known.input_size,
            own,
            clock,
            entropy=files.entropy,
            confidence=files.confidence,
        )
    except ImageRejected as error:
        why = Rejected(error.reason, error.detail)
        image_record = SelectedImage(source.ref.relative, (), 0, rejected=why)
        return _Cut(image_record, nothing, nothing, 0, 0, notices, clock.seconds)
    with clock.stage("encode png"):
        encoded = files.encode(source.ref.relative, image, selection, pipeline.spec.classes)
    with clock.stage("write png"):
        written = tuple(_write(folder, name, data) for name, data in encoded)
    record = SelectedImage(
        source.ref.relative,
        written,
        int(selection.selected.sum()),
        None if rule.fixed else own.thresholds,
    )
    return _Cut(
        record,
        selection.predicted,
        selection.selected,
        selection.invalid,
        selection.masked,
        notices,
        clock.seconds,
    )


def own_rule(
    pipeline: Pipeline, scores: EncodedScores, known: ScoredImage, rule: RuleFor, clock: StageClock
) -> Rule:
    assert rule.per_image and known.image_size and known.input_size
    evidence = pipeline.evidence(scores, known.image_size, known.input_size, rule.weighting, clock)
    return rule.per_image(evidence.statistics)


def scores_of(
    pipeline: Pipeline, source: Source, needs_image: bool, clock: StageClock
) -> tuple[EncodedScores, npt.NDArray[np.uint8] | None, ScoredImage]:
    """From the cache if there is one, else through the network (and then as it was scored)."""
    known = source.known
    if known and source.score_file and not needs_image:
        with clock.stage("cache read"):
            return _cached(pipeline, source.score_file, source.position, known), None, known
    frame = pipeline.open_frame(source.ref, clock)
    if known and frame.sha256 != known.sha256:
        raise ArtefactMismatch(
            f"{source.ref.path} has changed since it was scored; start again with another --out"
        )
    seen = ScoredImage(
        frame.relative,
        frame.size_bytes,
        frame.sha256,
        frame.size,
        pipeline.input_size(frame.size),
        notices=frame.notices,
    )
    if known and source.score_file:
        with clock.stage("cache read"):
            cached = _cached(pipeline, source.score_file, source.position, known)
        return cached, frame.image, seen
    return pipeline.scores(frame.image, clock), frame.image, seen


class DamagedCache(ArtefactMismatch):
    """A score file is unreadable or holds other bytes than its manifest says."""


def _cached(pipeline: Pipeline, path: Path, position: int, known: ScoredImage) -> EncodedScores:
    remedy = "delete this file; the same command then scores its images again"
    try:
        scores = read_scores(path, position)
    except READ_ERRORS as error:
        raise DamagedCache(f"{path} is damaged ({error}); {remedy}") from error
    if digest(scores) != known.scores_sha256:
        raise DamagedCache(f"{path} does not hold the scores that were written; {remedy}")
    return EncodedScores(scores, pipeline.upsampling)


def _write(folder: RunFolder, relative: bytes, data: bytes) -> OutputFile:
    path = folder.file(relative)
    durable.make_folder(path.parent)
    durable.write_file(path, data)
    return OutputFile(relative, len(data), hashlib.sha256(data).hexdigest())


def _commit_selected(
    pipeline: Pipeline,
    folder: RunFolder,
    run_id: str,
    index: int,
    count: int,
    cuts: Iterator[_Cut],
    rule: RuleFor,
    advance: Advance,
) -> SelectedShard:
    done: list[_Cut] = []
    for _ in range(count):
        done.append(next(cuts))
        advance(1)
    clock = StageClock()
    with clock.stage("commit"):
        touched = {folder.file(f.relative).parent for c in done for f in c.image.files}
        for path in sorted(touched):
            durable.sync_folder(path)
    zero = np.zeros(len(pipeline.spec.classes), np.int64)
    manifest = SelectedShard(
        run_id,
        rule.digest,
        index,
        tuple(c.image for c in done),
        _ints(sum((c.predicted for c in done), zero)),
        _ints(sum((c.selected for c in done), zero)),
        sum(c.invalid for c in done),
        sum(c.masked for c in done),
        Counter(n for c in done for n in c.notices),
        total_seconds([clock.seconds, *(c.seconds for c in done)]),
    )
    durable.write_json(folder.selected_manifest(index), sealed(manifest.to_json()))
    return manifest


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in values)
