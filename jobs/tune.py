"""Sweeps on Ray Tune: `python -m jobs.tune SWEEP [key=value ...] [--plan]`.

SWEEP is a YAML file or the name of a shipped one. Every trial is a normal run. The same line again continues: what is done or
was stopped early is left untouched, an extended file runs only what is new.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
from typing import Any

from jobs._cluster import connect
from jobs._job import Terminated, record_in, refuse_unknown_flags, run_job, split_words
from reid_dist.errors import RunError, UserError

USAGE = """usage: python -m jobs.tune SWEEP [key=value ...] [sweep.key=value ...] [--plan]
  SWEEP          a .yaml file, or a shipped sweep (python -m jobs.tune --list shows them)
  key=value      recipe overrides of every trial, for example data.root=s3://bucket/data training.epochs=10
  sweep.key=value  the sweep file's own keys, for example sweep.budget.trials=8 sweep.resources.num_workers=2
  output=        folder or s3:// prefix; the sweep lives in <output>/<name>
  --plan         trials, concurrency, GPU-hours, what is impossible and why; starts nothing
  cluster=FILE   with --plan: count on the node types of a cluster launcher file
  --list         list the shipped sweeps"""

logger = logging.getLogger("reid_dist.jobs.tune")


def main(argv: list[str]) -> dict[str, Any]:
    from tuning.sweep import load_sweep, nested, shipped

    words, values, flags = split_words(argv, USAGE)
    refuse_unknown_flags(flags, {"--plan", "--list"}, USAGE)
    if "--list" in flags:
        return {"sweeps": shipped()}
    if len(words) != 1:
        raise UserError(f"name one sweep, got {words or 'none'}; shipped: {', '.join(shipped())}")
    cluster = [word.removeprefix("cluster=") for word in values if word.startswith("cluster=")]
    plan_only = "--plan" in flags
    if cluster and not plan_only:
        raise UserError("cluster=FILE goes with --plan: a sweep that runs asks the cluster that it is connected to")
    own = [word.removeprefix("sweep.") for word in values if word.startswith(("sweep.", "output="))]
    rest = [word for word in values if not word.startswith(("sweep.", "output=", "cluster="))]
    sweep = load_sweep(words[0], own)
    if rest:
        import dataclasses

        from reid_dist.config import apply_overrides

        sweep = dataclasses.replace(sweep, set=apply_overrides(nested(sweep.set), rest))
    return tune(sweep, plan_only, cluster[-1] if cluster else "")


def tune(sweep: Any, plan_only: bool = False, cluster: str = "") -> dict[str, Any]:
    """Plan or run a sweep; returns the job's record. Raises UserError before anything starts; RunError."""
    from tuning.board import write_board
    from tuning.capacity import shapes_of_file
    from tuning.cluster import connected_shapes, least_cpus, this_machine
    from tuning.expand import check_axes, places
    from tuning.run import execute, make_side_tables, missing_side_tables, prepare
    from tuning.state import SweepState

    check_axes(sweep, places(sweep))
    root = data_root(sweep)
    missing = missing_side_tables(sweep, root)
    if plan_only:
        asks = bool(os.environ.get("RAY_ADDRESS")) and not cluster
        with connect() if asks else contextlib.nullcontext():
            shapes = shapes_of_file(cluster) if cluster else connected_shapes() if asks else this_machine(sweep)
        plan, _ = prepare(sweep, shapes, side_tables=not missing)
        record = plan.record() | {"side_tables_to_make": missing}
        log_plan(record)
        return {"plan": record}
    plan, checker = checked(
        sweep, side_tables=not missing
    )  # what the file and the data say, before any job or Ray is started
    if missing:
        make_side_tables(sweep, root)
        plan, checker = checked(sweep)
    state = SweepState(sweep.uri)
    record_in(state.write_record)
    command = shlex.join(["python", *sys.orig_argv[1:]])
    if not plan.waiting and not plan.samples:
        logger.info("%s is done already; nothing to do", state.uri)
        state.write_index(sweep, [trial.name for trial in plan.trials])
        return {"sweep": state.uri, "trials": len(plan.trials), "already_done": True, **write_board(state.uri)}
    with connect(least_cpus(sweep)):
        plan.shapes = connected_shapes()
        plan.place()
        log_plan(plan.record())
        refuse_impossible(plan.problems)
        try:
            record = execute(sweep, plan, checker, command)
        except RunError as error:
            with contextlib.suppress(UserError, RunError):
                write_board(state.uri)
            if isinstance(error, Terminated):  # between two phases; while trials run, they are asked to stop first
                raise Terminated(f"{error}; the same command continues the sweep") from None
            raise
    return record | write_board(state.uri)


def checked(sweep: Any, side_tables: bool = True) -> Any:
    """(plan, checker) without a cluster. Raises UserError when a trial is impossible for a reason that no cluster mends."""
    from tuning.cluster import this_machine
    from tuning.plan import EVERY
    from tuning.run import prepare

    plan, checker = prepare(sweep, this_machine(sweep), side_tables)
    refuse_impossible([problem for problem in plan.problems if problem.label != EVERY])
    return plan, checker


def data_root(sweep: Any) -> str:
    """data.root of the sweep's recipes."""
    from tuning.expand import make_recipe, places

    return str(make_recipe(sweep, places(sweep)[0], {}).data.root)


def refuse_impossible(problems: list[Any]) -> None:
    """Raises UserError that names the first trials that cannot run."""
    if not problems:
        return
    shown = "; ".join(f"{problem.label}: {problem.reason}" for problem in problems[:3])
    more = f"; and {len(problems) - 3} more (--plan lists them)" if len(problems) > 3 else ""
    raise UserError(f"{len(problems)} impossible: {shown}{more}")


def log_plan(record: dict[str, Any]) -> None:
    """One line per fact."""
    for key, value in record.items():
        if key == "impossible":
            for entry in value:
                logger.warning("plan: impossible: %s: %s", entry["trial"], entry["reason"])
        else:
            logger.info("plan: %s = %s", key, value)


if __name__ == "__main__":
    run_job("tune", main)
