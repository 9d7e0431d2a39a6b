"""From statistics to the rule that cuts labels, and to thresholds.json, which records it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cada_deploy.classes import ClassSet
from cada_deploy.errors import UsageError
from cada_deploy.manifests import SelectedShard, digest_of
from cada_deploy.policies import Rule, category_adaptive, fixed, policy
from cada_deploy.statistics import ClassStatistics, centroid_entropies, weighting_of
from cada_deploy.streaming import RuleFor

SCHEMA = 1
UNITS = {"entropy": "nat", "confidence": "probability", "margin": "probability", "ratio": "ratio"}


@dataclass(frozen=True)
class Selecting:
    """A policy and its options as given on the command line (None = not given)."""

    policy: str = category_adaptive.NAME
    delta: str | None = None
    centroid: str = "confidence"
    scope: str = "dataset"
    threshold: float | None = None

    def __post_init__(self) -> None:
        policy(self.policy)
        if self.threshold is not None and self.policy != fixed.NAME:
            raise UsageError(f"--threshold belongs to --policy fixed, not to {self.policy}")
        given = self.delta is not None or self.scope != "dataset"
        if self.policy != category_adaptive.NAME and given:
            raise UsageError(f"--delta and --scope belong to --policy {category_adaptive.NAME}")

    @property
    def weighting(self) -> str:
        return weighting_of(self.centroid)

    def options(self, classes: ClassSet) -> Any:
        """The policy's own Options. Raises UsageError for values that it refuses."""
        if self.policy == fixed.NAME:
            return fixed.Options() if self.threshold is None else fixed.Options(self.threshold)
        delta = category_adaptive.parse_delta(
            "0" if self.delta is None else self.delta, classes.names
        )
        return category_adaptive.Options(delta, self.centroid, self.scope)

    def rule(self, statistics: ClassStatistics, classes: ClassSet) -> Rule:
        made: Rule = policy(self.policy).rule(statistics, self.options(classes))
        return made

    def rule_for(
        self, statistics: ClassStatistics, classes: ClassSet, files: dict[str, Any]
    ) -> RuleFor:
        """The run's rule, or how each image makes its own; with the digest that names it. `files`
        says which files are written, which is part of what a selection is."""
        own = self.scope == "image"
        rule = self.rule(statistics, classes)
        facts = {
            "selecting": self.to_json(),
            "files": files,
            "thresholds": None if own else [repr(t) for t in rule.thresholds],
        }
        return RuleFor(
            digest_of(facts),
            None if own else rule,
            (lambda s: self.rule(s, classes)) if own else None,
            self.weighting,
        )

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def thresholds_json(
    selecting: Selecting,
    classes: ClassSet,
    statistics: ClassStatistics,
    shards: Sequence[SelectedShard],
) -> dict[str, Any]:
    """thresholds.json (docs/formats.md). `pixels` are counted on the statistics grid, `predicted`
    and `selected` on the label grid."""
    rule = selecting.rule(statistics, classes)
    predicted = [sum(s.predicted[k] for s in shards) for k in range(len(classes))]
    selected = [sum(s.selected[k] for s in shards) for k in range(len(classes))]
    invalid, masked = sum(s.invalid for s in shards), sum(s.masked for s in shards)
    total = sum(predicted) + invalid + masked
    entropies = centroid_entropies(statistics, selecting.centroid)
    return {
        "schema": SCHEMA,
        "policy": selecting.policy,
        "measure": rule.measure,
        "comparator": rule.comparator,
        "unit": UNITS[rule.measure],
        "centroid": selecting.centroid,
        "scope": selecting.scope,
        "delta": _delta_json(selecting, classes),
        "classes": [
            {
                "id": k,
                "name": name,
                "pixels": int(statistics.pixels[k]),
                "centroid_entropy": entropies[k],
                "threshold": None if selecting.scope == "image" else rule.thresholds[k],
                "predicted": predicted[k],
                "selected": selected[k],
            }
            for k, name in enumerate(classes.names)
        ],
        "selected_fraction": sum(selected) / total if total else 0.0,
        "invalid_pixels": invalid,
        "masked_pixels": masked,
    }


def _delta_json(selecting: Selecting, classes: ClassSet) -> Any:
    """A number of nats, a share such as "10%", or a list of these by class; null for others."""
    if selecting.policy != category_adaptive.NAME:
        return None
    deltas = selecting.options(classes).delta
    values = [str(d) if d.relative else d.amount for d in deltas]
    return values[0] if len(values) == 1 else values
