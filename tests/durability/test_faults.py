"""A full disk, a read-only folder, failing system calls: exit 1, then the same command ends well.

Each needs a privilege or a tool. Where that is missing the test is skipped with the reason, which
means: not run.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import Ran, child, child_environment, command, deliverables, read, temporary_files

from cada_deploy.labels import read_label_png
from durability.long_run import SHARDS, Job, manifests

SOAK = os.environ.get("CADA_SOAK") == "1"


@dataclass(frozen=True)
class SmallDisk:
    """A tmpfs of 4 MiB that only processes of one mount namespace see at `path`."""

    keeper: subprocess.Popen[bytes]
    path: Path

    @property
    def seen_from_here(self) -> Path:
        return Path(f"/proc/{self.keeper.pid}/root{self.path}")

    def inside(self, *words: str | bytes) -> Ran:
        done = subprocess.run(
            ["nsenter", "-t", str(self.keeper.pid), "-m", "--", *words],
            capture_output=True, env=child_environment(), timeout=120, check=False,
        )  # fmt: skip
        return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())

    def leave_free(self, kilobytes: int) -> None:
        """Fill up with a ballast file until only so much is free."""
        self.free_all()
        here = self.seen_from_here
        stat = os.statvfs(here)
        size = stat.f_bavail * stat.f_frsize - kilobytes * 1024
        (here / "ballast").write_bytes(bytes(max(0, size)))

    def free_all(self) -> None:
        (self.seen_from_here / "ballast").unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    for tool in ("unshare", "nsenter", "mount"):
        if shutil.which(tool) is None:
            pytest.skip(f"not run: there is no {tool} here to make a small disk with")
    point = tmp_path / "disk"
    point.mkdir()
    script = f"mount -t tmpfs -o size=4m small '{point}' && echo ready && exec sleep 600"
    keeper = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert keeper.stdout is not None and keeper.stderr is not None
    try:
        if keeper.stdout.readline() != b"ready\n":
            why = keeper.stderr.read().decode().strip()
            pytest.skip(f"not run: mounting a small disk is not allowed here ({why})")
        yield SmallDisk(keeper, point)
    finally:
        if keeper.poll() is None:
            os.killpg(keeper.pid, signal.SIGKILL)
        keeper.wait()
        keeper.stdout.close()
        keeper.stderr.close()


def run_on(disk: SmallDisk, job: Job) -> Ran:
    return disk.inside(*job.command(disk.path / "out"))


def whole(disk: SmallDisk, job: Job) -> tuple[int, int]:
    """Nothing half-written stands under a final name; how far the run came."""
    out = disk.seen_from_here / "out"
    for path in (out / "labels").glob("*.png"):
        assert path.read_bytes() == job.expected[f"labels/{path.name}"], path
    for path in out.rglob("*.json"):
        read(path)
    return manifests(out)


def test_a_full_disk_stops_the_run_and_room_lets_it_finish(disk: SmallDisk, job: Job) -> None:
    in_scoring = in_selection = 0
    for free in (0, 30, 200, 500, 800, 1100):
        disk.leave_free(free)
        ran = run_on(disk, job)
        if ran.code != 0:
            assert ran.code == 1, ran.err
            assert "the disk is full" in ran.err and "Traceback" not in ran.err
            scored, selected = whole(disk, job)
            in_scoring += scored < SHARDS
            in_selection += scored == SHARDS and selected < SHARDS
        disk.free_all()
        ran = run_on(disk, job)
        assert ran.code == 0, ran.err
        out = disk.seen_from_here / "out"
        assert deliverables(out) == job.expected
        assert temporary_files(out) == []
        shutil.rmtree(out)
    assert in_scoring >= 2
    assert in_selection >= 2


def test_enospc_during_select_leaves_no_half_file_and_select_completes(
    disk: SmallDisk, job: Job, tmp_path: Path
) -> None:
    assert run_on(disk, job).code == 0
    select = command("select", disk.path / "out", "--delta", "30%", "--entropy")
    disk.leave_free(40)
    ran = disk.inside(*select)
    assert ran.code == 1, ran.err
    assert "the disk is full" in ran.err and "Traceback" not in ran.err
    out = disk.seen_from_here / "out"
    assert not (out / "thresholds.json").exists(), "a run between two rules claims nothing"
    for path in out.rglob("*.png"):
        if path.parent.name == "labels":
            read_label_png(path.read_bytes())
    disk.free_all()
    assert disk.inside(*select).code == 0
    fresh = child(*job.arguments, "--out", tmp_path / "fresh", "--delta", "30%", "--entropy")
    assert fresh.code == 0, fresh.err
    assert deliverables(out) == deliverables(tmp_path / "fresh")
    assert temporary_files(out) == []


def test_a_read_only_out_is_exit_1_and_says_so(disk: SmallDisk, job: Job) -> None:
    assert run_on(disk, job).code == 0
    assert disk.inside("mount", "-o", "remount,ro", str(disk.path)).code == 0
    for arguments in (job.command(disk.path / "out"), job.command(disk.path / "new")):
        ran = disk.inside(*arguments)
        assert ran.code == 1, ran.err
        assert "Read-only file system" in ran.err and "can be written" in ran.err
        assert "Traceback" not in ran.err
    assert disk.inside("mount", "-o", "remount,rw", str(disk.path)).code == 0
    assert run_on(disk, job).code == 0
    assert deliverables(disk.seen_from_here / "out") == job.expected


FAULTS = [
    ("fsync", "EIO"),
    ("rename,renameat,renameat2", "EROFS"),
    ("rename,renameat,renameat2", "EACCES"),
    ("mkdir,mkdirat", "ENOSPC"),
]


@pytest.mark.parametrize(("call", "error"), FAULTS, ids=lambda v: v.partition(",")[0])
def test_a_failing_system_call_is_exit_1_and_the_same_command_resumes(
    call: str, error: str, job: Job, out: Path
) -> None:
    """The Nth call fails, for N spread over the run; then the run is completed and compared."""
    if shutil.which("strace") is None:
        pytest.skip("not run: there is no strace here to inject faults with")
    if subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True).returncode:
        pytest.skip("not run: strace may not trace here")
    hit = 0
    moments = range(1, 200, 5) if SOAK else (2, 40, 130)
    for when in moments if call != "mkdir,mkdirat" else (1, 3):
        inject = f"inject={call}:error={error}:when={when}"
        done = subprocess.run(
            ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject,
             *job.command(out)],
            capture_output=True, env=child_environment(), timeout=120, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            shutil.rmtree(out)  # fewer calls than `when`: nothing failed
            continue
        said = done.stderr.decode()
        hit += 1
        assert done.returncode == 1, said
        assert "error: cannot write" in said and "Traceback" not in said, said
        job.complete(out)
        assert temporary_files(out) == []
        shutil.rmtree(out)
    assert hit >= 2, "the faults did not strike"
