"""The sections of report.html, each a function of ReportData; an empty one is an empty string."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from cada_deploy import plots
from cada_deploy.report_page.contents import Agreement, ClassRow, Frame, ReportData
from cada_deploy.report_page.findings import keeps_below, look_first, remarks, warnings
from cada_deploy.report_page.words import (
    NONE,
    count,
    duration,
    images,
    listed,
    measure,
    name_of,
    percent,
    plain,
    rate,
)

MOST_REJECTED = 200
MOST_WARNED = 24
_FRAME_WIDTH = 640
_FRAMES_OPEN = 2
_UNITS = {"entropy": " (nats)"}


def _section(name: str, title: str, *parts: str) -> str:
    body = "".join(parts)
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">'
        f'<h2 id="{name}-title">{title}</h2>{body}</section>'
    )


def _table(caption: str, head: Sequence[tuple[str, str]], rows: Iterable[str]) -> str:
    """head: (text, CSS class) per column. Scrolls sideways by itself where the page is narrow."""
    columns = "".join(f'<th scope="col" class="{kind}">{text}</th>' for text, kind in head)
    return (
        f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table>'
        f'<caption class="unseen">{caption}</caption><thead><tr>{columns}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(head: str, *cells: str) -> str:
    return f'<tr><th scope="row">{head}</th>{"".join(cells)}</tr>'


def _number(text: str) -> str:
    return f'<td class="number">{text}</td>'


def _swatch(colour: tuple[int, int, int]) -> str:
    return f'<i class="swatch" style="background:{plots.hex_colour(colour)}"></i>'


def _class_name(row: ClassRow) -> str:
    return f'<span class="class">{_swatch(row.colour)}{name_of(row.name)}</span>'


def summary(data: ReportData) -> str:
    kept = sum(1 for row in data.classes if row.selected)
    tiles = [
        ("Pixels kept", percent(data.selected_fraction), f"of {count(data.predicted)} predicted"),
        ("Classes kept", f"{kept}<small> / {len(data.classes)}</small>", "with at least one pixel"),
        ("Images labelled", count(data.images_labelled), f"{count(len(data.rejected))} rejected"),
        ("Throughput", f"{rate(data.images_per_s)}<small> images/s</small>", _wall(data)),
    ]
    shown = "".join(
        f"<div><dt>{name}</dt><dd>{value}</dd><dd class='note'>{note}</dd></div>"
        for name, value, note in tiles
    )
    options = "".join(f" <code>{plain(n)}\u00a0{plain(v)}</code>" for n, v in data.options)
    return (
        f'<header id="summary"><p class="eyebrow">cada-deploy · pseudo labels</p>'
        f"<h1>{name_of(data.title)}</h1><p class='verdict'>{_verdict(data)}</p>"
        f'<dl class="tiles">{shown}</dl>'
        f'<p class="method"><span>Model <b>{name_of(data.model)}</b></span> '
        f"<span>Policy <b>{plain(data.policy)}</b>{options}</span> "
        f"<span>Keeps <b>{plain(data.measure)} {plain(data.comparator)} T</b></span></p></header>"
    )


def _wall(data: ReportData) -> str:
    return f"{duration(data.wall_s)} in all"


def _verdict(data: ReportData) -> str:
    if data.images_labelled == 0:
        return "No image was labelled."
    if data.selected_fraction is None:
        return f"{images(data.images_labelled)} labelled, but no pixel has a valid prediction."
    lost = [row for row in data.classes if row.predicted and not row.selected]
    unseen = [row for row in data.classes if not row.predicted]
    tail = []
    if lost:
        tail.append(f"{len(lost)} of {len(data.classes)} classes lost every pixel")
    if unseen:
        tail.append(f"{len(unseen)} {'was' if len(unseen) == 1 else 'were'} never predicted")
    return (
        f"{images(data.images_labelled)} labelled, {percent(data.selected_fraction)} of the "
        f"pixels kept; {' and '.join(tail) if tail else 'every class is represented'}."
    )


def first_look(data: ReportData) -> str:
    hints = look_first(data)
    if not hints:
        return ""
    items = "".join(f'<li><a href="#{hint.section}">{hint.text}</a></li>' for hint in hints)
    return (
        '<aside class="look" aria-labelledby="look-title"><h2 id="look-title">Look at first</h2>'
        f"<ul>{items}</ul></aside>"
    )


def warning_panel(data: ReportData) -> str:
    found = warnings(data)
    if not found:
        return ""
    items = "".join(
        f"<li><h3>{w.headline}</h3>{_chips(w.classes, thresholds=True)}<p>{w.meaning}</p>"
        f"<p><b>What to do.</b> {w.remedy}</p></li>"
        for w in found
    )
    return (
        '<section id="warnings" class="warnings" aria-labelledby="warnings-title">'
        f'<h2 id="warnings-title"><span aria-hidden="true">▲</span> Warnings</h2><ul>{items}</ul>'
        "</section>"
    )


def _chips(rows: Sequence[ClassRow], thresholds: bool = False) -> str:
    """The legend; in a warning, which should stay short, the worst with their thresholds."""
    shown = rows[:MOST_WARNED] if thresholds else rows
    chips = [
        f"<li>{_class_name(row)}{_own_threshold(row) if thresholds else ''}</li>" for row in shown
    ]
    if len(shown) < len(rows):
        chips.append(f"<li>and {len(rows) - len(shown)} more</li>")
    return f'<ul class="chips">{"".join(chips)}</ul>' if chips else ""


def _own_threshold(row: ClassRow) -> str:
    if row.threshold is None or not row.predicted:
        return ""
    return f' <span class="number">T\u00a0=\u00a0{measure(row.threshold)}</span>'


def coverage(data: ReportData) -> str:
    overall = data.selected_fraction
    bars = "".join(_coverage_bar(row, overall) for row in data.classes if data.predicted)
    note = (
        "Kept share of the pixels predicted as each class. The thin line marks all classes "
        f"together, {percent(overall)}."
        if overall is not None
        else "Nothing was predicted, so there is nothing to keep."
    )
    return _section(
        "coverage",
        "Coverage by class",
        f'<p class="lead">{note}</p>',
        f'<ul class="bars">{bars}</ul>' if bars else "",
        _class_table(data),
        _pixels_left_out(data),
    )


def _coverage_bar(row: ClassRow, overall: float | None) -> str:
    empty = "" if row.selected else ' class="empty"'
    return (
        f"<li{empty}>{_class_name(row)}{plots.bar(row.coverage or 0.0, row.colour, overall)}"
        f'<span class="number">{percent(row.coverage)}</span></li>'
    )


def _class_table(data: ReportData) -> str:
    head = [
        ("Class", ""),
        ("Id", "number"),
        ("Predicted", "number"),
        ("Selected", "number"),
        ("Coverage", "number"),
        ("Share of kept", "number"),
        ("E(f) (nats)", "number"),
        (f"T{_UNITS.get(data.measure, '')}", "number"),
        ("Remarks", ""),
    ]
    return _table(
        "Pixels, coverage and threshold of every class",
        head,
        (_class_row(row, data) for row in data.classes),
    )


def _class_row(row: ClassRow, data: ReportData) -> str:
    found = "".join(f'<span class="flag bad">{text}</span>' for text in remarks(row, data))
    found += "".join(f'<span class="flag">{plain(text)}</span>' for text in row.flags)
    cells = [
        str(row.id),
        count(row.predicted),
        count(row.selected),
        percent(row.coverage),
        percent(row.selected / data.selected if data.selected else None),
        measure(row.centroid_entropy),
        measure(row.threshold),
    ]
    return _row(_class_name(row), *map(_number, cells), f'<td class="flags">{found}</td>')


def _pixels_left_out(data: ReportData) -> str:
    parts = [
        f"{count(number)} {kind}"
        for number, kind in [
            (data.invalid_pixels, "invalid pixels (the network gave NaN or infinity)"),
            (data.masked_pixels, "pixels under the ignore mask"),
        ]
        if number
    ]
    return f'<p class="note">Not counted above: {listed(parts)}.</p>' if parts else ""


def frames(data: ReportData) -> str:
    if not data.frames:
        return ""
    palette = _palette(data.classes)
    top = _top_nats(data.frames, len(data.classes))
    shown = "".join(
        _frame(frame, palette, top, place < _FRAMES_OPEN) for place, frame in enumerate(data.frames)
    )
    legend = _chips(data.classes)
    return _section(
        "frames",
        "Frames",
        '<p class="lead">What was kept and what was left, on the images themselves. '
        "Grey: no label.</p>",
        f'<div class="legend">{legend}'
        f'<div class="scale"><span>Entropy in nats (at most ln C = '
        f"{math.log(len(data.classes)):.2f})</span>{plots.nats_legend(top)}"
        '<span class="class"><i class="swatch invalid"></i>invalid</span></div></div>',
        shown,
    )


def _palette(classes: Sequence[ClassRow]) -> plots.Pixels:
    palette = np.zeros((256, 3), np.uint8)
    for row in classes:
        if 0 <= row.id < plots.UNLABELLED:
            palette[row.id] = row.colour
    return palette


def _top_nats(shown: Sequence[Frame], classes: int) -> float:
    """One scale for all frames, so that they compare: the 99.5 % quantile, rounded up."""
    quantiles = [_quantile(frame.entropy) for frame in shown]
    most = max(math.log(classes), 0.1) if classes > 1 else 0.1
    return min(max(math.ceil(max(quantiles) * 10) / 10, 0.1), most)


def _quantile(entropy: npt.NDArray[np.float32]) -> float:
    sample = entropy[:: max(1, entropy.shape[0] // 512), :: max(1, entropy.shape[1] // 512)]
    valid = sample[np.isfinite(sample)]
    return float(np.quantile(valid, 0.995)) if valid.size else 0.0


def _frame(frame: Frame, palette: plots.Pixels, top: float, opened: bool) -> str:
    pictures = plots.overlays(
        frame.image,
        frame.selected,
        frame.predicted,
        frame.entropy,
        palette,
        top,
        _FRAME_WIDTH,
    )
    figures = [
        _figure(pictures.image, "Image", frame.name),
        _figure(pictures.selected, "Selected pseudo labels", frame.name),
        _figure(pictures.predicted, "Full prediction", frame.name),
        _figure(pictures.entropy, "Entropy", frame.name),
    ]
    return (
        f'<details class="frame"{" open" if opened else ""}><summary>{name_of(frame.name)}'
        f'<span class="number">{percent(frame.share_selected)} selected</span></summary>'
        f'<div class="figures">{"".join(figures)}</div></details>'
    )


def _figure(picture: plots.Pixels, what: str, name: str) -> str:
    high, wide = picture.shape[:2]
    return (
        f'<figure><img src="{plots.data_uri(picture)}" width="{wide}" height="{high}" '
        f'alt="{what} of {plain(name)}"><figcaption>{what}</figcaption></figure>'
    )


def histograms(data: ReportData) -> str:
    if data.histograms is None:
        return ""
    cards = []
    empty = []
    for row, counts in zip(data.classes, data.histograms):
        numbers = [int(n) for n in counts]
        if any(numbers):
            cards.append(_histogram_card(row, numbers, data))
        else:
            empty.append(plain(row.name))
    left_out = f'<p class="note">Nothing to draw for {listed(empty)}.</p>' if empty else ""
    cut = (
        "The line is the threshold T: what is kept has the class colour, what is dropped is grey."
        if data.measure == "entropy"
        else f"The rule cuts on {plain(data.measure)}, so no threshold is drawn."
    )
    return _section(
        "entropy",
        "Entropy by class",
        '<p class="lead">How sure the network is, class by class: entropy of every pixel on a '
        f"logarithmic axis, surest at the left. {cut} Heights are square roots of densities, so "
        "that small bars stay visible.</p>",
        f'<div class="multiples">{"".join(cards)}</div>' if cards else "",
        left_out,
    )


def _histogram_card(row: ClassRow, counts: list[int], data: ReportData) -> str:
    threshold = row.threshold if data.measure == "entropy" else None
    label = f"Entropy histogram of {plain(row.name)}: {count(sum(counts))} pixels"
    if threshold is not None:
        label += f", threshold {measure(threshold)} nats, {percent(row.coverage)} kept"
    svg = plots.entropy_histogram(counts, row.colour, threshold, keeps_below(data), label)
    return (
        f"<figure><figcaption>{_class_name(row)}"
        f'<span class="number">{percent(row.coverage)}</span></figcaption>{svg}</figure>'
    )


def evaluation(data: ReportData) -> str:
    if data.evaluation is None:
        return ""
    full, selected = data.evaluation.full, data.evaluation.selected
    overall = [
        ("mIoU", full.miou, selected.miou),
        ("Precision", full.precision, selected.precision),
        ("Coverage of the truth", full.coverage, selected.coverage),
    ]
    tiles = "".join(
        f"<div><dt>{name}</dt><dd>{percent(after)}</dd>"
        f"<dd class='note'>selected; all predictions {percent(before)}</dd></div>"
        for name, before, after in overall
    )
    return _section(
        "evaluation",
        "Against the truth",
        f'<p class="lead">Compared with {name_of(data.evaluation.truth)}, which the run did not '
        "see. Precision: of the labelled pixels, the share that is right.</p>",
        f'<dl class="tiles three">{tiles}</dl>',
        _agreement_table(data.classes, full, selected),
    )


def _agreement_table(classes: Sequence[ClassRow], full: Agreement, selected: Agreement) -> str:
    head = [("Class", "")] + [
        (text, "number")
        for text in ("IoU, all", "IoU, selected", "Precision, all", "Precision, selected")
    ]
    rows = (
        _row(
            _class_name(row),
            *(
                _number(percent(share))
                for share in (
                    full.iou[place],
                    selected.iou[place],
                    full.class_precision[place],
                    selected.class_precision[place],
                )
            ),
        )
        for place, row in enumerate(classes)
    )
    return _table("IoU and precision of every class", head, rows)


def timing(data: ReportData) -> str:
    if not data.stages:
        return ""
    whole = sum(stage.seconds for stage in data.stages)
    slowest = max(data.stages, key=lambda stage: stage.seconds)
    slowest_flag = '<span class="flag">slowest</span>' if whole > 0 else ""
    rows = (
        _row(
            f'<span class="class"><i class="swatch" '
            f'style="background:{plots.stage_colour(place)}"></i>{plain(stage.name)}</span>',
            _number(f"{stage.seconds:,.2f}"),
            _number(_ms_per_image(stage.seconds, data.images_labelled)),
            _number(percent(stage.seconds / whole if whole > 0 else None)),
            f"<td>{slowest_flag if stage is slowest else ''}</td>",
        )
        for place, stage in enumerate(data.stages)
    )
    head = [("Stage", "")] + [(t, "number") for t in ("Seconds", "ms per image", "Share")]
    return _section(
        "timing",
        "Where the time went",
        f'<p class="lead">{_busy(data, whole)}</p>',
        plots.stacked_bar(
            [(plain(stage.name), stage.seconds) for stage in data.stages],
            f"Share of each stage; the slowest is {plain(slowest.name)}",
        ),
        _table("Time of every stage", [*head, ("Remarks", "")], rows),
    )


def _busy(data: ReportData, whole: float) -> str:
    text = f"{duration(data.wall_s)} on the clock, {duration(whole)} of work over all workers"
    if data.wall_s > 0:
        text += f": {whole / data.wall_s:.1f} stages busy at a time"
    if data.cores:
        text += f" on {data.cores} core" + ("" if data.cores == 1 else "s")
    return text + "."


def _ms_per_image(seconds: float, labelled: int) -> str:
    return f"{seconds / labelled * 1000:,.2f}" if labelled else NONE


def rejected(data: ReportData) -> str:
    if not data.rejected and not data.notices:
        return ""
    parts = []
    if data.rejected:
        reasons: dict[str, int] = {}
        for item in data.rejected:
            reasons[item.reason] = reasons.get(item.reason, 0) + 1
        ordered = sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))
        by_reason = listed([f"{count(number)} {plain(reason)}" for reason, number in ordered])
        parts.append(f'<p class="lead">{images(len(data.rejected))} left out: {by_reason}.</p>')
        rows = (
            _row(
                f'<span class="path">{name_of(item.path)}</span>',
                f"<td>{plain(item.reason)}</td>",
                f"<td>{name_of(item.detail)}</td>",
            )
            for item in data.rejected[:MOST_REJECTED]
        )
        head = [("File", ""), ("Reason", ""), ("Detail", "")]
        parts.append(_table("Rejected inputs", head, rows))
        if len(data.rejected) > MOST_REJECTED:
            more = count(len(data.rejected) - MOST_REJECTED)
            parts.append(f'<p class="note">and {more} more, all in rejected.jsonl.</p>')
    else:
        parts.append('<p class="lead">No input was rejected.</p>')
    if data.notices:
        noticed = [f"{count(number)} × {plain(kind)}" for kind, number in data.notices]
        parts.append(f'<p class="note">Converted on the way in: {listed(noticed)}.</p>')
    return _section("rejected", "Rejected inputs", *parts)


def outputs(data: ReportData) -> str:
    if not data.links:
        return ""
    items = "".join(
        f'<li><a href="{_relative(link.path)}">{plain(link.path)}</a> '
        f"<span>{plain(link.what)}</span></li>"
        for link in data.links
    )
    return _section("outputs", "Files", f'<ul class="files">{items}</ul>')


def _relative(path: str) -> str:
    """Quoting makes 'scheme:' and '//host' parts of a file name."""
    return escape(quote(path.lstrip("/"), safe="/", errors="surrogateescape"))


def provenance(data: ReportData) -> str:
    if not data.provenance and not data.command_line:
        return ""
    command = (
        f'<h3>Command</h3><pre class="copy" tabindex="0">{plain(data.command_line)}</pre>'
        if data.command_line
        else ""
    )
    facts = "".join(
        f"<div><dt>{plain(name)}</dt><dd class='copy'>{plain(value)}</dd></div>"
        for name, value in data.provenance
    )
    return _section(
        "provenance",
        "Provenance",
        command,
        f'<dl class="facts">{facts}</dl>' if facts else "",
    )
