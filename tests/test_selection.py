"""From statistics to rule, digest and thresholds.json; the golden file holds its bytes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from cada_deploy import durable
from cada_deploy.classes import ClassSet
from cada_deploy.errors import UsageError
from cada_deploy.manifests import SelectedShard
from cada_deploy.selection import Selecting, thresholds_json
from cada_deploy.statistics import HISTOGRAM_BINS, UNIT, ClassStatistics

GOLDEN = Path(__file__).parent / "golden"
CLASSES = ClassSet("trio", ("road", "straße", "sky"), (7, 8, 23), ((1, 2, 3), (4, 5, 6), (7, 8, 9)))


def statistics() -> ClassStatistics:
    """road: mostly road; straße: half and half, past 2^53; sky: nobody predicted it."""
    return ClassStatistics(
        "confidence",
        np.array([1000, 5000, 0], object),
        np.array(
            [[900 * UNIT, 90 * UNIT, 10 * UNIT + 1], [1 << 82, 1 << 82, 0], [0, 0, 0]], object
        ),
        np.zeros((3, HISTOGRAM_BINS), object),
        17,
        4,
    )


def shards() -> list[SelectedShard]:
    return [
        SelectedShard("r", "d", 0, (), (600, 50, 0), (500, 0, 0), 10, 2),
        SelectedShard("r", "d", 1, (), (400, 30, 0), (401, 7, 0), 7, 2),
    ]


@pytest.mark.parametrize(
    ("name", "selecting"),
    [
        ("thresholds", Selecting()),
        ("thresholds_per_class", Selecting(delta="0.01,10%,-0.5", scope="image")),
        ("thresholds_fixed", Selecting(policy="fixed", threshold=0.75)),
    ],
)
def test_thresholds_json_has_its_golden_bytes(name: str, selecting: Selecting) -> None:
    data = durable.json_bytes(thresholds_json(selecting, CLASSES, statistics(), shards()))
    assert data == (GOLDEN / f"{name}.json").read_bytes()


def test_the_figures_add_up_over_shards() -> None:
    found = thresholds_json(Selecting(), CLASSES, statistics(), shards())
    assert [row["predicted"] for row in found["classes"]] == [1000, 80, 0]
    assert [row["selected"] for row in found["classes"]] == [901, 7, 0]
    assert found["selected_fraction"] == 908 / (1080 + 17 + 4)
    assert found["classes"][1]["centroid_entropy"] == pytest.approx(math.log(2), rel=1e-15)
    assert found["classes"][2]["threshold"] is None
    assert thresholds_json(Selecting(), CLASSES, statistics(), [])["selected_fraction"] == 0.0


def test_the_rule_digest_names_the_thresholds_and_the_files() -> None:
    def digest(selecting: Selecting, files: dict[str, bool] | None = None) -> str:
        return selecting.rule_for(statistics(), CLASSES, files or {}).digest

    assert digest(Selecting()) == digest(Selecting())
    others = [
        digest(Selecting()),
        digest(Selecting(delta="0.1")),
        digest(Selecting(scope="image")),
        digest(Selecting(policy="fixed")),
        digest(Selecting(policy="fixed", threshold=0.5)),
        digest(Selecting(), {"overlay": True}),
    ]
    assert len(set(others)) == len(others)
    more = statistics() + statistics()
    assert digest(Selecting()) == Selecting().rule_for(more, CLASSES, {}).digest, "same centroids"


def test_scope_image_makes_each_image_its_own_rule() -> None:
    rule = Selecting(scope="image").rule_for(statistics(), CLASSES, {})
    assert rule.fixed is None and rule.per_image is not None
    zero = ClassStatistics.zero(3, "confidence")
    assert rule.per_image(zero).thresholds == (None, None, None)
    fixed = Selecting().rule_for(statistics(), CLASSES, {})
    assert fixed.fixed is not None and fixed.per_image is None


@pytest.mark.parametrize(
    "bad",
    [
        {"policy": "fixed", "delta": "0"},
        {"policy": "fixed", "delta": ""},
        {"policy": "fixed", "scope": "image"},
        {"threshold": 0.5},
        {"policy": "nobody"},
    ],
    ids=str,
)
def test_options_of_another_policy_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Selecting(**bad)  # type: ignore[arg-type]
