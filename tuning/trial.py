"""One trial, as its driver function runs it inside a Tune actor: train the run (or continue it), score it, store the outcome.

Everything durable lies in the run and in the sweep's folder; the actor may die at any point and the next one continues.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from reid_dist import methods
from reid_dist.config import DataConfig, flatten, typed
from reid_dist.errors import RunError, UserError
from reid_dist.runs import Run, identity_of, ship_logs
from tuning.expand import DIGITS, Trial, trial_of
from tuning.search import LOSS, STEP, history
from tuning.state import DONE, SweepState
from tuning.sweep import Scoring, nested

logger = logging.getLogger("reid_dist.tuning.trial")


def drive(config: dict[str, Any]) -> dict[str, Any]:
    """Tune's trainable. `config`: {"trial": facts as JSON, "sweep": URI, "metric", "command"}; the returned dict is the last
    result: "ended" tells it from a trial that the scheduler stopped.
    """
    from jobs._job import set_up_logging

    set_up_logging()
    trial, state = trial_of(json.loads(config["trial"])), SweepState(config["sweep"])
    try:
        return run_trial(trial, state, config["metric"], config["command"])
    except (UserError, RunError) as error:
        reason = " ".join(str(error).split())
        logger.error("trial %s failed: %s", trial.name, reason)
        state.fail(trial.name, reason)
        return {"ended": "failed", "reason": reason}


def run_trial(trial: Trial, state: SweepState, metric: str, command: str) -> dict[str, Any]:
    """Train and score. Raises UserError, RunError."""
    from reid_dist.training.loaded import facts_dict
    from reid_dist.training.worker import open_data

    recipe = trial.recipe
    spec, data = methods.get(recipe.method), open_data(recipe)
    identity = identity_of(recipe, data.train.versions)
    if not trial.name.endswith(identity.digest[:DIGITS]):
        raise RunError(
            f"trial {trial.name}: data or code changed since it was planned (now {identity.digest[:DIGITS]})"
        )
    run = Run.open(recipe.uri, identity, recipe, command=command)
    if run.finished is None:
        run.describe(model_facts=facts_dict(spec.facts(data)), sweep=state.uri, label=trial.label)
        stopped = _train(trial, run, metric)
        if stopped:
            return {"ended": "interrupted", "reason": stopped}
    scores = _score(trial, run)
    value, checkpoint, selected_on = chosen(run, metric)
    seconds, hours = spent(run)
    state.end(
        trial.name, DONE, label=trial.label, setting=trial.setting, repeat=trial.repeat, uri=run.uri, metric=metric, value=value,
        step=run.latest_step(), checkpoint=checkpoint, selected_on=selected_on, scores=scores,
        seconds=seconds, gpu_hours=hours,
    )  # fmt: skip
    last = {} if value is None else {metric: value, STEP: run.latest_step()}
    return {"ended": "done", **last}


def _train(trial: Trial, run: Run, metric: str) -> str:
    """Train until done; returns why it stopped early, or nothing."""
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    from reid_dist.training.launch import fit, resources

    recipe = trial.recipe
    run.describe(gpus=recipe.training.num_workers * resources(recipe).get("GPU", 0.0))
    if metric:  # what an earlier attempt reported up to where this one continues
        for report in history(run.metrics(), metric, until=run.latest_step()):
            tune.report(report)
    with ship_logs(run, "driver"):
        try:
            summary = fit(recipe, run, callbacks=[TuneReportCallback()], bar=False)
        except (UserError, RunError) as error:
            code = 2 if isinstance(error, UserError) else 1
            run.write_record({"job": "train", "exit_code": code, "error": " ".join(str(error).split())})
            raise
    if "stopped" in summary:
        run.write_record({"job": "train", "exit_code": 1, "error": summary["stopped"]})
        return str(summary["stopped"])
    run.write_record(
        {
            "job": "train", "exit_code": 0, "run": run.uri, "method": recipe.method,
            "num_workers": recipe.training.num_workers, "zero_stage": recipe.training.zero_stage, "steps": summary["steps"],
            "device": summary["device"], "final_loss": summary["last"].get("loss"), "selection": summary["metrics"],
            "restarts": sum(note["kind"] == "restart" for note in run.notes()),
        }
    )  # fmt: skip
    return ""


def _score(trial: Trial, run: Run) -> list[dict[str, Any]]:
    """The trial's columns: scored here, or by a task on a GPU where the workers had one."""
    if not trial.scorings:
        return []
    import ray

    from reid_dist.training.launch import resources

    needs = resources(trial.recipe)
    if "GPU" not in needs:
        return [score(run.uri, scoring) for scoring in trial.scorings]
    task = ray.remote(num_cpus=needs["CPU"], num_gpus=needs["GPU"])(_score_all)
    scores: list[dict[str, Any]] = ray.get(task.remote(run.uri, trial.scorings))
    return scores


def _score_all(uri: str, scorings: tuple[Scoring, ...]) -> list[dict[str, Any]]:
    return [score(uri, scoring) for scoring in scorings]


def score(uri: str, scoring: Scoring) -> dict[str, Any]:
    """One column of a trained run: {"column", "protocol", "train", "test", "record": {metric: fraction}}. Raises UserError."""
    from jobs._words import RunOptions
    from jobs.evaluate import evaluate_run
    from reid_dist.data.store import open_view

    words = {"data.test": list(scoring.test), **flatten(nested(scoring.set))}
    overrides = [f"{key}={json.dumps(value)}" for key, value in words.items()]
    record = evaluate_run(uri, RunOptions(protocol=scoring.protocol), overrides)
    data = typed(DataConfig, Run.read(uri).facts["recipe"]["data"], "data")
    numbers = {
        key: value for key, value in record.items() if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    return {
        "column": scoring.name,
        "protocol": scoring.protocol,
        "test": list(scoring.test),
        "checkpoint": record["checkpoint"],
        "stored": record["stored"],
        "synthetic": any("synthetic" in table.facts.notes for table in open_view(data, scoring.test).tables),
        "record": numbers,
    }


def chosen(run: Run, metric: str) -> tuple[float | None, str, str]:
    """(metric on the selection split, checkpoint, split that chose it) of what `jobs.evaluate` takes as best."""
    kept = [c for c in run.checkpoints() if c["kept"]]
    scored = [c for c in kept if "rank1" in c["metrics"]]
    best = max(scored, key=lambda c: (c["metrics"]["rank1"], c["step"])) if scored else (kept[-1] if kept else None)
    if best is None:
        return None, "", "none"
    split = run.facts["recipe"]["training"]["select_on"] if scored else "none"
    if metric == LOSS:
        return last_report(run.metrics(), metric)["value"], str(best["name"]), split
    value = best["metrics"].get(metric) if metric else None
    return (None if value is None else float(value)), str(best["name"]), split


def spent(run: Run) -> tuple[float, float]:
    """(seconds over all attempts, GPU-hours; 0 where no GPU was used)."""
    card = run.card()
    seconds, last = float(card["seconds"]), card["attempts"][-1]
    if last["end"] is None:  # still running: the card counts up to its last note only
        seconds += time.time() - last["start"] - last["seconds"]
    return round(seconds, 1), seconds / 3600 * float(card.get("gpus", 0.0))


def last_report(metrics: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """{"value", "step"} of the newest judged report of a run."""
    reports = history(metrics, metric)
    return {"value": reports[-1][metric], "step": reports[-1][STEP]} if reports else {"value": None, "step": 0}
