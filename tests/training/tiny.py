"""A recipe of seconds on small procedural scenes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cada_deploy.training.recipes import Recipe, recipe_from
from cada_deploy.training.stages import Data, Workplace
from cada_deploy.training.trainer import Domains

SIZE = [64, 96]


def scenes(domain: str, first: int, count: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": "scenes",
        "domain": domain,
        "seeds": [first, first + count],
        "size": SIZE,
        **more,
    }


TABLE: dict[str, Any] = {
    "name": "tiny",
    "crop": [32, 64],
    "batch": 2,
    "save_every": 2,
    "source": scenes("source", 0, 4),
    "validation": scenes("source", 100, 2),
    "target": scenes("target", 200, 4, labelled=False),
    "evaluation": scenes("target", 200, 4),
    "upper_bound": scenes("target", 200, 4),
    "network": {"output_shrink": 1},
    "stages": {
        "source": {"steps": 4},
        "adapt": {"steps": 4, "reestimate": True, "weights": {"output": 0.01, "style": 0.01,
                                                            "self_supervised": 0.0}},
        "self-train": {"steps": 4, "weights": {"output": 0.01, "style": 0.01}},
        "upper-bound": {"steps": 4},
    },
}  # fmt: skip


def recipe(**changes: Any) -> Recipe:
    return replace(recipe_from(TABLE), **changes)


def work(folder: Path, said: list[str] | None = None) -> Workplace:
    return Workplace(folder, "cpu", True, (said if said is not None else []).append)


def data_of(given: Recipe) -> Domains:
    data = Data.of(given)
    return Domains(data.source, data.target)
