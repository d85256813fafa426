"""Tables of the report. Records hold fractions; percent stands only here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

METRICS = {"rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10", "mAP": "mAP", "mINP": "mINP"}
MISSING = Markup("&ndash;")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str = "") -> Markup:
    """An HTML table; every cell is escaped unless it is Markup. The first column holds row names, the others align
    right.

    Raises ValueError for a row of another length than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"table row {list(row)!r} has {len(row)} cells, the header {len(header)}")
    head = Markup("").join(Markup("<th scope=col>{}</th>").format(name) for name in header)
    body = Markup("").join(
        Markup("<tr><th scope=row>{}</th>{}</tr>").format(
            row[0], Markup("").join(Markup("<td>{}</td>").format(cell) for cell in row[1:])
        )
        for row in rows
    )
    title = Markup("<caption>{}</caption>").format(caption) if caption else Markup("")
    frame = Markup('<div class=scroll tabindex=0 role=region aria-label="{}">{}</div>')
    whole = Markup("<table>{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(title, head, body)
    return frame.format(caption or "table", whole)


def percent(value: Any) -> Markup:
    """A fraction as percent with one decimal, or a dash."""
    return MISSING if value is None else escape(f"{100 * float(value):.1f}")


def metrics_table(records: Mapping[str, Mapping[str, Any]]) -> Markup:
    """Records (fractions) by row name, each beside what random scores would give on the same lists."""
    rows = []
    for name, record in records.items():
        chance = record.get("chance_mAP")
        times = MISSING if not chance or record.get("mAP") is None else f"{record['mAP'] / chance:.1f} x"
        guess = [percent(record.get("chance_rank1")), percent(chance), times]
        rows.append([name, *(percent(record.get(key)) for key in METRICS), *guess])
    header = ["", *METRICS.values(), "chance Rank-1", "chance mAP", "mAP / chance"]
    return table(header, rows, caption="Retrieval metrics in percent")


def counts_line(record: Mapping[str, Any]) -> str:
    """One sentence on how many queries stand behind a record."""
    parts = []
    if "num_queries" in record:
        parts.append(f"{record['num_queries']:,} queries")
    if "num_invalid" in record:
        parts.append(
            f"{record['num_invalid']:,} of them without a true match in the gallery and left out of the averages"
        )
    if "num_trials" in record:
        parts.append(f"means over {record['num_trials']} trials")
    if "tie_rate" in record:
        parts.append(f"{100 * record['tie_rate']:.2f} % of true matches tie with a wrong item and are ranked after it")
    return (", ".join(parts) + ".").capitalize() if parts else ""
