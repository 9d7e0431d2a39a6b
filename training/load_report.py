"""LoadReport: which of a file's tensors met which of a network's, and what was done to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Mismatch:
    """A tensor that both sides have in different shapes."""

    name: str
    found: tuple[int, ...]
    expected: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.found}, expected {self.expected}"


@dataclass(frozen=True)
class LoadReport:
    """What loading did. `filled` are batch norms' counters, which no prediction depends on."""

    layout: str  # "zip", "legacy" or "safetensors"
    matched: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    filled: int = 0
    nesting: tuple[str, ...] = ()
    stripped: tuple[str, ...] = ()
    converted: Mapping[str, int] = field(default_factory=dict)  # from which dtype, how many
    notes: tuple[str, ...] = ()
    allow_partial: bool = False

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    @property
    def percent(self) -> float:
        """Of all names that either side has, the share that met. Never rounds up to 100."""
        whole = len(self.matched) + len(self.missing) + len(self.unexpected) + len(self.mismatched)
        return 100.0 * len(self.matched) / whole if whole else 0.0

    def text(self) -> str:
        lines = [
            f"{len(self.matched)} tensors matched ({_floored(self.percent)} %), "
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected, "
            f"{len(self.mismatched)} of another shape; {self.layout} file"
        ]
        lines += _listed("missing", self.missing)
        lines += _listed("unexpected", self.unexpected)
        lines += _listed("another shape", [str(m) for m in self.mismatched])
        if self.nesting:
            lines.append(f"found under: {' > '.join(self.nesting)}")
        if self.stripped:
            lines.append(f"stripped prefixes: {' '.join(self.stripped)}")
        for dtype, count in sorted(self.converted.items()):
            lines.append(f"{count} tensors converted from {dtype} to float32")
        if self.filled:
            lines.append(f"{self.filled} num_batches_tracked were missing and set to 0 (unused)")
        if self.allow_partial and not self.complete:
            lines.append("a partial load was allowed: what is missing has fresh random weights")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """For a model's provenance: counts, and names only where something did not fit."""
        return {
            "layout": self.layout,
            "matched": len(self.matched),
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "mismatched": [str(m) for m in self.mismatched],
            "filled": self.filled,
            "nesting": list(self.nesting),
            "stripped": list(self.stripped),
            "converted": dict(self.converted),
            "notes": list(self.notes),
            "partial": self.allow_partial and not self.complete,
        }


def _floored(percent: float) -> str:
    return f"{int(percent * 100) / 100:g}"


def _listed(title: str, names: Sequence[str], most: int = 8) -> list[str]:
    if not names:
        return []
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return [f"{title}: {', '.join(names[:most])}{more}"]
