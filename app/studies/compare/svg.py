"""Line and bar charts as SVG text: no script, no font and no file from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

_WIDTH, _HEIGHT = 640, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 14, 46
_BAR, _GAP, _NAMES = 22, 12, 150
_STEPS = (1, 2, 2.5, 5, 10)
"""Of a power of ten: distances between the ticks of an axis."""


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """One curve.

    Attributes:
        x, y: float64 `[N]`.
        style: CSS classes, which give it its colour.
        label: shown when the pointer rests on it.
        dots: whether its points are marked.
    """

    x: np.ndarray
    y: np.ndarray
    style: str
    label: str
    dots: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Chart:
    """Curves over a common axis.

    Attributes:
        x_label, y_label: of the axes.
        lines: the later ones above the earlier ones.
        level: height of a dashed line across, with its name; None for none.
        y_range: None for the range of the curves.
    """

    x_label: str
    y_label: str
    lines: Sequence[Line]
    level: tuple[float, str] | None = None
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class _Axis:
    """Maps values to pixels."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[float] = field(default_factory=list)

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within [low, high], at most `most` + 1 of them, one of the usual distances apart."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in _STEPS if power * each >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def line_chart(chart: Chart) -> str:
    """The chart as an `<svg>` element; a note where no curve has a point."""
    lines = [line for line in chart.lines if len(line.x)]
    if not lines:
        return '<p class="none">No run measured this.</p>'
    x, y = _axes(chart, lines)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(f"{chart.y_label} against {chart.x_label}")}">',
        *_grid(x, y),
        f'<text class="name" x="{(x.start + x.end) / 2:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"{escape(chart.x_label)}</text>",
        f'<text class="name" transform="translate(14 {(y.start + y.end) / 2:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(chart.y_label)}</text>",
    ]
    if chart.level is not None:
        height = y.at(chart.level[0])
        parts.append(
            f'<g class="level"><line x1="{x.start}" x2="{x.end}" y1="{height:.1f}" y2="{height:.1f}"/>'
            f'<text x="{x.end - 4}" y="{height - 5:.1f}" text-anchor="end">{escape(chart.level[1])}</text></g>'
        )
    parts += [_drawn(line, x, y) for line in lines]
    return "\n".join([*parts, "</svg>"])


def bar_chart(rows: Mapping[str, Mapping[str, float]], styles: Mapping[str, str], unit: str) -> str:
    """Stacked horizontal bars, one per row.

    Args:
        rows: by name of the row, the parts' values by name, each at least 0.
        styles: CSS class of each part, in the order in which they are stacked.
        unit: behind the totals.
    """
    totals = {name: sum(parts.get(part, 0.0) for part in styles) for name, parts in rows.items()}
    most = max(totals.values(), default=0.0)
    if most <= 0:
        return '<p class="none">No run measured this.</p>'
    height = len(rows) * (_BAR + _GAP) + _GAP
    axis = _Axis(0.0, most, _NAMES, _WIDTH - 80)
    found = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(unit)} by part">']
    for place, (name, parts) in enumerate(rows.items()):
        top, begin = _GAP + place * (_BAR + _GAP), 0.0
        middle = top + _BAR / 2 + 4
        found.append(f'<text x="{_NAMES - 8}" y="{middle}" text-anchor="end">{escape(name)}</text>')
        for part, style in styles.items():
            value = parts.get(part, 0.0)
            width = axis.at(begin + value) - axis.at(begin)
            found.append(
                f'<rect class="{style}" x="{axis.at(begin):.2f}" y="{top}" width="{width:.2f}" height="{_BAR}">'
                f"<title>{escape(name)}: {escape(part)} {value:.2f} {escape(unit)}</title></rect>"
            )
            begin += value
        found.append(f'<text x="{axis.at(begin) + 6:.1f}" y="{middle}">{totals[name]:.3g} {escape(unit)}</text>')
    return "\n".join([*found, "</svg>"])


def _axes(chart: Chart, lines: Sequence[Line]) -> tuple[_Axis, _Axis]:
    highest_x = max(float(line.x.max()) for line in lines)
    values = [float(bound) for line in lines for bound in (line.y.min(), line.y.max())]
    if chart.level is not None:
        values.append(chart.level[0])
    low, high = chart.y_range or _padded(min(values), max(values))
    x_low, x_high = 0.0, highest_x or 1.0
    return (
        _Axis(x_low, x_high, _LEFT, _WIDTH - _RIGHT, ticks(x_low, x_high)),
        _Axis(low, high, _HEIGHT - _BOTTOM, _TOP, ticks(low, high)),
    )


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _grid(x: _Axis, y: _Axis) -> list[str]:
    found = []
    for tick in y.ticks:
        at = y.at(tick)
        found.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}"/>')
        found.append(f'<text x="{x.start - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x.ticks:
        at = x.at(tick)
        found.append(f'<text x="{at:.1f}" y="{y.start + 17}" text-anchor="middle">{_short(tick)}</text>')
    return found


def _short(value: float) -> str:
    """`1500000` as `1.5M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:g}"


def _drawn(line: Line, x: _Axis, y: _Axis) -> str:
    points = [(x.at(float(a)), y.at(float(b))) for a, b in zip(line.x, line.y, strict=True)]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    dots = "".join(
        f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.2"><title>{escape(line.label)}: {_short(float(at))}, {value:.3f}'
        "</title></circle>"
        for (a, b), at, value in zip(points, line.x, line.y, strict=True)
        if line.dots
    )
    return f'<g class="{line.style}"><polyline points="{path}"><title>{escape(line.label)}</title></polyline>{dots}</g>'
