"""Calls the command line in this process or in a child, and reads what a run left behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cada_deploy.cli import main

ROOT = Path(__file__).parent.parent
Argument = str | Path | int | float


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    def said(self, *parts: str) -> bool:
        return all(part in self.err for part in parts)


def cada(*arguments: Argument) -> Ran:
    """`cada-deploy ARGUMENTS` in this process. An exception that is no exit fails the test: a
    user's mistake must not end in a traceback."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    code: Any = "main() came back without an exit code"
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main([str(a) for a in arguments])
    except SystemExit as leaving:
        code = leaving.code
    finally:
        signal.signal(signal.SIGTERM, before)
    assert isinstance(code, int), code
    return Ran(code, out.getvalue(), err.getvalue())


def command(*arguments: Argument | bytes) -> list[str | bytes]:
    return [
        sys.executable, "-m", "cada_deploy",
        *(a if isinstance(a, bytes) else os.fsencode(str(a)) for a in arguments),
    ]  # fmt: skip


def child_environment(**more: str) -> dict[str, str]:
    """Warnings stay errors in the child too; the working tree comes first on the path."""
    # A signal can come between open() and its `with`: that file is closed by the collector, and
    # Python would write a remark about it.
    warnings = "error,ignore::ResourceWarning"
    known = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(ROOT), *([known] if known else [])])
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": warnings, **more}


def child(*arguments: Argument | bytes, **options: Any) -> Ran:
    """`cada-deploy ARGUMENTS` in a process of its own."""
    done = subprocess.run(
        command(*arguments),
        capture_output=True,
        timeout=120,
        env=child_environment(),
        check=False,
        **options,
    )
    return Ran(
        done.returncode,
        done.stdout.decode(errors="backslashreplace"),
        done.stderr.decode(errors="backslashreplace"),
    )


EVIDENCE = ("thresholds.json", "statistics.json", "rejected.jsonl")


def deliverables(out: Path) -> dict[str, bytes]:
    """Every label and the evidence of a run by relative path; what a law compares byte for byte."""
    files = [p for p in (out / "labels").rglob("*") if p.is_file()]
    files += [out / name for name in EVIDENCE]
    return {os.fsdecode(os.fsencode(p.relative_to(out))): p.read_bytes() for p in sorted(files)}


def temporary_files(out: Path) -> list[Path]:
    return sorted(out.rglob("*.tmp"))


def read(path: Path) -> Any:
    return json.loads(path.read_bytes())


def rejected(out: Path) -> list[dict[str, str]]:
    lines = (out / "rejected.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def selected_of(out: Path) -> list[int]:
    return [row["selected"] for row in read(out / "thresholds.json")["classes"]]
