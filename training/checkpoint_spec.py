"""The spec of a checkpoint: how its network is fed and read, by a preset, a TOML file or itself.

Tensors' names and shapes say nothing about preprocessing (BDL and CRST share all of them), so a
person has to; only what this project trained itself carries its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cada_deploy import presets
from cada_deploy.classes import CITYSCAPES_19, ClassSet, anonymous
from cada_deploy.errors import ArtefactMismatch, UsageError
from cada_deploy.model_spec import ModelSpec

from .checkpoints import Loaded

OWN_PRESET = "imagenet-rgb"  # what training/source.py feeds the small network with
INPUT = "image"
OUTPUT = "scores"


def checkpoint_spec(
    path: Path,
    loaded: Loaded,
    *,
    preset: str | None = None,
    spec_file: Path | None = None,
    classes: ClassSet | None = None,
) -> ModelSpec:
    """The spec of a loaded checkpoint, with what loading found out in its provenance.

    Raises UsageError when nothing says how it is fed, ArtefactMismatch for another class count.
    """
    own = OWN_PRESET if loaded.family.name == "deeplab-small" else None
    spec = stated_spec(
        path, loaded.classes, preset=preset, spec_file=spec_file, classes=classes, own=own,
        candidates=loaded.family.presets,
    )  # fmt: skip
    spec = with_names(spec, stride=loaded.output_stride)
    provenance = {**spec.provenance, **provenance_of(loaded)}
    return replace(spec, weights_sha256=loaded.sha256, provenance=provenance)


def require_statement(path: Path, preset: str | None, spec_file: Path | None) -> None:
    """Raises UsageError when both are given: they would say the same thing twice."""
    if preset and spec_file:
        raise UsageError("--preset and --spec both say how to feed the model; give one of them")


def stated_spec(
    path: Path,
    found: int,
    *,
    preset: str | None,
    spec_file: Path | None,
    classes: ClassSet | None,
    own: str | None = None,
    candidates: Sequence[str] = (),
) -> ModelSpec:
    """What --preset or --spec states for a network of `found` classes; `own` is the preset that
    the file itself implies, `candidates` those that its family's projects use."""
    require_statement(path, preset, spec_file)
    if spec_file:
        spec = presets.load_spec(spec_file, classes)
    elif preset or own:
        name = preset or own or ""
        fed, read = presets.preset(name)
        how = f"--preset {name}" if preset else "the checkpoint's own training"
        named = classes or (CITYSCAPES_19 if found == len(CITYSCAPES_19) else anonymous(found))
        spec = ModelSpec(named, fed, read, preset=name, provenance={"spec": how})
    else:
        raise UsageError(_unstated(path, candidates))
    if len(spec.classes) != found:
        raise ArtefactMismatch(
            f"{path.name} gives {found} classes but class set {spec.classes.name!r} has "
            f"{len(spec.classes)}; name the right set with --classes or in --spec"
        )
    return spec


def _unstated(path: Path, candidates: Sequence[str]) -> str:
    likely = (
        f" Projects that write such files use {' or '.join(candidates)}; the file cannot say which."
        if candidates
        else ""
    )
    return (
        f"{path.name} does not say how it must be fed, and cada-deploy never guesses that.{likely} "
        f"Give --preset with one of {', '.join(presets.PRESETS)}, or --spec FILE.toml:\n\n"
        + presets.spec_template()
    )


def with_names(spec: ModelSpec, *, stride: int | None = None) -> ModelSpec:
    """The spec with the names that a checkpoint's network is given. A spec of another layout or
    element type, or of probabilities, describes an ONNX file and not a network in PyTorch."""
    if spec.input.layout != "NCHW" or spec.input.dtype != "float32":
        raise UsageError(
            f"the spec says input {spec.input.layout} {spec.input.dtype}; a checkpoint's network "
            "takes NCHW float32"
        )
    if spec.output.meaning != "logits":
        raise UsageError("the spec says output.meaning probabilities; a checkpoint gives logits")
    output = replace(spec.output, name=OUTPUT, stride=stride or spec.output.stride)
    return replace(spec, input=replace(spec.input, name=INPUT), output=output)


def provenance_of(loaded: Loaded) -> dict[str, Any]:
    """What is known of the weights, as JSON."""
    facts: dict[str, Any] = {
        "architecture": loaded.architecture.name,
        "family": loaded.family.name,
        "projects": loaded.family.projects,
        "checkpoint_sha256": loaded.sha256,
        "load_report": loaded.report.to_json(),
    }
    branches = getattr(loaded.architecture, "aspp_branches", None)
    if branches is not None:
        told = loaded.evidence
        facts["aspp"] = {
            "branches": branches,
            "tensors_say": told.branches if told else None,
            "reason": told.reason if told else None,
            "evidence": [e.describe() for e in told.evidence] if told else [],
        }
    return facts
