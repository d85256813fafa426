"""A sweep from its file to its leaderboard: plan, shared runs, trials, leaderboard."""

from __future__ import annotations

import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from reid_dist.config import RecipeError
from reid_dist.errors import RunError, UserError
from reid_dist.storage import open_store
from tuning.axes import Setting
from tuning.capacity import NodeShape
from tuning.checks import Checker
from tuning.expand import Expansion, Trial, expand
from tuning.plan import Plan, make_plan
from tuning.search import OptunaChooser, warm_start
from tuning.state import SweepState
from tuning.sweep import Axis, SideTable, Sweep

logger = logging.getLogger(__name__)

ASKS = 200  # suggestions that may be refused in a row


def prepare(sweep: Sweep, shapes: Sequence[NodeShape], side_tables: bool = True) -> tuple[Plan, Checker]:
    """Expand and check a sweep; `side_tables` False: some are not made yet.

    Raises UserError: a wrong file, or an earlier sweep (in its place, or of search.warm_start) that cannot be read.
    """
    checker, state = Checker(sweep, side_tables), SweepState(sweep.uri)
    outcomes: dict[str, Any] = {}
    if state.exists:
        state.index()
        outcomes = state.outcomes()
    if sweep.search.name != "optuna":
        return make_plan(sweep, expand(sweep, checker.identify), checker, shapes, outcomes), checker
    refuse_moving_stages(sweep)
    warm_start(OptunaChooser(sweep), sweep)  # what it cannot read or draw from is said before anything starts
    known = _asked_before(sweep, state, checker) if state.exists else Expansion()
    probe = expand(sweep, checker.identify, iter([{key: _any(axis) for key, axis in sweep.axes.items()}]))
    limit = min(sweep.search.samples or 0, sweep.budget.trials or sys.maxsize)
    samples = max(0, limit - sum(bool(trial.scorings) for trial in known.trials))
    plan = make_plan(sweep, known, checker, shapes, outcomes, samples)
    tried = make_plan(sweep, probe, checker, shapes, {})
    plan.problems += [problem for problem in tried.problems if problem not in plan.problems]
    plan.longest = max(plan.longest, tried.longest)
    fresh = [run for run in tried.shared if run.name not in {r.name for r in plan.shared}]
    plan.shared += fresh
    plan.waiting = [*(run for run in fresh if run.name not in outcomes), *plan.waiting]
    return plan, checker


def refuse_moving_stages(sweep: Sweep) -> None:
    """Raises RecipeError when Optuna would need a shared run per suggestion."""
    for stage in sweep.shared:
        moving = sorted(set(sweep.axes) - set(stage.without))
        if moving:
            raise RecipeError(
                f"shared.{stage.name} depends on {', '.join(moving)}, which optuna chooses trial by trial: name them in "
                "`without` if the stage does not see them, or take search.name=random"
            )


def _any(axis: Axis) -> Any:
    if axis.values:
        return axis.values[0]
    value = axis.low if axis.low is not None else axis.mean
    return round(value or 0) if axis.integer else value


def _asked_before(sweep: Sweep, state: SweepState, checker: Checker) -> Expansion:
    """The trials that Optuna chose in earlier jobs, as far as data and code are still the same."""
    planned = state.planned()
    settings: list[Setting] = [dict(f["setting"]) for f in planned.values() if set(f["setting"]) == set(sweep.axes)]
    known = expand(sweep, checker.identify, iter(settings))
    known.trials = [trial for trial in known.trials if trial.name in planned or not trial.scorings]
    known.problems = []
    return known


def missing_side_tables(sweep: Sweep, root: str) -> list[str]:
    """Side tables and files of the sweep that are not there yet, by name."""
    return [table.name for table in sweep.side_tables if not _is_there(table, root.rstrip("/"))]


def _is_there(table: SideTable, root: str) -> bool:
    if table.file:
        return bool(open_store(root).exists(table.file))
    return bool(open_store(f"{root}/tables/{table.name}.side.lance").list("_versions/"))


def make_side_tables(sweep: Sweep, root: str) -> None:
    """Run the jobs that make what is missing, one after the other. Raises RunError, UserError."""
    missing = missing_side_tables(sweep, root)
    for table in sweep.side_tables:
        words = shlex.split(table.make.replace("{root}", root))
        if not words or not words[0].startswith(("jobs.", "reid_dist.")):
            raise UserError(
                f"side_tables.{table.name}: make={table.make!r} must name a job, for example jobs.generate ..."
            )
        if table.name not in missing:
            continue
        logger.info("side table %s: python -m %s", table.name, shlex.join(words))
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
        if done.returncode:
            tail = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RunError(f"side table {table.name} could not be made (exit {done.returncode}): {tail}")
    still = missing_side_tables(sweep, root)
    if still:
        raise RunError(f"the jobs of side_tables ran, but {', '.join(still)} are still not under {root}")


def execute(sweep: Sweep, plan: Plan, checker: Checker, command: str) -> dict[str, Any]:
    """Run what waits; returns the job's record. Raises RunError when trials failed or the job was interrupted."""
    from tuning.driver import Books, gpu_hours, queue, run_phase

    began, state = time.time(), SweepState(sweep.uri)
    books = Books(sweep, state, command, trials={trial.name: trial for trial in (*plan.shared, *plan.trials)})
    state.write_index(sweep, [trial.name for trial in plan.trials])
    for trial in plan.waiting:
        state.plan(trial)
    for level in range(len(sweep.shared)):
        runs = [trial for trial in plan.waiting if not trial.scorings and trial.level == level]
        if runs:
            run_phase(books, queue(runs), plan.concurrent, plan.longest, None, judged=False)
    trials, blocked = unblocked(state, [trial for trial in plan.waiting if trial.scorings])
    chooser = None
    following = queue(trials)
    if sweep.search.name == "optuna":
        chooser = OptunaChooser(sweep)
        warm_start(chooser, sweep)
        chooser.learn(plan.outcomes.values())
        following = Asking(books, checker, chooser, trials, plan.samples)
    if trials or plan.samples:
        judged = sweep.scheduler.name != "none"
        run_phase(books, following, plan.concurrent, plan.longest, chooser, judged)
    return summary(books, plan, blocked, gpu_hours(state)) | {"seconds_running": round(time.time() - began, 1)}


def unblocked(state: SweepState, trials: list[Trial]) -> tuple[list[Trial], int]:
    """Trials whose shared runs are done; the others fail with that reason."""
    outcomes, free = state.outcomes(), []
    for trial in trials:
        lacking = [name for name in trial.needs if name not in outcomes]
        if lacking:
            state.fail(trial.name, f"the shared run {', '.join(lacking)} that it starts from failed")
        else:
            free.append(trial)
    return free, len(trials) - len(free)


class Asking:
    """The trials of a sweep that Optuna chooses: first those that it chose in earlier jobs, then new ones."""

    def __init__(
        self, books: Any, checker: Checker, chooser: OptunaChooser, waiting: list[Trial], samples: int
    ) -> None:
        self.books, self.checker, self.chooser = books, checker, chooser
        self.waiting, self.samples = list(waiting), samples

    def __call__(self) -> Trial | None:
        """The next trial, or None. Raises RecipeError when no suggestion satisfies the constraints."""
        if self.waiting:
            return self.waiting.pop(0)
        if not self.samples:
            return None
        for _ in range(ASKS):
            handle, setting = self.chooser.ask()
            found = expand(self.books.sweep, self.checker.identify, iter([setting]))
            fresh = [trial for trial in found.trials if trial.scorings and trial.name not in self.books.trials]
            for problem in found.problems:
                logger.warning("suggestion refused: %s: %s", problem.label, problem.reason)
            if not fresh:
                self.chooser.refuse(handle)
                continue
            self.samples -= 1
            trial = fresh[0]
            self.chooser.began(trial.name, handle)
            self.books.trials[trial.name] = trial
            self.books.state.plan(trial)
            names = [name for name, known in self.books.trials.items() if known.scorings]
            self.books.state.write_index(self.books.sweep, names)
            return trial
        logger.warning("optuna found no new setting that the constraints allow in %d tries; the sweep ends here", ASKS)
        return None


def summary(books: Any, plan: Plan, blocked: int, hours: float) -> dict[str, Any]:
    """The record of a sweep that ran to its end. Raises RunError when trials failed."""
    outcomes, failures = books.state.outcomes(), books.state.failures()
    failed = {name: failures[name]["reason"] for name in books.trials if name in failures}
    if failed:
        name, reason = next(iter(failed.items()))
        raise RunError(
            f"{len(failed)} of {len(books.trials)} runs failed ({blocked} because of a shared run); {name}: {reason}. The same "
            "command tries them again and leaves the others as they are"
        )
    ended = [outcomes[name]["status"] for name in books.trials if name in outcomes]
    return {
        "sweep": books.state.uri,
        "trials": sum(bool(trial.scorings) for trial in books.trials.values()),
        "done": ended.count("done"),
        "stopped_early": ended.count("stopped"),
        "started_now": len(books.started),
        "left_out_by_budget": plan.over_budget,
        "gpu_hour_budget_used_up": books.over_budget,
        "gpu_hours": round(hours, 4),
        "concurrent_trials": plan.concurrent,
    }
