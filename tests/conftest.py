"""Fixtures that many tests share: one hypothesis profile, tiny frames, a colour model, a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import Ran, cada
from foreign_models import fitted_colours, save_colour_model, street_like, write_images
from hypothesis import HealthCheck, settings

SOAK = os.environ.get("CADA_SOAK") == "1"

settings.register_profile(
    "cada",
    deadline=None,
    derandomize=True,
    print_blob=True,
    max_examples=1000 if SOAK else 50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("cada")

FRAMES = 7
CLASSES = 6


@pytest.fixture(scope="session")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of FRAMES images, 48x64 each."""
    folder = tmp_path_factory.mktemp("shared") / "frames"
    write_images(folder, FRAMES)
    return folder


@pytest.fixture(scope="session")
def colour_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A foreign ONNX of CLASSES classes, stride 8; needs --preset imagenet-rgb."""
    pictures = [street_like(48, 64, seed) for seed in range(FRAMES)]
    path = tmp_path_factory.mktemp("model") / "colours.onnx"
    return save_colour_model(path, fitted_colours(pictures, CLASSES))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, colour_model: Path, frames: Path) -> Path:
    """OUT of an uninterrupted run with every default but the shard size. Only read it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    ran: Ran = cada(
        "pseudo-label", "--model", colour_model, "--preset", "imagenet-rgb",
        "--images", frames, "--out", out, "--shard-size", 3,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return out
