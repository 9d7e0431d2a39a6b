"""A whole run on one machine: plan, score, learn thresholds, cut labels, write what was found.

`pseudo_label` runs or resumes, `select_again` cuts new labels from a finished run, `predict` writes
full-coverage labels in one pass. The report is drawn from the Outcome they return.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cada_deploy import device_frames, disk_plan, durable, run_identity, run_record, streaming
from cada_deploy.classes import ClassSet
from cada_deploy.engine_plans import Build, PlanOptions
from cada_deploy.engines import Engine, load_model, open_engine
from cada_deploy.errors import ArtefactMismatch, EnvironmentLacks, UsageError
from cada_deploy.fused import best_kernel
from cada_deploy.ignored import IgnoredArea
from cada_deploy.image_files import ImageRef, check_out_not_inside, check_output_names, find_images
from cada_deploy.manifests import Rejected, RunFolder, ScoredShard, SelectedShard
from cada_deploy.model_files import Model, check_classes
from cada_deploy.model_spec import ModelSpec
from cada_deploy.outputs import LabelFiles
from cada_deploy.pipeline import Pipeline, Sizes
from cada_deploy.progress import progress
from cada_deploy.run_record import Record
from cada_deploy.scores import SCORE_ENCODING
from cada_deploy.selection import Selecting, thresholds_json
from cada_deploy.shards import plan
from cada_deploy.stages import total_seconds
from cada_deploy.statistics import ClassStatistics, merged
from cada_deploy.streaming import RuleFor, Source

SCHEMA = 1
Say = Callable[[str], None]
ShardSources = list[tuple[int, list[Source]]]


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class ModelChoice:
    """Which model, and how to run it."""

    path: Path
    engine: str = "ort"
    device: str = "cpu"
    preset: str | None = None
    spec_file: Path | None = None
    classes: ClassSet | None = None
    build: Build | None = None  # for engines that are built from a model

    def load(self, threads: int = 1) -> tuple[Model, Engine]:
        """threads: of the network for one frame; hosts keep 1 and work on several frames."""
        model = load_model(
            self.engine,
            self.path,
            preset=self.preset,
            spec_file=self.spec_file,
            classes=self.classes,
            build=self.build,
        )
        engine = open_engine(self.engine, model, self.device, threads)
        spec = check_classes(self.path, model.spec, engine.classes, model.classes_named)
        return replace(model, spec=spec), engine


@dataclass(frozen=True)
class Work:
    """How the work is cut and shown; none of it changes a byte of the labels."""

    workers: int | None = None
    batch_size: int = 1
    shard_size: int | None = None
    cache: str = "auto"
    quiet: bool = False
    auto_batch: bool = False  # halve batch_size when the GPU has no room for it

    @property
    def threads(self) -> int:
        return self.workers or cores()


@dataclass(frozen=True)
class RunOptions:
    """A pseudo-label or predict run as it was asked for."""

    model: ModelChoice
    images: Path
    out: Path
    selecting: Selecting = Selecting()
    sizes: Sizes = Sizes()
    ignored: IgnoredArea = IgnoredArea()
    files: LabelFiles = LabelFiles()
    work: Work = Work()


@dataclass(frozen=True)
class Outcome:
    """What a finished run did: for the report, the terminal and the exit code."""

    folder: RunFolder
    record: Record
    pipeline: Pipeline
    selecting: Selecting
    files: LabelFiles
    statistics: ClassStatistics | None
    thresholds: dict[str, Any] | None
    selected: tuple[SelectedShard, ...]
    sources: tuple[Source, ...]  # of every image that has labels
    rejected: tuple[tuple[bytes, Rejected], ...]
    stage_seconds: dict[str, float]
    wall_seconds: float
    workers: int

    @property
    def spec(self) -> ModelSpec:
        return self.pipeline.spec

    @property
    def notices(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for shard in self.selected:
            counts.update(shard.notices)
        return dict(sorted(counts.items()))


def pseudo_label(options: RunOptions, say: Say) -> Outcome:
    """Run, or resume, to the end. Writes everything below options.out except report.html."""
    started = time.monotonic()
    images = _inputs(options)
    model, engine = options.model.load()
    pipeline = _pipeline(options, model.spec, engine, say)
    options.selecting.options(model.spec.classes)  # refuses bad values before any work
    weighting = options.selecting.weighting
    identity = run_identity.identity("pseudo-label", model, pipeline, engine, images, weighting)
    folder = RunFolder(options.out)
    with durable.locked(folder.root):
        shard_size = run_record.settled_shard_size(folder, identity, options.work.shard_size)
        record = run_record.new(
            identity, shard_size, len(images), _settings(options, {"cache": options.work.cache})
        )
        shards = plan(images, shard_size)
        found = {s.index: folder.scored(s.index, record["run_id"]) for s in shards}
        done = {s.index: m for s in shards if (m := found[s.index]) and m.covers(s)}
        todo = [s for s in shards if s.index not in done]
        if done:
            say(f"resuming: {len(done)} of {len(shards)} shards are scored already")
        unscored = [image for shard in todo for image in shard.images]
        keep = disk_plan.keep_scores(pipeline, unscored, folder.root, options.work.cache, say)
        run_record.begin(folder, record, options.ignored, options.files.unwanted)
        durable.make_folder(folder.scores)
        with progress("scoring", len(unscored), quiet=options.work.quiet) as bar:
            fresh = streaming.score_shards(
                pipeline, folder, record["run_id"], todo, weighting=weighting, cache=keep,
                workers=options.work.threads, batch_size=options.work.batch_size,
                advance=bar.advance,
            )  # fmt: skip
            manifests = {**done, **{m.index: m for m in fresh}}
        scored = [manifests[s.index] for s in shards]
        sources: ShardSources = [
            (m.index, _scored_sources(folder, s.images, m))
            for s, m in zip(shards, scored, strict=True)
        ]
        return _Selection(pipeline, folder, record, options.selecting, options.files).run(
            scored, sources, options.work, started
        )


def select_again(
    run: Path, out: Path, selecting: Selecting, files: LabelFiles, work: Work, say: Say
) -> Outcome:
    """New labels with new thresholds from a finished run's scores. No network, unless the run has
    no cache: then its model is run again on the same bytes."""
    started = time.monotonic()
    source = RunFolder(run)
    record = run_record.read(run)
    spec = ModelSpec.from_json(record["identity"]["spec"])
    selecting.options(spec.classes)
    _check_weighting(run, record, selecting)
    images = run_record.path_of(record, "images")
    in_place = out.resolve() == run.resolve()
    with durable.locked(source.root):
        scored = _all_scored(source, record)
        pipeline = _pipeline_again(source, record, spec, scored, say)
        known = _known_refs(images)
        sources = [(m.index, _scored_sources(source, _refs(known, images, m), m)) for m in scored]
        folder = source if in_place else RunFolder(out)
        settings = {**record["settings"], **selecting.to_json()}
        selection = _Selection(pipeline, folder, {**record, "settings": settings}, selecting, files)
        if in_place:
            return selection.begin_and_run(scored, sources, work, started)
        check_out_not_inside(images, out)
        with durable.locked(folder.root):
            run_record.refuse_foreign(folder, record["identity"])
            return selection.begin_and_run(scored, sources, work, started)


def predict(options: RunOptions, say: Say) -> Outcome:
    """Full-coverage labels in one pass: every valid pixel keeps its class. Resumable by shard."""
    started = time.monotonic()
    images = _inputs(options)
    model, engine = options.model.load()
    pipeline = _pipeline(options, model.spec, engine, say)
    weighting = options.selecting.weighting
    identity = run_identity.identity("predict", model, pipeline, engine, images, weighting)
    folder = RunFolder(options.out)
    with durable.locked(folder.root):
        shard_size = run_record.settled_shard_size(folder, identity, options.work.shard_size)
        record = run_record.new(identity, shard_size, len(images), _settings(options, {}))
        run_record.begin(folder, record, options.ignored, options.files.unwanted)
        sources = [(s.index, [Source(ref) for ref in s.images]) for s in plan(images, shard_size)]
        selection = _Selection(pipeline, folder, record, options.selecting, options.files)
        return selection.run(None, sources, options.work, started)


def _pipeline(options: RunOptions, spec: ModelSpec, engine: Engine, say: Say) -> Pipeline:
    work = options.work
    frames = device_frames.for_engine(
        engine, spec, most=work.batch_size, auto_batch=work.auto_batch, say=say
    )
    if work.auto_batch and frames is None:
        raise UsageError(
            "--auto-batch is for a GPU that has no room for a batch; this run's frames do not go "
            "through one together, so leave it out"
        )
    return Pipeline(engine, best_kernel(1), spec, options.sizes, options.ignored, frames)


def _inputs(options: RunOptions) -> list[ImageRef]:
    images = find_images(options.images)
    check_output_names(images)
    check_out_not_inside(options.images, options.out)
    return images


def _settings(options: RunOptions, more: Mapping[str, Any]) -> dict[str, Any]:
    choice = options.model
    return {
        **run_record.recorded_path("model", choice.path.absolute()),
        **run_record.recorded_path("images", options.images.absolute()),
        "engine": choice.engine,
        "device": choice.device,
        **options.selecting.to_json(),
        **more,
    }


def _scored_sources(
    folder: RunFolder, refs: Sequence[ImageRef], manifest: ScoredShard
) -> list[Source]:
    """The images of a shard that got scores, with where these lie."""
    path = folder.scores / manifest.score_file[0] if manifest.score_file else None
    return [
        Source(ref, image, path, position)
        for position, (ref, image) in enumerate(zip(refs, manifest.images, strict=True))
        if image.rejected is None
    ]


@dataclass(frozen=True)
class _Selection:
    """The second half of every run: one rule, labels, thresholds.json, rejected.jsonl, run.json."""

    pipeline: Pipeline
    folder: RunFolder
    record: Record
    selecting: Selecting
    files: LabelFiles

    def begin_and_run(
        self, scored: Sequence[ScoredShard], sources: ShardSources, work: Work, started: float
    ) -> Outcome:
        run_record.begin(self.folder, self.record, self.pipeline.ignored, self.files.unwanted)
        return self.run(scored, sources, work, started)

    def run(
        self,
        scored: Sequence[ScoredShard] | None,
        sources: ShardSources,
        work: Work,
        started: float,
    ) -> Outcome:
        classes = self.pipeline.spec.classes
        parts = (m.statistics for m in scored or ())
        statistics = merged(parts, len(classes), self.selecting.weighting)
        rule = self.selecting.rule_for(statistics, classes, self.files.to_json())
        shards = self._cut(sources, rule, work)
        thresholds = None
        if scored is not None:
            thresholds = self._write_evidence(statistics, shards)
        rejected = _rejected(scored or (), shards)
        self._write_rejected(rejected)
        labelled = {i.relative for s in shards for i in s.images if i.rejected is None}
        wall = time.monotonic() - started
        record = run_record.finish(
            self.folder,
            self.record,
            {"labelled": len(labelled), "rejected": len(rejected), "wall_seconds": round(wall, 3)},
        )
        return Outcome(
            self.folder,
            record,
            self.pipeline,
            self.selecting,
            self.files,
            statistics if scored is not None else None,
            thresholds,
            tuple(shards),
            tuple(s for _, group in sources for s in group if s.ref.relative in labelled),
            rejected,
            total_seconds([*(m.seconds for m in scored or ()), *(s.seconds for s in shards)]),
            wall,
            work.threads,
        )

    def _cut(self, sources: ShardSources, rule: RuleFor, work: Work) -> list[SelectedShard]:
        run_id = self.record["run_id"]
        done = {
            index: manifest
            for index, _ in sources
            if (manifest := self.folder.selected(index, run_id, rule.digest))
        }
        todo = [(index, group) for index, group in sources if index not in done]
        with progress("labels", sum(len(g) for _, g in todo), quiet=work.quiet) as bar:
            fresh = streaming.select_shards(
                self.pipeline, self.folder, run_id, todo, rule, self.files,
                workers=work.threads, advance=bar.advance,
            )  # fmt: skip
            manifests = {**done, **{m.index: m for m in fresh}}
        return [manifests[index] for index, _ in sources]

    def _write_evidence(
        self, statistics: ClassStatistics, shards: Sequence[SelectedShard]
    ) -> dict[str, Any]:
        classes = self.pipeline.spec.classes
        durable.write_json(
            self.folder.root / "statistics.json",
            {
                "schema": SCHEMA,
                "run_id": self.record["run_id"],
                "classes": list(classes.names),
                **statistics.to_json(),
            },
        )
        thresholds = thresholds_json(self.selecting, classes, statistics, shards)
        durable.write_json(self.folder.root / "thresholds.json", thresholds)
        return thresholds

    def _write_rejected(self, rejected: Sequence[tuple[bytes, Rejected]]) -> None:
        lines = [
            durable.json_line({**durable.name_to_json(relative), **vars(why)})
            for relative, why in rejected
        ]
        path = self.folder.root / "rejected.jsonl"
        durable.write_file(path, b"".join(lines))
        durable.sync_folder(path.parent)


def _rejected(
    scored: Sequence[ScoredShard], selected: Sequence[SelectedShard]
) -> tuple[tuple[bytes, Rejected], ...]:
    found = [(i.relative, i.rejected) for m in scored for i in m.images if i.rejected]
    found += [(i.relative, i.rejected) for m in selected for i in m.images if i.rejected]
    return tuple(sorted(found, key=lambda entry: entry[0]))


# --- a finished run, opened again --------------------------------------------------------------


def _check_weighting(run: Path, record: Record, selecting: Selecting) -> None:
    found = record["identity"]["weighting"]
    if selecting.weighting != found:
        raise ArtefactMismatch(
            f"{run} holds {found}-weighted statistics, which --centroid {selecting.centroid} "
            f"cannot use; run pseudo-label --centroid {selecting.centroid} with another --out"
        )


def _all_scored(folder: RunFolder, record: Record) -> list[ScoredShard]:
    count = -(-record["image_count"] // record["shard_size"])
    found = [folder.scored(index, record["run_id"]) for index in range(count)]
    missing = [f"{index:06d}" for index, manifest in enumerate(found) if manifest is None]
    if missing:
        raise ArtefactMismatch(
            f"{folder.root} has no whole scores for shard {', '.join(missing[:5])} "
            f"({len(missing)} of {count}); run the same pseudo-label command again to complete them"
        )
    whole = [manifest for manifest in found if manifest is not None]
    images = sum(len(manifest.images) for manifest in whole)
    if images != record["image_count"]:
        raise ArtefactMismatch(
            f"{folder.root}: the shards hold {images} images, run.json says "
            f"{record['image_count']}; it was changed or damaged"
        )
    return whole


def _known_refs(images: Path) -> dict[bytes, ImageRef]:
    """The run's inputs as they are found now, by relative path. They need not be there any more:
    cutting labels from cached scores reads no image."""
    try:
        return {ref.relative: ref for ref in find_images(images)}
    except UsageError:
        return {}


def _refs(known: Mapping[bytes, ImageRef], images: Path, manifest: ScoredShard) -> list[ImageRef]:
    return [
        known.get(i.relative)
        or ImageRef(images / os.fsdecode(i.relative), i.relative, i.size_bytes)
        for i in manifest.images
    ]


def _pipeline_again(
    folder: RunFolder, record: Record, spec: ModelSpec, scored: Sequence[ScoredShard], say: Say
) -> Pipeline:
    """The pipeline of a run; with its engine only if some shard has no cached scores."""
    parts = record["identity"]
    kernel = best_kernel(1)
    found = run_identity.kernel_identity(kernel)
    if found != parts["kernel"] or parts["score_encoding"] != SCORE_ENCODING:
        raise ArtefactMismatch(
            f"{folder.root} was made with fused kernel {parts['kernel']} and score encoding "
            f"{parts['score_encoding']}; this installation has {found} and {SCORE_ENCODING}. Run "
            "pseudo-label again with another --out"
        )
    engine: Engine | None = None
    if any(manifest.score_file is None for manifest in scored):
        say("this run has no score cache, so its network runs again")
        engine = _engine_again(record, spec)
    label = parts["sizes"]["label"]
    sizes = Sizes(
        _pair(parts["sizes"]["input"]),
        label if isinstance(label, str) else (label[0], label[1]),
        _pair(parts["sizes"]["statistics"]),
    )
    frames = device_frames.for_engine(engine, spec) if engine else None
    return Pipeline(engine, kernel, spec, sizes, run_record.ignored_area(folder, record), frames)


def _engine_again(record: Record, spec: ModelSpec) -> Engine:
    path = run_record.path_of(record, "model")
    size = _pair(record["identity"]["sizes"]["input"])
    build = Build(PlanOptions(size, size, size))  # a kept engine is found by what it was built for
    model = load_model(record["settings"]["engine"], path, spec=spec, build=build)
    if model.sha256 != record["identity"]["model"]:
        raise ArtefactMismatch(f"{path} is not the model this run was made with; put that one back")
    engine = open_engine(record["settings"]["engine"], model, record["settings"]["device"])
    expected = record["identity"]["engine"]["version"]
    if engine.version != expected:
        raise EnvironmentLacks(
            f"this run was made with {engine.name} {expected}, here is {engine.version}; install "
            "that version, or run pseudo-label again with another --out"
        )
    return engine


def _pair(values: Sequence[int] | None) -> tuple[int, int] | None:
    return (values[0], values[1]) if values else None
