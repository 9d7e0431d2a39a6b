"""Times on a GPU between CUDA events, with its second-level cache flushed before every run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from harness import Times

FLUSH_BYTES = 1 << 30  # many times any L2; filling it also lets the host enqueue ahead of the GPU


def measure(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 3
) -> dict[str, Times]:
    """All contenders take turns on the current stream, each turn in the other direction, so that
    drifting clocks fall on all of them. The flush is enqueued right before the first event, and
    while it runs the host enqueues the work: launches are not part of a time unless there are so
    many that the GPU catches up."""
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm_up + rounds):
        names = list(contenders) if turn % 2 == 0 else list(reversed(contenders))
        for name in names:
            torch.cuda.synchronize()
            flush.fill_(turn)
            start.record()
            contenders[name]()
            end.record()
            end.synchronize()
            if turn >= warm_up:
                taken[name].append(start.elapsed_time(end))
    return {name: Times(tuple(ms)) for name, ms in taken.items()}
