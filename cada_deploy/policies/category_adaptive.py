"""The paper's rule: keep a pixel whose entropy is below its category centroid's, less Delta.

T_l = E(f_l) - Delta_l, or a share of E(f_l) when Delta is relative (paper, Eq. 1 to 3;
docs/mathematics.md says how Eq. 1 is read and why).
"""

from __future__ import annotations

from dataclasses import dataclass

from cada_deploy.errors import UsageError
from cada_deploy.policies import Rule
from cada_deploy.statistics import CENTROIDS, ClassStatistics, centroid_entropies

NAME = "category-adaptive"
SCOPES = ("dataset", "image")


@dataclass(frozen=True)
class Delta:
    """How far below the centroid's entropy a pixel must lie: nats, or a share of that entropy."""

    amount: float
    relative: bool = False

    def threshold(self, entropy: float) -> float:
        return entropy * (1.0 - self.amount) if self.relative else entropy - self.amount

    def __str__(self) -> str:
        return f"{self.amount * 100:.12g}%" if self.relative else f"{self.amount:.12g}"


@dataclass(frozen=True)
class Options:
    """delta holds one Delta for all classes, or one per class."""

    delta: tuple[Delta, ...] = (Delta(0.0),)
    centroid: str = "confidence"
    scope: str = "dataset"

    def __post_init__(self) -> None:
        if self.centroid not in CENTROIDS:
            raise UsageError(f"--centroid is {self.centroid!r}; expected one of {CENTROIDS}")
        if self.scope not in SCOPES:
            raise UsageError(f"--scope is {self.scope!r}; expected one of {SCOPES}")

    def for_class(self, index: int) -> Delta:
        return self.delta[0] if len(self.delta) == 1 else self.delta[index]


def rule(statistics: ClassStatistics, options: Options) -> Rule:
    entropies = centroid_entropies(statistics, options.centroid)
    if len(options.delta) not in (1, len(entropies)):
        raise UsageError(
            f"--delta gives {len(options.delta)} values for {len(entropies)} classes; give one "
            "for all, or one per class"
        )
    return Rule(
        measure="entropy",
        comparator="<",
        thresholds=tuple(
            None if e is None else options.for_class(k).threshold(e)
            for k, e in enumerate(entropies)
        ),
    )


def parse_delta(text: str, class_names: tuple[str, ...]) -> tuple[Delta, ...]:
    """`0.1`, `10%`, one value per class (`0.1,0.2,...`), or by name (`*=0.1,car=20%`).

    Raises UsageError for anything else.
    """
    parts = [p.strip() for p in text.split(",")]
    if not any("=" in p for p in parts):
        values = tuple(_one(p) for p in parts)
        if len(values) not in (1, len(class_names)):
            raise UsageError(
                f"--delta {text}: {len(values)} values for {len(class_names)} classes; give one "
                "for all, one per class in order, or name them: '*=0.1,car=0.2'"
            )
        return values
    return _by_name(parts, class_names)


def _by_name(parts: list[str], class_names: tuple[str, ...]) -> tuple[Delta, ...]:
    given: dict[str, Delta] = {}
    for part in parts:
        name, separator, value = part.partition("=")
        if not separator or (name != "*" and name not in class_names):
            raise UsageError(
                f"--delta: {part!r} names no class; the classes are {', '.join(class_names)} "
                "(and * for all others)"
            )
        if name in given:
            raise UsageError(f"--delta names {name!r} twice")
        given[name] = _one(value)
    default = given.get("*", Delta(0.0))
    return tuple(given.get(name, default) for name in class_names)


def _one(text: str) -> Delta:
    relative = text.endswith("%")
    try:
        amount = float(text.removesuffix("%"))
    except ValueError:
        raise UsageError(
            f"--delta: {text!r} is not a number; expected nats (0.1) or a share (10%)"
        ) from None
    if not -1e6 < amount < 1e6:
        raise UsageError(f"--delta: {text!r} is out of range")
    return Delta(amount / 100.0, True) if relative else Delta(amount)
