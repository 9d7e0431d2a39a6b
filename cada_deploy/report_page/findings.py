"""What stands out in a run: warnings with a remedy, and where to look first. Words, not HTML tags.

The texts are HTML only in that foreign names in them are already escaped.
"""

from __future__ import annotations

from dataclasses import dataclass

from cada_deploy.report_page.contents import ClassRow, ReportData
from cada_deploy.report_page.words import count, images, listed, percent, plain

_LOW_COVERAGE = 0.05
_MUCH_INVALID = 0.01


@dataclass(frozen=True)
class Warned:
    """One warning: headline, what it means, what to do, and the classes it is about."""

    headline: str
    meaning: str
    remedy: str
    classes: tuple[ClassRow, ...] = ()


@dataclass(frozen=True)
class Hint:
    """One thing to look at, and the section of the page that shows it."""

    text: str
    section: str


def keeps_below(data: ReportData) -> bool:
    return data.comparator in ("<", "<=")


def hopeless(row: ClassRow, data: ReportData) -> bool:
    """Entropy is never negative: below a threshold of zero there is nothing to find."""
    return (
        data.measure == "entropy"
        and keeps_below(data)
        and row.threshold is not None
        and row.threshold <= 0
    )


def remarks(row: ClassRow, data: ReportData) -> list[str]:
    """What is wrong with one class, in a word or two."""
    found = []
    if row.predicted == 0:
        found.append("never predicted")
    elif row.selected == 0:
        found.append("nothing kept")
    if row.predicted and hopeless(row, data):
        found.append("T \u2264 0")
    return found


def warnings(data: ReportData) -> list[Warned]:
    """The worst first; empty for a run in which every class was predicted and kept."""
    if data.images_labelled == 0:
        return [_nothing_labelled(data)]
    predicted = [row for row in data.classes if row.predicted]
    below_zero = [row for row in predicted if hopeless(row, data)]
    emptied = [row for row in predicted if row.selected == 0 and row not in below_zero]
    unseen = [row for row in data.classes if not row.predicted]
    found = []
    if predicted and data.selected == 0:
        found.append(_nothing_selected(data))
    if below_zero:
        found.append(_threshold_below_zero(below_zero, data))
    if emptied:
        found.append(_nothing_kept(emptied, data))
    if unseen:
        found.append(_never_predicted(unseen))
    return found


def _nothing_labelled(data: ReportData) -> Warned:
    return Warned(
        "No image was labelled",
        f"Rejected: {images(len(data.rejected))}, which is all there were."
        if data.rejected
        else "The run had no input that it could use.",
        "See the reasons under Rejected inputs, put them right and run the same command again.",
    )


def _nothing_selected(data: ReportData) -> Warned:
    return Warned(
        "Not a single pixel was kept",
        "Every label file is empty (255 everywhere). A student trained on these labels "
        "learns nothing.",
        _loosen(data),
    )


def _threshold_below_zero(rows: list[ClassRow], data: ReportData) -> Warned:
    why = (
        "The threshold is the category's centroid entropy minus Δ, and here Δ is at least as "
        "large as that entropy."
        if _has_delta(data)
        else "A pixel is kept when its entropy is below the threshold of its class."
    )
    return Warned(
        f"{_classes(rows, 'has', 'have')} a threshold of zero or less",
        f"{why} Entropy is never below zero, so nothing of "
        f"{'this class' if len(rows) == 1 else 'these classes'} can pass.",
        _loosen(data),
        tuple(rows),
    )


def _nothing_kept(rows: list[ClassRow], data: ReportData) -> Warned:
    return Warned(
        f"{_classes(rows, 'has', 'have')} no selected pixel",
        "The class was predicted, yet no pixel passed its threshold. A student trained on these "
        "labels will not see it and may forget it.",
        _loosen(data),
        tuple(rows),
    )


def _never_predicted(rows: list[ClassRow]) -> Warned:
    return Warned(
        f"{_classes(rows, 'was', 'were')} never predicted",
        "No pixel of any image was given this label, so there is no centroid, no threshold and "
        "no pseudo label.",
        "If these images should show it, check that the preset (colour order, normalisation) and "
        "the class set are those the model was trained with. If they do not show it, this is as "
        "it should be.",
        tuple(rows),
    )


def _classes(rows: list[ClassRow], one: str, many: str) -> str:
    return f"1 class {one}" if len(rows) == 1 else f"{len(rows)} classes {many}"


def _has_delta(data: ReportData) -> bool:
    return any(name == "delta" for name, _ in data.options)


def _loosen(data: ReportData) -> str:
    if _has_delta(data):
        return (
            "Lower <code>--delta</code>, give one value per class, or make it relative: "
            "<code>--delta 10%</code> sets each threshold to nine tenths of the category's own "
            "centroid entropy and stays above zero. <code>cada-deploy select</code> cuts "
            "anew from cached scores, without running the network."
        )
    options = [f"<code>--{plain(name)}</code>" for name, _ in data.options]
    loosened = f"Loosen {listed(options)}" if options else "Loosen the policy's options"
    return (
        f"{loosened}, or try another policy. <code>cada-deploy select</code> cuts anew from "
        "cached scores, without running the network."
    )


def look_first(data: ReportData) -> list[Hint]:
    """Where a look pays; what the caller adds comes after what the numbers say."""
    found = []
    warned = warnings(data)
    if warned:
        warned_text = "1 warning" if len(warned) == 1 else f"{len(warned)} warnings"
        found.append(Hint(f"{warned_text}, with what to do about it", "warnings"))
    low = sorted(
        (row for row in data.classes if row.coverage and row.coverage < _LOW_COVERAGE),
        key=lambda row: row.coverage or 0.0,
    )
    if low:
        names = listed([f"{plain(r.name)} ({percent(r.coverage)})" for r in low], most=4)
        found.append(Hint(f"Thin classes, under {_LOW_COVERAGE:.0%} kept: {names}", "coverage"))
    if data.rejected:
        share = len(data.rejected) / (len(data.rejected) + data.images_labelled)
        found.append(
            Hint(f"{images(len(data.rejected))} rejected ({percent(share)} of all)", "rejected")
        )
    pixels = data.predicted + data.invalid_pixels
    if data.invalid_pixels and data.invalid_pixels >= _MUCH_INVALID * pixels:
        found.append(
            Hint(
                f"{count(data.invalid_pixels)} pixels are invalid: the network gave NaN or "
                "infinity there",
                "frames" if data.frames else "coverage",
            )
        )
    stages = [stage for stage in data.stages if stage.seconds > 0]
    if stages:
        slowest = max(stages, key=lambda stage: stage.seconds)
        share = slowest.seconds / sum(stage.seconds for stage in stages)
        found.append(Hint(f"Most time goes to {plain(slowest.name)} ({percent(share)})", "timing"))
    return found + [Hint(plain(text), "summary") for text in data.look_first]
