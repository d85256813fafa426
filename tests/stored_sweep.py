"""Sweeps as `jobs.tune` leaves them in storage, with scripted outcomes instead of trainings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from reid_dist.config import Recipe
from reid_dist.runs import Run, identity_of
from tuning.expand import Trial, expand
from tuning.state import DONE, STOPPED, SweepState
from tuning.sweep import Sweep

Value = Callable[[Trial], float]  # what a trial reaches at its end, a fraction


def identify(recipe: Recipe) -> str:
    """The identity that `store_sweep` gives its runs: there is no data."""
    return identity_of(recipe, {}).digest


def store_sweep(
    sweep: Sweep, value: Value, *, score: Value | None = None, epochs: int = 10, stop: Mapping[str, int] | None = None
) -> SweepState:  # fmt: skip
    """Store every trial as done, with `value` as the metric on the selection split and `score` (default: a tenth less) on each
    column.

    `stop`: {trial name: epoch after which the scheduler ended it}; those have no scores, and with 0 epochs no outcome.
    """
    state, stop = SweepState(sweep.uri), stop or {}
    trials = [trial for trial in expand(sweep, identify).trials if trial.scorings]
    state.write_index(sweep, [trial.name for trial in trials])
    for trial in trials:
        state.plan(trial)
        last = stop.get(trial.name, epochs)
        if not last:
            continue
        run = store_run(trial, value(trial), epochs, last)
        reached = 0.9 * value(trial) if score is None else score(trial)
        ended = DONE if last == epochs else STOPPED
        curve = approach(value(trial), epochs)[:last]
        scores = [] if ended == STOPPED else [_score(scoring, reached) for scoring in trial.scorings]
        state.end(
            trial.name, ended, label=trial.label, setting=dict(trial.setting), repeat=dict(trial.repeat), uri=run.uri,
            metric=sweep.metric, value=curve[-1] if sweep.metric else None, step=10 * last, checkpoint="", scores=scores,
            selected_on=trial.recipe.training.select_on, seconds=60.0 * last, gpu_hours=last / 60,
            **({"reports": [{"step": 10 * (i + 1), sweep.metric: v} for i, v in enumerate(curve)]} if ended == STOPPED else {}),
        )  # fmt: skip
    return state


def approach(value: float, epochs: int) -> list[float]:
    """A learning curve that ends at `value`."""
    return [value * (1 - 0.6 ** (epoch + 1)) / (1 - 0.6**epochs) for epoch in range(epochs)]


def store_run(trial: Trial, value: float, epochs: int, last: int) -> Run:
    """A run with its metrics and record."""
    run = Run.open(trial.recipe.uri, identity_of(trial.recipe, {}), trial.recipe, command="python -m jobs.tune FILE")
    for epoch, reached in enumerate(approach(value, epochs)[:last], start=1):
        run.write_metrics({"kind": "step", "step": 10 * epoch, "loss": 3.0 * (1 - reached)})
        run.write_metrics({"kind": "eval", "step": 10 * epoch, "mAP": reached, "rank1": reached})
    run.write_record({"job": "train", "exit_code": 0 if last == epochs else 1})
    return run


def _score(scoring: Any, value: float) -> dict[str, Any]:
    facts = dataclasses.asdict(scoring)
    record = {"mAP": value, "rank1": min(1.0, value + 0.1)}
    return {"column": facts["name"], "protocol": facts["protocol"], "test": list(facts["test"]), "checkpoint": "last",
            "stored": "", "synthetic": False, "record": record}  # fmt: skip
