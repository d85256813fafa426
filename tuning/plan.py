"""The plan: what would run, how much of it at once, at what cost, and what cannot. Starts nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuning.capacity import Bundle, NodeShape, demand, how_many, why_not
from tuning.checks import Checker
from tuning.expand import Expansion, Problem, Trial
from tuning.state import DONE, STOPPED
from tuning.sweep import Sweep

NO_RATE = (
    "unknown: no trial is done yet. Give the hours of one trial (sweep.resources.hours_per_trial=HOURS), or run one first "
    "(sweep.budget.trials=1; it is kept) and plan again"
)
EVERY = "every trial"  # the label of a problem that is the cluster's


@dataclass
class Plan:
    """A sweep, checked against data and cluster."""

    sweep: Sweep
    shapes: Sequence[NodeShape]
    shared: list[Trial] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)  # all, whatever became of them
    waiting: list[Trial] = field(default_factory=list)  # shared runs and trials that have no outcome and will run
    outcomes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    dropped: int = 0
    over_budget: int = 0  # trials that the budget leaves out
    concurrent: int = 0
    bundles: list[Bundle] = field(default_factory=list)
    longest: int = 0  # steps of the longest trial
    others: int = 0  # trials that ended here and are none of these: another setting, or other data or code since
    samples: int = 0  # settings that the searcher has still to choose (optuna)

    def place(self) -> None:
        """Fill in bundles and concurrency for `shapes`; a trial that fits nowhere becomes a problem."""
        own = self.sweep.resources
        worker = {"CPU": own.cpus_per_worker}
        gpus = any(shape.resources.get("GPU", 0.0) for shape in self.shapes)
        if own.use_gpu or (own.use_gpu is None and gpus):
            worker["GPU"] = own.gpus_per_worker
        self.bundles = demand(worker, own.num_workers, own.driver)
        limit = max(1, own.max_concurrent or max(len(self.waiting), self.samples))
        self.concurrent = how_many(self.shapes, self.bundles, limit)
        self.problems = [problem for problem in self.problems if problem.label != EVERY]
        if not self.concurrent:
            self.problems.append(Problem(EVERY, why_not(self.shapes, self.bundles)))

    def record(self) -> dict[str, Any]:
        """Plain form: the job's record, and what the log shows line by line."""
        ended = [self.outcomes[t.name]["status"] for t in (*self.shared, *self.trials) if t.name in self.outcomes]
        trials_left = [trial for trial in self.waiting if trial.scorings]
        columns = dict.fromkeys(scoring.name for trial in self.trials for scoring in trial.scorings)
        return {
            "sweep": self.sweep.uri,
            "trials": len(self.trials) + self.samples,
            "shared_runs": len(self.shared),
            "done": ended.count(DONE),
            "stopped_early": ended.count(STOPPED),
            "of_other_settings_data_or_code": self.others,
            "to_run": len(self.waiting) + self.samples,
            "ruled_out_by_constraints": self.dropped,
            "left_out_by_budget": self.over_budget,
            "rows": len({trial.label for trial in self.trials}),
            "columns": list(columns),
            "chosen_on": _chosen_on(self.sweep, self.trials),
            "steps": {"longest_trial": self.longest or None},  # None: unknown before the side tables are made
            "per_trial": " + ".join(_bundle(bundle) for bundle in self.bundles),
            "cluster": [shape.describe() for shape in self.shapes],
            "concurrent_trials": self.concurrent,
            "estimate": estimate(self, len(trials_left) + self.samples),
            "leak_guard": "no tested identity or image is trained on" if not self.problems else "see impossible",
            "impossible": [{"trial": p.label, "reason": p.reason} for p in self.problems],
        }


def make_plan(
    sweep: Sweep, expansion: Expansion, checker: Checker, shapes: Sequence[NodeShape],
    outcomes: Mapping[str, Mapping[str, Any]], samples: int = 0,
) -> Plan:  # fmt: skip
    """Check every trial, leave out what is done or beyond the budget, and count what fits at the same time."""
    plan = Plan(sweep, shapes, problems=list(expansion.problems), dropped=expansion.dropped, samples=samples)
    for trial in expansion.trials:
        problem = checker.problem(trial)
        if problem is not None:
            plan.problems.append(problem)
        elif trial.scorings:
            plan.trials.append(trial)
            plan.longest = max(plan.longest, checker.total_steps(trial))
        else:
            plan.shared.append(trial)
    known = {trial.name for trial in (*plan.shared, *plan.trials)}
    plan.outcomes = {name: outcome for name, outcome in outcomes.items() if name in known}
    plan.others = len(outcomes) - len(plan.outcomes)
    if sweep.budget.trials is not None:
        plan.over_budget = max(0, len(plan.trials) - sweep.budget.trials)
        plan.trials = plan.trials[: sweep.budget.trials]
    needed = {name for trial in plan.trials if trial.name not in plan.outcomes for name in trial.needs}
    shared = [run for run in plan.shared if run.name in needed]
    plan.waiting = [trial for trial in (*shared, *plan.trials) if trial.name not in plan.outcomes]
    plan.place()
    return plan


def estimate(plan: Plan, left: int) -> dict[str, Any]:
    """GPU-hours and wall hours of what is left, from trials that are done, else from resources.hours_per_trial."""
    gpus = sum(bundle.get("GPU", 0.0) for bundle in plan.bundles)
    done = [o["seconds"] / 3600 for o in plan.outcomes.values() if o["status"] == DONE and o.get("seconds")]
    hours = sum(done) / len(done) if done else plan.sweep.resources.hours_per_trial
    if hours is None:
        return {
            "gpu_hours": None,
            "hours": None,
            "from": NO_RATE,
        }
    used = sum(o.get("gpu_hours", 0.0) for o in plan.outcomes.values())
    waves = -(-left // max(plan.concurrent, 1))
    return {
        "gpu_hours": round(left * hours * gpus, 4),
        "gpu_hours_used": round(used, 4),
        "gpu_hours_budget": plan.sweep.budget.gpu_hours,
        "hours": round(waves * hours, 4),
        "from": f"{len(done)} finished trials" if done else "resources.hours_per_trial",
    }


def _chosen_on(sweep: Sweep, trials: Sequence[Trial]) -> str:
    if not sweep.metric:
        return "nothing is chosen: every row is reported"
    splits = sorted({trial.recipe.training.select_on for trial in trials})
    return f"{sweep.metric} ({sweep.mode}) on the selection split ({', '.join(splits) or 'val'})"


def _bundle(bundle: Bundle) -> str:
    return "(" + ", ".join(f"{amount:g} {name}" for name, amount in bundle.items()) + ")"
