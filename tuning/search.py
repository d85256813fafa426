"""Who chooses the next setting (Optuna), and who stops bad trials (Ray's ASHA and median rules, with what earlier jobs saw).

Optuna is asked and told directly, so that what it knows can be rebuilt from the sweep's own records: after a kill, and from
earlier sweeps (`search.warm_start`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from reid_dist.config import RecipeError
from reid_dist.errors import UserError
from tuning.axes import Setting
from tuning.expand import places
from tuning.state import STOPPED, SweepState
from tuning.sweep import Axis, Sweep

logger = logging.getLogger(__name__)

LOSS = "loss"  # of training; every trial reports it
STEP = "step"  # time of a report: optimizer steps of the whole run


class OptunaChooser:
    """Asks a study for settings and tells it how they ended. Raises RecipeError: an axis that it cannot draw from."""

    def __init__(self, sweep: Sweep) -> None:
        import optuna

        if len(places(sweep)) != 1:
            raise RecipeError(
                "search.name=optuna chooses settings by one number each: give one recipe, one split and at most one seed, or "
                "take search.name=random"
            )
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self._optuna = sweep, optuna
        self.distributions = {key: self._distribution(key, axis) for key, axis in sweep.axes.items()}
        sampler = optuna.samplers.TPESampler(seed=sweep.search.seed, constant_liar=True)
        self.study = optuna.create_study(direction="maximize" if sweep.mode == "max" else "minimize", sampler=sampler)
        self._asked: dict[str, Any] = {}  # trial name -> optuna's trial

    def _distribution(self, key: str, axis: Axis) -> Any:
        kinds = self._optuna.distributions
        if axis.values:  # by number, because a value may be a list
            return kinds.CategoricalDistribution(tuple(range(len(axis.values))))
        if axis.mean is not None or axis.low is None or axis.high is None:
            raise RecipeError(f"axes.{key}: optuna draws from values, or low and high; not from mean and std")
        if axis.integer:
            return kinds.IntDistribution(round(axis.low), round(axis.high), log=axis.log)
        return kinds.FloatDistribution(axis.low, axis.high, log=axis.log)

    def ask(self) -> tuple[Any, Setting]:
        """(handle, setting)."""
        trial = self.study.ask(self.distributions)
        setting = {}
        for key, axis in self.sweep.axes.items():
            value = trial.params[key]
            setting[key] = axis.values[value] if axis.values else value
        return trial, setting

    def refuse(self, handle: Any) -> None:
        """The setting of `ask` cannot be tried."""
        self.study.tell(handle, state=self._optuna.trial.TrialState.FAIL)

    def began(self, name: str, handle: Any) -> None:
        """The setting of `ask` became the trial `name`."""
        self._asked[name] = handle

    def tell(self, name: str, outcome: Mapping[str, Any] | None) -> None:
        """How the trial `name` ended; None: it failed."""
        handle, states = self._asked.pop(name, None), self._optuna.trial.TrialState
        if handle is None:
            return
        value = (outcome or {}).get("value")
        if outcome is None or value is None:
            self.study.tell(handle, state=states.FAIL)
        elif outcome["status"] == STOPPED:
            handle.report(value, int(outcome["step"]))
            self.study.tell(handle, state=states.PRUNED)
        else:
            self.study.tell(handle, value)

    def learn(self, outcomes: Iterable[Mapping[str, Any]]) -> int:
        """Add trials that ended earlier; those of other axes are passed over. Returns how many were added."""
        states, count = self._optuna.trial.TrialState, 0
        for outcome in outcomes:
            params = self._params(outcome.get("setting", {}))
            if params is None or outcome.get("value") is None or outcome.get("metric") != self.sweep.metric:
                continue
            stopped = outcome["status"] == STOPPED
            facts = (
                {"intermediate_values": {int(outcome["step"]): outcome["value"]}}
                if stopped
                else {"value": outcome["value"]}
            )
            state = states.PRUNED if stopped else states.COMPLETE
            trial = self._optuna.trial.create_trial(
                state=state, params=params, distributions=self.distributions, **facts
            )
            self.study.add_trial(trial)
            count += 1
        return count

    def _params(self, setting: Mapping[str, Any]) -> dict[str, Any] | None:
        if set(setting) != set(self.sweep.axes):
            return None
        params: dict[str, Any] = {}
        for key, axis in self.sweep.axes.items():
            value = setting[key]
            if axis.values:
                known = [_plain(item) for item in axis.values]
                if _plain(value) not in known:
                    return None
                params[key] = known.index(_plain(value))
            elif not isinstance(value, (int, float)) or not self.distributions[key]._contains(value):
                return None
            else:
                params[key] = value
        return params


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def warm_start(chooser: OptunaChooser, sweep: Sweep) -> int:
    """Learn from the sweeps that `search.warm_start` names. Raises UserError: unreadable, or nothing in it can be used."""
    total = 0
    for uri in sweep.search.warm_start:
        count = chooser.learn(SweepState.read(uri).outcomes().values())
        if not count:
            raise UserError(f"search.warm_start: {uri} has no ended trial with these axes and metric {sweep.metric}")
        logger.info("warm start: %d trials of %s", count, uri)
        total += count
    return total


def make_scheduler(sweep: Sweep, longest: int) -> Any:
    """Ray's scheduler of the sweep, or None. `longest`: steps of its longest trial."""
    from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

    own = sweep.scheduler
    if own.name == "asha":
        return ASHAScheduler(
            time_attr=STEP, metric=sweep.metric, mode=sweep.mode, grace_period=own.grace,
            max_t=max(longest, own.grace), reduction_factor=own.reduction,
            stop_last_trials=False,  # a trial that reached its last step is scored
        )  # fmt: skip
    if own.name == "none":
        return None

    class Median(MedianStoppingRule):  # type: ignore[misc]
        """Ray's rule; its bookkeeping fails on a trial whose last result has no metric."""

        def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
            if STEP in result and sweep.metric in result:
                super().on_trial_complete(tune_controller, trial, result)

    return Median(
        time_attr=STEP, metric=sweep.metric, mode=sweep.mode, grace_period=own.grace, min_samples_required=own.samples,
        min_time_slice=float("inf"),  # never pause: a pause would throw away what follows the last checkpoint
    )  # fmt: skip


def replay(scheduler: Any, histories: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Show a scheduler the reports of trials that ended in earlier jobs, so that it judges as if it had never stopped."""
    for name, reports in histories.items():
        trial = _Ended(name)
        scheduler.on_trial_add(None, trial)
        last: Mapping[str, Any] = {}
        for last in reports:
            scheduler.on_trial_result(_NoController(), trial, dict(last))
        scheduler.on_trial_complete(_NoController(), trial, dict(last))


class _Ended:
    """What a scheduler needs to know of a trial that ended in an earlier job."""

    status = "TERMINATED"

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


class _NoController:
    """Stands for Tune's controller while nothing runs."""

    def get_live_trials(self) -> list[Any]:
        return []


def history(metrics: Iterable[Mapping[str, Any]], metric: str, until: int | None = None) -> list[dict[str, float]]:
    """The reports of a run that a scheduler judges: one per evaluation (per loss record where the loss chooses)."""
    kind = "step" if metric == LOSS else "eval"
    chosen = [m for m in metrics if m.get("kind") == kind and metric in m and (until is None or m["step"] <= until)]
    return [{STEP: m["step"], metric: m[metric]} for m in chosen]
