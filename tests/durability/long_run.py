"""A run of many small images in a process of its own, and how to stop it at a chosen moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from command_line import child, child_environment, command, deliverables

IMAGES, SHARD = 60, 2
SHARDS = IMAGES // SHARD
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Job:
    """The arguments of one pseudo-label run and the bytes that it must give."""

    arguments: tuple[str, ...]
    expected: dict[str, bytes]

    def command(self, out: Path) -> list[str | bytes]:
        return command(*self.arguments, "--out", out)

    @contextmanager
    def started(self, out: Path) -> Iterator[subprocess.Popen[bytes]]:
        """The run as leader of its own process group; nothing of it survives the block."""
        process = subprocess.Popen(
            self.command(out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=child_environment(),
            start_new_session=True,
        )
        try:
            yield process
        finally:
            kill_group(process)
            process.wait()
            assert process.stderr is not None
            process.stderr.close()

    def complete(self, out: Path) -> None:
        """Run to the end; every byte must be the uninterrupted run's."""
        ran = child(*self.arguments, "--out", out)
        assert ran.code == 0, ran.err
        assert deliverables(out) == self.expected


def kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def manifests(out: Path) -> tuple[int, int]:
    """How many shards are scored, how many selected."""
    scored = len(list((out / "shards").glob("*.scored.json")))
    return scored, len(list((out / "shards").glob("*.selected.json")))


def wait_for_manifests(process: subprocess.Popen[bytes], out: Path, count: int) -> None:
    """Until so many manifests are there, or the process has ended."""
    give_up = time.monotonic() + PATIENCE_S
    while sum(manifests(out)) < count and process.poll() is None:
        assert time.monotonic() < give_up, "the run makes no progress"
        time.sleep(0.001)


def kill_at_random(job: Job, out: Path, dice: random.Random) -> tuple[int, int]:
    """Start or resume, kill -9 the group at a random point of what is left; manifests then."""
    done = sum(manifests(out))
    target = done + int(dice.uniform(0, 0.7) * (2 * SHARDS - done))
    # With no new manifest to wait for, the kill falls into start-up, planning or the first shard.
    pause = dice.uniform(0, 0.8) if target == done else dice.uniform(0, 0.01)
    with job.started(out) as process:
        wait_for_manifests(process, out, target)
        time.sleep(pause)
        kill_group(process)
        process.wait()
    return manifests(out)
