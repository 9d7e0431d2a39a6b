"""The few kinds of error a user can meet, each with its exit code; bugs stay ordinary exceptions.

Every message says what was found, what was expected and what to do. The table of exit codes
stands in docs/formats.md; 6 (done, but some inputs were rejected) is an outcome, not an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

DONE = 0
REJECTED_SOME = 6
INTERRUPTED = 130


class CadaError(Exception):
    """Something a person can put right. The message is shown without a traceback."""

    exit_code: ClassVar[int] = 1


class RunFailed(CadaError):
    """Failed on the way: disk full, read-only folder, lost device."""

    exit_code: ClassVar[int] = 1


class UsageError(CadaError):
    """Unknown option, bad value, no image found, a foreign model without preset or spec."""

    exit_code: ClassVar[int] = 2


class EnvironmentLacks(CadaError):
    """An engine, device or package is missing; the message says what to install."""

    exit_code: ClassVar[int] = 3


class ArtefactMismatch(CadaError):
    """An artefact does not fit: class count, version, digest, another run's OUT, corrupt model."""

    exit_code: ClassVar[int] = 4


class CheckFailed(CadaError):
    """A check failed: parity gate, verify, an objective that was asked for."""

    exit_code: ClassVar[int] = 5


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence tail that lists the known names and suggests the closest one."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"known: {', '.join(names)}{hint}"
