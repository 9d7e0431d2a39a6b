"""Times on a GPU between CUDA events, with its second-level cache flushed before every run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from harness import Times

FLUSH_BYTES = 1 << 30  # many times any L2; filling it also lets the host enqueue ahead of the GPU


@dataclass(frozen=True)
class GpuTimes(Times):
    """caught_up: runs in which the GPU had reached the work before the host had enqueued all of it,
    so that the host's own time may be part of theirs."""

    caught_up: int = 0

    def as_row(self) -> dict[str, float]:
        return {**super().as_row(), "caught_up_runs": self.caught_up}


def measure(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 3
) -> dict[str, GpuTimes]:
    """All contenders take turns on the current stream, each turn in the other direction, so that
    drifting clocks fall on all of them. The flush is enqueued right before the first event, and
    while it runs the host enqueues the work."""
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    caught_up = dict.fromkeys(contenders, 0)
    for turn in range(warm_up + rounds):
        names = list(contenders) if turn % 2 == 0 else list(reversed(contenders))
        for name in names:
            torch.cuda.synchronize()
            flush.fill_(turn)
            start.record()
            contenders[name]()
            late = start.query()
            end.record()
            end.synchronize()
            if turn >= warm_up:
                taken[name].append(start.elapsed_time(end))
                caught_up[name] += late
    return {name: GpuTimes(tuple(ms), caught_up[name]) for name, ms in taken.items()}
