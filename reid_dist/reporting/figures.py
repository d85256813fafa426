"""Figures of the report as inline SVG and data URIs: curves, rank lists, expert usage.

Drawn by hand rather than by a plotting library, so that text stays text, colours follow the reader's light or dark
theme, and a page of ten figures stays small. Nothing is told by colour alone: lines differ in dash, right and wrong
carry a sign.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from PIL import Image

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 250, 58, 12, 12, 40
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 4", "12 4")
MAX_POINTS = 300
THUMBNAIL = 192  # pixels of height at most
BAR = Markup("<rect class='bar c{}' x='{:.1f}' y='{:.1f}' width='{:.1f}' height='{:.1f}'><title>{}</title></rect>")
USAGE_EPSILON = 1e-9  # of the entropy's logarithm, methods/comoe.md section 6


@dataclass(frozen=True)
class Curves:
    """One chart: series over steps."""

    title: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]  # name -> (x, y)
    x_label: str = "step"
    percent: bool = False  # y holds fractions, the page shows percent
    note: str = ""
    last_values: bool = True  # stand in the legend


@dataclass(frozen=True)
class RankedItem:
    """One gallery item of a rank list."""

    correct: bool | None  # None: nobody knows who it is (a search)
    image: bytes | None = None  # an encoded image of any common format
    text: str = ""  # caption, when the gallery holds text
    label: str = ""  # e.g. the id
    score: float | None = None


@dataclass(frozen=True)
class RankList:
    """A query and what was found, best first."""

    items: Sequence[RankedItem]
    caption: str = ""
    image: bytes | None = None
    label: str = ""
    matches: int | None = None  # true matches in the gallery
    ap: float | None = None  # fraction
    film: bool = False  # pictures are film strips of tracklets, wider than an image


def spread_queries(ap: np.ndarray, count: int = 10) -> np.ndarray:
    """int64 [count]: queries at evenly spaced places of the order by AP, best first, so that a page shows failures too.

    `ap` float [Q]; NaN marks invalid queries, which are passed over. Fewer when there are fewer.
    """
    order = np.argsort(-ap, kind="stable")[: int(np.isfinite(ap).sum())]
    picked: np.ndarray = order[
        np.unique(np.linspace(0, max(len(order) - 1, 0), min(count, len(order))).round().astype(int))
    ]
    return picked


def data_uri(image: bytes) -> str:
    """An encoded image as a JPEG data URI, at most THUMBNAIL pixels high. Raises ValueError when it cannot be read."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            picture = opened.convert("RGB")
    except OSError as error:
        raise ValueError(f"a picture for the report cannot be read: {error}") from error
    if picture.height > THUMBNAIL:
        picture = picture.resize(
            (max(1, round(picture.width * THUMBNAIL / picture.height)), THUMBNAIL), Image.Resampling.LANCZOS
        )
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def line_chart(curves: Curves) -> Markup:
    """A chart of lines with its legend. Points that are not finite leave gaps; no data gives a
    sentence."""
    scale = 100.0 if curves.percent else 1.0
    thinned = {n: _thin(np.asarray(x, float), scale * np.asarray(y, float)) for n, (x, y) in curves.series.items()}
    shown = {name: (x, y) for name, (x, y, _) in thinned.items() if np.isfinite(y).any()}
    if not shown:
        return Markup("<p class=muted>{}: nothing was recorded.</p>").format(curves.title)
    xs = np.concatenate([x for x, _ in shown.values()])
    ys = np.concatenate([y[np.isfinite(y)] for _, y in shown.values()])
    x_ticks, y_ticks = _ticks(xs.min(), xs.max(), 6), _ticks(ys.min(), ys.max(), 5)
    x_low, x_high = float(xs.min()), float(max(xs.max(), xs.min() + 1e-12))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = _axes(x_ticks, y_ticks, place, x_low, x_high, curves.x_label)
    legend = []
    for number, (name, (x, y)) in enumerate(shown.items()):
        look, dash = number % len(DASHES), DASHES[number % len(DASHES)]
        style = Markup('class="line c{}" stroke-dasharray="{}"').format(look, dash)
        single = Markup('class="line dot c{}"').format(look)  # one record: a dash pattern would hide it
        shape = single if np.isfinite(y).sum() == 1 else style
        parts.append(Markup("<path {} d='{}'/>").format(shape, _path(*place(x, y))))
        key = Markup("<svg class=key viewBox='0 0 24 6' aria-hidden=true><path {} d='M0 3H24'/></svg>").format(style)
        last = _number(y[np.isfinite(y)][-1]) + (" %" if curves.percent else "") if curves.last_values else ""
        legend.append(Markup("<li>{}{} <b>{}</b></li>").format(key, name, last))
    mean_of = max(steps for _, _, steps in thinned.values())
    notes = [curves.note, f"Each point is the mean of up to {mean_of} records." if mean_of > 1 else ""]
    return Markup(
        "<figure><figcaption>{}</figcaption><svg class=chart viewBox='0 0 {} {}' role=img aria-label='{}'>{}</svg>"
        "<ul class=legend>{}</ul>{}</figure>"
    ).format(curves.title, WIDTH, HEIGHT, curves.title, Markup("").join(parts), Markup("").join(legend), _note(notes))


def expert_usage(usage: Mapping[str, Mapping[str, Sequence[float]]], *, title: str = "Expert usage") -> Markup:
    """Share of routed (token, slot) pairs per expert, one chart per block.

    Args:
        usage: block name -> modality -> counts [E].
    The entropy -sum f log(f + 1e-9) stands beside log E, its value when all experts are used alike (methods/comoe.md
    6). Raises ValueError: counts of different lengths in a block, or without a single routed token.
    """
    return Markup("").join(
        _usage_chart(f"{title}: {block}" if block else title, counts) for block, counts in usage.items()
    )


def _usage_chart(title: str, counts: Mapping[str, Sequence[float]]) -> Markup:
    shares = {}
    for name, values in counts.items():
        total = float(np.sum(values))
        if total <= 0:
            raise ValueError(f"{title}, {name}: no token was routed")
        shares[name] = np.asarray(values, float) / total
    sizes = {len(f) for f in shares.values()}
    if len(sizes) != 1:
        raise ValueError(f"{title}: modalities count different numbers of experts {sorted(sizes)}")
    experts = sizes.pop()
    y_ticks = _ticks(0.0, max(float(f.max()) for f in shares.values()), 4)
    slot = (WIDTH - LEFT - RIGHT) / experts
    bar = slot * 0.8 / len(shares)
    scale = (HEIGHT - TOP - BOTTOM) / y_ticks[-1]
    parts = [_y_line(HEIGHT - BOTTOM - tick * scale, f"{100 * tick:g} %") for tick in y_ticks]
    uniform = HEIGHT - BOTTOM - scale / experts
    parts.append(Markup("<path class=uniform d='M{} {:.1f}H{}'/>").format(LEFT, uniform, WIDTH - RIGHT))
    legend = []
    for number, (name, share) in enumerate(shares.items()):
        for expert, f in enumerate(share):
            left = LEFT + expert * slot + slot * 0.1 + number * bar
            tip = f"{name}, expert {expert + 1}: {100 * f:.1f} %"
            corner, size = (left, HEIGHT - BOTTOM - f * scale), (bar, f * scale)
            parts.append(BAR.format(number % len(DASHES), *corner, *size, tip))
        entropy = float(-(share * np.log(share + USAGE_EPSILON)).sum())
        key = Markup(
            "<svg class=key viewBox='0 0 12 12' aria-hidden=true><rect class='bar c{}' width=12 height=12 /></svg>"
        )
        text = f"entropy {entropy:.3f} of log {experts} = {math.log(experts):.3f}"
        legend.append(Markup("<li>{}{} <b>{}</b></li>").format(key.format(number % len(DASHES)), name, text))
    parts += [_x_label(LEFT + (expert + 0.5) * slot, str(expert + 1)) for expert in range(experts)]
    parts.append(_axis_name("expert"))
    return Markup(
        "<figure><figcaption>{}</figcaption><svg class=chart viewBox='0 0 {} {}' role=img aria-label='{}'>{}</svg>"
        "<ul class=legend>{}<li class=muted>dashed line: all experts alike</li></ul></figure>"
    ).format(title, WIDTH, HEIGHT, title, Markup("").join(parts), Markup("").join(legend))


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """At most MAX_POINTS points, as means of neighbours (of the finite ones); and how many went into one."""
    if len(x) != len(y):
        raise ValueError(f"a curve with {len(x)} x and {len(y)} y values")
    size = -(-len(x) // MAX_POINTS)
    if size <= 1:
        return x, y, 1
    cuts = np.arange(0, len(x), size)
    counts = np.add.reduceat(np.isfinite(y).astype(float), cuts)
    sums = np.add.reduceat(np.where(np.isfinite(y), y, 0.0), cuts)
    mean = np.divide(sums, counts, out=np.full(len(cuts), np.nan), where=counts > 0)
    return np.add.reduceat(x, cuts) / np.diff(cuts, append=len(x)), mean, size


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers that enclose [low, high]."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _axes(
    x_ticks: list[float], y_ticks: list[float], place: object, x_low: float, x_high: float, name: str
) -> list[Markup]:
    parts = []
    for tick in y_ticks:
        _, height = place(np.array([x_low]), np.array([tick]))  # type: ignore[operator]
        parts.append(_y_line(float(height[0]), _number(tick)))
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            across, _ = place(np.array([tick]), np.array([y_ticks[0]]))  # type: ignore[operator]
            parts.append(_x_label(float(across[0]), _number(tick)))
    return [*parts, _axis_name(name)]


def _y_line(height: float, text: str) -> Markup:
    return Markup("<path class=grid d='M{} {:.1f}H{}'/><text class=y x='{}' y='{:.1f}'>{}</text>").format(
        LEFT, height, WIDTH - RIGHT, LEFT - 6, height + 4, text
    )


def _x_label(across: float, text: str) -> Markup:
    return Markup("<text class=x x='{:.1f}' y='{}'>{}</text>").format(across, HEIGHT - BOTTOM + 16, text)


def _axis_name(name: str) -> Markup:
    return Markup("<text class=x x='{}' y='{}'>{}</text>").format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, name)


def _path(across: np.ndarray, height: np.ndarray) -> str:
    pieces, pen = [], "M"
    for x, y in zip(across, height, strict=True):
        if np.isfinite(y):
            pieces.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(pieces) + ("h0.1" if len(pieces) == 1 else "")  # a single record is a dot


def _number(value: float) -> str:
    magnitude = abs(value)
    return f"{value:,.0f}" if magnitude >= 1000 and value == round(value) else f"{value:.4g}"


def _note(notes: Sequence[str]) -> Markup:
    text = " ".join(note for note in notes if note)
    return Markup("<p class=muted>{}</p>").format(text) if text else Markup("")
