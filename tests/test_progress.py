"""Progress: lines for logs, a bar on a terminal, silence when asked; never a crash."""

from __future__ import annotations

import io
import re
import threading

import pytest

from cada_deploy.progress import progress


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_lines_come_at_most_every_few_seconds_and_a_last_one(clock: FakeClock) -> None:
    out = io.StringIO()
    with progress("scoring", 100, stream=out, clock=clock, every_s=5) as bar:
        for _ in range(100):
            clock.now_s += 0.1
            bar.advance()
    lines = out.getvalue().splitlines()
    assert lines == [
        "scoring: 50/100 images (50%), 10 images/s, 0:05 left",
        "scoring: 100/100 images (100%), 10 images/s",
        "scoring: 100/100 images (100%), done in 0:10, 10 images/s",
    ]


def test_fast_work_writes_one_line(clock: FakeClock) -> None:
    out = io.StringIO()
    with progress("selecting", 3, stream=out, clock=clock, unit="shards") as bar:
        clock.now_s += 1.5
        bar.advance(3)
    assert out.getvalue() == "selecting: 3/3 shards (100%), done in 0:02, 2 shards/s\n"


def test_the_note_stands_in_the_line_and_stays_one_line(clock: FakeClock) -> None:
    out = io.StringIO()
    with progress("scoring", 9, stream=out, clock=clock, every_s=1) as bar:
        clock.now_s += 2
        bar.advance(1, note="a\nb\x1b[31m\udce9.png")
    assert out.getvalue().splitlines()[0].endswith(r"left (a\nb\x1b[31m\udce9.png)")
    assert len(out.getvalue().splitlines()) == 2


def test_what_an_earlier_run_did_counts_but_not_in_the_rate(clock: FakeClock) -> None:
    out = io.StringIO()
    with progress("scoring", 1000, done=900, stream=out, clock=clock, every_s=10) as bar:
        clock.now_s += 10
        bar.advance(50)
    assert out.getvalue().startswith("scoring: 950/1,000 images (95%), 5 images/s, 0:10 left\n")


@pytest.mark.parametrize("total", [0, None])
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_zero_and_unknown_totals(
    total: int | None, stream: type[io.StringIO], clock: FakeClock
) -> None:
    out = stream()
    with progress("scoring", total, stream=out, clock=clock, every_s=1) as bar:
        clock.now_s += 2
        bar.advance(0)
        if total is None:
            bar.advance(7)
    assert ("7 images" if total is None else "0/0 images") in out.getvalue()


def test_no_time_passed_is_no_division(clock: FakeClock) -> None:
    out = io.StringIO()
    with progress("scoring", 2, stream=out, clock=clock, every_s=0) as bar:
        bar.advance(2)
    assert out.getvalue().splitlines()[-1] == "scoring: 2/2 images (100%), done in 0:00"


def test_an_error_is_not_called_done(clock: FakeClock) -> None:
    out = io.StringIO()
    with (
        pytest.raises(RuntimeError, match="disk full"),
        progress("scoring", 10, stream=out, clock=clock) as bar,
    ):
        clock.now_s += 4
        bar.advance(4)
        raise RuntimeError("disk full")
    assert out.getvalue() == "scoring: 4/10 images (40%), stopped after 0:04, 1 images/s\n"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_quiet_is_silent(stream: type[io.StringIO]) -> None:
    out = stream()
    with progress("scoring", 10, quiet=True, stream=out) as bar:
        bar.advance(10, note="x")
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar_with_rate_and_note(clock: FakeClock) -> None:
    out = Terminal()
    with progress("scoring", 20, stream=out, clock=clock) as bar:
        clock.now_s += 2
        bar.advance(20, note="[red]a[/red].png")
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "scoring" in seen and "20/20 images (100%)" in seen and "10 images/s" in seen
    assert "[red]a" in seen, "a file name is not markup"


def test_a_dumb_terminal_gets_lines(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    with progress("scoring", 1, stream=out, clock=clock) as bar:
        bar.advance()
    assert out.getvalue() == "scoring: 1/1 images (100%), done in 0:00\n"


def test_stderr_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("scoring", 1) as bar:
        bar.advance()
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("scoring: 1/1 images (100%), done in")


def test_a_log_that_broke_does_not_break_the_work(clock: FakeClock) -> None:
    out = io.StringIO()
    with progress("scoring", 1, stream=out, clock=clock, every_s=0) as bar:
        out.close()
        bar.advance()


def test_an_ascii_log_takes_any_note(clock: FakeClock) -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    with progress("scoring", 1, stream=out, clock=clock, every_s=0) as bar:
        bar.advance(note="Zürich.png")
    assert rb"(Z\xfcrich.png)" in raw.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_threads_lose_no_count(stream: type[io.StringIO]) -> None:
    out = stream()
    with progress("scoring", 800, stream=out) as bar:

        def work() -> None:
            for _ in range(100):
                bar.advance()

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "800/800 images (100%)" in out.getvalue()
