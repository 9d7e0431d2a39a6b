"""The report of a run: one HTML page that needs no network, no script and no other file.

write_report turns ReportData into text and touches no file; whoever calls it writes the page with
the care that manifests.py takes. What the page tells is defined in report_page/contents.py.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

from cada_deploy.report_page import sections
from cada_deploy.report_page.contents import ReportData
from cada_deploy.report_page.words import plain

# No script, no request: even if a name slipped through unescaped, nothing would be fetched or run.
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)
_NAVIGATION = (
    ("warnings", "Warnings"),
    ("coverage", "Coverage"),
    ("frames", "Frames"),
    ("entropy", "Entropy"),
    ("evaluation", "Truth"),
    ("timing", "Time"),
    ("rejected", "Rejected"),
    ("outputs", "Files"),
    ("provenance", "Provenance"),
)


def write_report(data: ReportData) -> str:
    """The whole page as text; encode it as UTF-8."""
    body = [
        sections.first_look(data),
        sections.warning_panel(data),
        sections.coverage(data),
        sections.frames(data),
        sections.histograms(data),
        sections.evaluation(data),
        sections.timing(data),
        sections.rejected(data),
        sections.outputs(data),
        sections.provenance(data),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{plain(data.title)} · pseudo labels</title>\n"
        f"<style>\n{_style()}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#coverage">Skip to the results</a>\n'
        f"{_navigation(body)}\n<main>\n{sections.summary(data)}\n"
        f"{''.join(part + chr(10) for part in body if part)}</main>\n</body>\n</html>\n"
    )


def _navigation(body: list[str]) -> str:
    """Links to the sections that this page has."""
    present = {found[1] for part in body if (found := re.match(r'<section id="(\w+)"', part))}
    links = "".join(
        f'<a href="#{name}">{text}</a>' for name, text in _NAVIGATION if name in present
    )
    return f'<nav aria-label="Sections">{links}</nav>'


@cache
def _style() -> str:
    return (files("cada_deploy") / "report_page" / "page.css").read_text("utf-8")
