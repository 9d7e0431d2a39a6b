"""`cada-deploy compare`: are two models equal for this job?"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from cada_deploy import command_options as shared
from cada_deploy import durable, engines
from cada_deploy.comparison import TIE, Asked, Comparison, Gates, compare
from cada_deploy.comparison_page import write_page
from cada_deploy.engine_plans import Build, PlanOptions
from cada_deploy.errors import REJECTED_SOME, CheckFailed
from cada_deploy.labelling import cores
from cada_deploy.pipeline import parse_size
from cada_deploy.presets import PRESETS

_SHARE = click.FloatRange(0, 1)


@click.command(name="compare")
@click.argument("a", type=shared.PATH)
@click.argument("b", type=shared.PATH)
@click.option("--images", type=shared.PATH, required=True, help="Folder of images, or a list file.")
@click.option(
    "--preset",
    type=click.Choice(sorted(PRESETS)),
    help="Preprocessing of the model that carries no spec of its own.",
)
@click.option("--spec", "spec_file", type=shared.PATH, help="The same as a TOML file.")
@click.option("--classes", help="Class set of both, such as cityscapes-19.")
@click.option("--size", help="Network input HxW of models that take any size.")
@click.option(
    "--engine",
    "engine_b",
    type=click.Choice(engines.names()),
    help="What runs B (default: by its kind of file). trt compares B through TensorRT.",
)
@click.option("--rebuild", is_flag=True, help="Build B's TensorRT engine anew.")
@click.option("--limit", type=shared.COUNT, help="So many of the images, spread evenly.")
@shared.policy_options
@click.option("--min-agreement", type=_SHARE, help="Gate: share of labels that must agree.")
@click.option(
    "--max-entropy-error", type=click.FloatRange(0), help="Gate: largest entropy error in nats."
)
@click.option(
    "--max-selected-loss",
    type=_SHARE,
    help="Gate: per class, the share of A's selected pixels that may be lost or relabelled.",
)
@click.option(
    "--max-margin",
    type=_SHARE,
    help="Gate: how far A's two best probabilities may be apart where the labels differ.",
)
@click.option("--out", type=shared.PATH, help="Write a page with pictures of the disagreements.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table.")
@click.option("--workers", type=shared.COUNT, help="Images worked on at once (default: all cores).")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(a: Path, b: Path, as_json: bool, out: Path | None, **options: Any) -> int:
    """Compare two models, each a checkpoint, an exported program (.pt2), ONNX or a TensorRT engine,
    on IMAGES.

    Shows where the labels differ, how sure A was there, and which pseudo labels change when each
    model learns its own thresholds, and when both use A's. A gate that does not hold is exit 5.

    \b
    Example:
      cada-deploy compare bdl.pth bdl.onnx --preset bdl --images frames/ --max-margin 0.001
    """
    size = None if options["size"] is None else parse_size("--size", options.pop("size"))
    gates = Gates(**{name: options.pop(name) for name in vars(Gates())})
    asked = Asked(
        a,
        b,
        options["images"],
        options["preset"],
        options["spec_file"],
        shared.named_classes(options["classes"]),
        size,
        options["limit"],
        shared.selecting(options),
        options["workers"] or cores(),
        options["quiet"],
        options["engine_b"],
        Build(
            PlanOptions(size, size, size),
            options["rebuild"],
            quiet=options["quiet"],
            say=shared.say(options["quiet"]),
        ),
    )
    found = compare(asked)
    failures = gates.failures(found)
    if out is not None:
        durable.make_folder(out.parent)
        durable.write_file(out, write_page(found, failures, gates.asked).encode())
        durable.sync_folder(out.parent)
    click.echo(_json(found, failures) if as_json else _text(found))
    if failures:
        raise CheckFailed("the models differ too much: " + "; ".join(failures))
    return REJECTED_SOME if found.rejected or found.one_sided else 0


def _json(found: Comparison, failures: list[str]) -> str:
    return json.dumps({**found.to_json(), "failed_gates": failures}, indent=1)


def _text(found: Comparison) -> str:
    margins = found.margins
    widest = max(len("class"), *(len(name) for name in found.classes.names))
    head = (
        f"{'class':<{widest}} {'pixels A':>12} {'agree':>9} {'IoU':>9} {'selected A':>12} "
        f"{'lost':>9} {'relabel':>9} {'gained':>9} | {'lost':>9} {'relabel':>9} {'gained':>9}"
    )
    rows = []
    for name, pixels, agreement, iou, own, same in zip(
        found.classes.names, found.matrix.labelled.tolist(), found.class_agreement.tolist(),
        found.matrix.iou.tolist(), found.own, found.same,
    ):  # fmt: skip
        if pixels or own.gained or same.gained:
            rows.append(
                f"{name:<{widest}} {pixels:>12,} {_share(agreement):>9} {_share(iou):>9} "
                f"{own.selected:>12,} {own.lost:>9,} {own.relabelled:>9,} {own.gained:>9,} | "
                f"{same.lost:>9,} {same.relabelled:>9,} {same.gained:>9,}"
            )
    lines = [
        f"A {found.a.path} ({found.a.engine})",
        f"B {found.b.path} ({found.b.engine})",
        f"{found.images} images, {found.pixels:,} pixels: {found.agreement:.6%} of the labels "
        f"agree, mean IoU {_share(found.matrix.mean_iou)}",
        f"{found.disagreements:,} disagreements; A's margin there: largest {margins.largest:.3g}, "
        f"median {_figure(margins.median)}, below {TIE:g}: {_share(margins.ties_share)}",
        f"entropy differs by at most {found.entropy_error_max:.3g} nats, "
        f"{found.entropy_error_mean:.3g} on average",
        "",
        f"{'':<{widest}} {'each with its own thresholds':>75} | both with A's thresholds",
        head,
        *rows,
    ]
    if found.rejected or found.one_sided:
        lines.append("")
        lines += [f"not compared: {name} ({why})" for name, why in found.rejected]
        lines += [
            f"not compared: {name} (scores not finite: {why})" for name, why in found.one_sided
        ]
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4%}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
