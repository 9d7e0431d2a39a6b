"""Data parallel training by torchrun: each process makes its part of a batch; gradients are
averaged.

Without torchrun there is one process and nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if it did; gives this process's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    on_gpu = device.startswith("cuda")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else device
    finally:
        dist.destroy_process_group()


def same_start(parameters: Iterable[torch.Tensor]) -> None:
    """Every process begins with the first one's values."""
    if count() > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, 0)


def average_gradients(optimiser: torch.optim.Optimizer) -> None:
    if count() == 1:
        return
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= count()


def wait() -> None:
    """Until every process is here."""
    if count() > 1:
        dist.barrier()
