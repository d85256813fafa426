"""The Tune side of a sweep: feed trials, keep the books, stop in order, leave nothing behind.

Tune is used for what it is good at (actors, retries, schedulers); its own resume is not, because it can neither be extended
nor read without unpickling. A driver function per trial runs a Ray Train job; `TuneReportCallback` streams its metrics.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from reid_dist.errors import RunError, UserError
from reid_dist.runs import Run
from reid_dist.storage import ray_storage
from tuning import groups
from tuning.expand import Trial
from tuning.feed import Next, make_feed, make_ledger
from tuning.search import STEP, OptunaChooser, history, make_scheduler, replay
from tuning.state import STOPPED, SweepState
from tuning.sweep import Sweep
from tuning.trial import drive

logger = logging.getLogger(__name__)

TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # reports between evaluations have no metric
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # runs keep their own metrics
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # its state is thrown away
}
STATUS_S = 60.0  # how often the log says where every running trial is, when that changed
GONE_S = 10.0  # how long placement groups may take to vanish after the last trial


@dataclass
class Books:
    """What this job did, shared between its threads."""

    sweep: Sweep
    state: SweepState
    command: str
    running: dict[str, Trial] = field(default_factory=dict)
    over_budget: bool = False
    names: dict[str, str] = field(default_factory=dict)  # tune's trial id -> ours
    started: list[str] = field(default_factory=list)
    closed: str = ""  # why nothing more is started
    trials: dict[str, Trial] = field(default_factory=dict)
    reports: dict[str, list[dict[str, float]]] = field(default_factory=dict)  # what the scheduler was shown, by trial
    reached: dict[str, int] = field(default_factory=dict)  # the last step that a trial reported

    def spent(self) -> bool:
        """Whether the GPU-hours of the budget are used up."""
        limit = self.sweep.budget.gpu_hours
        if limit is None or gpu_hours(self.state) < limit:
            return False
        self.over_budget = True
        return True

    def status(self) -> str:
        """How many trials of this job ended, and where the running ones are: a line of the log instead of a bar for each."""
        at = [f"{trial.label} {_where(self.reached.get(name))}" for name, trial in list(self.running.items())]
        return f"{len(self.started) - len(at)} ended in this job, {len(at)} running: {', '.join(at) or 'none'}"


def _where(step: int | None) -> str:
    return "starts" if step is None else f"past step {step}"


def gpu_hours(state: SweepState) -> float:
    """What all trials of the sweep that ended have used."""
    return float(sum(outcome.get("gpu_hours", 0.0) for outcome in state.outcomes().values()))


def queue(trials: Sequence[Trial]) -> Next:
    """The trials in order, then None."""
    waiting = list(trials)
    return lambda: waiting.pop(0) if waiting else None


def run_phase(
    books: Books, following: Next, concurrent: int, longest: int, chooser: OptunaChooser | None, judged: bool
) -> None:
    """Run what `following` gives until it gives no more, `concurrent` at a time. Raises RunError on interruption.

    `judged`: whether the sweep's scheduler looks on; `longest`: steps of the longest trial.
    """
    from ray import tune

    for key, value in TUNE_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    logging.getLogger("ray.tune.analysis").setLevel(
        logging.ERROR
    )  # it misses results of shared runs, which report nothing
    sweep, state = books.sweep, books.state
    scheduler = make_scheduler(sweep, longest) if judged else None
    if scheduler is not None:
        replay(scheduler, _earlier(books))
    path, filesystem = ray_storage(f"{state.uri}/ray")
    tuner = tune.Tuner(
        tune.with_resources(drive, dict(sweep.resources.driver)),
        tune_config=tune.TuneConfig(
            search_alg=make_feed(books, following), scheduler=scheduler, num_samples=-1, max_concurrent_trials=concurrent,
            trial_dirname_creator=lambda trial: trial.trial_id, reuse_actors=False,
        ),
        run_config=tune.RunConfig(
            name=f"tune-{time.time_ns()}", storage_path=path, storage_filesystem=filesystem, verbose=0,
            failure_config=tune.FailureConfig(max_failures=sweep.resources.max_failures),
            callbacks=[make_ledger(books, chooser)],
        ),
    )  # fmt: skip
    try:
        _watch(books, tuner.fit)
    finally:
        state.store.delete_tree("ray")
        leftover = groups.remove_all(GONE_S)
        if leftover:
            logger.warning("%d placement groups of this job were left after %.0f s and were removed", leftover, GONE_S)


def _earlier(books: Books) -> dict[str, list[dict[str, float]]]:
    """Reports of the trials of this sweep that ended in earlier jobs, by name."""
    metric = books.sweep.metric
    ended = {name: outcome for name, outcome in books.state.outcomes().items() if name in books.trials}
    found = {name: o.get("reports") or history(Run.read(o["uri"]).metrics(), metric) for name, o in ended.items()}
    return {name: reports for name, reports in found.items() if reports}


def _watch(books: Books, fit: Callable[[], Any]) -> None:
    """Run Tune beside the main thread, which stays free for signals: an interrupt asks every trial to stop with a checkpoint."""
    failed: list[BaseException] = []
    done = threading.Event()

    def target() -> None:
        try:
            fit()
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    threading.Thread(target=target, name="ray-tune-fit", daemon=True).start()
    said, due = "", time.monotonic() + STATUS_S
    while not done.is_set():
        try:
            time.sleep(0.5)
            if time.monotonic() > due:
                due, status = time.monotonic() + STATUS_S, books.status()
                if status != said:
                    logger.info("%s", status)
                said = status
            groups.remove_orphans()  # the room of a trial that was stopped is the next one's at once
            if books.closed:
                _ask_to_stop(books)
        except (KeyboardInterrupt, RunError) as interrupt:
            if books.closed:
                raise
            books.closed = str(interrupt) or "interrupted"
            logger.warning("%s: asking %d trials to checkpoint and stop", books.closed, len(books.running))
    if failed:
        raise RunError(f"Ray Tune ended with {type(failed[0]).__name__}: {failed[0]}") from failed[0]
    if books.closed:
        raise RunError(f"{books.closed}; the same command continues the sweep")


def _ask_to_stop(books: Books) -> None:
    """Again and again, because a trial that is just starting has no attempt yet that could be asked."""
    for trial in list(books.running.values()):
        try:
            run = Run.read(trial.recipe.uri)
            if run.attempt and not run.stop_requested():
                run.request_stop(books.closed)
        except (UserError, RunError) as error:
            logger.debug("%s cannot be asked yet: %s", trial.name, error)


def stopped_early(books: Books, trial: Trial) -> dict[str, Any] | None:
    """The scheduler ended a trial: store that, unless it ended by itself in the same moment. Returns the outcome."""
    from tuning.trial import spent

    try:
        run = Run.read(trial.recipe.uri)
        metric = books.sweep.metric
        reports = books.reports.get(trial.name, [])  # the run's own may not be stored yet
        last = {"value": reports[-1][metric], "step": reports[-1][STEP]} if reports else {"value": None, "step": 0}
        seconds, hours = spent(run)
        facts = {"label": trial.label, "setting": dict(trial.setting), "repeat": dict(trial.repeat), "uri": run.uri}
        chose = {"metric": metric, "selected_on": trial.recipe.training.select_on}
        if books.state.end(
            trial.name, STOPPED, **facts, **chose, **last, reports=reports, scores=[], seconds=seconds, gpu_hours=hours
        ):
            reason = f"stopped early by the sweep's scheduler ({books.sweep.scheduler.name}) at step {last['step']}"
            run.write_record({"job": "train", "exit_code": 1, "error": reason})
            logger.info("%s (%s): %s", trial.name, trial.label, reason)
    except (UserError, RunError) as error:
        logger.error("the end of %s could not be stored: %s", trial.name, error)
        return None
    return books.state.outcomes().get(trial.name)


def payload(books: Books, trial: Trial) -> dict[str, Any]:
    """What a trial's driver gets."""
    return {
        "trial": json.dumps(trial.facts()),
        "sweep": books.state.uri,
        "metric": books.sweep.metric if trial.scorings else "",
        "command": books.command,
    }
