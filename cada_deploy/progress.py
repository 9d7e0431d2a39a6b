"""How long work reports itself on stderr: a bar on a terminal, now and then a line elsewhere.

with progress("scoring", total) as bar:
    bar.advance(64, note="shard 12")

Output is for people; nothing reads it back. It never makes the work fail.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task
from rich.text import Text

EVERY_S = 5.0  # seconds between two lines of a log

Clock = Callable[[], float]


class Bar(Protocol):
    """What the work sees. Safe to call from several threads."""

    def advance(self, n: int = 1, note: str | None = None) -> None:
        """n more are done; note says what is being worked on and stays until the next one."""
        ...


class Pace:
    """How much is done and how fast, by a clock that never runs backwards.

    done starts at what an earlier run had finished; the rate counts only what this one does.
    total None = unknown.
    """

    def __init__(self, total: int | None, done: int, clock: Clock) -> None:
        self.total = total
        self.done = done
        self._before = done
        self._clock = clock
        self._start = clock()

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._start

    @property
    def per_s(self) -> float | None:
        """None until something is done and time has passed."""
        elapsed_s = self.elapsed_s
        worked = self.done - self._before
        return worked / elapsed_s if worked > 0 and elapsed_s > 0 else None

    @property
    def left_s(self) -> float | None:
        """Seconds until the end at the rate so far; None where nobody can know."""
        if self.total is None or self.per_s is None:
            return None
        return max(self.total - self.done, 0) / self.per_s


@contextmanager
def progress(
    title: str,
    total: int | None,
    *,
    quiet: bool = False,
    done: int = 0,
    unit: str = "images",
    stream: TextIO | None = None,
    clock: Clock = time.monotonic,
    every_s: float = EVERY_S,
) -> Iterator[Bar]:
    """Show work on `stream` (stderr) while the block runs; the last line says how it ended.

    total None = unknown; done = what an earlier run had finished already.
    """
    out = sys.stderr if stream is None else stream
    pace = Pace(total, done, clock)
    if quiet:
        yield _Silent()
    elif _is_terminal(out):
        with _on_terminal(title, unit, pace, out) as bar:
            yield bar
    else:
        lines = _Lines(title, unit, pace, out, every_s)
        try:
            yield lines
        except BaseException:
            lines.end("stopped after")
            raise
        lines.end("done in")


def _is_terminal(stream: TextIO) -> bool:
    """A dumb terminal cannot move its cursor: it gets lines."""
    with suppress(ValueError, AttributeError):  # closed, or not quite a file
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    return False


class _Silent:
    def advance(self, n: int = 1, note: str | None = None) -> None:
        pass


class _Lines:
    """Plain lines for logs: one at most every few seconds, and a last one."""

    def __init__(self, title: str, unit: str, pace: Pace, out: TextIO, every_s: float) -> None:
        self._title = title
        self._unit = unit
        self._pace = pace
        self._out = out
        self._every_s = every_s
        self._next_s = every_s
        self._note = ""
        self._lock = threading.Lock()

    def advance(self, n: int = 1, note: str | None = None) -> None:
        with self._lock:
            self._pace.done += n
            if note is not None:
                self._note = _one_line(note)
            if self._pace.elapsed_s >= self._next_s:
                self._next_s = self._pace.elapsed_s + self._every_s
                self._write(_counted(self._pace, self._unit), _speed(self._pace, self._unit))

    def end(self, how: str) -> None:
        with self._lock:
            self._note = ""
            took = f"{how} {_clock_face(self._pace.elapsed_s)}"
            per_s = _rate(self._pace, self._unit)
            self._write(_counted(self._pace, self._unit), *([took, per_s] if per_s else [took]))

    def _write(self, *parts: str) -> None:
        note = f" ({self._note})" if self._note else ""
        line = f"{self._title}: {', '.join(p for p in parts if p)}{note}\n"
        encoding = getattr(self._out, "encoding", None) or "utf-8"
        # A closed pipe or an odd encoding of the log must not end a night of work.
        with suppress(OSError, ValueError):
            self._out.write(line.encode(encoding, "backslashreplace").decode(encoding))
            self._out.flush()


class _Terminal:
    def __init__(self, shown: Progress, pace: Pace, title: str) -> None:
        self._shown = shown
        self._pace = pace
        self._task = shown.add_task(title, total=pace.total, completed=pace.done, note="")
        self._lock = threading.Lock()

    def advance(self, n: int = 1, note: str | None = None) -> None:
        with self._lock:
            self._pace.done += n
            if note is None:
                self._shown.update(self._task, completed=self._pace.done)
            else:
                self._shown.update(self._task, completed=self._pace.done, note=_one_line(note))


@contextmanager
def _on_terminal(title: str, unit: str, pace: Pace, out: TextIO) -> Iterator[_Terminal]:
    columns = (
        SpinnerColumn(finished_text=" "),
        _Said(lambda task: Text(title, style="bold")),
        BarColumn(bar_width=28),
        _Said(lambda task: Text(_counted(pace, unit))),
        _Said(lambda task: Text(_speed(pace, unit), style="cyan")),
        _Said(lambda task: Text(task.fields["note"], style="dim", overflow="ellipsis")),
    )
    console = Console(file=out, force_terminal=True, highlight=False)
    with Progress(*columns, console=console, refresh_per_second=5) as shown:
        yield _Terminal(shown, pace, title)


class _Said(ProgressColumn):
    """A column of text that reads no markup: a note may be any file name."""

    def __init__(self, said: Callable[[Task], Text]) -> None:
        super().__init__()
        self._said = said

    def render(self, task: Task) -> Text:
        text = self._said(task)
        text.no_wrap = True
        return text


def _one_line(note: str) -> str:
    """File names may hold line ends, escape sequences and bytes that are not UTF-8."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in note
    )


def _counted(pace: Pace, unit: str) -> str:
    if pace.total is None:
        return f"{pace.done:,} {unit}"
    share = f" ({pace.done / pace.total:.0%})" if pace.total > 0 else ""
    return f"{pace.done:,}/{pace.total:,} {unit}{share}"


def _rate(pace: Pace, unit: str) -> str:
    per_s = pace.per_s
    if per_s is None:
        return ""
    return f"{per_s:,.0f} {unit}/s" if per_s >= 100 else f"{per_s:.3g} {unit}/s"


def _speed(pace: Pace, unit: str) -> str:
    left_s = pace.left_s
    left = "" if left_s is None or pace.done == pace.total else f"{_clock_face(left_s)} left"
    return ", ".join(part for part in (_rate(pace, unit), left) if part)


def _clock_face(seconds: float) -> str:
    """0:07, 3:12, 1:04:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
