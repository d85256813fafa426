"""The main job on the embedded default, from nothing to a page: `python -m jobs.demo [folder=work/demo] [key=value ...]`.

Writes a synthetic CUHK-PEDES in the authors' layout, packs it, trains CoMoE with a tiny CLIP on 2 Ray Train workers with
DeepSpeed ZeRO-1, evaluates text-to-image retrieval before and after, writes the report. Every stage is the real job; running
it again continues where it stopped.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from typing import Any

from jobs._cluster import connect
from jobs._job import refuse_unknown_flags, run_job, split_words
from jobs.evaluate import evaluate, take_options
from jobs.report import report
from jobs.train import train
from reid_dist.errors import UserError

USAGE = """usage: python -m jobs.demo [folder=work/demo] [recipe=comoe/synthetic] [key=value ...]
  folder=      where everything goes (data, run, report)
  recipe=      any recipe on synthetic tables (named synthetic-<layout>), for example rle/synthetic
  key=value    overrides of the recipe, for example training.max_steps=100"""

logger = logging.getLogger("reid_dist.jobs.demo")
PREFIX = "synthetic-"


def main(argv: list[str]) -> dict[str, Any]:
    words, values, flags = split_words(argv, USAGE)
    refuse_unknown_flags(flags, set(), USAGE)
    if words:
        raise UserError(f"unexpected word {words[0]!r}. {USAGE.splitlines()[0]}")
    options, overrides = take_options(values, ("folder", "recipe"))
    return demo(options.get("folder", "work/demo"), options.get("recipe", "comoe/synthetic"), overrides)


def demo(folder: str, name: str, overrides: list[str]) -> dict[str, Any]:
    """All stages; returns the record."""
    from reid_dist import methods

    started, seconds = time.time(), {}
    recipe = methods.load_recipe(name, [f"data.root={folder}", f"output={folder}/runs", *overrides])
    with connect(math.ceil(recipe.training.num_workers * recipe.training.cpus_per_worker) + 1):
        seconds["ray"] = time.time() - started
        tables = dict.fromkeys((*recipe.data.train, *recipe.data.val, *recipe.data.test))
        seconds["data"] = _timed(lambda: [make_data(folder, table) for table in tables])[1]
        trained, seconds["train"] = _timed(lambda: train(recipe))
    run = trained["run"]
    _, seconds["evaluate_untrained"] = _timed(lambda: evaluate(run, "start"))
    record, seconds["evaluate"] = _timed(lambda: evaluate(run, "best"))
    page, seconds["report"] = _timed(lambda: report(run))
    keys = (
        "rank1",
        "rank5",
        "rank10",
        "mAP",
        "mINP",
        "chance_mAP",
        "chance_rank1",
        "num_queries",
        "tie_rate",
        "checkpoint",
    )
    return {
        **{key: record[key] for key in keys},
        "num_workers": trained["num_workers"],
        "zero_stage": trained["zero_stage"],
        "steps": trained["steps"],
        "rows_per_s": trained["rows_per_s"],
        "startup_s": trained["startup_s"],
        "seconds": round(time.time() - started, 1),
        "seconds_by_stage": {name: round(value, 1) for name, value in seconds.items()},
        "run": run,
        "report": page["report"],
    }


def _timed(call: Any) -> tuple[Any, float]:
    started = time.time()
    return call(), time.time() - started


def make_data(folder: str, table: str) -> dict[str, Any]:
    """Draw the world of `synthetic-<layout>` once and pack it (which does nothing when it is packed). Raises UserError."""
    from pathlib import Path

    from reid_dist.data.pack import pack, plan
    from reid_dist.data.synthetic import write_synthetic

    if not table.startswith(PREFIX):
        raise UserError(f"table {table} is not a synthetic one (synthetic-<layout>): train that recipe with jobs.train")
    layout = table.removeprefix(PREFIX)
    raw, done = Path(folder) / f"raw-{layout}", Path(folder) / f"raw-{layout}.done"
    if not done.exists():
        if raw.exists():  # left by a run that was killed while drawing
            shutil.rmtree(raw)
        write_synthetic(raw, layout, progress=True)
        done.touch()
    return pack(plan(layout, str(raw), folder, name=table))


if __name__ == "__main__":
    run_job("demo", main)
