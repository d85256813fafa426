"""A method's own figures, stored as plain data by `jobs.evaluate`, turned into sections of the page.

A figure is {"kind", "title", "text", "data"}; what `data` holds depends on the kind:

    expert_usage  {block: {modality: counts [E]}}
    charts        {"x_label", "charts": {title: {series name: [x, y]}}}, side by side
    table         {"header": [...], "rows": [[...]]}
    images        [{"label", "pictures": [{"png": base64, "label"}]}], a strip per entry; a label is a text, or
                  [[piece, whether it is marked], ...]
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

from markupsafe import Markup

from reid_dist.reporting.figures import Curves, data_uri, expert_usage, line_chart
from reid_dist.reporting.page import Section
from reid_dist.reporting.tables import table

MARKED, PLAIN = Markup("<mark>{}</mark>"), Markup("{}")


def _label(label: str | list[tuple[str, bool]]) -> Markup:
    if isinstance(label, str):
        return PLAIN.format(label)
    return Markup("").join((MARKED if marked else PLAIN).format(piece) for piece, marked in label)


def _charts(data: Mapping[str, Any]) -> Markup:
    charts = [
        line_chart(
            Curves(title, {name: (xy[0], xy[1]) for name, xy in series.items()}, data["x_label"], last_values=False)
        )
        for title, series in data["charts"].items()
    ]
    return Markup("<div class=charts>{}</div>").format(Markup("").join(charts))


def _images(strips: list[Mapping[str, Any]]) -> Markup:
    rows = []
    for strip in strips:
        pictures = Markup("").join(
            Markup("<figure><img src='{}' alt='{}'><figcaption>{}</figcaption></figure>").format(
                data_uri(base64.b64decode(picture["png"])), picture.get("label", ""), picture.get("label", "")
            )
            for picture in strip["pictures"]
        )
        rows.append(
            Markup("<div class=strip><p>{}</p><div class=pictures>{}</div></div>").format(
                _label(strip.get("label", "")), pictures
            )
        )
    return Markup("<div class=strips>{}</div>").format(Markup("").join(rows))


KINDS: Mapping[str, Callable[[Any], Markup]] = {
    "expert_usage": lambda data: expert_usage(data),
    "charts": _charts,
    "table": lambda data: table(data["header"], data["rows"]),
    "images": _images,
}


def section_of(figure: Mapping[str, Any]) -> Section:
    """The section of a stored figure. Raises ValueError for an unknown kind."""
    if figure["kind"] not in KINDS:
        raise ValueError(f"figure of kind {figure['kind']!r}; known: {', '.join(KINDS)}")
    return Section(figure["title"], [KINDS[figure["kind"]](figure["data"])], figure.get("text", ""))
