"""Charts as geometry: numbers in, places of an SVG out. Pure; `chart.svg.j2` draws them.

The page's own colours, fonts and tooltips apply to what is drawn, in the light and in the dark, since it is markup of
the page; an image by a plotting library would bring its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from blackbox_kd.report.words import number

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 22, 30
"""Margins, in units of the SVG."""
MOST_POINTS = 240
"""Of a line: about two a pixel of a phone."""
LOG_FROM = 8.0
"""A range so many times its smallest value is drawn on a logarithmic axis."""


class Point(NamedTuple):
    """A value at a place, with its interval where it has one."""

    x: float
    y: float
    lo: float | None = None
    hi: float | None = None
    label: str = ""
    """In the tooltip, before the numbers."""


class Series(NamedTuple):
    """Points of one colour; `kind`: "line" (with a band where there are intervals), "dots" (with whiskers), "area"."""

    name: str
    points: Sequence[Point]
    kind: str = "line"
    tone: int = 0


class Tick(NamedTuple):
    """A place on an axis, in the SVG's units, and what is written there."""

    at: float
    label: str


class Dot(NamedTuple):
    """A point in the SVG's units; `lo` and `hi` are y, too."""

    x: float
    y: float
    lo: float | None
    hi: float | None
    title: str


class Drawn(NamedTuple):
    """A series in the SVG's units; `line` and `band` are the `points` of a polyline and of a polygon, or ''."""

    name: str
    kind: str
    tone: int
    line: str
    band: str
    dots: list[Dot]


class Chart(NamedTuple):
    """Everything that the template needs."""

    title: str
    note: str
    series: list[Drawn]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Tick]
    """Vertical lines: where a stage begins."""
    summary: str
    """For who cannot see it."""


Scale = Callable[[float], float]


def chart(
    title: str,
    series: Sequence[Series],
    *,
    note: str = "",
    x_ticks: Sequence[tuple[float, str]] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    x_range: tuple[float, float] | None = None,
) -> Chart | None:
    """A chart, or None where there is no point to draw."""
    series = [each._replace(points=thinned(each.points)) for each in series if each.points]
    if not series:
        return None
    xs = [p.x for s in series for p in s.points]
    ys = [y for s in series for p in s.points for y in (p.y, p.lo, p.hi) if y is not None]
    x_lo, x_hi = x_range or (min(xs), max(xs))
    low, high, log = span(ys, areas=any(s.kind == "area" for s in series))
    x = scale(x_lo, x_hi, LEFT, WIDTH - RIGHT)
    y = scale(low, high, HEIGHT - BOTTOM, TOP, log=log)
    ticks = x_ticks if x_ticks is not None else [(t, number(t)) for t in linear_ticks(x_lo, x_hi)]
    return Chart(
        title=title,
        note=note + (" Logarithmic axis." if log else ""),
        series=[_drawn(each, x, y) for each in series],
        x_ticks=[Tick(round(x(at), 1), label) for at, label in ticks],
        y_ticks=[Tick(round(y(at), 1), number(at)) for at in (log_ticks if log else linear_ticks)(low, high)],
        marks=_marks(marks, x, x_hi),
        summary="; ".join(_summary(each) for each in series),
    )


def _drawn(series: Series, x: Scale, y: Scale) -> Drawn:
    def at(point: Point, value: float) -> str:
        return f"{x(point.x):.1f},{y(value):.1f}"

    points, banded = series.points, [p for p in series.points if p.lo is not None and p.hi is not None]
    if series.kind == "dots":
        return Drawn(series.name, series.kind, series.tone, "", "", [_dot(p, x, y) for p in points])
    upper = [at(p, p.hi) for p in banded if p.hi is not None]
    lower = [at(p, p.lo) for p in reversed(banded) if p.lo is not None]
    line = " ".join(at(p, p.y) for p in points)
    dots = [_dot(p, x, y) for p in points] if series.kind == "line" and len(points) <= 40 else []
    return Drawn(series.name, series.kind, series.tone, line, " ".join(upper + lower), dots)


def _dot(point: Point, x: Scale, y: Scale) -> Dot:
    within = "" if point.lo is None else f" [{number(point.lo)}, {number(point.hi)}]"
    lo, hi = (None if end is None else round(y(end), 1) for end in (point.lo, point.hi))
    return Dot(round(x(point.x), 1), round(y(point.y), 1), lo, hi, f"{point.label} {number(point.y)}{within}".strip())


def _marks(marks: Sequence[tuple[float, str]], x: Scale, x_hi: float) -> list[Tick]:
    """Each with its label where that has room before the next."""
    ends = [*(at for at, _ in marks), x_hi][1:]
    room = [x(end) - x(at) for (at, _), end in zip(marks, ends, strict=True)]
    return [
        Tick(round(x(at), 1), label if space > 6.5 * len(label) else label[-1] if space > 10 else "")
        for (at, label), space in zip(marks, room, strict=True)
    ]


def _summary(series: Series) -> str:
    first, last = series.points[0], series.points[-1]
    return f"{series.name}: {number(first.y)} at the start, {number(last.y)} at the end"


def scale(low: float, high: float, start: float, end: float, *, log: bool = False) -> Scale:
    """low..high -> start..end; the middle where there is no range."""
    if log:
        low, high = math.log(low), math.log(high)
    width = high - low

    def place(value: float) -> float:
        share = ((math.log(value) if log else value) - low) / width if width else 0.5
        return start + share * (end - start)

    return place


def span(values: Sequence[float], *, areas: bool) -> tuple[float, float, bool]:
    """The y axis: from, to, and whether it is logarithmic. From 0 where 0 is near; areas always start there."""
    low, high = min(values), max(values)
    if areas:
        return 0.0, high or 1.0, False
    if low > 0 and high / low >= LOG_FROM:
        return low / 1.15, high * 1.15, True
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (0.0 if 0 <= low <= 0.45 * high else low - room), high + room, False


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """About so many round numbers within low..high, by steps of 1, 2 or 5."""
    if high <= low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within low..high; only the powers where those are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    return [t for p in powers for f in factors if low <= (t := round(f * 10.0**p, 12)) <= high]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS, evenly chosen, the first and the last among them."""
    if len(points) <= MOST_POINTS:
        return list(points)
    return [points[round(i * (len(points) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]


def stacked(named: Sequence[tuple[str, Sequence[float]]], xs: Sequence[float]) -> list[Series]:
    """Areas on top of each other: each series of y at `xs` begins where the one before ends."""
    found, floor = [], [0.0] * len(xs)
    for tone, (name, ys) in enumerate(named):
        top = [low + y for low, y in zip(floor, ys, strict=True)]
        points = [Point(x, t, low, t) for x, t, low in zip(xs, top, floor, strict=True)]
        found.append(Series(name, points, "area", tone))
        floor = top
    return found
