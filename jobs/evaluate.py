"""Score a trained run, or anybody's feature file; or search a feature file. See USAGE.

RUN is the run's folder or s3:// prefix; or a recipe together with init=authors:PATH, to score a published checkpoint.
The record, ten rank lists and the method's own figures are stored in the run under evaluations/, where `jobs.report`
finds them.
Scoring a file imports neither Ray, DeepSpeed nor vLLM unless shards= is given.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import warnings
from typing import Any

from jobs._job import refuse_unknown_flags, run_job, split_words
from reid_dist.errors import UserError

USAGE = """usage: python -m jobs.evaluate RUN [checkpoint=best|last|start|step-N] [protocol=NAME] [key=value ...]
       python -m jobs.evaluate --features FILE --protocol NAME [metric=cosine|dot|euclidean] [key=value ...]
       python -m jobs.evaluate --search FEATURES --query QUERY [--query ...] [images=FOLDER] [out=search.html] [top=10]
  RUN            a run's folder or s3:// prefix, or a recipe with init=authors:PATH
  checkpoint=    best on the selection split (default; the last where nothing selects), last, start (untrained), step-N
  protocol=      default: the method's own (evaluation/protocols.py)
  trial=N        one train/test division of a set that has several; a model trained on that set has its own
  trials=all     RUN is the name of a training with trials=all: every division by its own model, and their mean
  data.test=[t]  tables to score, default those of the recipe
  --plan         print what would run, start nothing
  --features     npz or Parquet with feat [N, D], pid, camid, split (query, gallery); some protocols want modality,
                 tracklet, trial, path
  --search       a feature file with the columns feat and path (jobs.extract writes one)
  --query        a path in that file, row:N, another feature file; with run=RUN an image file or, by a text method,
                 a sentence
  images=        where the paths of a searched file lie (folder or s3://), or table=NAME root=URI: pictures for the page
  rerank=true    k-reciprocal re-ranking; rerank.k1=20 rerank.k2=6 rerank.lambda_value=0.3
  expansion=true query expansion; expansion.k=5 expansion.alpha=3.0
  shards=N       encode and score by N Ray tasks; store=URI: where they exchange features
  permutations=  SYSU-MM01's rand_perm_cam.mat instead of seeded draws
  memory_mb=     budget of one block of scores; allow_constant=true: score features that are all the same"""

logger = logging.getLogger("reid_dist.jobs.evaluate")


def main(argv: list[str]) -> dict[str, Any]:
    from jobs._words import FileOptions, RunOptions, SearchOptions, split_options, take_valued

    taken, argv = take_valued(argv, ("features", "protocol", "search", "query"))
    words, values, flags = split_words(argv, USAGE)
    refuse_unknown_flags(flags, {"--plan"}, USAGE)
    single = {name: given[0] for name, given in taken.items() if name != "query" and len(given) == 1}
    ways = len(words) + len(taken.get("features", [])) + len(taken.get("search", []))
    if ways != 1 or len(taken.get("protocol", [])) > 1 or ("query" in taken) != ("search" in taken):
        raise UserError(
            f"name one run, one --features FILE, or one --search FEATURES with --query. {USAGE.splitlines()[0]}"
        )
    values = [*values, *(f"protocol={name}" for name in taken.get("protocol", []))]
    if "features" in single:
        from jobs._scoring import score_file

        return score_file(single["features"], split_options(FileOptions, values, rest_allowed=False)[0])
    if "search" in single:
        from jobs._search import search

        return search(single["search"], taken["query"], split_options(SearchOptions, values, rest_allowed=False)[0])
    options, overrides = split_options(RunOptions, values, rest_allowed=True)
    if options.trials is not None:
        from jobs._trials import evaluate_trials

        return evaluate_trials(words[0], options, overrides, "--plan" in flags)
    return evaluate_run(words[0], options, overrides, "--plan" in flags)


def take_options(values: list[str], names: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Split key=value words into the job's own options and recipe overrides."""
    options = dict(word.split("=", 1) for word in values if word.split("=")[0] in names)
    return options, [word for word in values if word.split("=")[0] not in names]


def evaluate(word: str, which: str = "best", overrides: list[str] | None = None) -> dict[str, Any]:
    """Encode and score by the method's own protocol; returns the record."""
    from jobs._words import RunOptions

    return evaluate_run(word, RunOptions(checkpoint=which), overrides or [])


def evaluate_run(word: str, options: Any, overrides: list[str], plan_only: bool = False) -> dict[str, Any]:
    """Encode and score a run with RunOptions; returns the record. Raises UserError."""
    from jobs._scoring import get_protocol, or_refusal, permutations_of
    from jobs._words import pipeline_options
    from reid_dist.data.leaks import tested
    from reid_dist.data.store import open_view
    from reid_dist.evaluation.distributed.retrieval import plan_retrieval, score_beside

    loaded = load(word, options.checkpoint, overrides)
    recipe, spec = loaded.recipe, loaded.spec
    settings = pipeline_options(options, recipe.evaluation.memory_mb)
    tables = recipe.data.test or recipe.data.train
    whole = open_view(recipe.data, tables)
    refuse_new_leaks(loaded, whole)
    view = tested(whole)
    protocol = get_protocol(options.protocol or recipe.evaluation.protocol or spec.protocol)
    asked = options.trial
    if asked is None and recipe.data.trial != trained_on(loaded).trial:
        asked = recipe.data.trial
    trial = trial_of(protocol, view, trained_on(loaded), tables, asked)
    retrieval = plan_retrieval(protocol, view, trial=trial, permutations=permutations_of(options, protocol))
    counts = {kind: len(side.rows) for kind, side in retrieval.sides.items()}
    logger.info("%s on %s by protocol %s: %s", loaded.checkpoint, ", ".join(tables), protocol.name, counts)
    if plan_only:
        return {
            "plan": {
                "checkpoint": loaded.checkpoint,
                "protocol": protocol.name,
                "tables": list(tables),
                "items": counts,
            }
        }
    encoder = functools.partial(make_encoder, word, options.checkpoint, overrides)
    record, ap, features = encode_and_score(loaded, view, retrieval, settings, options, encoder)
    if protocol.beside:
        other = plan_retrieval(get_protocol(protocol.beside), view, trial=trial)
        how = loaded.spec.similarity, settings, not options.allow_constant
        record["beside"] = {protocol.beside: or_refusal(lambda: score_beside(retrieval, other, features, *how))}
    record |= {
        "checkpoint": loaded.checkpoint,
        "step": loaded.step,
        "method": recipe.method,
        "tables": view.versions,
        "selected_on": recipe.training.select_on if options.checkpoint == "best" else "none",
        "overrides": overrides,
        **({} if trial is None else {"trial": trial}),
    }
    if loaded.run is not None:
        record |= {"run": loaded.run.uri, "stored": store_evaluation(loaded, view, retrieval, features, record, ap)}
    return record


def encode_and_score(
    loaded: Any, view: Any, retrieval: Any, settings: Any, options: Any, encoder: Any
) -> tuple[dict[str, Any], Any, Any]:
    """(record, AP per query of the first trial, features), in this process or by Ray tasks."""
    from reid_dist.evaluation.distributed.retrieval import encode_all, score
    from reid_dist.training.encode import encode_side

    weights, refuse = loaded.spec.similarity, not options.allow_constant
    if not options.shards:
        features = encode_all(retrieval, lambda side: encode_side(loaded, view, side))
        return *score(retrieval, features, weights, settings, refuse), features
    from jobs._cluster import connect
    from jobs._scoring import shard_place
    from reid_dist.evaluation.distributed.shards import encode_sharded, score_sharded

    # Lance warns about every child process; Ray's are started with exec, which is safe.
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    usual = loaded.run.uri if loaded.run is not None else ""
    batch = loaded.recipe.evaluation.batch
    with shard_place(options, usual) as place, connect(options.shards):
        stored = encode_sharded(place, retrieval, encoder, batch, options.shards)
        record, ap = score_sharded(retrieval, stored, weights, settings, options.shards, refuse)
        return record | {"shards": options.shards}, ap, stored.all()


def make_encoder(word: str, which: str, overrides: list[str]) -> Any:
    """In a Ray task: load the model, open the view, encode a side."""
    from reid_dist.data.leaks import tested
    from reid_dist.data.store import open_view
    from reid_dist.training.encode import encode_side

    loaded = load(word, which, overrides)
    data = loaded.recipe.data
    view = tested(open_view(data, data.test or data.train))
    return lambda side: encode_side(loaded, view, side)


def trained_on(loaded: Any) -> Any:
    """The DataConfig that the model was trained with, whatever this job's words change of it."""
    from reid_dist.config import DataConfig, typed

    return loaded.recipe.data if loaded.run is None else typed(DataConfig, loaded.run.facts["recipe"]["data"], "data")


def trial_of(protocol: Any, view: Any, trained: Any, tables: Any, asked: int | None) -> int | None:
    """The train/test division to score, None for all that the tables have.

    Where each division has its own training identities (RegDB; any set that the model was trained on, by its DataConfig
    `trained`), the model counts for its own alone: they are among the test identities of the others. Raises UserError
    for another one.
    """
    from reid_dist.evaluation.protocols import EvaluationError, check_trial

    own = trained.trial
    if view.num_trials == 1 or not set(tables) & set(trained.train):
        return asked
    try:
        check_trial(protocol, own if asked is None else asked, own)
    except EvaluationError as error:
        raise UserError(str(error)) from None
    if asked not in (None, own):
        raise UserError(
            f"trial={asked}: this model was trained on division {own} of {', '.join(tables)}, whose training "
            f"identities are among the test identities of division {asked}"
        )
    return own


def refuse_new_leaks(loaded: Any, whole: Any) -> None:
    """Tables that training did not mean to test are looked through for what it was trained on. Raises LeakError."""
    from reid_dist.data.leaks import check_leaks, only_people
    from reid_dist.data.store import open_view

    if loaded.run is None:  # what a published checkpoint was trained on, no table says
        return
    data, known = loaded.recipe.data, trained_on(loaded)
    if {table.name for table in whole.tables} - set(known.test or known.train):
        trained = open_view(dataclasses.replace(data, trial=known.trial), known.train, known.train_splits)
        check_leaks(only_people(trained), whole)


def store_evaluation(loaded: Any, view: Any, retrieval: Any, features: Any, record: dict[str, Any], ap: Any) -> str:
    """Record, rank lists and the method's figures into the run; returns the key."""
    from reid_dist.evaluation.distributed.retrieval import rank_lists
    from reid_dist.reporting import spread_queries

    recipe, spec = loaded.recipe, loaded.spec
    tables = recipe.data.test or recipe.data.train
    picks = spread_queries(ap, 10)
    lists = rank_lists(retrieval, features, spec.similarity, picks, top=10)
    for entry, pick in zip(lists, picks.tolist(), strict=True):
        entry["ap"] = float(ap[pick])
    made = [figure(loaded.model, recipe, view, retrieval.sides) for figure in spec.figures]
    figures = [figure for figure in made if figure is not None]
    marks = [f"trial-{record['trial']}"] if "trial" in record else []
    marks += [record["label"]] if record["label"] else []
    marks += [word for word in record["overrides"] if word.startswith("model.")]  # dense clips beside restricted ones
    key = f"evaluations/{'--'.join([retrieval.protocol.name, '+'.join(tables), loaded.checkpoint, *marks])}.json"
    content = {
        "record": record,
        "lists": lists,
        "figures": figures,
        "data": {"root": recipe.data.root, "tables": tables},
    }
    loaded.run.store.write(key, json.dumps(content, default=str).encode())
    return key


def load(word: str, which: str, overrides: list[str]) -> Any:
    """The run's model, or a recipe's with published weights."""
    from reid_dist import methods
    from reid_dist.methods.spec import ModelFacts
    from reid_dist.training.loaded import fresh_model, load_run

    if word in methods.recipes() or word.endswith((".yaml", ".yml")):
        recipe = methods.load_recipe(word, overrides)
        if not recipe.init.startswith("authors:"):
            raise UserError(
                f"{word} is a recipe, not a run: add init=authors:PATH to score a published checkpoint, or train it"
            )
        return fresh_model(recipe, ModelFacts(), None, recipe.init)
    return load_run(word, which, overrides)


if __name__ == "__main__":
    run_job("evaluate", main)
