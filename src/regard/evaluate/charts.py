"""Line charts as geometry: where each line, mark and number goes. pages/base.html draws them as SVG.

A chart comes in two sizes, so that its letters are as large on a telephone as on a wide screen; the page shows the one
that fits, in the colours of its light or dark ground.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

SIZES = {"wide": (820, 320), "narrow": (380, 280)}
"""Width and height of the drawings, pixels."""

SHAPES = ("M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z", "M-3.6,-3.6h7.2v7.2h-7.2z", "M0,-5l4.8,8.2h-9.6z",
          "M0,-5.2l5.2,5.2l-5.2,5.2l-5.2,-5.2z", "M0,5l4.8,-8.2h-9.6z")
"""The marks of the lines, as SVG paths, for those who do not tell lines by colour."""

COLOURS = 8
"""Colours of the page's lines; with the shapes they make 40 lines that differ."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 16, 14, 30  # pixels around the plot
_MOST_POINTS = 160
_FEW = 30  # points that can carry marks


class Series(NamedTuple):
    """What becomes a line.

    Attributes:
        name: of the line.
        points: x and y; in a chart with categories, x is the place of a category.
        style: which colour and shape: a number from 0.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: int


class Tick(NamedTuple):
    """A number at an axis: where, in pixels, and what is written there, with a second line below it."""

    at: float
    label: str
    below: str = ""


class Mark(NamedTuple):
    """A point: where, in pixels, and what it says when it is pointed at."""

    x: float
    y: float
    title: str


class Line(NamedTuple):
    """A drawn line: an SVG path, and its points where they are few enough to be marked."""

    series: Series
    path: str
    marks: list[Mark]


class Drawing(NamedTuple):
    """A chart in one size, in pixels."""

    width: int
    height: int
    left: int
    right: int
    bottom: int
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]


class Chart(NamedTuple):
    """A chart in all sizes.

    Attributes:
        drawings: by the names of SIZES.
        x_label: what runs to the right.
        y_label: what runs up.
        alt: what it shows, in words.
        series: its lines, for the legend.
    """

    drawings: dict[str, Drawing]
    x_label: str
    y_label: str
    alt: str
    series: list[Series]


def chart(
    series: Sequence[Series], x_label: str, y_label: str, alt: str, *,
    categories: Sequence[tuple[str, str]] | None = None, from_zero: bool = False,
) -> Chart | None:
    """Lay a line chart out.

    Args:
        series: the lines; points that are not finite are left out.
        x_label: what runs to the right.
        y_label: what runs up.
        alt: what it shows, in words, for those who do not see it.
        categories: for an axis of names: each name, and a second line below it.
        from_zero: begin the vertical axis at 0.

    Returns:
        the chart; None where there is no finite point.
    """
    kept = [each._replace(points=[point for point in each.points if all(map(math.isfinite, point))]) for each in series]
    kept = [each for each in kept if each.points]
    if not kept:
        return None
    drawings = {name: _draw(kept, width, height, categories, from_zero) for name, (width, height) in SIZES.items()}
    return Chart(drawings, x_label, y_label, alt, kept)


def thin(points: Sequence[tuple[float, float]], most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """At most so many points, each the mean of its neighbours, so that a long training's curve stays small and calm."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(math.fsum(x for x, _ in group) / len(group), math.fsum(y for _, y in group) / len(group))
            for group in groups]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, at most so many of them, that reach from low to high."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / most))
    step = next(step * times for times in (1, 2, 5, 10, 20) if span / (step * times) <= most - 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """A number as an axis shows it: 0.005, 12, 2,400, 1.5M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"


def _draw(
    series: Sequence[Series], width: int, height: int, categories: Sequence[tuple[str, str]] | None, from_zero: bool
) -> Drawing:
    """One size."""
    right, bottom = width - _RIGHT, height - _BOTTOM - (14 if categories else 0)
    ys = [y for each in series for _, y in each.points]
    y_values = ticks(min(0.0, *ys) if from_zero else min(ys), max(ys), 6)
    xs = [x for each in series for x, _ in each.points]
    if categories:
        x_low, x_high = -0.5, len(categories) - 0.5
        places = [float(place) for place in range(0, len(categories), math.ceil(len(categories) * 46 / width))]
    else:
        x_low, x_high = min(0.0, *xs), max(*xs, 1e-9)
        places = [place for place in ticks(x_low, x_high, 8 if width > 500 else 5) if place <= x_high]

    def across(x: float) -> float:
        return round(_LEFT + (x - x_low) / (x_high - x_low) * (right - _LEFT), 1)

    def up(y: float) -> float:
        return round(bottom - (y - y_values[0]) / (y_values[-1] - y_values[0]) * (bottom - _TOP), 1)

    names = [categories[int(x)] if categories else (number(x), "") for x in places]
    lines = []
    for each in series:
        at = [(across(x), up(y)) for x, y in each.points]
        titles = [f"{each.name}, {_named(x, categories)}: {y:.4g}" for x, y in each.points]
        marks = [Mark(*place, title) for place, title in zip(at, titles, strict=True)] if len(at) <= _FEW else []
        lines.append(Line(each, "M" + "L".join(f"{x},{y}" for x, y in at), marks))
    x_ticks = [Tick(across(x), *name) for x, name in zip(places, names, strict=True)]
    return Drawing(width, height, _LEFT, right, bottom, x_ticks, [Tick(up(y), number(y)) for y in y_values], lines)


def _named(x: float, categories: Sequence[tuple[str, str]] | None) -> str:
    """A place of the horizontal axis in words."""
    return categories[round(x)][0] if categories else number(round(x, 6))
