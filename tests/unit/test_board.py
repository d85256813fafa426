"""The leaderboard of a stored sweep: `jobs.report SWEEP` alone, what is best and who said so, the page."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest

from jobs import report, train
from reid_dist import methods
from tests.stored_sweep import identify, store_sweep
from tests.worlds import small_table
from tuning.board import best_trial, ranking
from tuning.expand import Trial, expand
from tuning.page import CURVES, learning_curves, trial_names
from tuning.state import SweepState
from tuning.sweep import Sweep, build_sweep

RATES = [1e-3, 1e-4, 1e-5]
LEVEL = {1e-3: 0.3, 1e-4: 0.6, 1e-5: 0.5}


def sweep_of(folder: Path, **sections: Any) -> Sweep:
    facts = {"name": "s", "base": "comoe/tiny", "output": str(folder), "metric": "mAP", "axes": {"optim.lr": RATES}}
    return build_sweep({**facts, "protocol": {"seeds": [1, 2]}, **sections})


def by_rate(trial: Trial) -> float:
    return LEVEL[trial.recipe.optim.lr] + 0.01 * trial.recipe.seed


def stored(sweep: Sweep) -> tuple[dict[str, Any], dict[str, Any]]:
    state = SweepState.read(sweep.uri)
    return state.planned(), state.outcomes()


def test_report_alone_writes_every_format_and_a_recipe_that_train_takes(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    store_sweep(sweep, by_rate)
    record = report.main([sweep.uri, f"out={tmp_path}/elsewhere.html"])
    assert record["best"]["row"] == "comoe lr=0.0001"
    assert record["best"]["value"] == pytest.approx(0.62)  # the better seed of the best row
    found = {path.suffix for path in Path(sweep.uri).glob("leaderboard.*")}
    assert found == {".md", ".csv", ".tex", ".html"}
    assert (tmp_path / "elsewhere.html").read_text() == (Path(sweep.uri) / "leaderboard.html").read_text()
    recipe = methods.load_recipe(record["best"]["recipe"])
    assert (recipe.optim.lr, recipe.seed, recipe.data.test) == (1e-4, 2, ("synthetic-cuhk-pedes",))
    small_table(tmp_path, "synthetic-cuhk-pedes")
    words = [record["best"]["recipe"], f"data.root={tmp_path}", f"output={tmp_path}/runs", "--plan"]
    plan = train.main(words)["plan"]
    assert "s-best" in str(plan)
    assert not (tmp_path / "runs").exists()


def test_what_is_best_on_test_does_not_win(tmp_path: Path) -> None:
    """The selection split orders the rows, whatever the columns show."""
    sweep = sweep_of(tmp_path)
    store_sweep(sweep, by_rate, score=lambda trial: 1.0 - by_rate(trial))
    report.main([sweep.uri])
    text = (Path(sweep.uri) / "leaderboard.md").read_text()
    assert re.findall(r"^\| comoe lr=(\S+)", text, re.M) == ["0.0001", "1e-05", "0.001"]
    assert "by mAP (max) on the selection split, never on what the columns show" in text
    assert "Checkpoint of each trial: the best on split val." in text
    cells = list(csv.DictReader(io.StringIO((Path(sweep.uri) / "leaderboard.csv").read_text())))
    assert [float(cell["mAP_mean"]) for cell in cells] == pytest.approx([0.385, 0.485, 0.685])


def test_a_row_that_is_not_whole_comes_last_and_the_mode_counts(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    (halted,) = [
        trial.name
        for trial in expand(sweep, identify).trials
        if (trial.recipe.optim.lr, trial.recipe.seed) == (1e-4, 1)
    ]
    store_sweep(sweep, by_rate, stop={halted: 4})
    planned, outcomes = stored(sweep)
    assert ranking(sweep, planned, outcomes) == ["comoe lr=1e-05", "comoe lr=0.001", "comoe lr=0.0001"]
    least = sweep_of(tmp_path, mode="min")
    assert ranking(least, planned, outcomes)[0] == "comoe lr=0.001"
    assert outcomes[best_trial(least, planned, outcomes)]["repeat"] == {"seed": 1}
    only = {halted: outcomes[halted]}
    assert best_trial(sweep, planned, only) == ""
    report.main([sweep.uri])
    text = (Path(sweep.uri) / "leaderboard.md").read_text()
    assert "5 trials done" in text
    assert "so below the others: comoe lr=0.0001." in text
    assert re.search(r"^\| comoe lr=0.0001 \|.*\(n=1\) \|$", text, re.M)


def test_a_sweep_that_just_began_has_a_page_that_says_so(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    store_sweep(sweep, by_rate, stop={trial.name: 0 for trial in expand(sweep, identify).trials})
    assert report.main([sweep.uri])["best"] is None
    page = (Path(sweep.uri) / "leaderboard.html").read_text()
    assert "0 of 6 trials ended" in page
    assert page.count("not ended") == 6
    assert not (Path(sweep.uri) / "best.yaml").exists()


def test_paper_figures_stand_under_the_row_they_name(tmp_path: Path) -> None:
    paper = [{"column": "synthetic-cuhk-pedes", "label": "comoe lr=0.001", "mAP": 90.0, "source": "table 9"}]
    sweep = sweep_of(tmp_path, paper=paper)
    store_sweep(sweep, by_rate)
    report.main([sweep.uri])
    lines = (Path(sweep.uri) / "leaderboard.md").read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("| comoe lr=0.001 "))
    assert lines[place + 1].startswith("| *paper: table 9* | *90.0 / -* |")
    assert sum("90.0" in line for line in lines) == 1


@pytest.fixture
def single_source(tmp_path: Path) -> Sweep:
    """Stored: four sources, twelve pairs, two seeds, nothing chosen."""
    protocol = {"splits": ["ss"], "seeds": [1, 2]}
    sweep = sweep_of(tmp_path, axes={}, base="muva/market1501_to_msmt17", metric="", protocol=protocol)
    store_sweep(sweep, lambda trial: 0.4)
    report.main([sweep.uri])
    return sweep


def test_the_page_tells_trials_apart_and_says_where_the_numbers_come_from(single_source: Sweep) -> None:
    planned, outcomes = stored(single_source)
    names = trial_names(planned)
    assert len(set(names.values())) == len(outcomes) == 8
    assert "muva dukemtmc-reid seed=2" in names.values()
    (losses,) = learning_curves(single_source, outcomes, names)
    assert len(losses.series) == CURVES  # not more than there are line styles
    page = (Path(single_source.uri) / "leaderboard.html").read_text()
    assert "Parallel coordinates" not in page  # no axes
    for telling in ("GPU-hours", "python -m jobs.tune FILE", "boto3", "1, 2"):
        assert telling in page


def test_a_table_with_many_columns_is_turned_on_the_page_alone(single_source: Sweep) -> None:
    page = (Path(single_source.uri) / "leaderboard.html").read_text()
    assert "<th scope=row>market-1501 → dukemtmc-reid</th>" in page
    lines = (Path(single_source.uri) / "leaderboard.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| muva"))
    assert row.count("36.0 ± 0.0 / 46.0 ± 0.0") == 12
