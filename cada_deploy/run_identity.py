"""The run id: digests of everything that decides what the scores and statistics of a run are.

Two runs with one id give the same bytes, however the work was cut; workers, batch size and shard
size are therefore not in it. Policy and Delta belong to the selection alone and are not in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from cada_deploy.engines import Engine
from cada_deploy.errors import ArtefactMismatch
from cada_deploy.fused import KERNEL_VERSION, FusedKernel
from cada_deploy.image_files import ImageRef
from cada_deploy.manifests import digest_of
from cada_deploy.model_files import Model
from cada_deploy.pipeline import Pipeline
from cada_deploy.preprocess import resize_identity
from cada_deploy.scores import SCORE_ENCODING

_WORDS = {
    "job": "what the run is for",
    "model": "the model file",
    "spec": "the model's spec (preprocessing, classes, upsampling)",
    "resize": "the library that resizes (Pillow 13 gives other last bits than 12)",
    "inputs": "the list of images (names and sizes)",
    "sizes": "--size, --label-size or --stats-size",
    "weighting": "--centroid",
    "ignored": "--ignore-mask or --ignore-rows",
    "score_encoding": "the score encoding of this cada-deploy version",
    "kernel": "the fused kernel (another version, or no compiled kernel)",
    "engine": "the engine, its version or its kind of device",
}


def identity(
    job: str,
    model: Model,
    pipeline: Pipeline,
    engine: Engine,
    images: Sequence[ImageRef],
    weighting: str,
) -> dict[str, Any]:
    """What the run id is made of, by part, as JSON. job is "pseudo-label" or "predict"."""
    sizes = pipeline.sizes
    return {
        "job": job,
        "model": model.sha256,
        "spec": pipeline.spec.to_json(),
        "resize": resize_identity(pipeline.spec.input.resize),
        "inputs": {"images": len(images), "sha256": _inputs_digest(images)},
        "sizes": {
            "input": _list(sizes.input),
            "label": sizes.label if isinstance(sizes.label, str) else _list(sizes.label),
            "statistics": _list(sizes.statistics),
        },
        "weighting": weighting,
        "ignored": pipeline.ignored.to_json(),
        "score_encoding": SCORE_ENCODING,
        "kernel": kernel_identity(pipeline.kernel),
        "engine": {
            "name": engine.name,
            "version": engine.version,
            "device_kind": engine.device.partition(":")[0],
        },
    }


def kernel_identity(kernel: FusedKernel) -> str:
    """All bit-exact kernels are one; the NumPy path gives other last bits and is another."""
    return f"{'normative' if kernel.bit_exact else kernel.name}-{KERNEL_VERSION}"


def run_id(parts: dict[str, Any]) -> str:
    return digest_of(parts)


def _inputs_digest(images: Sequence[ImageRef]) -> str:
    digest = hashlib.sha256()
    for ref in images:
        digest.update(ref.relative + b"\0" + str(ref.size_bytes).encode() + b"\n")
    return digest.hexdigest()


def _list(size: tuple[int, int] | None) -> list[int] | None:
    return list(size) if size else None


def check_same(found: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """Raises ArtefactMismatch that names every part in which a finished run differs."""
    different = [
        f"  {_WORDS.get(part, part)}: {_short(found.get(part))} there, {_short(expected[part])} now"
        for part in expected
        if found.get(part) != expected[part]
    ]
    if different:
        raise ArtefactMismatch(
            f"{where} holds another run; it differs in\n"
            + "\n".join(different)
            + "\nChoose another --out, or remove that folder"
        )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:40]}... (sha256 {digest_of(value)[:12]})"
