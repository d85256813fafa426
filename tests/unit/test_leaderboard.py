"""The leaderboard: means and spreads, published figures apart from ours, four formats."""

from __future__ import annotations

import csv
import io
import math
import re
import statistics

import pytest

from reid_dist.reporting.leaderboard import (
    Leaderboard,
    Published,
    Score,
    build,
    comma_separated,
    html,
    latex,
    markdown,
)
from reid_dist.reporting.parallel import Line, parallel_coordinates

VALUES = {"seed=1": 0.50, "seed=2": 0.53, "seed=3": 0.56}


def board() -> Leaderboard:
    scores = [Score("comoe lr=1", "a -> b", {"mAP": v, "rank1": v + 0.1}, repeat) for repeat, v in VALUES.items()]
    scores.append(Score("comoe lr=1", "50 % & c_d", {"mAP": 0.25, "rank1": 0.5}, "seed=1"))
    scores.append(Score("comoe lr=2", "a -> b", {"mAP": 0.125, "rank1": 0.5}, "seed=1"))
    papers = [Published("comoe lr=1", "a -> b", {"mAP": 0.90, "rank1": 0.95}, "Table 7")]
    return build("experts", scores, papers, ["Checkpoints were chosen on: val."])


def test_means_and_spreads_are_those_of_the_statistics_module() -> None:
    cell = board().cells["comoe lr=1", "a -> b"]
    assert cell.count == 3
    assert math.isclose(cell.mean["mAP"], statistics.mean(VALUES.values()))
    assert math.isclose(cell.spread["mAP"] or 0, statistics.stdev(VALUES.values()))
    assert board().cells["comoe lr=2", "a -> b"].spread["mAP"] is None


def test_no_mean_contains_a_published_figure() -> None:
    scores = [Score("row", "a", {"mAP": v}, repeat) for repeat, v in VALUES.items()]
    without, beside = build("t", scores, []), build("t", scores, [Published("row", "a", {"mAP": 0.9}, "paper X")])
    assert without.cells == beside.cells
    rows = list(csv.DictReader(io.StringIO(comma_separated(beside))))
    assert [(row["origin"], row["mAP_mean"], row["source"]) for row in rows] == [
        ("ours", "0.530000", ""), ("paper", "0.900000", "paper X"),
    ]  # fmt: skip


def test_markdown_has_a_row_of_its_own_for_the_paper() -> None:
    lines = [line for line in markdown(board()).splitlines() if line.startswith("|")]
    assert len({line.count("|") - line.count("\\|") for line in lines}) == 1
    ours = next(line for line in lines if line.startswith("| comoe lr=1 "))
    paper = lines[lines.index(ours) + 1]
    assert "53.0 ± 3.0 / 63.0 ± 3.0 (n=3)" in ours
    assert "25.0 / 50.0 (n=1) |" in ours  # of one seed: said, because other cells have more
    assert paper.startswith("| *paper: Table 7* | *90.0 / 95.0* | - |")


def test_latex_escapes_and_counts_its_columns() -> None:
    text = latex(board())
    assert r"50 \% \& c\_d" in text
    assert r"a $\rightarrow$ b" in text
    assert r"\emph{paper: Table 7}" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {2}
    assert r"\begin{tabular}{lcc}" in text


def test_html_escapes() -> None:
    text = str(html(build("t", [Score("<b>row", "a", {"mAP": 0.5, "rank1": 0.5}, "")], [])))
    assert "&lt;b&gt;row" in text
    assert "<b>row" not in text


def test_two_scores_of_one_cell_are_refused() -> None:
    twice = [Score("row", "a", {"mAP": 0.5}, "seed=1")] * 2
    with pytest.raises(ValueError, match="two scores"):
        build("t", twice, [])
    with pytest.raises(ValueError, match="two published"):
        build("t", [], [Published("row", "a", {"mAP": v}, "x") for v in (0.5, 0.6)])


def points(svg: str) -> dict[str, list[tuple[float, float]]]:
    found = re.findall(r"class='line[^>]*d='M([^']*)'><title>(\w+)", svg)
    return {name: [tuple(map(float, p.split())) for p in path.split("L")] for path, name in found}  # type: ignore[misc]


def test_parallel_coordinates_put_larger_values_higher_and_draw_the_best_last() -> None:
    lines = [
        Line("low", {"lr": 1e-5, "arch": "a"}, 0.1),
        Line("best", {"lr": 1e-1, "arch": "b"}, 0.9, best=True),
        Line("middle", {"lr": 1e-3, "arch": "a"}, 0.5),
        Line("unknown", {"lr": 1e-3, "arch": "a"}, None),
    ]
    svg = str(parallel_coordinates(lines, ["lr", "arch"], "mAP"))
    drawn = points(svg)
    assert list(drawn)[-1] == "best"
    assert len(drawn["unknown"]) == 2  # it has no value yet
    lr = {name: path[0][1] for name, path in drawn.items()}
    assert lr["best"] < lr["middle"] < lr["low"]  # SVG counts downwards
    assert math.isclose(lr["middle"], (lr["best"] + lr["low"]) / 2, abs_tol=0.11)  # a logarithmic line
    assert drawn["low"][1] == drawn["middle"][1] != drawn["best"][1]
    assert drawn["best"][2][1] < drawn["middle"][2][1] < drawn["low"][2][1]
