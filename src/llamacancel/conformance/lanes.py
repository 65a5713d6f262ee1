"""Lanes over time as an SVG picture: who waited, who was worked on, who hung up and who was answered.

    band = Band("queued-hang-up", [
        Lane("active", [("prefill", 0.0, 0.4), ("streaming", 0.4, 3.0)], [("answered", 3.0, "")]),
        Lane("queued", [("queued", 0.6, 1.2)], [("hang-up", 1.2, "hung up")]),
    ])
    Path("lanes.svg").write_text(draw([band], title="Who noticed?"))

The colours are those of Okabe and Ito, which people who see colours differently can tell apart; kinds also differ by
pattern and marks by shape. The picture follows the viewer's light or dark scheme.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

__all__ = ["KINDS", "MARKS", "Band", "Kind", "Lane", "Mark", "draw"]


@dataclass(frozen=True)
class Kind:
    """How a span looks: its words in the legend, its colour, and "solid", "hatched" or "open"."""

    label: str
    colour: str
    fill: str = "solid"


@dataclass(frozen=True)
class Mark:
    """How a moment looks: its words in the legend, its colour, and "cross", "dot", "diamond", "bar" or "ring"."""

    label: str
    colour: str
    shape: str


KINDS: Mapping[str, Kind] = {
    "queued": Kind("queued", "#999999", "hatched"),
    "prefill": Kind("until the first token", "#E69F00"),
    "streaming": Kind("streaming", "#0072B2"),
    "whole": Kind("working, not streamed", "#56B4E9"),
    "unread": Kind("streaming, not read", "#0072B2", "hatched"),
    "rest": Kind("work that nobody wants", "#D55E00", "open"),
}

MARKS: Mapping[str, Mark] = {
    "hang-up": Mark("hung up", "#D55E00", "cross"),
    "half-close": Mark("half closed", "#CC79A7", "ring"),
    "stopped": Mark("stopped reading", "#CC79A7", "bar"),
    "cancel": Mark("cancelled", "#CC79A7", "diamond"),
    "answered": Mark("answered", "#009E73", "dot"),
    "failed": Mark("not answered", "#000000", "diamond"),
}

_OUTCOMES = {"passed": "#009E73", "failed": "#D55E00"}


@dataclass(frozen=True)
class Lane:
    """One row.

    Args:
        name: What stands before it.
        spans: (kind, start, end), in seconds.
        marks: (kind, time, label); a label stands beside the mark, "" for none.
    """

    name: str
    spans: Sequence[tuple[str, float, float]] = ()
    marks: Sequence[tuple[str, float, str]] = ()


@dataclass(frozen=True)
class Band:
    """Rows that share a time axis.

    Args:
        title: Stands above them.
        lanes: The rows, from the top.
        note: A sentence under the title.
        outcome: A word at the right of the title; "passed" and "failed" have colours of their own.
    """

    title: str
    lanes: Sequence[Lane] = field(default_factory=tuple)
    note: str = ""
    outcome: str = ""


_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_STYLE = f"""
text {{ font-family: {_FONT}; font-size: 12px; fill: #24292f; }}
.page {{ fill: #ffffff; }}
.title {{ font-size: 18px; font-weight: 600; }}
.band {{ font-size: 14px; font-weight: 600; }}
.quiet {{ fill: #57606a; }}
.small {{ font-size: 11px; }}
.pill {{ font-size: 11px; font-weight: 600; fill: #ffffff; }}
.grid {{ stroke: #d0d7de; stroke-width: 1; }}
.row {{ fill: #f6f8fa; }}
.ink {{ stroke: #24292f; fill: #24292f; }}
.halo {{ stroke: #ffffff; }}
.hatch {{ stroke: #ffffff; }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3; }}
.page {{ fill: #0d1117; }}
.quiet {{ fill: #9198a1; }}
.grid {{ stroke: #30363d; }}
.row {{ fill: #161b22; }}
.ink {{ stroke: #e6edf3; fill: #e6edf3; }}
.halo {{ stroke: #0d1117; }}
.hatch {{ stroke: #0d1117; }}
}}
"""
_MARGIN = 24
_ROW = 24
_BAR = 14
_AXIS = 30


def draw(
    bands: Sequence[Band],
    *,
    title: str = "",
    note: str = "",
    kinds: Mapping[str, Kind] = KINDS,
    marks: Mapping[str, Mark] = MARKS,
    width: int = 960,
) -> str:
    """Draw bands below each other, with a legend of what occurs in them.

    Args:
        bands: The bands, from the top; each has a time axis of its own that begins at 0.
        title: Stands above everything.
        note: A sentence under the title.
        kinds: How spans look, by kind.
        marks: How marks look, by kind.
        width: Of the picture, in pixels.

    Returns:
        The text of the SVG.

    Raises:
        KeyError: A span or a mark has a kind that is not described.
    """
    names = [lane.name for band in bands for lane in band.lanes]
    left = _MARGIN + min(1.1 * max([_text_width(name) for name in names] or [0]) + 14, width // 3)
    parts: list[str] = []
    y = float(_MARGIN)
    if title:
        y += 16
        parts.append(_text(_MARGIN, y, title, "title"))
        y += 8
    y = _paragraph(parts, note, y, width)
    y = _legend(parts, bands, kinds, marks, y + 6, width)
    for band in bands:
        y = _band(parts, band, kinds, marks, y + 22, left, width)
    height = math.ceil(y + _MARGIN / 2)
    label = _escape(title or "lanes over time", quote=True)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" aria-label="{label}">',
            f"<style>{_STYLE}</style>",
            "<defs>",
            '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
            '<line class="hatch" x1="0" y1="0" x2="0" y2="6" stroke-width="5"/></pattern>',
            "</defs>",
            f'<rect class="page" width="{width}" height="{height}"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def _band(
    parts: list[str],
    band: Band,
    kinds: Mapping[str, Kind],
    marks: Mapping[str, Mark],
    y: float,
    left: float,
    width: int,
) -> float:
    """Draw a band from `y` down and return where it ends."""
    y += 14
    parts.append(_text(_MARGIN, y, band.title, "band"))
    if band.outcome:
        wide = 1.15 * _text_width(band.outcome, 11) + 18
        x = width - _MARGIN + 8 - wide
        colour = _OUTCOMES.get(band.outcome, "#6e7781")
        parts.append(f'<rect x="{x:.1f}" y="{y - 13:.1f}" width="{wide:.1f}" height="17" rx="8.5" fill="{colour}"/>')
        parts.append(_text(x + wide / 2, y, band.outcome, "pill", anchor="middle"))
    y = _paragraph(parts, band.note, y + 4, width)
    if not band.lanes:
        return y
    y += 8
    times = [time for lane in band.lanes for _, start, end in lane.spans for time in (start, end)]
    times += [time for lane in band.lanes for _, time, _ in lane.marks]
    step, last = _ticks(max([*times, 1e-6]))
    right = width - _MARGIN - 60
    scale = (right - left) / last
    bottom = y + len(band.lanes) * _ROW

    for i in range(0, len(band.lanes), 2):
        parts.append(
            f'<rect class="row" x="{_MARGIN - 8}" y="{y + i * _ROW:.1f}" width="{width - 2 * _MARGIN + 16}" '
            f'height="{_ROW}" rx="4"/>'
        )
    for n in range(round(last / step) + 1):
        x = left + n * step * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{bottom + 4:.1f}"/>')
        unit = " s" if n == round(last / step) else ""
        parts.append(_text(x, bottom + 17, f"{n * step:g}{unit}" if n else "0", "quiet small", anchor="middle"))
    for i, lane in enumerate(band.lanes):
        middle = y + i * _ROW + _ROW / 2
        parts.append(_text(left - 10, middle + 4, lane.name, "", anchor="end"))
        for kind, start, end in lane.spans:
            parts += _span(kinds[kind], left + start * scale, left + end * scale, middle, f"{lane.name}: ", start, end)
        for kind, time, label in lane.marks:
            parts += _mark(marks[kind], left + time * scale, middle, label, time)
    return bottom + _AXIS - 8


def _span(kind: Kind, x0: float, x1: float, middle: float, before: str, start: float, end: float) -> list[str]:
    box = f'x="{x0:.1f}" y="{middle - _BAR / 2:.1f}" width="{max(x1 - x0, 1):.1f}" height="{_BAR}" rx="2"'
    words = f"<title>{_escape(before)}{_escape(kind.label)}, {start:.3f} s to {end:.3f} s</title>"
    if kind.fill == "open":
        return [
            f'<rect {box} fill="{kind.colour}" fill-opacity="0.12" stroke="{kind.colour}" stroke-dasharray="3 2">'
            f"{words}</rect>"
        ]
    parts = [f'<rect {box} fill="{kind.colour}">{words}</rect>']
    if kind.fill == "hatched":
        parts.append(f'<rect {box} fill="url(#hatch)" fill-opacity="0.55"/>')
    return parts


def _mark(mark: Mark, x: float, y: float, label: str, time: float | None) -> list[str]:
    ink = mark.colour == "#000000"
    line = 'class="ink"' if ink else f'stroke="{mark.colour}" fill="{mark.colour}"'
    words = "" if time is None else f"<title>{_escape(label or mark.label)} at {time:.3f} s</title>"
    shapes = {
        "cross": f"M{x - 4.5:.1f} {y - 4.5:.1f}l9 9m0 -9l-9 9",
        "bar": f"M{x - 2:.1f} {y - 7:.1f}v14m4 0v-14",
        "diamond": f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z",
    }
    if mark.shape in ("cross", "bar"):
        path = shapes[mark.shape]
        halo = f'<path class="halo" d="{path}" fill="none" stroke-width="6" stroke-linecap="round"/>'
        parts = [
            halo,
            f'<path {line} d="{path}" fill-opacity="0" stroke-width="2.6" stroke-linecap="round">{words}</path>',
        ]
    elif mark.shape == "diamond":
        parts = [f'<path {line} d="{shapes["diamond"]}">{words}</path>']
    elif mark.shape == "ring":
        parts = [
            f'<circle class="page" cx="{x:.1f}" cy="{y:.1f}" r="5"/>',
            f'<circle {line} fill-opacity="0" stroke-width="2.4" cx="{x:.1f}" cy="{y:.1f}" r="5">{words}</circle>',
        ]
    else:
        where = f'cx="{x:.1f}" cy="{y:.1f}" r="5.5"'
        parts = [f'<circle class="halo" stroke-width="2" fill="{mark.colour}" {where}>{words}</circle>']
    if label:
        parts.append(_text(x + 10, y + 4, label, "small"))
    return parts


def _legend(
    parts: list[str],
    bands: Iterable[Band],
    kinds: Mapping[str, Kind],
    marks: Mapping[str, Mark],
    y: float,
    width: int,
) -> float:
    """Draw what occurs, in the order of the descriptions, and return where the legend ends."""
    spans_seen = {span[0] for band in bands for lane in band.lanes for span in lane.spans}
    marks_seen = {mark[0] for band in bands for lane in band.lanes for mark in lane.marks}
    x = float(_MARGIN)
    y += 10
    shown: list[Kind | Mark] = [kind for name, kind in kinds.items() if name in spans_seen]
    shown += [mark for name, mark in marks.items() if name in marks_seen]
    for description in shown:
        wide = 1.1 * _text_width(description.label) + 48
        if x + wide > width - _MARGIN and x > _MARGIN:
            x, y = float(_MARGIN), y + 20
        if isinstance(description, Kind):
            sample = _span(description, x, x + 22, y, "", 0, 0)
            parts += [part.replace("<title>", "<desc>").replace("</title>", "</desc>") for part in sample]
        else:
            parts += _mark(description, x + 11, y, "", None)
        parts.append(_text(x + 28, y + 4, description.label, ""))
        x += wide + 4
    return y + 8


def _paragraph(parts: list[str], text: str, y: float, width: int) -> float:
    for line in textwrap.wrap(text, int((width - 2 * _MARGIN) / 6.2)):
        y += 15
        parts.append(_text(_MARGIN, y, line, "quiet"))
    return y


def _text(x: float, y: float, text: str, style: str, *, anchor: str = "start") -> str:
    classes = f' class="{style}"' if style else ""
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text{classes} x="{x:.1f}" y="{y:.1f}"{where}>{_escape(text)}</text>'


def _escape(text: str, quote: bool = False) -> str:
    """Make a text fit for XML, which has no control characters."""
    return escape("".join(character for character in text if character >= " "), quote=quote)


def _text_width(text: str, size: float = 12) -> float:
    """About how wide a text is: there is no font to ask."""
    narrow = sum(character in "iljtfr.,:;'|!()[] " for character in text)
    wide = sum(character in "mwMW@" or character.isupper() for character in text)
    return size * (0.56 * (len(text) - narrow - wide) + 0.32 * narrow + 0.75 * wide)


def _ticks(last: float) -> tuple[float, float]:
    """Return the distance of about eight round ticks, and the tick at or above `last`."""
    raw = last / 8
    base = 10 ** math.floor(math.log10(raw))
    step = next(base * factor for factor in (1, 2, 2.5, 5, 10) if base * factor >= raw * 0.999)
    return step, step * max(math.ceil(last / step - 1e-9), 1)
