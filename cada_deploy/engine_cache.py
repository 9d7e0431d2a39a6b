"""The private cache of built engines, ~/.cache/cada-deploy/engines: folder, keys, locks.

An engine is executable code. The folder is the user's alone (0700, files 0600), and one that
somebody else owns or can write is refused. A key covers everything that decides a plan, so nothing
in the cache is ever looked at for another model, GPU, driver, TensorRT or option.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cada_deploy import __version__, durable
from cada_deploy.engine_plans import Machine, PlanOptions, Profile
from cada_deploy.errors import ArtefactMismatch

PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700

KEY_VERSION = 1  # bump when what is built from the same wishes changes


def folder() -> Path:
    """The cache, made if need be. Raises ArtefactMismatch when others could put engines there."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(base).expanduser() / "cada-deploy" / "engines"
    if not path.exists():
        durable.make_folder(path.parent)
        with durable.explained(path):
            path.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
    _refuse_open(path)
    return path


def _refuse_open(path: Path) -> None:
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise ArtefactMismatch(
            f"{path} belongs to user {status.st_uid}, not to you; an engine is code, so nothing "
            "from there is loaded. Set XDG_CACHE_HOME to a folder of your own"
        )
    if stat.S_IMODE(status.st_mode) & 0o022:
        raise ArtefactMismatch(
            f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):04o}); an engine "
            f"is code, so nothing from there is loaded. Empty it, then: chmod 700 {path}"
        )


def key(
    model_sha256: str, machine: Machine, options: PlanOptions, profile: Profile, precision: str
) -> str:
    """The name under which an engine with these properties is kept."""
    return _digest(
        {
            "key": KEY_VERSION,
            "cada_deploy": __version__,
            "model": model_sha256,
            "machine": machine.to_json(),
            "options": options.to_json(),
            "profile": vars(profile),
            "precision": precision,
        }
    )


def timing_cache(machine: Machine) -> Path:
    """Measured kernel times of this TensorRT on this GPU; they speed up the next build."""
    name = _digest({k: v for k, v in machine.to_json().items() if k != "driver"})
    return folder() / f"timing-{name[:16]}.cache"


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of one engine, whichever folder it goes to. Another process that builds it is
    waited for, after `waiting` was told. The lock dies with its holder."""
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    lock = folder() / f"{name}.lock"
    with durable.explained(lock):
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
