"""The back end `trt`, run against a stand-in for TensorRT (stand_in_tensorrt/): our side of every
call, never TensorRT itself. Built with the sanitizers, so a copy of a wrong length is seen."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from foreign_models import street_like

from cada_deploy.fused import best_kernel
from cada_deploy.model_spec import ModelSpec
from cada_deploy.policies.fixed import every_class
from cada_deploy.preprocess import to_batch_row
from cada_deploy.scores import EncodedScores, Upsampling

from .cada_seg import DONE, FAILED, LACKS, MISMATCH, USAGE, run
from .test_labels import labels_of, spec_of

CLASSES = 7
WEIGHTS = np.random.default_rng(4).normal(0, 3, (CLASSES, 4)).astype(np.float32)
SIZES = [(40, 56), (33, 17), (56, 40)]
VERSION = (10, 3, 0, 30)


def plan_bytes(
    batch: int = 0,
    half: bool = False,
    fails: bool = False,
    version: tuple[int, ...] = VERSION,
    sides: tuple[int, int] = (16, 64),
) -> bytes:
    header = b"ftrt" + bytes(20) + bytes(version)
    numbers = struct.pack("<6i", batch, CLASSES, *sides, half, fails)
    return header + b"lin1" + numbers + WEIGHTS.tobytes()


def plan_file(path: Path, content: bytes, spec: ModelSpec, **changes: object) -> Path:
    """A plan with its manifest, as far as cada_seg reads it."""
    path.write_bytes(content)
    manifest = {
        "plan_bytes": len(content),
        "plan_sha256": hashlib.sha256(content).hexdigest(),
        "spec": spec.to_json(),
        "flags": [],
        "verified": True,
        **changes,
    }
    path.with_name(path.name + ".json").write_text(json.dumps(manifest))
    return path


def expected(
    image: np.ndarray, spec: ModelSpec, half: bool, network: tuple[int, int] | None = None
) -> np.ndarray:
    """The labels: the stand-in's scores in NumPy, everything after them by Python's kernel."""
    row = to_batch_row(image, spec.input, network)
    x = row[0].reshape(3, -1)
    w = WEIGHTS[:, :, None]
    scores = ((w[:, 0] * x[0] + w[:, 1] * x[1]) + w[:, 2] * x[2]) + w[:, 3]
    scores = scores.reshape(1, CLASSES, *row.shape[2:])
    kernel = best_kernel(1)
    encoded = kernel.encode(scores.astype(np.float16) if half else scores, spec.output.meaning)
    upsampling = Upsampling(spec.output.order, spec.output.align_corners)
    size = (image.shape[0], image.shape[1])
    rule = every_class(CLASSES, 0.0)
    return kernel.select(EncodedScores(encoded[0], upsampling), size, rule).labels


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    folder = tmp_path / "frames"
    folder.mkdir()
    for k, size in enumerate(SIZES):
        cv2.imwrite(str(folder / f"{k}.png"), street_like(*size, seed=k)[..., ::-1])
    return folder


SPEC = spec_of("imagenet-rgb", output={"name": "logits"})
QUIET = {"ASAN_OPTIONS": "detect_leaks=1"}


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("half", [False, True])
def test_labels_of_a_plan(
    batch: int, half: bool, sanitized: Path, frames: Path, tmp_path: Path
) -> None:
    plan = plan_file(tmp_path / "m.engine", plan_bytes(batch, half), SPEC)
    ran = run(
        sanitized / "cada_seg", "--backend", "trt", "--model", plan, "--images", frames,
        "--out", tmp_path / "out", **QUIET,
    )  # fmt: skip
    assert ran.code == DONE, ran.err
    assert ran.said("tensorrt 10.3.0, ")
    found = labels_of(tmp_path / "out")
    assert len(found) == len(SIZES)
    for k, size in enumerate(SIZES):
        labels = expected(street_like(*size, seed=k), SPEC, half)
        assert len(np.unique(labels)) >= 3
        np.testing.assert_array_equal(found[f"{k}.png"], labels)


def test_everything_that_is_refused(sanitized: Path, frames: Path, tmp_path: Path) -> None:
    plan = tmp_path / "m.engine"
    good = plan_bytes()

    def refused(code: int, *why: str, more: tuple[str, ...] = (), **variables: str) -> None:
        ran = run(
            sanitized / "cada_seg", "--backend", "trt", "--model", plan, "--images", frames,
            "--out", tmp_path / "out", *more, **QUIET, **variables,
        )  # fmt: skip
        assert ran.code == code and ran.said(*why), (ran.code, ran.err)
        assert not (tmp_path / "out").exists()

    plan_file(plan, good, SPEC)
    plan.write_bytes(good[:-1] + b"x")
    refused(MISMATCH, "not the plan of its manifest", "an engine is code")
    plan.write_bytes(good[:-1])
    refused(MISMATCH, "is cut short")
    plan_file(plan, good[:30], SPEC)
    refused(MISMATCH, "TensorRT refuses", "the stand-in knows no such plan")
    plan_file(plan, plan_bytes(version=(10, 16, 1, 11)), SPEC)
    refused(MISMATCH, "built with TensorRT 10.16.1.11, here is 10.3.0")
    plan_file(plan, plan_bytes(version=(10, 30, 0, 1)), SPEC)
    refused(MISMATCH, "built with TensorRT 10.30.0.1")
    plan_file(plan, good, spec_of("imagenet-rgb"))
    refused(USAGE, "has 2 outputs (labels, logits)")
    plan_file(plan, good, spec_of("imagenet-rgb", output={"name": "labels"}))
    refused(MISMATCH, "not float32 or float16")
    plan_file(plan, good, spec_of("imagenet-rgb", 6, output={"name": "logits"}))
    refused(MISMATCH, "gives 7 classes")
    plan_file(plan, good, SPEC)
    refused(LACKS, "invalid device", more=("--device", "1"))
    refused(LACKS, "TensorRT gave no runtime", STAND_IN_NO_RUNTIME="1")
    refused(MISMATCH, "does not take", "(1, 3, 16, 16) to (1, 3, 64, 64)", more=("--size", "65x64"))
    plan_file(plan, plan_bytes(fails=True), SPEC)
    refused(FAILED, "failed on an input of shape (1, 3, 40, 56)")
    plan_file(plan, good, SPEC, plan_sha256=7)
    refused(MISMATCH, "not the manifest of an engine")


def test_a_plan_of_one_size_gets_every_frame_at_it(
    sanitized: Path, frames: Path, tmp_path: Path
) -> None:
    content = plan_bytes(sides=(40, 40))
    plan = plan_file(tmp_path / "m.engine", content, SPEC, verified=False)
    ran = run(
        sanitized / "cada_seg", "--backend", "trt", "--model", plan, "--images", frames,
        "--out", tmp_path / "out", **QUIET,
    )  # fmt: skip
    assert ran.code == DONE and ran.said("tensorrt 10.3.0 (unverified plan), "), ran.err
    for k, size in enumerate(SIZES):
        labels = expected(street_like(*size, seed=k), SPEC, half=False, network=(40, 40))
        np.testing.assert_array_equal(labels_of(tmp_path / "out")[f"{k}.png"], labels)


def test_a_plan_for_later_versions_runs_on_one(
    sanitized: Path, frames: Path, tmp_path: Path
) -> None:
    content = plan_bytes(version=(10, 2, 0, 0))
    plan = plan_file(tmp_path / "m.engine", content, SPEC, flags=["VERSION_COMPATIBLE"])
    ran = run(
        sanitized / "cada_seg", "--backend", "trt", "--model", plan, "--images", frames,
        "--out", tmp_path / "out", "--quiet", **QUIET,
    )  # fmt: skip
    assert (ran.code, ran.err) == (DONE, "")
