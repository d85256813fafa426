"""What must hold before any trial starts: data is there, nothing tested is trained on, protocols fit, the metric exists.

Looks at table columns alone. Results are kept per data section, because the trials of a sweep share few of them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable
from typing import Any

from reid_dist import methods
from reid_dist.config import Recipe, to_mapping
from reid_dist.errors import UserError
from reid_dist.evaluation import protocols
from reid_dist.evaluation.similarity import EvaluationError
from reid_dist.methods.spec import TrainingData
from reid_dist.runs import identity_of
from tuning.expand import Problem, Trial
from tuning.search import LOSS
from tuning.sweep import Scoring, Sweep

logger = logging.getLogger(__name__)


class Checker:
    """Checks trials; asks the tables once per different data section."""

    def __init__(self, sweep: Sweep, side_tables: bool = True) -> None:
        """`side_tables` False: those of the sweep are not made yet, so stages that read them cannot be asked."""
        self.sweep, self.side_tables = sweep, side_tables
        self._data: dict[str, TrainingData | UserError] = {}
        self._scored: dict[str, str] = {}
        self.steps: dict[str, dict[str, int]] = {}  # trial name -> steps per stage

    def identify(self, recipe: Recipe) -> str:
        """Digest of recipe, data and code. Raises UserError when a table is missing."""
        digest: str = identity_of(recipe, self.data(recipe).train.versions).digest
        return digest

    def data(self, recipe: Recipe) -> TrainingData:
        """The training rows. Raises UserError."""
        from reid_dist.training.worker import open_data

        # What is tested does not change what is opened, apart from the check that `all` sources are not targets.
        bare = dataclasses.replace(recipe.data, test=()) if recipe.training.select_on != "test" else recipe.data
        held_out = recipe.seed if recipe.data.val_fraction else 0
        key = json.dumps([to_mapping(bare), held_out])
        if key not in self._data:
            try:
                self._data[key] = open_data(recipe)
            except UserError as error:
                self._data[key] = error
        found = self._data[key]
        if isinstance(found, UserError):
            raise found
        return found

    def problem(self, trial: Trial) -> Problem | None:
        """Why the trial cannot run, or None."""
        try:
            self._check(trial)
        except (UserError, EvaluationError) as error:
            return Problem(f"{trial.label} {_words(trial.repeat)} ({trial.name})", str(error))
        return None

    def _check(self, trial: Trial) -> None:
        recipe = trial.recipe
        spec, data = methods.get(recipe.method), self.data(recipe)
        if self.side_tables:
            spec.refuse(recipe)
            stages = list(spec.stages(recipe, data))
            steps = {stage.name: sum(stage.plan().steps(epoch) for epoch in range(stage.epochs)) for stage in stages}
            self.steps[trial.name] = steps
        for scoring in trial.scorings:
            key = json.dumps([to_mapping(recipe.data), to_mapping(scoring), recipe.method])
            if key not in self._scored:
                self._scored[key] = _said(functools.partial(check_scoring, recipe, data, scoring))
            if self._scored[key]:
                raise UserError(self._scored[key])
        if trial.scorings:
            check_metric(self.sweep, recipe, data)

    def total_steps(self, trial: Trial) -> int:
        """Optimizer steps of a checked trial."""
        steps = sum(self.steps.get(trial.name, {}).values())
        return min(steps, trial.recipe.training.max_steps or steps)


def _said(check: Callable[[], None]) -> str:
    try:
        check()
    except (UserError, EvaluationError) as error:
        return str(error)
    return ""


def check_scoring(recipe: Recipe, data: TrainingData, scoring: Scoring) -> None:
    """The leak guard and the protocol's own conditions for one column. Raises UserError."""
    from reid_dist.data.leaks import check_leaks, tested
    from reid_dist.data.store import open_view
    from reid_dist.evaluation.distributed.retrieval import plan_retrieval

    both = sorted(set(recipe.data.train) & set(scoring.test))
    if both and set(recipe.data.train_splits) - {"train", "val"}:
        raise UserError(
            f"data.train_splits={list(recipe.data.train_splits)} learns from the test images of {', '.join(both)}, "
            f"which column {scoring.name!r} scores"
        )
    whole = open_view(recipe.data, scoring.test)
    check_leaks(data.train, whole)
    try:
        protocol = protocols.get(scoring.protocol)
        known = set(scoring.test) & set(recipe.data.train)
        trial = recipe.data.trial if known and whole.num_trials > 1 else None
        plan_retrieval(protocol, tested(whole), trial=trial)
    except (UserError, EvaluationError) as error:
        raise UserError(f"column {scoring.name!r} cannot be scored by protocol {scoring.protocol}: {error}") from None


def check_metric(sweep: Sweep, recipe: Recipe, data: TrainingData) -> None:
    """Whether the trial reports what the sweep chooses by. Raises UserError."""
    if not sweep.metric or sweep.metric == LOSS:
        return
    training = recipe.training
    if training.select_on == "test":
        raise UserError(
            "training.select_on=test: a sweep never chooses on the test split; say training.select_on=val with "
            "data.val_fraction=0.1 where there is no val split"
        )
    ranks = [f"rank{rank}" for rank in recipe.evaluation.ranks]
    known = [*ranks, "mAP", "mINP", LOSS]
    if sweep.metric not in known:
        raise UserError(f"metric={sweep.metric!r}: no trial reports it; a trial reports {', '.join(known)}")
    silent = {
        "training.select_on=none": training.select_on == "none",
        "training.eval_every=0": training.eval_every == 0,
        "no val split and data.val_fraction=0": data.val is None,
    }
    reasons = [reason for reason, holds in silent.items() if holds]
    if reasons:
        raise UserError(
            f"metric={sweep.metric!r}: no trial reports it, because of {' and '.join(reasons)}; set training.select_on: val, "
            "training.eval_every: 1 and, where there is no val split, data.val_fraction: 0.1"
        )


def _words(facts: Any) -> str:
    return " ".join(f"{key}={value}" for key, value in facts.items())
