"""Draws report.html from what a run did: picks frames, collects figures, writes the page."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Iterator
from pathlib import Path

from cada_deploy import durable
from cada_deploy.disk_plan import size_text
from cada_deploy.errors import ArtefactMismatch
from cada_deploy.fused import KERNEL_VERSION
from cada_deploy.labelling import Outcome
from cada_deploy.rejections import ImageRejected
from cada_deploy.report import write_report
from cada_deploy.report_page import contents
from cada_deploy.stages import StageClock
from cada_deploy.streaming import Source, own_rule, scores_of

_FRAMES = 8


def publish_report(outcome: Outcome, evaluation: contents.Evaluation | None = None) -> Path:
    """Write OUT/report.html, durably, and return its path."""
    path = outcome.folder.root / "report.html"
    durable.write_file(path, write_report(report_data(outcome, evaluation)).encode())
    durable.sync_folder(path.parent)
    return path


def report_data(
    outcome: Outcome, evaluation: contents.Evaluation | None = None
) -> contents.ReportData:
    assert outcome.statistics is not None and outcome.thresholds is not None
    thresholds = outcome.thresholds
    classes = outcome.spec.classes
    return contents.ReportData(
        title=outcome.folder.root.resolve().name,
        model=Path(outcome.record["settings"]["model"]).name,
        policy=thresholds["policy"],
        measure=thresholds["measure"],
        comparator=thresholds["comparator"],
        images_labelled=outcome.record["results"]["labelled"],
        wall_s=outcome.wall_seconds,
        classes=tuple(
            contents.ClassRow(
                row["id"],
                row["name"],
                classes.palette[row["id"]],
                row["predicted"],
                row["selected"],
                row["centroid_entropy"],
                row["threshold"],
            )
            for row in thresholds["classes"]
        ),
        options=_options(outcome),
        invalid_pixels=thresholds["invalid_pixels"],
        masked_pixels=thresholds["masked_pixels"],
        histograms=outcome.statistics.histogram,
        frames=tuple(_frames(outcome)),
        evaluation=evaluation,
        rejected=tuple(
            contents.Rejected(os.fsdecode(relative), why.reason, why.detail)
            for relative, why in outcome.rejected
        ),
        notices=tuple(outcome.notices.items()),
        stages=tuple(contents.Stage(n, s) for n, s in outcome.stage_seconds.items()),
        cores=outcome.workers,
        command_line=shlex.join(outcome.record["command"]),
        provenance=_provenance(outcome),
    )


def summary(outcome: Outcome) -> str:
    """A few lines for the terminal."""
    results = outcome.record["results"]
    lines = [
        f"{results['labelled']} images labelled in {outcome.wall_seconds:.1f} s -> "
        f"{outcome.folder.labels}"
    ]
    if outcome.thresholds is not None:
        lines.append(f"selected {outcome.thresholds['selected_fraction']:.1%} of all pixels")
        lines += _dead_classes(outcome)
        lines.append(f"report: {outcome.folder.root / 'report.html'}")
    if outcome.rejected:
        lines.append(
            f"{len(outcome.rejected)} inputs were rejected and got no label; each with its reason "
            f"in {outcome.folder.root / 'rejected.jsonl'}"
        )
        for relative, why in outcome.rejected[:5]:
            lines.append(f"  {_shown(relative)}: {why.reason} ({why.detail})")
    return "\n".join(lines)


def _dead_classes(outcome: Outcome) -> list[str]:
    """Said loudly: a class that keeps nothing cannot be learnt from these labels."""
    assert outcome.thresholds is not None
    rows = outcome.thresholds["classes"]
    negative = [r["name"] for r in rows if r["threshold"] is not None and r["threshold"] <= 0]
    empty = [r["name"] for r in rows if r["predicted"] and not r["selected"]]
    lines = []
    if negative and outcome.thresholds["measure"] == "entropy":
        lines.append(
            f"WARNING: threshold <= 0, so nothing can be selected: {', '.join(negative)}. Lower "
            "--delta, or make it relative (--delta 10%)"
        )
    if empty := [name for name in empty if name not in negative]:
        lines.append(f"WARNING: predicted, but nothing selected: {', '.join(empty)}")
    return lines


def _options(outcome: Outcome) -> contents.Pairs:
    chosen = outcome.selecting
    if chosen.policy == "fixed":
        threshold = chosen.options(outcome.spec.classes).threshold
        return (("threshold", str(threshold)),)
    return (
        ("delta", chosen.delta or "0"),
        ("centroid", chosen.centroid),
        ("scope", chosen.scope),
    )


def _frames(outcome: Outcome) -> Iterator[contents.Frame]:
    """Frames spread evenly over the run, seen as the run saw them."""
    count = min(_FRAMES, len(outcome.sources))
    for k in range(count):
        source = outcome.sources[(2 * k + 1) * len(outcome.sources) // (2 * count)]
        frame = _frame(outcome, source)
        if frame is not None:
            yield frame


def _frame(outcome: Outcome, source: Source) -> contents.Frame | None:
    """None when the image cannot be read any more, or is another now: the labels do not need it."""
    clock, pipeline = StageClock(), outcome.pipeline
    try:
        scores, image, known = scores_of(pipeline, source, True, clock)
    except (ImageRejected, ArtefactMismatch):
        return None
    assert image is not None and known.image_size and known.input_size
    assert outcome.statistics is not None
    rule = outcome.selecting.rule(outcome.statistics, outcome.spec.classes)
    if outcome.selecting.scope == "image":
        made = outcome.selecting.rule_for(outcome.statistics, outcome.spec.classes, {})
        rule = own_rule(pipeline, scores, known, made, clock)
    chosen = pipeline.select(scores, known.image_size, known.input_size, rule, clock, entropy=True)
    everything = pipeline.kernel.accumulate(
        scores,
        (chosen.labels.shape[0], chosen.labels.shape[1]),
        outcome.selecting.weighting,
        labels=True,
    )
    assert chosen.entropy is not None and everything.labels is not None
    return contents.Frame(
        os.fsdecode(source.ref.relative), image, everything.labels, chosen.labels, chosen.entropy
    )


def _shown(relative: bytes) -> str:
    return relative.decode(errors="backslashreplace")


def _provenance(outcome: Outcome) -> contents.Pairs:
    record = outcome.record
    identity = record["identity"]
    kernel = outcome.pipeline.kernel
    cache = sum(p.stat().st_size for p in outcome.folder.scores.glob("*.safetensors"))
    return (
        ("run id", record["run_id"]),
        ("model", record["settings"]["model"]),
        ("model sha256", identity["model"]),
        ("images", record["settings"]["images"]),
        ("inputs", f"{identity['inputs']['images']}, sha256 {identity['inputs']['sha256']}"),
        (
            "engine",
            f"{identity['engine']['name']} {identity['engine']['version']} on "
            f"{record['settings']['device']}",
        ),
        ("fused kernel", f"{kernel.name} {getattr(kernel, 'isa', '')} (version {KERNEL_VERSION})"),
        ("preset", identity["spec"]["preset"] or "from the model's own spec"),
        ("class set", identity["spec"]["classes"]["name"]),
        ("score cache", size_text(cache) if cache else "off"),
        ("versions", ", ".join(f"{k} {v}" for k, v in record["versions"].items())),
        ("machine", f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"),
    )
