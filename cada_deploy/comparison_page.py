"""The page of a comparison: figures by class, what changes, and pictures of the worst frames.

One HTML file that needs no network, no script and no other file; it wears the report's style.
write_page turns a Comparison into text and touches no file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib.resources import files

import numpy as np

from cada_deploy import plots
from cada_deploy.comparison import TIE, Change, Comparison, Picture, Side
from cada_deploy.report_page.words import NONE, count, images, measure, name_of, percent, plain
from cada_deploy.selection import UNITS

_WIDTH = 640
_OPEN = 3
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)
_STYLE = """
.strip { display: inline-block; width: 12rem; height: .85rem; border-radius: 3px;
  background: linear-gradient(90deg, #440154, #3b528b, #21918c, #5cc863, #fde725); }
.passed { color: var(--quiet); } .failed { color: var(--warn-ink); font-weight: 650; }
.tiles.five { grid-template-columns: repeat(5, 1fr); }
@media (max-width: 60rem) {
  .tiles.five { grid-template-columns: 1fr 1fr; } .tiles.five > :last-child { grid-column: 1 / -1; }
}
th.group { text-align: center; border-bottom: 0; padding-bottom: 0; }
tr.total > * { font-weight: 650; }
"""


def write_page(found: Comparison, failures: Sequence[str], gates_asked: bool) -> str:
    """The whole page as text; encode it as UTF-8."""
    title = f"{plain(found.a.path.name)} against {plain(found.b.path.name)}"
    style = (files("cada_deploy") / "report_page" / "page.css").read_text("utf-8")
    body = [
        _header(found, failures, gates_asked),
        _failed_gates(failures),
        _labels(found),
        _pseudo_labels(found),
        _frames(found),
        _left_out(found),
        _models(found),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{title} · comparison</title>\n<style>\n{style}{_STYLE}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#labels">Skip to the results</a>\n<main>\n'
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(found: Comparison, failures: Sequence[str], gates_asked: bool) -> str:
    margins = found.margins
    lost = _sum(found.own)
    tiles = [
        ("Labels that agree", _fine(found.agreement), f"of {count(found.pixels)} pixels"),
        ("Mean IoU, A as truth", _fine(found.matrix.mean_iou), "over classes that occur"),
        ("Disagreements", count(found.disagreements), f"{percent(margins.ties_share)} are ties"),
        ("Largest margin", _margin(margins.largest), f"median {_margin(margins.median)}"),
        ("Pseudo labels lost", percent(lost.loss), f"of {count(lost.selected)} that A selects"),
    ]
    shown = "".join(
        f"<div><dt>{name}</dt><dd>{value}</dd><dd class='note'>{note}</dd></div>"
        for name, value, note in tiles
    )
    return (
        '<header id="summary"><p class="eyebrow">cada-deploy · comparison</p>'
        f"<h1>{name_of(found.a.path.name)} against {name_of(found.b.path.name)}</h1>"
        f'<p class="verdict">{images(found.images)}: {_verdict(found, failures, gates_asked)}</p>'
        f'<dl class="tiles five">{shown}</dl>'
        f'<p class="method"><span>Entropy differs by at most <b>{measure(found.entropy_error_max)} '
        f"nats</b>, <b>{measure(found.entropy_error_mean)}</b> on average</span> "
        f"<span>A margin is the gap between A's two best probabilities; below {TIE:g} it is a tie"
        "</span></p></header>"
    )


def _verdict(found: Comparison, failures: Sequence[str], gates_asked: bool) -> str:
    if failures:
        return f'<span class="failed">{len(failures)} gates do not hold.</span>'
    held = " Every gate that was asked for holds." if gates_asked else " No gate was asked for."
    if not found.disagreements:
        return "every label is the same." + held
    if found.margins.largest < TIE and found.margins.count == found.disagreements:
        return "labels differ only where A itself is undecided." + held
    return "labels differ." + held


def _failed_gates(failures: Sequence[str]) -> str:
    if not failures:
        return ""
    items = "".join(f"<li><p>{plain(text)}</p></li>" for text in failures)
    return (
        '<section id="warnings" class="warnings" aria-labelledby="warnings-title">'
        '<h2 id="warnings-title"><span aria-hidden="true">▲</span> Gates that do not hold</h2>'
        f"<ul>{items}</ul></section>"
    )


def _labels(found: Comparison) -> str:
    rows = zip(
        found.classes.names,
        found.classes.palette,
        found.matrix.labelled.tolist(),
        found.class_agreement.tolist(),
        found.matrix.iou.tolist(),
        found.rule_a.thresholds,
        found.rule_b.thresholds,
    )
    body = "".join(
        _row(
            _class(name, colour),
            count(pixels),
            _fine(agreement),
            _fine(iou),
            measure(threshold_a),
            measure(threshold_b),
        )
        for name, colour, pixels, agreement, iou, threshold_a, threshold_b in rows
    )
    unit = UNITS[found.rule_a.measure]
    head = ("Class", "Pixels in A", "B agrees", "IoU", f"T of A ({unit})", f"T of B ({unit})")
    return _section(
        "labels",
        "Labels by class",
        "Every pixel of every image, B's label against A's; T is the threshold that each model "
        "learns from these images.",
        _table("Agreement, IoU and thresholds of every class", head, body),
    )


def _pseudo_labels(found: Comparison) -> str:
    four = ("Lost", "Relabelled", "Gained", "Loss")
    head = ("Class", "A selects", *four, *four)
    groups = ((2, ""), (4, "B with its own thresholds"), (4, "B with A's thresholds"))
    rows = list(zip(found.classes.names, found.classes.palette, found.own, found.same))
    body = "".join(
        _row(_class(name, colour), count(own.selected), *_change(own), *_change(same))
        for name, colour, own, same in rows
        if own.selected or own.gained or same.gained
    )
    own, same = _sum(found.own), _sum(found.same)
    body += _row("all", count(own.selected), *_change(own), *_change(same), total=True)
    return _section(
        "pseudo-labels",
        "Which pseudo labels change",
        "Pixels that A selects under its own thresholds, and what becomes of them. Lost: B selects "
        "nothing there. Relabelled: B selects another class. Gained: only B selects it.",
        _table("Pseudo labels lost, relabelled and gained by class", head, body, groups),
    )


def _change(change: Change) -> tuple[str, str, str, str]:
    loss = percent(change.loss) if change.selected else NONE
    return count(change.lost), count(change.relabelled), count(change.gained), loss


def _sum(changes: Iterable[Change]) -> Change:
    parts = [(c.selected, c.kept, c.lost, c.relabelled, c.gained) for c in changes]
    return Change(*(sum(column) for column in zip(*parts)))


def _frames(found: Comparison) -> str:
    if not found.pictures:
        return ""
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(found.classes)] = found.classes.palette
    shown = "".join(
        _frame(picture, palette, place < _OPEN) for place, picture in enumerate(found.pictures)
    )
    seen = {int(k) for p in found.pictures for m in (p.a, p.b) for k in np.unique(m)}
    chips = "".join(
        f"<li>{_class(name, colour)}</li>"
        for k, (name, colour) in enumerate(zip(found.classes.names, found.classes.palette))
        if k in seen
    )
    return _section(
        "frames",
        "Where they differ most",
        "Frames by the sum of the margins of their disagreements: an undecided pixel counts "
        "little.",
        f'<div class="legend"><ul class="chips">{chips}</ul><div class="scale">'
        "<span>A's margin where the labels differ: 0</span>"
        '<span class="strip"></span><span>1 (A was sure)</span></div></div>',
        shown,
    )


def _frame(picture: Picture, palette: plots.Pixels, opened: bool) -> str:
    unused = np.zeros(picture.a.shape, np.float32)
    drawn = plots.overlays(picture.image, picture.a, picture.b, unused, palette, 1.0, _WIDTH)
    differ = np.isfinite(picture.margin)
    figures = [
        _figure(drawn.image, "Image", picture.name),
        _figure(difference(picture, drawn.image), "Difference", picture.name),
        _figure(drawn.selected, "Labels of A", picture.name),
        _figure(drawn.predicted, "Labels of B", picture.name),
    ]
    share = float(differ.mean())
    return (
        f'<details class="frame"{" open" if opened else ""}><summary>{name_of(picture.name)}'
        f'<span class="number">{count(int(differ.sum()))} pixels differ ({percent(share)})</span>'
        f'</summary><div class="figures">{"".join(figures)}</div></details>'
    )


def difference(picture: Picture, small: plots.Pixels) -> plots.Pixels:
    """A's margin where the labels differ, over the dimmed image. Each pixel of the picture shows
    the largest margin under it, so that a lone disagreement is not lost when it is made smaller."""
    high, wide = small.shape[:2]
    rows, columns = np.nonzero(np.isfinite(picture.margin))
    size = picture.margin.shape
    at = rows * high // size[0], columns * wide // size[1]
    largest = np.full((high, wide), -1.0, np.float32)
    np.maximum.at(largest, at, picture.margin[rows, columns])
    grey = small.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    dim = np.repeat(grey[..., None] * 0.35 + 30, 3, axis=-1).astype(np.uint8)
    heat = plots.viridis(np.clip(largest, 0.0, 1.0))
    return np.where((largest >= 0)[..., None], heat, dim)


def _figure(picture: plots.Pixels, what: str, name: str) -> str:
    high, wide = picture.shape[:2]
    return (
        f'<figure><img src="{plots.data_uri(picture)}" width="{wide}" height="{high}" '
        f'alt="{what} of {plain(name)}"><figcaption>{what}</figcaption></figure>'
    )


def _left_out(found: Comparison) -> str:
    rows = [(name, why) for name, why in found.rejected]
    rows += [(name, f"the scores are not finite: {whose}") for name, whose in found.one_sided]
    if not rows:
        return ""
    items = "".join(f"<li>{name_of(name)} <span>{plain(why)}</span></li>" for name, why in rows)
    return _section(
        "left-out", "Left out", f"{images(len(rows))} could not be compared.",
        f'<ul class="files">{items}</ul>',
    )  # fmt: skip


def _models(found: Comparison) -> str:
    return _section("models", "Models", "", *(_facts(side) for side in (found.a, found.b)))


def _facts(side: Side) -> str:
    facts = "".join(
        f"<div><dt>{plain(key)}</dt><dd>{plain(str(value))}</dd></div>"
        for key, value in side.to_json().items()
    )
    return f'<h3>{side.letter}</h3><dl class="facts">{facts}</dl>'


# --- small pieces ------------------------------------------------------------------------------


def _section(name: str, title: str, lead: str, *parts: str) -> str:
    said = f'<p class="lead">{lead}</p>' if lead else ""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>'
        f"{said}{''.join(parts)}</section>"
    )


def _table(
    caption: str, head: Sequence[str], body: str, groups: Sequence[tuple[int, str]] = ()
) -> str:
    """groups: columns and title of what stands over the head."""
    over = "".join(f'<th scope="colgroup" colspan="{n}" class="group">{t}</th>' for n, t in groups)
    over = f"<tr>{over}</tr>" if groups else ""
    columns = "".join(
        f'<th scope="col"{" class=" + chr(34) + "number" + chr(34) if k else ""}>{text}</th>'
        for k, text in enumerate(head)
    )
    return (
        f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table>'
        f'<caption class="unseen">{caption}</caption><thead>{over}<tr>{columns}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _row(head: str, *cells: str, total: bool = False) -> str:
    numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
    kind = ' class="total"' if total else ""
    return f'<tr{kind}><th scope="row">{head}</th>{numbers}</tr>'


def _class(name: str, colour: tuple[int, int, int]) -> str:
    swatch = f'<i class="swatch" style="background:{plots.hex_colour(colour)}"></i>'
    return f'<span class="class">{swatch}{name_of(name)}</span>'


def _fine(share: float) -> str:
    """Percent with as many digits as it takes not to write 100 % for less."""
    if math.isnan(share):
        return NONE
    for digits in (2, 4):
        text = f"{share:.{digits}%}"
        if share == 1 or not text.startswith("100"):
            return text
    return "&gt;\N{NO-BREAK SPACE}99.9999%"


def _margin(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}"
