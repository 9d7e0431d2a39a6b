"""Small plots as inline SVG and small pictures as data URIs, for pages that must work offline.

Every function returns HTML; the names and labels it is given are HTML too, escaped by the caller.
Colours that belong to the page (ink, grid, line) are CSS classes of report_page/page.css, so that
the plots follow the light and the dark scheme.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cada_deploy.statistics import HISTOGRAM_BINS, HISTOGRAM_LOWEST_OCTAVE

Colour = tuple[int, int, int]
Pixels = npt.NDArray[np.uint8]

UNLABELLED = 255
_OCTAVES = HISTOGRAM_BINS // 8
_JPEG_QUALITY = 84
_INVALID_STRIPES = (np.array([255, 0, 255], np.uint8), np.array([60, 0, 60], np.uint8))

# 17 points of matplotlib's viridis (CC0): perceptually uniform, and readable by the colour-blind.
_VIRIDIS = bytes.fromhex(
    "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c "
    "1f9f88 27ad81 3dbc74 5cc863 81d34d aadc32 d5e21a fde725"
)
# White text stands on each of these at a contrast of 4.5 or more.
STAGE_COLOURS = (
    *("#3b6fb6", "#8a5a9e", "#b0563b", "#2b7868", "#7a6a2b"),
    *("#9c3d64", "#4f5d75", "#557527", "#99550f", "#416a8c"),
)


def hex_colour(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def bar(fraction: float, colour: Colour, mark: float | None = None) -> str:
    """One horizontal bar from 0 to 1 as wide as its place; `mark` is a thin line for comparison.

    Decoration: the number stands beside it as text, so it is hidden from screen readers.
    """
    line = "" if mark is None else _vertical(mark)
    return (
        '<svg class="bar" aria-hidden="true"><rect class="track" width="100%" height="100%"/>'
        f'<rect class="swatch" width="{fraction:.2%}" height="100%" fill="{hex_colour(colour)}"/>'
        f"{line}</svg>"
    )


def _vertical(fraction: float) -> str:
    place = f'x1="{fraction:.2%}" x2="{fraction:.2%}" y1="0" y2="100%"'
    return f'<line class="halo" {place}/><line class="mark" {place}/>'


def stacked_bar(parts: Sequence[tuple[str, float]], label: str) -> str:
    """Shares of a whole side by side, in STAGE_COLOURS; a name is cut off where it does not fit."""
    whole = sum(amount for _, amount in parts)
    pieces = []
    start = 0.0
    for place, (name, amount) in enumerate(parts):
        share = amount / whole if whole > 0 else 0.0
        text = f'<text x="8" y="23">{name}</text>' if share > 0.1 else ""
        pieces.append(
            f'<svg x="{start:.3%}" width="{share:.3%}" height="36">'
            f'<rect width="100%" height="100%" fill="{stage_colour(place)}"/>{text}</svg>'
        )
        start += share
    return f'<svg class="stack" role="img" aria-label="{label}">{"".join(pieces)}</svg>'


def stage_colour(place: int) -> str:
    return STAGE_COLOURS[place % len(STAGE_COLOURS)]


# One entropy histogram: 16 octaves across, drawn at about its own size so that text stays readable.
_WIDE, _HIGH, _TOP, _FOOT = 288, 84, 16, 18


def entropy_histogram(
    counts: Sequence[int], colour: Colour, threshold: float | None, keeps_below: bool, label: str
) -> str:
    """Counts (HISTOGRAM_BINS,) on a logarithmic axis of nats; what passes T is coloured.

    Bar height is the square root of the density (bins differ in width): one bin can hold most of a
    class, and the others should still be seen. Without a threshold all has the class colour.
    """
    outline = _outline(counts)
    base = f'<path class="dropped" d="{outline}"/>'
    if threshold is None:
        kept = f'<path class="swatch" fill="{hex_colour(colour)}" d="{outline}"/>'
        line = ""
    else:
        x = _nats_x(threshold)
        left, wide = (0.0, x) if keeps_below else (x, _WIDE - x)
        # A nested svg clips what lies outside of it: the bin that T cuts is coloured in part.
        kept = (
            f'<svg x="{left:.1f}" width="{wide:.1f}" height="{_TOP + _HIGH}" '
            f'viewBox="{left:.1f} 0 {wide:.1f} {_TOP + _HIGH}">'
            f'<path class="swatch" fill="{hex_colour(colour)}" d="{outline}"/></svg>'
            if wide >= 0.05
            else ""
        )
        line = _threshold_line(x, threshold)
    return (
        f'<svg class="histogram" viewBox="0 0 {_WIDE} {_TOP + _HIGH + _FOOT}" role="img" '
        f'aria-label="{label}">{_nats_axis()}{base}{kept}{line}</svg>'
    )


def bin_edge(place: int) -> float:
    """The lower edge of bin `place`, in nats: 2^octave * (1 + eighth / 8)."""
    octave, eighth = divmod(place, 8)
    return float(2.0 ** (HISTOGRAM_LOWEST_OCTAVE + octave) * (1 + eighth / 8))


def _nats_x(nats: float) -> float:
    """Where a number of nats lies; what is off the axis lies at its end."""
    if nats <= 0:
        return 0.0
    octaves = math.log2(nats) - HISTOGRAM_LOWEST_OCTAVE
    return min(max(octaves / _OCTAVES, 0.0), 1.0) * _WIDE


def _outline(counts: Sequence[int]) -> str:
    """One closed path around all bars; steps of the same height are joined."""
    # Python integers may pass float64's range; their shares of the whole cannot.
    whole = max(sum(counts), 1)
    density = [n / whole / _octaves_wide(place) for place, n in enumerate(counts)]
    peak = max(density, default=0.0)
    floor = _TOP + _HIGH
    points = [f"M0 {floor}"]
    level = None
    for place, value in enumerate(density):
        height = math.sqrt(value / peak) * _HIGH if peak else 0.0
        y = f"{floor - height:.1f}"
        if y != level:
            points.append(f"H{_nats_x(bin_edge(place)):.1f}V{y}")
            level = y
    return "".join([*points, f"H{_WIDE}V{floor}Z"])


def _octaves_wide(place: int) -> float:
    return math.log2(bin_edge(place + 1) / bin_edge(place))


def _nats_axis() -> str:
    floor = _TOP + _HIGH
    pieces = [f'<line class="axis" x1="0" x2="{_WIDE}" y1="{floor}" y2="{floor}"/>']
    for nats in (0.001, 0.01, 0.1, 1.0):
        x = _nats_x(nats)
        pieces.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{floor}"/>'
            f'<text class="tick" x="{x:.1f}" y="{floor + 14}" text-anchor="middle">{nats:g}</text>'
        )
    pieces.append(f'<text class="tick" x="{_WIDE}" y="{floor + 14}" text-anchor="end">nats</text>')
    return "".join(pieces)


def _threshold_line(x: float, threshold: float) -> str:
    anchor, shift = ("start", 4) if x < _WIDE / 2 else ("end", -4)
    name = "T \u2264 0" if threshold <= 0 else f"T {threshold:.3g}"
    return (
        f'<line class="threshold" x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{_TOP + _HIGH}"/>'
        f'<text class="threshold" x="{x + shift:.1f}" y="11" text-anchor="{anchor}">{name}</text>'
    )


def nats_legend(top: float) -> str:
    """The scale of entropy_picture: a strip from 0 to `top` nats with five numbers under it."""
    colours = viridis(np.linspace(0.0, 1.0, 17))
    stops = "".join(
        f'<stop offset="{place / 16:.4f}" stop-color="#{bytes(colour).hex()}"/>'
        for place, colour in enumerate(colours)
    )
    ticks = []
    for quarter in range(5):
        x = 4 + quarter * 58
        ticks.append(
            f'<text class="tick" x="{x}" y="28" '
            f'text-anchor="{("start", "middle", "middle", "middle", "end")[quarter]}">'
            f"{'≥ ' if quarter == 4 else ''}{top * quarter / 4:.3g}</text>"
        )
    return (
        '<svg class="nats" viewBox="0 0 240 32" role="img" '
        f'aria-label="Colour scale of entropy, from 0 (dark blue) to {top:.3g} nats (yellow)">'
        f'<defs><linearGradient id="viridis">{stops}</linearGradient></defs>'
        '<rect class="swatch" x="4" y="1" width="232" height="13" fill="url(#viridis)"/>'
        f"{''.join(ticks)}</svg>"
    )


def viridis(values: npt.NDArray[Any]) -> Pixels:
    """Values in 0..1 of any shape (...) -> colours (..., 3) uint8."""
    points = np.frombuffer(_VIRIDIS, np.uint8).reshape(-1, 3)
    at = np.linspace(0.0, 1.0, len(points))
    channels = [np.interp(values, at, points[:, k]) for k in range(3)]
    colours: Pixels = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    return colours


@dataclass(frozen=True)
class Overlays:
    """Four pictures of one frame, each (h, w, 3) uint8: small enough for a page."""

    image: Pixels
    selected: Pixels
    predicted: Pixels
    entropy: Pixels


def overlays(
    image: Pixels,
    selected: Pixels,
    predicted: Pixels,
    entropy: npt.NDArray[np.float32],
    palette: Pixels,
    top_nats: float,
    max_width: int,
) -> Overlays:
    """image (H, W, 3); the maps (H', W'), whose size may differ; palette (256, 3)."""
    small = downscaled(image, max_width)
    size = (small.shape[0], small.shape[1])
    kept, full, nats = (_nearest(m, size) for m in (selected, predicted, entropy))
    invalid = ~np.isfinite(nats)
    heat = viridis(np.where(invalid, 0.0, nats) / top_nats)
    return Overlays(
        image=small,
        selected=_painted(small, kept, palette),
        predicted=_painted(small, full, palette),
        entropy=_striped(heat, invalid),
    )


def downscaled(image: Pixels, max_width: int) -> Pixels:
    """At most max_width wide; a picture that is already smaller stays as it is."""
    high, wide = image.shape[:2]
    if wide <= max_width:
        return image
    size = (max_width, max(1, round(high * max_width / wide)))
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize(size, Image.Resampling.BOX))


def _nearest(values: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    rows, columns = (
        (2 * np.arange(small) + 1) * large // (2 * small)
        for small, large in zip(size, values.shape)
    )
    sampled: npt.NDArray[Any] = values[rows[:, None], columns[None, :]]
    return sampled


def _painted(image: Pixels, labels: npt.NDArray[Any], palette: Pixels) -> Pixels:
    """Class colours over the image; what has no label is grey and dim."""
    picture = image.astype(np.float32)
    grey = picture @ np.array([0.299, 0.587, 0.114], np.float32)
    dim = np.repeat(grey[..., None] * 0.42 + 12, 3, axis=-1)
    lit = 0.38 * picture + 0.62 * palette[labels].astype(np.float32)
    painted = np.where((labels == UNLABELLED)[..., None], dim, lit)
    return np.rint(painted).astype(np.uint8)


def _striped(picture: Pixels, where: npt.NDArray[np.bool_]) -> Pixels:
    """Magenta stripes, which viridis does not contain."""
    rows, columns = np.indices(where.shape)
    stripe = ((rows + columns) // 4 % 2 == 0)[..., None]
    striped = np.where(stripe, *_INVALID_STRIPES)
    result: Pixels = np.where(where[..., None], striped, picture).astype(np.uint8)
    return result


def data_uri(picture: Pixels) -> str:
    """(h, w, 3) uint8 as a JPEG inside the page."""
    stream = io.BytesIO()
    # 4:4:4: half-resolution colour smears the edges of labels. Not optimize=True: Pillow's buffer
    # for it (one byte a pixel) is too small for a noisy picture, and saving fails.
    Image.fromarray(np.ascontiguousarray(picture)).save(
        stream, "JPEG", quality=_JPEG_QUALITY, subsampling=0
    )
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
