"""Durable writes: after `write_file` returns and the folder is synced, a power cut loses nothing.

No library ever writes to a final name: bytes go to a temporary file beside it, are synced, and
are renamed into place. A folder's new names are durable after `sync_folder`; callers sync a folder
once for many files and only then write the manifest that speaks of them.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cada_deploy.errors import ArtefactMismatch, RunFailed

_LONGEST_NAME = 255  # bytes, on every common Linux file system
_TEMPORARY = ".tmp"  # one writer holds the run's lock, so a leftover is simply written over


def write_file(path: Path, data: bytes, mode: int | None = None) -> None:
    """Put `data` under `path`, whole or not at all. The folder must exist; mode None = umask."""
    temporary = _temporary(path)
    with explained(path):
        try:
            with temporary.open("wb") as file:
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)  # a full disk needs the room
            raise


def _temporary(path: Path) -> Path:
    """A name beside `path`; a digest stands for a name that has no room for four more bytes."""
    name = path.name
    if len(os.fsencode(name)) + len(_TEMPORARY) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(name + _TEMPORARY)


def sync_folder(folder: Path) -> None:
    """Make the folder's renames and new names durable."""
    with explained(folder):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def make_folder(folder: Path) -> None:
    """Create `folder` and what is missing above it, durably."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with explained(folder):
        folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def write_json(path: Path, value: Any) -> None:
    """A small JSON file, durable with its folder."""
    write_file(path, json_bytes(value))
    sync_folder(path.parent)


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def json_line(value: Any) -> bytes:
    """One line of a .jsonl file."""
    return (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Raises ArtefactMismatch for a file that is not JSON, FileNotFoundError for none."""
    data = path.read_bytes()
    try:
        return json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactMismatch(
            f"{path} is not JSON ({error}); it was changed or damaged"
        ) from error


def remove(path: Path) -> None:
    """Remove a file if it is there, durably."""
    with explained(path):
        path.unlink(missing_ok=True)
    if path.parent.is_dir():
        sync_folder(path.parent)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an operating-system error into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise RunFailed(f"cannot write {path}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full. Free some space; the same command then goes on where it stopped"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{error.strerror}. Choose a folder that can be written"
    return f"{error.strerror}. What was finished is safe; the same command goes on from there"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. It dies with its holder, however that ends (flock).

    Raises ArtefactMismatch when another process holds it.
    """
    make_folder(folder)
    path = folder / ".lock"
    with explained(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            raise ArtefactMismatch(
                f"{folder} is in use by {holder}; wait for it, or choose another --out"
            ) from None
        with explained(path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def name_to_json(relative: bytes) -> dict[str, str]:
    """A file name as `path`, or as `path_b64` when it is not UTF-8."""
    try:
        return {"path": relative.decode()}
    except UnicodeDecodeError:
        return {"path_b64": base64.b64encode(relative).decode()}


def name_from_json(data: dict[str, Any]) -> bytes:
    if "path_b64" in data:
        return base64.b64decode(data["path_b64"], validate=True)
    return str(data["path"]).encode()
