"""Sets with several train/test divisions (RegDB has ten): `trials=all` is one ordinary run per division.

The run of division T of NAME lies in NAME-trial-T, with card, checkpoints and record of its own, so whatever works on a
run works on each of them: one that was killed continues, one that is done is passed over. Scores are averaged over the
divisions, each scored by its own model; a model of another division has seen these test people.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jobs._job import finish_record
from reid_dist.config import Recipe
from reid_dist.errors import UserError

logger = logging.getLogger("reid_dist.jobs.trials")
WHICH = Literal["all"] | tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class TrialOptions:
    """The word `trials=`."""

    trials: WHICH = None  # "all" or a list of divisions, from 0

    def __post_init__(self) -> None:
        if self.trials is not None and self.trials != "all" and len(set(self.trials)) != len(self.trials):
            raise ValueError(f"trials={list(self.trials)}: a division is named twice")
        if self.trials == ():
            raise ValueError("trials=[]: name at least one division, or trials=all")


def place(name: str, trial: int) -> str:
    """Name or URI of one division's run."""
    return f"{name.rstrip('/')}-trial-{trial}"


def chosen(which: WHICH, there: int, what: str) -> list[int]:
    """The divisions that `trials=` names, of `there` that `what` has. Raises UserError."""
    if there == 1:
        raise UserError(f"trials=: {what} has one train/test division; leave the word out")
    if which is None or which == "all":
        return list(range(there))
    assert not isinstance(which, str)
    unknown = [trial for trial in which if not 0 <= trial < there]
    if unknown:
        raise UserError(f"trials={list(which)}: there is no division {unknown[0]} of {what}; it has {there}, from 0")
    return list(which)


def train_trials(recipe: Recipe, which: WHICH, plan_only: bool) -> dict[str, Any]:
    """Train one run per division, one after another; returns the job's record. Raises UserError, RunError."""
    from jobs._cluster import connect
    from jobs.train import train
    from reid_dist.data.store import open_view

    there = open_view(recipe.data, recipe.data.train).num_trials
    trials = chosen(which, there, ", ".join(recipe.data.train))
    recipes = [
        dataclasses.replace(recipe, name=place(recipe.name, trial), data=dataclasses.replace(recipe.data, trial=trial))
        for trial in trials
    ]
    if plan_only:
        return {"plan": {one.name: train(one, plan_only=True)["plan"] for one in recipes}}
    training, records = recipe.training, []
    with connect(math.ceil(training.num_workers * training.cpus_per_worker) + 1):
        for number, one in enumerate(recipes, 1):
            logger.info("run %d of %d, division %d: %s", number, len(recipes), one.data.trial, one.uri)
            records.append(train(one))
            finish_record(records[-1])
    word = "all" if len(trials) == there else json.dumps(trials).replace(" ", "")
    logger.info("trained; scores: python -m jobs.evaluate %s trials=%s", recipe.uri, word)
    return {"trials": trials, "runs": records}


def runs_of(uri: str, which: WHICH, overrides: Sequence[str] = ()) -> dict[int, Any]:
    """{division: its finished Run} of NAME's URI, all of one recipe on one state of the data. Raises UserError."""
    from reid_dist.runs import Run
    from reid_dist.storage import open_store

    parent, _, name = uri.rstrip("/").rpartition("/")
    pattern = re.compile(rf"{re.escape(name)}-trial-(\d+)/run\.json")
    entries = open_store(parent or ".").list(f"{name}-trial-")
    found = sorted(int(hit[1]) for entry in entries if (hit := pattern.fullmatch(entry.key)))
    if not found:
        raise UserError(f"there is no run {place(uri, 0)}: train the divisions with jobs.train RECIPE trials=all")
    there = _divisions(Run.read(place(uri, found[0])), overrides)
    wanted = chosen(which, there, f"the data of {place(uri, found[0])}")
    runs = {trial: Run.read(place(uri, trial)) for trial in wanted if trial in found}
    missing = [trial for trial in wanted if trial not in runs or runs[trial].finished is None]
    if missing:
        raise UserError(
            f"division {', '.join(map(str, missing))} of {uri} is not trained to the end: finish with jobs.train RECIPE "
            "trials=all, or average some with trials=[...]"
        )
    _refuse_mixture(runs)
    return runs


def _divisions(run: Any, overrides: Sequence[str]) -> int:
    """Train/test divisions of the tables that a run learned from."""
    from reid_dist.config import DataConfig, apply_overrides, typed
    from reid_dist.data.store import open_view

    recipe = apply_overrides(run.facts["recipe"], [word for word in overrides if word.startswith("data.")])
    data = typed(DataConfig, recipe["data"], "data")
    return open_view(data, data.train).num_trials


def _refuse_mixture(runs: Mapping[int, Any]) -> None:
    """Raises UserError unless the runs differ in their division alone (code that differs is said)."""
    from reid_dist.runs.identity import differences

    trees = {trial: run.facts["identity"] for trial, run in runs.items()}
    first = next(iter(trees))
    alike = {
        trial: {"recipe": {**tree["recipe"], "data.trial": None}, "data": tree["data"]} for trial, tree in trees.items()
    }
    for trial, tree in alike.items():
        found = differences(alike[first], tree)
        if found:
            raise UserError(
                f"{runs[trial].uri} is another experiment than {runs[first].uri}, their average would mean nothing: "
                + "; ".join(found[:6])
            )
    if len({tree["code"] for tree in trees.values()}) > 1:
        logger.warning("the runs were trained by different states of the code; the record names them")


def evaluate_trials(uri: str, options: Any, overrides: Sequence[str], plan_only: bool) -> dict[str, Any]:
    """Score each division by its own model and average; returns the record, which is also stored. Raises UserError."""
    from jobs.evaluate import evaluate_run
    from reid_dist.storage import open_store

    if options.trial is not None:
        raise UserError("trial= scores one division and trials= averages several: give one of them")
    runs = runs_of(uri, options.trials, overrides)
    records = {trial: evaluate_run(run.uri, options, list(overrides), plan_only) for trial, run in runs.items()}
    if plan_only:
        return {"plan": {runs[trial].uri: record["plan"] for trial, record in records.items()}}
    record = average(records) | {"code": sorted({run.facts["identity"]["code"] for run in runs.values()})}
    marks = [record["protocol"], options.checkpoint, *([record["label"]] if record["label"] else [])]
    key = f"evaluations/{'--'.join(marks)}.json"
    store = open_store(f"{uri.rstrip('/')}-trials")
    store.write(key, json.dumps({"record": record}, default=str).encode())
    return record | {"stored": f"{store.uri}/{key}"}


OWN = ("step", "trial")  # numbers of a record that name a run and are no score


def average(records: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and spread of the divisions' records, what they share, and each one's main scores."""
    from reid_dist.evaluation.sums import average_records

    plain = [{key: value for key, value in record.items() if key not in OWN} for record in records.values()]
    shared = {key: value for key, value in plain[0].items() if all(record.get(key) == value for record in plain)}
    rows = [
        {
            "trial": trial,
            **{key: record[key] for key in ("rank1", "mAP", "mINP", "step", "run", "stored") if key in record},
        }
        for trial, record in records.items()
    ]
    return {**shared, **average_records(plain), "trials": rows}


def report_trials(uri: str, which: WHICH, out: str | None, root: str | None) -> dict[str, Any]:
    """One page of all divisions: means, each division's scores, and the rest of the first. Raises UserError."""
    from jobs.report import page_input, stored_evaluations, write_page
    from reid_dist.storage import open_store

    runs = runs_of(uri, which, [f"data.root={root}"] if root else [])
    evaluations = {trial: stored_evaluations(run) for trial, run in runs.items()}
    first = next(iter(runs))
    page = page_input(runs[first].card(), runs[first].metrics(), evaluations[first], root)
    name, title = place(uri.rpartition("/")[2], first), f"{uri.rstrip('/').rpartition('/')[2]}, {len(runs)} divisions"
    table, spread = rows(evaluations)
    page = dataclasses.replace(
        page,
        title=page.title.replace(name, title),
        summary=f"{page.summary} The table has the scores of every division's own model and their mean; everything else "
        f"on this page is of division {first}.",
        metrics=table,
        metrics_note=f"Standard deviations over the divisions: {spread}.",
    )
    where = write_page(page, open_store(f"{uri.rstrip('/')}-trials"), out)
    return {"runs": [run.uri for run in runs.values()], "report": where}


def rows(evaluations: Mapping[int, Sequence[Mapping[str, Any]]]) -> tuple[dict[str, Mapping[str, Any]], str]:
    """({row name: record}, spreads in words): per way of scoring that all divisions have, the mean and then each.

    Raises UserError when there is no such way.
    """
    ways: dict[tuple[str, str, str, str], dict[int, Mapping[str, Any]]] = {}
    for trial, stored in evaluations.items():
        for record in (one["record"] for one in stored):
            tables = "+".join(record["tables"]) if several_tables(evaluations) else ""
            kind = "untrained" if record["checkpoint"] == "start" else ""
            way = record["protocol"], tables, record["label"], kind
            known = ways.setdefault(way, {}).get(trial)
            if known is None or known["step"] < record["step"]:
                ways[way][trial] = record
    shared = {way: records for way, records in sorted(ways.items()) if len(records) == len(evaluations)}
    if not shared:
        raise UserError("no protocol was scored on every division yet: python -m jobs.evaluate RUN trials=all")
    table: dict[str, Mapping[str, Any]] = {}
    spreads = []
    for way, records in shared.items():
        mean, name = average(records), ", ".join(word for word in way if word)
        table[f"{name}: mean of {len(records)}"] = mean
        table |= {f"{name}: division {trial}": records[trial] for trial in sorted(records)}
        spreads.append(f"{name} Rank-1 {100 * mean['rank1_std']:.1f}, mAP {100 * mean['mAP_std']:.1f}")
    return table, "; ".join(spreads)


def several_tables(evaluations: Mapping[int, Sequence[Mapping[str, Any]]]) -> bool:
    """Whether the records are of different tables, so that a row must name its own."""
    return len({tuple(one["record"]["tables"]) for stored in evaluations.values() for one in stored}) > 1
