"""Parallel coordinates of a sweep: one vertical line per axis and one for the metric, one path per trial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT, TOP, BOTTOM, MARGIN = 1040, 360, 30, 50, 70
WIDEST, NARROW = 260, 120  # between two axes at most; below it every second name stands a line lower
FEW = 6  # different values up to which each has a place and a label of its own
LOG_SPAN = 50.0  # positive values that span more are drawn on a logarithmic line
GOOD, OTHER, OPEN = "stroke-width:1.5;opacity:.8", "stroke-width:1;opacity:.45", "stroke-width:1;opacity:.6"


@dataclass(frozen=True)
class Line:
    """One trial: its place on every axis."""

    label: str
    setting: Mapping[str, Any]
    value: float | None  # the metric; None: not known, the path ends before the last axis
    best: bool = False
    whole: bool = True  # False: stopped before its end


def parallel_coordinates(lines: Sequence[Line], axes: Sequence[str], metric: str, mode: str = "max") -> Markup:
    """The figure. The best trial is drawn last and thick; the better quarter is darker; what was stopped early is dashed."""
    if not lines or not axes:
        return Markup("<p class=muted>No axis, so nothing to compare.</p>")
    spacing = min(WIDEST, (WIDTH - 2 * MARGIN) // len(axes))
    values = [line.value for line in lines if line.value is not None]
    scales = [_Scale([line.setting.get(axis) for line in lines]) for axis in axes]
    scales.append(_Scale(values or [0.0], few=0))
    good = _better_quarter(values, mode)
    parts = [_path(line, axes, scales, spacing, metric, good) for line in sorted(lines, key=_order)]
    for number, name in enumerate([*axes, metric]):
        parts.append(_axis(MARGIN + number * spacing, name, scales[number], lower=spacing < NARROW and number % 2 == 1))
    width = 2 * MARGIN + spacing * len(axes)
    return Markup(
        "<figure style='max-width:none'><figcaption>Parallel coordinates</figcaption><svg class='chart parallel' "
        "viewBox='0 0 {} {}' style='max-width:{}px' role=img aria-label='Parallel coordinates'>{}</svg>"
        "<p class=muted>One path per trial. Thick: the best by {}; dark: the better quarter; dashed: stopped early.</p></figure>"
    ).format(width, HEIGHT, width, Markup("").join(parts), metric)


def _better_quarter(values: Sequence[float], mode: str) -> set[float]:
    ordered = sorted(values, reverse=mode == "max")
    return set(ordered[: math.ceil(len(ordered) / 4)])


def _order(line: Line) -> tuple[bool, bool]:
    return line.best, line.value is not None


def _path(
    line: Line, axes: Sequence[str], scales: Sequence[_Scale], spacing: int, metric: str, good: set[float]
) -> Markup:
    points = [scales[i].place(line.setting.get(axis)) for i, axis in enumerate(axes)]
    points += [] if line.value is None else [scales[-1].place(line.value)]
    path = "L".join(f"{MARGIN + i * spacing} {_height(place):.1f}" for i, place in enumerate(points))
    known = OPEN if line.value is None else GOOD if line.value in good else OTHER
    style = "stroke-width:4" if line.best else known
    colour = 0 if line.best or line.value in good else 5
    tip = f"{line.label}: {metric} " + ("unknown" if line.value is None else f"{line.value:.4g}")
    return Markup(
        "<path class='line c{}' style='{}' stroke-dasharray='{}' d='M{}'><title>{}</title></path>"
    ).format(colour, style, "none" if line.whole else "6 4", path, tip)  # fmt: skip


def _axis(across: int, name: str, scale: _Scale, lower: bool) -> Markup:
    """The vertical line, its labels (with a halo, because paths run through them) and its name."""
    line = Markup("<path class=grid d='M{} {}V{}'/>").format(across, TOP, HEIGHT - BOTTOM)
    title = Markup("<text class=x x='{}' y='{}'>{}</text>").format(across, HEIGHT - (4 if lower else 20), name)
    labels = [
        Markup("<text class='y halo' x='{}' y='{:.1f}'>{}</text>").format(across - 7, _height(place) + 4, text)
        for text, place in scale.ticks()
    ]
    return Markup("").join([line, *labels, title])


def _height(place: float) -> float:
    return HEIGHT - BOTTOM - place * (HEIGHT - TOP - BOTTOM)


class _Scale:
    """Places in [0, 1] of an axis's values: few numbers evenly by rank, many by size (by logarithm when they span much), others
    by first appearance."""

    def __init__(self, values: Sequence[Any], few: int = FEW) -> None:
        numbers = [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        numeric = len(numbers) == len(values)
        distinct = sorted(set(numbers))
        self.numeric = numeric and len(distinct) > few
        self.names = [f"{v:g}" for v in distinct] if numeric else list(dict.fromkeys(_text(v) for v in values))
        self.low, self.high = (distinct[0], distinct[-1]) if distinct else (0.0, 0.0)
        self.log = self.low > 0 and self.high / self.low > LOG_SPAN

    def place(self, value: Any) -> float:
        if not self.numeric:
            return self._rank(_text(value))
        if self.high == self.low:
            return 0.5
        if self.log:
            return math.log(float(value) / self.low) / math.log(self.high / self.low)
        return (float(value) - self.low) / (self.high - self.low)

    def _rank(self, name: str) -> float:
        return 0.5 if len(self.names) == 1 else self.names.index(name) / (len(self.names) - 1)

    def ticks(self) -> list[tuple[str, float]]:
        if not self.numeric:
            return [(name, self._rank(name)) for name in self.names]
        if self.low == self.high:
            return [(f"{self.low:.4g}", 0.5)]
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return [(f"{value:.3g}", self.place(value)) for value in (self.low, middle, self.high)]


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
