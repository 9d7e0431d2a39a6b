"""Durable writes: whole or not at all, a lock that dies with its holder, names of any bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import child_environment
from hypothesis import given
from hypothesis import strategies as st

from cada_deploy import durable
from cada_deploy.errors import ArtefactMismatch, RunFailed


def test_a_write_replaces_the_whole_file_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for data in (b"first, and longer", b"second"):
        durable.write_file(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "said"),
    [("ENOSPC", "the disk is full"), ("EROFS", "can be written"), ("EIO", "finished is safe")],
)
def test_a_failed_write_leaves_the_old_file_and_says_what_to_do(
    call: str, code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    path = tmp_path / "a.json"
    durable.write_file(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(*(("os.fsync",) if call == "fsync" else (Path, "replace")), fail)
    with pytest.raises(RunFailed, match=said):
        durable.write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path], "the room is given back"


def test_every_step_is_synced_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File, then name, then folder: the order that survived power cuts (research, 3.3)."""
    steps = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(handle: int) -> None:
        steps.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")  # noqa: PTH112
        fsync(handle)

    def watched_replace(self: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(self, target)

    monkeypatch.setattr("os.fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    durable.write_json(tmp_path / "a.json", {})
    assert steps == ["file", "rename", "folder"]


@pytest.mark.parametrize("length", [200, 251, 252, 255])
def test_the_longest_names_can_be_written(length: int, tmp_path: Path) -> None:
    path = tmp_path / ("n" * length)
    durable.write_file(path, b"x")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_folders_are_made_with_what_is_missing_above(tmp_path: Path) -> None:
    durable.make_folder(tmp_path / "a" / "b" / "c")
    durable.make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RunFailed, match="cannot write"):
        durable.make_folder(tmp_path / "file" / "below")


def test_remove_is_content_when_there_is_nothing(tmp_path: Path) -> None:
    durable.remove(tmp_path / "none")
    durable.remove(tmp_path / "no folder" / "none")


def test_the_lock_keeps_others_out_and_dies_with_its_holder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cada_deploy import durable\n"
        "with durable.locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE,
        env=child_environment(),
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdin is not None
    assert holder.stdout.readline() == b"held\n"
    with (
        pytest.raises(ArtefactMismatch, match=f"in use by process {holder.pid}"),
        durable.locked(tmp_path),
    ):
        pytest.fail("two processes hold one lock")
    holder.kill()
    holder.wait()
    holder.stdout.close()
    holder.stdin.close()
    with durable.locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()}\n"
    with durable.locked(tmp_path):
        pass


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), durable.locked(tmp_path):
        raise ZeroDivisionError
    with durable.locked(tmp_path):
        pass


@given(st.binary(max_size=40))
def test_names_of_any_bytes_survive_json(name: bytes) -> None:
    text = durable.json_bytes(durable.name_to_json(name)).decode()
    assert durable.name_from_json(json.loads(text)) == name
    line = durable.json_line(durable.name_to_json(name))
    assert line.count(b"\n") == 1 and line.endswith(b"\n")


def test_utf8_names_stay_readable() -> None:
    assert durable.name_to_json("straße.png".encode()) == {"path": "straße.png"}
    assert durable.name_to_json(b"\xff") == {"path_b64": "/w=="}


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"nul", b'{"a": }'])
def test_what_is_no_json_is_named(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ArtefactMismatch, match=r"a\.json is not JSON"):
        durable.read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError):
        durable.read_json(tmp_path / "none.json")


def test_nan_is_never_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        durable.json_bytes({"a": float("nan")})
