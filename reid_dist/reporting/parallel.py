"""Parallel coordinates of a sweep: one vertical line per axis and one for the metric, one path per trial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from reid_dist.reporting.figures import BOTTOM, DASHES, HEIGHT, TOP

SPACING, MARGIN = 130, 80
LOG_SPAN = 50.0  # positive values that span more are drawn on a logarithmic line


@dataclass(frozen=True)
class Line:
    """One trial: its place on every axis."""

    label: str
    setting: Mapping[str, Any]
    value: float | None  # the metric; None: not known, the path ends before the last axis
    best: bool = False


def parallel_coordinates(lines: Sequence[Line], axes: Sequence[str], metric: str) -> Markup:
    """The figure. The best trial is drawn last and thick, told by width as well as colour."""
    if not lines or not axes:
        return Markup("<p class=muted>No axis, so nothing to compare.</p>")
    width = 2 * MARGIN + SPACING * len(axes)
    scales = [_Scale([line.setting.get(axis) for line in lines]) for axis in axes]
    values = [line.value for line in lines if line.value is not None]
    scales.append(_Scale(values or [0.0]))
    parts = []
    for number, name in enumerate([*axes, metric]):
        across = MARGIN + number * SPACING
        parts.append(Markup("<path class=grid d='M{} {}V{}'/>").format(across, TOP, HEIGHT - BOTTOM))
        parts.append(Markup("<text class=x x='{}' y='{}'>{}</text>").format(across, HEIGHT - 8, name))
        for text, place in scales[number].ticks():
            parts.append(
                Markup("<text class=y x='{}' y='{:.1f}'>{}</text>").format(across - 6, _height(place) + 4, text)
            )
    for number, line in enumerate(sorted(lines, key=lambda entry: entry.best)):
        points = [scales[i].place(line.setting.get(axis)) for i, axis in enumerate(axes)]
        points += [] if line.value is None else [scales[-1].place(line.value)]
        path = "L".join(f"{MARGIN + i * SPACING} {_height(p):.1f}" for i, p in enumerate(points))
        style = "stroke-width:4" if line.best else "stroke-width:1.2;opacity:.7"
        colour, dash = (0, "none") if line.best else (1 + number % 5, DASHES[1 + number % 5])
        tip = f"{line.label}: {metric} " + ("unknown" if line.value is None else f"{line.value:.4g}")
        parts.append(
            Markup("<path class='line c{}' style='{}' stroke-dasharray='{}' d='M{}'><title>{}</title></path>").format(
                colour, style, dash, path, tip
            )
        )
    return Markup(
        "<figure style='max-width:none'><figcaption>Parallel coordinates</figcaption><svg class=chart viewBox='0 0 {} {}' "
        "style='max-width:{}px' role=img aria-label='Parallel coordinates'>{}</svg>"
        "<p class=muted>One path per trial; the thick one is the best by {}.</p></figure>"
    ).format(width, HEIGHT, width * 2, Markup("").join(parts), metric)


def _height(place: float) -> float:
    return HEIGHT - BOTTOM - place * (HEIGHT - TOP - BOTTOM)


class _Scale:
    """Places in [0, 1] of an axis's values: numbers by size (by logarithm when they span much), others by first appearance."""

    def __init__(self, values: Sequence[Any]) -> None:
        numbers = [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        self.numeric = len(numbers) == len(values)
        self.names = list(dict.fromkeys(_text(v) for v in values))
        if self.numeric:
            self.low, self.high = min(numbers), max(numbers)
            self.log = self.low > 0 and self.high / self.low > LOG_SPAN

    def place(self, value: Any) -> float:
        if not self.numeric:
            return (self.names.index(_text(value)) + 0.5) / len(self.names)
        if self.high == self.low:
            return 0.5
        if self.log:
            return math.log(float(value) / self.low) / math.log(self.high / self.low)
        return (float(value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[str, float]]:
        if not self.numeric:
            return [(name, (i + 0.5) / len(self.names)) for i, name in enumerate(self.names)]
        ends = [self.low] if self.low == self.high else [self.low, self.high]
        return [(f"{end:.4g}", self.place(end)) for end in ends]


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
