"""A sweep's leaderboard: one row per method and setting, one column per split, mean and spread over seeds and divisions.

Plain data in, text out. Scores are fractions in, percent out. Published figures stand in rows of their own that say "paper"
and the source; no mean ever contains one.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from reid_dist.reporting.tables import table

SHOWN = {"mAP": "mAP", "rank1": "Rank-1"}  # what a cell shows, in the order of most papers' tables
MANY_COLUMNS = 4  # on a page
METRICS = ("rank1", "rank5", "rank10", "mAP", "mINP")  # what the CSV holds


@dataclass(frozen=True)
class Score:
    """One scoring of one trial."""

    row: str
    column: str
    record: Mapping[str, float]  # fractions
    repeat: str = ""  # "seed=1 division=0": what is averaged over


@dataclass(frozen=True)
class Published:
    """A figure of a paper, as fractions."""

    row: str
    column: str
    record: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class Cell:
    """Mean and sample standard deviation per metric; a spread needs two values."""

    count: int
    mean: Mapping[str, float]
    spread: Mapping[str, float | None]


@dataclass
class Leaderboard:
    """Cells by (row, column); rows and columns in the order of their first score."""

    title: str
    rows: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)
    papers: dict[str, dict[str, Published]] = field(default_factory=dict)  # row -> column -> figure
    notes: list[str] = field(default_factory=list)


def build(
    title: str, scores: Sequence[Score], published: Sequence[Published], notes: Sequence[str] = ()
) -> Leaderboard:
    """Average the scores. Raises ValueError: two scores of one cell and repeat, or a repeated published figure."""
    board = Leaderboard(title, notes=list(notes))
    board.rows = list(dict.fromkeys([score.row for score in scores] + [figure.row for figure in published]))
    board.columns = list(dict.fromkeys([score.column for score in scores] + [figure.column for figure in published]))
    found: dict[tuple[str, str], dict[str, Mapping[str, float]]] = {}
    for score in scores:
        repeats = found.setdefault((score.row, score.column), {})
        if score.repeat in repeats:
            raise ValueError(
                f"two scores for row {score.row!r}, column {score.column!r}, {score.repeat or 'no repeat'}"
            )
        repeats[score.repeat] = score.record
    board.cells = {place: _cell(list(repeats.values())) for place, repeats in found.items()}
    for figure in published:
        if board.papers.setdefault(figure.row, {}).setdefault(figure.column, figure) is not figure:
            raise ValueError(f"two published figures for row {figure.row!r}, column {figure.column!r}")
    return board


def _cell(records: Sequence[Mapping[str, float]]) -> Cell:
    mean, spread = {}, {}
    for metric in METRICS:
        values = [float(record[metric]) for record in records if record.get(metric) is not None]
        if not values:
            continue
        mean[metric] = math.fsum(values) / len(values)
        squares = math.fsum((value - mean[metric]) ** 2 for value in values)
        spread[metric] = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else None
    return Cell(len(records), mean, spread)


def _percent(value: float | None, spread: float | None = None, sign: str = "±") -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + ("" if spread is None else f" {sign} {100 * spread:.1f}")


def _lines(board: Leaderboard, sign: str) -> list[tuple[list[str], bool]]:
    """[(cells with the row's name first, whether it is a paper's)]."""
    lines, same = [], _same_count(board)
    for row in board.rows:
        own = [board.cells.get((row, column)) for column in board.columns]
        if any(own):
            lines.append(([row, *(_ours(cell, sign, same is None) for cell in own)], False))
        figures = board.papers.get(row, {})
        if figures:
            sources = "; ".join(dict.fromkeys(figure.source for figure in figures.values()))
            texts = [_record(figures[c].record if c in figures else {}) for c in board.columns]
            lines.append(([f"paper: {sources}", *texts], True))
    return lines


def _same_count(board: Leaderboard) -> int | None:
    """The n of every cell, when it is one; else each cell says its own."""
    counts = {cell.count for cell in board.cells.values()}
    return counts.pop() if len(counts) == 1 else None


def _ours(cell: Cell | None, sign: str, says_count: bool) -> str:
    if cell is None:
        return "-"
    text = " / ".join(_percent(cell.mean.get(m), cell.spread.get(m), sign) for m in SHOWN)
    return f"{text} (n={cell.count})" if says_count else text


def _record(record: Mapping[str, float]) -> str:
    return " / ".join(_percent(record.get(metric)) for metric in SHOWN) if record else "-"


def _head(board: Leaderboard) -> str:
    """What a cell holds."""
    text, same = f"{' / '.join(SHOWN.values())} in percent", _same_count(board)
    if same == 1 or not board.cells:
        return text
    return f"{text}; mean and sample standard deviation over {same or 'n'} seeds or divisions"


def markdown(board: Leaderboard) -> str:
    """A Markdown page."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rows = [
        line([f"*{cell}*" if paper and cell != "-" else cell for cell in cells]) for cells, paper in _lines(board, "±")
    ]
    rule = "| --- |" + " --- |" * len(board.columns)
    notes = [f"- {note}" for note in board.notes]
    return (
        "\n".join([f"# {board.title}", "", f"{_head(board)}.", "", line(["", *board.columns]), rule, *rows, "", *notes])
        + "\n"
    )


def comma_separated(board: Leaderboard) -> str:
    """CSV, one line per cell and origin ("ours" or "paper"), fractions."""
    out = io.StringIO()
    numbers = [f"{metric}_{kind}" for metric in METRICS for kind in ("mean", "spread")]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "column", "origin", "n", *numbers, "source"])
    for row in board.rows:
        for column in board.columns:
            cell = board.cells.get((row, column))
            if cell is not None:
                values = [side.get(metric) for metric in METRICS for side in (cell.mean, cell.spread)]
                writer.writerow([row, column, "ours", cell.count, *map(_number, values), ""])
            figure = board.papers.get(row, {}).get(column)
            if figure is not None:
                values = [v for metric in METRICS for v in (figure.record.get(metric), None)]
                writer.writerow([row, column, "paper", "", *map(_number, values), figure.source])
    return out.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


_SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def _tex(text: str) -> str:
    escaped = "".join(_SPECIAL.get(char, char) for char in text)
    return escaped.replace("->", r"$\rightarrow$").replace("±", r"$\pm$")


def latex(board: Leaderboard) -> str:
    """A booktabs table."""
    rows = []
    for cells, paper in _lines(board, "±"):
        texts = [_tex(cell) for cell in cells]
        rows.append(" & ".join(rf"\emph{{{t}}}" if paper and t != "-" else t for t in texts) + r" \\")
    head = " & ".join(["", *(_tex(column) for column in board.columns)]) + r" \\"
    notes = [f"% {note}" for note in board.notes]
    return "\n".join(
        [*notes, r"\begin{table}", r"\centering", rf"\caption{{{_tex(board.title)}. {_tex(_head(board))}.}}",
         rf"\begin{{tabular}}{{l{'c' * len(board.columns)}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule",
         r"\end{tabular}", r"\end{table}", ""]
    )  # fmt: skip


def html(board: Leaderboard) -> Markup:
    """The table for a page. Many columns beside few rows are turned, so that none runs out of the page."""
    lines = _lines(board, "±")
    shown = [[Markup("<em>{}</em>").format(cell) if paper else cell for cell in cells] for cells, paper in lines]
    headings = [column.replace("->", "→") for column in board.columns]
    if len(headings) > max(MANY_COLUMNS, len(shown)):
        turned = zip(headings, *[cells[1:] for cells in shown], strict=True)
        return table(["", *(cells[0] for cells in shown)], list(turned), caption=_head(board))
    return table(["", *headings], shown, caption=_head(board))
