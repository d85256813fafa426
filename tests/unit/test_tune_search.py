"""Schedulers that are shown what earlier jobs saw, Optuna that is rebuilt from records, and a sweep's books. No Ray cluster."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reid_dist.config import RecipeError
from reid_dist.errors import UserError
from tuning.driver import Books, queue
from tuning.expand import expand
from tuning.feed import make_feed, make_ledger
from tuning.run import refuse_moving_stages
from tuning.search import STEP, OptunaChooser, history, make_scheduler, replay, warm_start
from tuning.state import DONE, STOPPED, SweepState
from tuning.sweep import Sweep, build_sweep

STEPS = (10, 20, 40)


def sweep_of(**sections: Any) -> Sweep:
    return build_sweep({"name": "s", "base": "comoe/tiny", "metric": "mAP", **sections})


def reports(level: float) -> list[dict[str, float]]:
    return [{STEP: step, "mAP": level} for step in STEPS]


class Fresh:
    """A running trial, as a scheduler sees it."""

    status = "RUNNING"

    def __init__(self, name: str) -> None:
        self.trial_id = name


class Controller:
    def get_live_trials(self) -> list[Any]:
        return []


def first_stop(scheduler: Any, name: str, level: float) -> int | None:
    """The step at which the scheduler stops a trial that reports `level` throughout."""
    trial = Fresh(name)
    scheduler.on_trial_add(Controller(), trial)
    for report in reports(level):
        if scheduler.on_trial_result(Controller(), trial, dict(report)) == "STOP":
            return int(report[STEP])
    return None


@pytest.mark.parametrize(
    "section", [{"name": "asha", "grace": 10, "reduction": 2}, {"name": "median", "grace": 10, "samples": 2}]
)
def test_what_earlier_jobs_saw_counts(section: dict[str, Any]) -> None:
    sweep = sweep_of(scheduler=section)
    assert first_stop(make_scheduler(sweep, 40), "bad", 0.1) is None  # alone, nothing is bad
    taught = make_scheduler(sweep, 40)
    replay(taught, {"a": reports(0.5), "b": reports(0.6), "c": reports(0.7)})
    assert first_stop(taught, "bad", 0.1) == 10
    assert first_stop(taught, "good", 0.9) is None


def test_a_trial_at_its_last_step_is_not_stopped_for_being_there() -> None:
    scheduler = make_scheduler(sweep_of(scheduler={"name": "asha", "grace": 10}), longest=40)
    assert first_stop(scheduler, "only", 0.3) is None


def test_history_holds_evaluations_up_to_where_a_run_continues() -> None:
    metrics = [
        {"kind": "step", "step": 1, "loss": 3.0},
        {"kind": "eval", "step": 2, "mAP": 0.1},
        {"kind": "step", "step": 3, "loss": 2.0},
        {"kind": "eval", "step": 4, "mAP": 0.2},
    ]
    assert history(metrics, "mAP") == [{STEP: 2, "mAP": 0.1}, {STEP: 4, "mAP": 0.2}]
    assert history(metrics, "mAP", until=2) == [{STEP: 2, "mAP": 0.1}]
    assert history(metrics, "loss") == [{STEP: 1, "loss": 3.0}, {STEP: 3, "loss": 2.0}]


AXES = {"optim.lr": {"low": 1e-5, "high": 1e-1, "log": True}, "model.losses": [["sdm"], ["sdm", "itc"]]}


def optuna_sweep(**sections: Any) -> Sweep:
    return sweep_of(axes=AXES, search={"name": "optuna", "samples": 5, **sections.pop("search", {})}, **sections)


def score(setting: dict[str, Any]) -> float:
    """Best at lr 1e-3 with both losses."""
    import math

    return 1.0 - abs(math.log10(setting["optim.lr"]) + 3) / 4 - (0.3 if len(setting["model.losses"]) == 1 else 0.0)


def test_optuna_learns_from_the_records_of_earlier_jobs() -> None:
    first, outcomes = OptunaChooser(optuna_sweep()), []
    for number in range(30):
        handle, setting = first.ask()
        first.began(f"t{number}", handle)
        outcome = {"status": DONE, "setting": setting, "value": score(setting), "metric": "mAP", "step": 9}
        first.tell(f"t{number}", outcome)
        outcomes.append(outcome)
    again = OptunaChooser(optuna_sweep())
    assert again.learn(outcomes) == 30
    assert again.study.best_value == first.study.best_value
    blind, taught = [], []
    for seed in range(2, 6):
        fresh = OptunaChooser(optuna_sweep(search={"seed": seed}))
        blind += [score(fresh.ask()[1]) for _ in range(4)]
        knows = OptunaChooser(optuna_sweep(search={"seed": seed}))
        knows.learn(outcomes)
        taught += [score(knows.ask()[1]) for _ in range(4)]
    assert sum(taught) / 16 > sum(blind) / 16 + 0.1


def test_stopped_and_failed_trials_are_told_apart() -> None:
    chooser = OptunaChooser(optuna_sweep())
    for name in ("stopped", "failed", "done"):
        handle, _ = chooser.ask()
        chooser.began(name, handle)
        outcomes = {
            "stopped": {"status": STOPPED, "value": 0.2, "step": 10},
            "failed": None,
            "done": {"status": DONE, "value": 0.5, "step": 40},
        }
        chooser.tell(name, outcomes[name])
    states = [trial.state.name for trial in chooser.study.trials]
    assert states == ["PRUNED", "FAIL", "COMPLETE"]
    assert chooser.study.trials[0].intermediate_values == {10: 0.2}


def test_what_optuna_cannot_do_is_refused() -> None:
    with pytest.raises(RecipeError, match="one recipe, one split and at most one seed"):
        OptunaChooser(optuna_sweep(protocol={"seeds": [1, 2]}))
    with pytest.raises(RecipeError, match="not from mean and std"):
        OptunaChooser(sweep_of(axes={"optim.lr": {"mean": 1.0, "std": 1.0}}, search={"name": "optuna", "samples": 2}))
    shared = [{"name": "p", "set": {}, "then": {}, "without": ["optim.lr"]}]
    with pytest.raises(RecipeError, match=r"depends on model\.losses"):
        refuse_moving_stages(optuna_sweep(shared=shared))


def earlier(folder: Path, **facts: Any) -> str:
    state = SweepState(str(folder))
    state.write_index(optuna_sweep(), ["t"])
    outcome = {"setting": {"optim.lr": 1e-3, "model.losses": ["sdm"]}, "value": 0.5, "metric": "mAP", "step": 3}
    state.end("t", DONE, **(outcome | facts))
    return str(folder)


def test_warm_start_reads_other_sweeps_or_says_why_not(tmp_path: Path) -> None:
    good = earlier(tmp_path / "good")
    sweep = optuna_sweep(search={"warm_start": [good]})
    assert warm_start(OptunaChooser(sweep), sweep) == 1
    for name, facts in {"axes": {"setting": {"optim.eps": 1.0}}, "range": {"setting": {"optim.lr": 5.0, "model.losses": ["sdm"]}},
                        "metric": {"metric": "rank1"}}.items():  # fmt: skip
        other = optuna_sweep(search={"warm_start": [earlier(tmp_path / name, **facts)]})
        with pytest.raises(UserError, match="no ended trial with these axes"):
            warm_start(OptunaChooser(other), other)
    missing = optuna_sweep(search={"warm_start": [str(tmp_path / "nowhere")]})
    with pytest.raises(UserError, match="there is no sweep"):
        warm_start(OptunaChooser(missing), missing)


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("sweep.json", b"{"),
        ("sweep.json", b'{"sweep": {"nam": 1}, "trials": []}'),
        ("sweep.json", b'{"trials": []}'),
        ("outcomes/t.json", b"\x00"),
        ("outcomes/t.json", b"[]"),
    ],
)
def test_an_earlier_sweep_that_cannot_be_read_is_the_users_to_mend(tmp_path: Path, key: str, content: bytes) -> None:
    SweepState(earlier(tmp_path / "s")).store.write(key, content)
    with pytest.raises(UserError, match="cannot be read"):
        SweepState.read(str(tmp_path / "s"))


def test_an_outcome_is_written_once(tmp_path: Path) -> None:
    state = SweepState(str(tmp_path / "s"))
    state.fail("t", "a node died")
    assert state.failures()["t"]["reason"] == "a node died"
    assert state.end("t", DONE, value=0.5)
    assert not state.end("t", STOPPED, value=0.1)
    assert (state.outcomes()["t"]["status"], state.outcomes()["t"]["value"]) == (DONE, 0.5)
    assert state.failures() == {}


def trials_of(sweep: Sweep) -> list[Any]:
    return expand(sweep, lambda recipe: hashlib.sha256(str(recipe.optim.lr).encode()).hexdigest()).trials


def test_no_trial_starts_once_the_gpu_hours_are_used_up(tmp_path: Path) -> None:
    """The budget counts what earlier jobs used; those that run end by themselves."""
    from ray.tune.search import Searcher

    rates = {"optim.lr": [1e-3, 1e-4, 1e-5]}
    sweep = sweep_of(output=str(tmp_path), axes=rates, budget={"gpu_hours": 3.0})
    trials, state = trials_of(sweep), SweepState(sweep.uri)
    state.end("of-an-earlier-job", DONE, gpu_hours=1.0)
    books = Books(sweep, state, "", trials={trial.name: trial for trial in trials})
    feed = make_feed(books, queue(trials))
    assert json.loads(feed.suggest("a")["trial"])["setting"] == {"optim.lr": 1e-3}
    state.end(trials[0].name, DONE, gpu_hours=1.5)
    assert feed.suggest("b") != Searcher.FINISHED
    state.end(trials[1].name, STOPPED, gpu_hours=0.5)
    assert feed.suggest("c") == Searcher.FINISHED
    assert (books.started, books.over_budget) == ([trial.name for trial in trials[:2]], True)


def test_a_closed_sweep_starts_nothing_more(tmp_path: Path) -> None:
    from ray.tune.search import Searcher

    sweep = sweep_of(output=str(tmp_path), axes={"optim.lr": [1e-3]})
    books = Books(sweep, SweepState(sweep.uri), "", closed="ended by signal SIGTERM")
    assert make_feed(books, queue(trials_of(sweep))).suggest("a") == Searcher.FINISHED


def test_the_log_says_where_every_trial_is(tmp_path: Path) -> None:
    """Instead of a progress bar for each, which would overwrite each other."""
    import types

    sweep = sweep_of(output=str(tmp_path), axes={"optim.lr": [1e-3, 1e-4, 1e-5]})
    trials = trials_of(sweep)
    books = Books(sweep, SweepState(sweep.uri), "", trials={trial.name: trial for trial in trials})
    feed, ledger = make_feed(books, queue(trials)), make_ledger(books, None)
    running = {name: types.SimpleNamespace(trial_id=name, last_result={"ended": "failed"}) for name in "abc"}
    for name, trial in running.items():
        feed.suggest(name)
        ledger.on_trial_start(0, [], trial)
    ledger.on_trial_result(0, [], running["b"], {"step": 94, "loss": 1.0})
    ledger.on_trial_complete(0, [], running["c"])
    labels = [trial.label for trial in trials]
    assert books.status() == f"1 ended in this job, 2 running: {labels[0]} starts, {labels[1]} past step 94"


def test_a_private_cluster_does_not_silence_a_sweep() -> None:
    """ray.init applies this configuration in the driver (jobs/_cluster.py); plan and trials are said after it."""
    lines = """
import logging, ray
from jobs._job import set_up_logging
set_up_logging()
ray.LoggingConfig(log_level="ERROR")._apply()
logging.getLogger("tuning.feed").info("trial one")
logging.getLogger("reid_dist.jobs.tune").info("plan: trials = 8")
logging.getLogger("another").info("not ours")
"""
    said = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True).stderr
    assert [line.partition(": ")[2] for line in said.splitlines()] == ["trial one", "plan: trials = 8"]
