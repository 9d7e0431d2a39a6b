"""Stage timing: seconds of wall time each stage of the pipeline took, summed over workers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

# The order in which a frame passes them, and in which the report shows them.
STAGES = (
    "read",
    "decode",
    "upload",
    "preprocess",
    "infer",
    "gpu",
    "encode scores",
    "statistics",
    "cache write",
    "cache read",
    "select",
    "encode png",
    "write png",
    "commit",
)


class StageClock:
    """Collects seconds by stage. One per task; not shared between threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys((), 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def total_seconds(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sums by stage, in the order of STAGES."""
    sums: Counter[str] = Counter()
    for part in parts:
        sums.update(part)
    return {name: sums[name] for name in STAGES if name in sums}
