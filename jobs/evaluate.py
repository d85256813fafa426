"""Score a trained run: `python -m jobs.evaluate RUN [checkpoint=best] [protocol=...] [key=value ...]`.

RUN is the run's folder or s3:// prefix; or a recipe together with init=authors:PATH, to score a published checkpoint. The
record, ten rank lists and the method's own figures are stored in the run under evaluations/, where `jobs.report` finds them.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from jobs._job import refuse_unknown_flags, run_job, split_words
from reid_dist.errors import UserError

USAGE = """usage: python -m jobs.evaluate RUN [checkpoint=best|last|start|step-N] [protocol=NAME] [key=value ...] [--plan]
  RUN            a run's folder or s3:// prefix, or a recipe with init=authors:PATH
  checkpoint=    best on the selection split (default; the last where nothing selects), last, start (untrained), step-N
  protocol=      default: the method's own (evaluation/protocols.py)
  data.test=[t]  tables to score, default those of the recipe
  --plan         print what would run, start nothing"""

logger = logging.getLogger("reid_dist.jobs.evaluate")


def main(argv: list[str]) -> dict[str, Any]:
    words, values, flags = split_words(argv, USAGE)
    refuse_unknown_flags(flags, {"--plan"}, USAGE)
    if len(words) != 1:
        raise UserError(f"name one run, got {words or 'none'}. {USAGE.splitlines()[0]}")
    options, overrides = take_options(values, ("checkpoint", "protocol"))
    return evaluate(words[0], options.get("checkpoint", "best"), options.get("protocol"), overrides, "--plan" in flags)


def take_options(values: list[str], names: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Split key=value words into the job's own options and recipe overrides."""
    options = dict(word.split("=", 1) for word in values if word.split("=")[0] in names)
    return options, [word for word in values if word.split("=")[0] not in names]


def evaluate(
    word: str, which: str = "best", protocol_name: str | None = None, overrides: list[str] | None = None, plan_only: bool = False
) -> dict[str, Any]:
    """Encode and score; returns the record."""
    from reid_dist.data.store import open_view
    from reid_dist.evaluation import protocols
    from reid_dist.evaluation.distributed.retrieval import encode_all, items_of, plan_retrieval, rank_lists, score
    from reid_dist.reporting import spread_queries
    from reid_dist.training.encode import encode_side

    loaded = load(word, which, overrides or [])
    recipe, spec = loaded.recipe, loaded.spec
    tables = recipe.data.test or recipe.data.train
    view = open_view(recipe.data, tables, ("test", "query", "gallery"))
    try:
        protocol = protocols.get(protocol_name or recipe.evaluation.protocol or spec.protocol)
    except protocols.EvaluationError as error:
        raise UserError(str(error)) from None
    retrieval = plan_retrieval(protocol, view)
    counts = {kind: len(side.rows) for kind, side in retrieval.sides.items()}
    logger.info("%s on %s by protocol %s: %s", loaded.checkpoint, ", ".join(tables), protocol.name, counts)
    if plan_only:
        return {"plan": {"checkpoint": loaded.checkpoint, "protocol": protocol.name, "tables": list(tables), "items": counts}}
    features = encode_all(retrieval, lambda side: encode_side(loaded, view, side))
    record, ap = score(retrieval, features, spec.similarity, recipe.evaluation.memory_mb)
    record |= {
        "checkpoint": loaded.checkpoint,
        "step": loaded.step,
        "method": recipe.method,
        "tables": view.versions,
        "selected_on": recipe.training.select_on if which == "best" else "none",
    }
    if loaded.run is not None:
        picks = spread_queries(ap, 10)
        lists = rank_lists(retrieval, features, spec.similarity, items_of(view)[1], picks, top=10)
        for entry, pick in zip(lists, picks.tolist(), strict=True):
            entry["ap"] = float(ap[pick])
        made = [figure(loaded.model, recipe, view, retrieval.sides) for figure in spec.figures]
        figures = [figure for figure in made if figure is not None]
        key = f"evaluations/{protocol.name}--{'+'.join(tables)}--{loaded.checkpoint}.json"
        content = {"record": record, "lists": lists, "figures": figures, "data": {"root": recipe.data.root, "tables": tables}}
        loaded.run.store.write(key, json.dumps(content, default=str).encode())
        record |= {"run": loaded.run.uri, "stored": key}
    return record


def load(word: str, which: str, overrides: list[str]) -> Any:
    """The run's model, or a recipe's with published weights."""
    from reid_dist import methods
    from reid_dist.methods.spec import ModelFacts
    from reid_dist.training.loaded import fresh_model, load_run

    if word in methods.recipes() or word.endswith((".yaml", ".yml")):
        recipe = methods.load_recipe(word, overrides)
        if not recipe.init.startswith("authors:"):
            raise UserError(f"{word} is a recipe, not a run: add init=authors:PATH to score a published checkpoint, or train it")
        return fresh_model(recipe, ModelFacts(), None, recipe.init)
    return load_run(word, which, overrides)


if __name__ == "__main__":
    run_job("evaluate", main)
