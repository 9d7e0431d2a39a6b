"""Every file of cada_deploy/policies keeps the contract of its folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from command_line import cada, deliverables, read

from cada_deploy import policies
from cada_deploy.policies import COMPARATORS, MEASURES, Rule
from cada_deploy.statistics import HISTOGRAM_BINS, ClassStatistics

NAMES = sorted(policies.policies())


def statistics(classes: int, seed: int) -> ClassStatistics:
    generator = np.random.Generator(np.random.PCG64(seed))
    pixels = generator.integers(0, 50, classes)
    sums = generator.integers(0, 1 << 23, (classes, classes)) * (pixels > 0)[:, None]
    histogram = np.zeros((classes, HISTOGRAM_BINS), np.int64)
    return ClassStatistics("confidence", pixels, sums, histogram, 0, 0)


def test_the_listing_is_the_folder() -> None:
    files = {p.stem for p in Path(policies.__file__).parent.glob("*.py")} - {"__init__"}
    assert {m.__name__.rpartition(".")[2] for m in policies.policies().values()} == files
    assert all(name == module.NAME for name, module in policies.policies().items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", [1, 2, 19])
def test_a_policy_is_a_pure_function_to_one_rule(name: str, classes: int) -> None:
    module = policies.policy(name)
    assert dataclasses.is_dataclass(module.Options)
    options = module.Options()
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.anything = 1
    for seed in range(5):
        given = statistics(classes, seed)
        before = given.to_json()
        rule = module.rule(given, options)
        assert isinstance(rule, Rule)
        assert rule == module.rule(given, options)
        assert given.to_json() == before
        assert len(rule.thresholds) == classes
        assert rule.measure in MEASURES and rule.comparator in COMPARATORS


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_copes_with_no_evidence_at_all(name: str) -> None:
    module = policies.policy(name)
    rule = module.rule(ClassStatistics.zero(4, "confidence"), module.Options())
    assert len(rule.thresholds) == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_runs_from_the_command_line_and_again_by_select(
    name: str, colour_model: Path, frames: Path, finished: Path, tmp_path: Path
) -> None:
    ran = cada(
        "pseudo-label", "--model", colour_model, "--preset", "imagenet-rgb", "--images", frames,
        "--out", tmp_path / "fresh", "--policy", name,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert read(tmp_path / "fresh" / "thresholds.json")["policy"] == name
    assert cada("select", finished, "--out", tmp_path / "again", "--policy", name).code == 0
    assert deliverables(tmp_path / "again") == deliverables(tmp_path / "fresh")
