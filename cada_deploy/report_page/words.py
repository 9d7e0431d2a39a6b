"""How numbers and foreign text are written in the report."""

from __future__ import annotations

import math
from html import escape

NONE = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"


def plain(text: str) -> str:
    """Foreign text made visible and harmless for HTML, attributes included.

    Bytes of a name that are not UTF-8 (surrogates, as os.fsdecode gives them) become \\xNN; control
    and direction characters become escapes too, so that no name can look like another.
    """
    return escape("".join(c if c.isprintable() else _escaped(c) for c in text))


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def name_of(text: str) -> str:
    """A foreign name as an element of its own: right-to-left letters do not disturb the line."""
    return f"<bdi>{plain(text)}</bdi>"


def count(number: int) -> str:
    return f"{number:,}"


def images(number: int) -> str:
    return f"{number:,} image" + ("" if number == 1 else "s")


def percent(share: float | None) -> str:
    """One decimal; what is not nothing (or not all) is never written as if it were."""
    if share is None or math.isnan(share):
        return NONE
    if 0 < share < 0.0005:
        return "<\N{NO-BREAK SPACE}0.1%".replace("<", "&lt;")
    if 0.9995 <= share < 1:
        return "&gt;\N{NO-BREAK SPACE}99.9%"
    return f"{share:.1%}"


def measure(value: float | None) -> str:
    """A threshold or an entropy: four decimals, more where four would show zero."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        text = "∞"
    elif 0 < abs(value) < 0.00005:
        text = f"{abs(value):.1e}"
    else:
        text = f"{abs(value):.4f}"
    return (_MINUS if value < 0 else "") + text


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def rate(per_s: float | None) -> str:
    if per_s is None:
        return NONE
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"


def listed(items: list[str], most: int = 12) -> str:
    """'a, b and c'; a long list ends with how many more there are."""
    shown = items[:most]
    if len(items) > most:
        return f"{', '.join(shown)} and {len(items) - most} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)
