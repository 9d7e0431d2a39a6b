"""One long job with its uninterrupted result, shared by all durability tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import child, deliverables
from foreign_models import fitted_colours, save_colour_model, street_like, write_images

from durability.long_run import IMAGES, SHARD, SHARDS, Job, manifests


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("long")
    write_images(folder / "frames", IMAGES, (112, 144))
    # Two inputs that are rejected: they must come out the same after every restart too.
    (folder / "frames" / "frame_010.png").write_bytes(b"")
    (folder / "frames" / "frame_033.png").write_bytes(b"no image at all")
    colours = fitted_colours([street_like(112, 144, seed) for seed in range(4)], 6)
    model = save_colour_model(folder / "model.onnx", colours)
    arguments = (
        "pseudo-label", "--model", str(model), "--preset", "imagenet-rgb",
        "--images", str(folder / "frames"), "--shard-size", str(SHARD), "--delta", "2%",
        "--workers", "2", "--allow-rejects", "2",
    )  # fmt: skip
    whole = folder / "whole"
    ran = child(*arguments, "--out", whole)
    assert ran.code == 0, ran.err
    assert manifests(whole) == (SHARDS, SHARDS)
    return Job(arguments, deliverables(whole))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"
