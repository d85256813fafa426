"""Train a recipe on Ray: `python -m jobs.train RECIPE [key=value ...] [--plan]`.

RECIPE is a YAML file or method/recipe (for example comoe/cuhk_pedes). The same line again continues a stopped or killed run,
or says that it is done; another recipe in the same place is refused with the differences.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from jobs._cluster import connect
from jobs._job import Terminated, record_in, refuse_unknown_flags, run_job, split_words
from reid_dist.config import Recipe
from reid_dist.errors import UserError

USAGE = """usage: python -m jobs.train RECIPE [key=value ...] [--plan]
  RECIPE       a .yaml file, or method/recipe (python -m jobs.train --list shows them)
  key=value    overrides, for example training.num_workers=4 optim.lr=1e-4 output=s3://bucket/runs
  init=        run:URI or authors:PATH: start weights
  trials=all   one run per train/test division of the set, NAME-trial-0 and on (or trials=[0,1])
  --plan       print what would run, start nothing
  --list       list methods and shipped recipes"""

logger = logging.getLogger("reid_dist.jobs.train")


def main(argv: list[str]) -> dict[str, Any]:
    words, overrides, flags = split_words(argv, USAGE)
    refuse_unknown_flags(flags, {"--plan", "--list"}, USAGE)
    from jobs._trials import TrialOptions, train_trials
    from jobs._words import split_options
    from reid_dist import methods

    if "--list" in flags:
        return {"methods": methods.names(), "recipes": methods.recipes()}
    if len(words) != 1:
        raise UserError(f"name one recipe, got {words or 'none'}; shipped: {', '.join(methods.recipes())}")
    options, overrides = split_options(TrialOptions, overrides, rest_allowed=True)
    recipe, plan_only = methods.load_recipe(words[0], overrides), "--plan" in flags
    return train(recipe, plan_only) if options.trials is None else train_trials(recipe, options.trials, plan_only)


def train(recipe: Recipe, plan_only: bool = False) -> dict[str, Any]:
    """Plan or run one recipe; returns the job's record."""
    started = time.time()
    from reid_dist import methods
    from reid_dist.data.leaks import check_leaks
    from reid_dist.data.store import open_view
    from reid_dist.runs import Run, identity_of, ship_logs
    from reid_dist.training.loaded import facts_dict
    from reid_dist.training.worker import open_data

    spec = methods.get(recipe.method)
    spec.refuse(recipe)
    data = open_data(recipe)
    tested = open_view(recipe.data, recipe.data.test or recipe.data.train)
    check_leaks(data.train, tested)
    check_start(recipe, tested)
    plan = plan_of(recipe, list(spec.stages(recipe, data)), data)
    for key, value in plan.items():
        logger.info("plan: %s = %s", key, value)
    if plan_only:
        return {"plan": plan}
    run = Run.open(recipe.uri, identity_of(recipe, data.train.versions), recipe)
    if run.finished is not None:
        logger.info("%s is done already; nothing to do", run.uri)
        return run.finished | {"already_done": True}
    record_in(run.write_record)
    run.describe(model_facts=facts_dict(spec.facts(data)), plan=plan)
    training = recipe.training
    connecting = time.time()
    with ship_logs(run, "driver"), connect(math.ceil(training.num_workers * training.cpus_per_worker) + 1):
        from reid_dist.training.launch import fit

        connected = time.time()
        summary = fit(recipe, run)
    if "stopped" in summary:
        raise Terminated(summary["stopped"])
    marks = summary["marks"]
    startup = {
        "driver_imports_and_data": connecting - started,
        "ray": connected - connecting,
        "workers": marks["worker"] - connected,
        "imports": marks["imports"] - marks["worker"],
        "data_and_model": marks["data"] - marks["imports"],
        "engine": marks.get("engine", marks["data"]) - marks["data"],
        "first_step": marks.get("first_step", marks["data"]) - marks.get("engine", marks["data"]),
    }
    return {
        "run": run.uri,
        "method": recipe.method,
        "num_workers": summary["num_workers"],
        "zero_stage": training.zero_stage,
        "steps": summary["steps"],
        "device": summary["device"],
        "rows_per_s": round(summary["last"].get("rows_per_s", 0.0), 1),
        "final_loss": summary["last"].get("loss"),
        "selection": summary["metrics"],
        "restarts": sum(note["kind"] == "restart" for note in run.notes()),
        "startup_s": {key: round(value, 2) for key, value in startup.items()},
    }


def check_start(recipe: Recipe, tested: Any) -> None:
    """Refuse start weights of a run that learned from people who are tested here. Raises UserError.

    So a model of one RegDB division cannot start the training of another. Tables that are not under data.root cannot be
    looked at, which is said.
    """
    import dataclasses

    from reid_dist.config import DataConfig, typed
    from reid_dist.data.leaks import LeakError, check_leaks
    from reid_dist.data.store import open_view, table_uri
    from reid_dist.runs import Run
    from reid_dist.storage import open_store

    if not recipe.init.startswith("run:"):
        return
    known = typed(DataConfig, Run.read(recipe.init.removeprefix("run:")).facts["recipe"]["data"], "data")
    root = recipe.data.root
    here = [name for name in known.train if open_store(table_uri(root, name)).list("_versions/")]
    if len(here) < len(known.train):
        logger.warning("init: tables %s are not under %s, so whether they hold tested people was not looked at",
                       ", ".join(sorted(set(known.train) - set(here))), root)  # fmt: skip
    if not here:
        return
    try:
        check_leaks(open_view(dataclasses.replace(recipe.data, trial=known.trial), here, known.train_splits), tested)
    except LeakError as error:
        raise UserError(f"init={recipe.init} was trained on people who are tested here: {error}") from None


def plan_of(recipe: Recipe, stages: list[Any], data: Any) -> dict[str, Any]:
    """What a run would do: rows, steps, resources, place."""
    training = recipe.training
    steps = [sum(stage.plan().steps(epoch) for epoch in range(stage.epochs)) for stage in stages]
    total = min(sum(steps), training.max_steps or sum(steps))
    return {
        "run": recipe.uri,
        "method": recipe.method,
        "tables": data.train.versions,
        "train_images": len(data.train),
        "train_ids": len(set(data.train.label.tolist())),
        "selection_images": len(data.val) if data.val is not None else 0,
        "stages": {stage.name: count for stage, count in zip(stages, steps, strict=True)},
        "steps": total,
        "workers": ("" if training.min_workers is None else f"{training.min_workers} to ")
        + f"{training.num_workers} x {training.cpus_per_worker:g} CPU"
        + ("" if training.use_gpu is False else f" (+ {training.gpus_per_worker:g} GPU where the cluster has GPUs)"),
        "zero_stage": training.zero_stage,
        "precision": training.precision,
    }


if __name__ == "__main__":
    run_job("train", main)
