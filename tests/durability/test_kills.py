"""Stopped at any moment, the same command goes on and gives the uninterrupted run's bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from command_line import child, command, deliverables, read, temporary_files

from durability.long_run import SHARDS, Job, kill_at_random, manifests, wait_for_manifests

KILLS = 300 if os.environ.get("CADA_SOAK") == "1" else 30
KILLS_A_RUN = 3  # then the run is completed, compared, and a fresh one begins


def test_sigkill_at_random_moments_loses_nothing(job: Job, out: Path) -> None:
    dice = random.Random(20260921)
    in_scoring = in_selection = 0
    for number in range(1, KILLS + 1):
        scored, selected = kill_at_random(job, out, dice)
        in_scoring += scored < SHARDS
        in_selection += scored == SHARDS and selected < SHARDS
        assert (out / "thresholds.json").exists() <= (selected == SHARDS)
        _whole_or_absent(job, out)
        if number % KILLS_A_RUN == 0:
            job.complete(out)
            assert temporary_files(out) == []
            shutil.rmtree(out)
    assert in_scoring >= KILLS // 10, "too few kills fell into the first phase"
    assert in_selection >= KILLS // 10, "too few kills fell into the second phase"


def _whole_or_absent(job: Job, out: Path) -> None:
    """Under a final name stands the final content, from the first moment on."""
    for path in (out / "labels").glob("*.png"):
        assert path.read_bytes() == job.expected[f"labels/{path.name}"], path
    for path in out.rglob("*.json"):
        read(path)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [SHARDS // 3, SHARDS + SHARDS // 3])
def test_a_polite_stop_exits_130_and_resumes(
    kind: signal.Signals, at: int, job: Job, out: Path
) -> None:
    with job.started(out) as process:
        wait_for_manifests(process, out, at)
        process.send_signal(kind)
        said = process.stderr.read().decode() if process.stderr else ""
        assert process.wait() == 130, said
    assert "interrupted" in said and "Traceback" not in said
    assert at <= sum(manifests(out)) < 2 * SHARDS
    assert read(out / "run.json")["status"] == "running"
    job.complete(out)
    assert read(out / "run.json")["status"] == "done"
    assert temporary_files(out) == []


def test_the_second_run_on_one_out_exits_4_and_the_first_is_unharmed(job: Job, out: Path) -> None:
    with job.started(out) as first:
        wait_for_manifests(first, out, 2)
        first.send_signal(signal.SIGSTOP)
        second = child(*job.arguments, "--out", out)
        assert second.code == 4
        assert second.said("in use", f"process {first.pid}")
        select = child("select", out)
        assert select.code == 4 and select.said("in use")
        first.send_signal(signal.SIGCONT)
        assert first.wait(60) == 0
    assert deliverables(out) == job.expected


def test_a_killed_holder_frees_the_lock_at_once(job: Job, out: Path) -> None:
    with job.started(out) as first:
        wait_for_manifests(first, out, 2)
        first.send_signal(signal.SIGSTOP)
        first.kill()
        first.wait()
    job.complete(out)


def test_a_reader_of_the_output_that_goes_away_ends_the_command_quietly(job: Job) -> None:
    import subprocess

    from command_line import child_environment

    pipe_end, write_end = os.pipe()
    os.close(pipe_end)
    done = subprocess.run(
        command("--help"), stdout=write_end, stderr=subprocess.PIPE,
        env=child_environment(), timeout=60, check=False,
    )  # fmt: skip
    os.close(write_end)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
