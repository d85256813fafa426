"""The report page: title, metrics against chance, curves, rank lists, the method's own sections, provenance.

One file that opens anywhere, years later: no script, no link, no font or image from elsewhere (a content policy in the
page says so to the browser too). Everything that comes from data is escaped; only figures and tables built by this
package are markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from reid_dist.reporting.figures import Curves, RankList, data_uri, line_chart
from reid_dist.reporting.tables import counts_line, metrics_table, percent, table

SYNTHETIC = (
    "The data of this run is synthetic: drawn by a program, no photograph of anybody. Its scores show that the code "
    "learns and scores correctly. They are no evidence about published accuracy and must not be tabulated beside it."
)
TEMPLATE = Path(__file__).with_name("page.html.jinja")


@dataclass(frozen=True)
class Section:
    """A section that the method adds: Markup from `figures` and `tables`, or plain text, which is escaped."""

    title: str
    content: Sequence[Markup | str]
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class ReportInput:
    """Everything that stands on the page, as plain data."""

    title: str
    summary: str  # what this is, in a sentence or two
    metrics: Mapping[str, Mapping[str, Any]]  # row name ("trained", "untrained", ...) -> record (fractions)
    synthetic: bool
    command: str  # the line that reproduces the run
    recipe: str  # the resolved recipe as text
    provenance: Mapping[str, str]  # data versions, code version, seeds, ...
    curves: Sequence[Curves] = ()
    rank_lists: Sequence[RankList] = ()
    rank_lists_note: str = "Queries spread evenly over the order by average precision, from best to worst."
    sections: Sequence[Section] = field(default_factory=tuple)
    metrics_note: str = ""  # protocol, how the checkpoint was selected, ...


def render_report(run: ReportInput) -> str:
    """The page as HTML text (write it as UTF-8). Raises ValueError: a picture that cannot be read, no metrics."""
    if not run.metrics:
        raise ValueError("a report needs at least one record of metrics")
    return _render(run)


def render_search(
    summary: str, rank_lists: Sequence[RankList], provenance: Mapping[str, str], command: str, note: str
) -> str:
    """The page of a gallery search: queries and what was found. Raises ValueError for a picture that cannot be read."""
    return _render(
        ReportInput(
            title="Gallery search", summary=summary, metrics={}, synthetic=False, command=command, recipe="",
            provenance=provenance, rank_lists=rank_lists, rank_lists_note=note,
        )
    )  # fmt: skip


def render_sections(run: ReportInput) -> str:
    """A page without metrics: a summary, its sections, provenance. Raises ValueError for a picture that cannot be read."""
    return _render(run)


def _render(run: ReportInput) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        run=run,
        synthetic=SYNTHETIC if run.synthetic else "",
        metrics=metrics_table(run.metrics),
        counts=counts_line(next(iter(run.metrics.values()), {})),
        charts=[line_chart(curves) for curves in run.curves],
        provenance=table(["", "Value"], list(run.provenance.items())),
        data_uri=data_uri,
        percent=percent,
    )
