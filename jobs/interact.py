"""Interactive retrieval: a model confirms candidates of a trained text run, describes the accepted one, and the refined
description is searched with (THI of ICL, CVPR 2025; methods/icl.md section 6). See USAGE.

Any run of a text method serves: what is used is its embeddings alone. All rounds of a query are one piece of work, so no
query waits for another; metrics after every round follow from the rounds of acceptance.
"""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs._generation import ModelOptions, make_job, prepare, store_rates
from jobs._job import refuse_unknown_flags, run_job, split_words
from reid_dist.errors import UserError

USAGE = """usage: python -m jobs.interact RUN [key=value ...] [--plan]
       python -m jobs.interact RUN --console
  RUN            a run of a text method: its folder or s3:// prefix
  checkpoint=best rounds=5 threshold=0.5 weight=0.8 (K, xi, lambda), max_words=60
  model=small    who answers; all options of `jobs.generate` about the model, its engines and its ledger
  data.test=[t]  tables to search, default those of the recipe; queries=N: the first N descriptions only
  --console      type a description, see the ten best, answer the questions yourself; page=FILE.html shows the pictures
  --plan         count queries and calls, start nothing"""

logger = logging.getLogger("reid_dist.jobs.interact")
BLOCK = 512  # queries scored at a time
Named = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class InteractOptions(ModelOptions):
    """What `jobs.interact` takes."""

    root: str = ""  # empty: the recipe's data.root
    checkpoint: str = "best"
    rounds: int = 5
    threshold: float = 0.5
    weight: float = 0.8
    max_words: int = 60
    queries: int = 0
    page: str = ""  # of the console: where the pictures are shown; empty: in the system's temporary folder


@dataclass(frozen=True)
class Encoded:
    """A text retrieval, encoded. Named embeddings [Q, D] and [G, D]; texts of the queries; view rows of both sides."""

    query: Named
    gallery: Named
    texts: tuple[str, ...]
    gallery_rows: np.ndarray  # int64 [G] rows of the whole tables
    gallery_images: tuple[str, ...]  # digests
    labels: tuple[Any, Any]
    scoring: Any
    shares: Mapping[str, float]
    encode: Callable[[Sequence[str]], Named]  # texts -> named embeddings


def main(argv: list[str]) -> dict[str, Any]:
    from jobs._words import split_options

    words, values, flags = split_words(argv, USAGE)
    refuse_unknown_flags(flags, {"--plan", "--console"}, USAGE)
    if len(words) != 1:
        raise UserError(f"expected one RUN. {USAGE.splitlines()[0]}")
    options, overrides = split_options(InteractOptions, values, rest_allowed=True)
    return interact(words[0], options, overrides, flags)


def interact(run: str, options: InteractOptions, overrides: list[str], flags: set[str]) -> dict[str, Any]:
    """The job; returns the record. Raises UserError, RunError."""
    from dataclasses import replace

    from jobs._cluster import connect
    from jobs._console import Console
    from reid_dist.data.store import open_view
    from reid_dist.generation.interaction import Policy
    from reid_dist.training.loaded import load_run

    loaded = load_run(run, options.checkpoint, overrides)
    if loaded.spec.task != "text":
        raise UserError(
            f"{run}: method {loaded.spec.name} does not search by descriptions; interaction needs one that does"
        )
    policy = Policy(options.rounds, options.threshold, options.weight)
    data = loaded.recipe.data
    options = replace(options, root=options.root or data.root, cache=options.cache or data.cache)
    tables = tuple(data.test or data.train)
    whole = open_view(data, tables)
    answering = prepare(options, tables)
    encoded = encode(loaded, whole, options.queries)
    facts = {"queries": len(encoded.texts), "gallery": len(encoded.gallery_rows), "checkpoint": loaded.checkpoint}
    if "--plan" in flags:
        return {"plan": facts | {"calls_at_most": len(encoded.texts) * policy.rounds, "ledger": answering.ledger}}
    if "--console" in flags:
        return Console(encoded, whole, policy, f"{run}, {loaded.checkpoint}", options.page).run()
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    started = time.monotonic()
    with connect(math.ceil(options.engines) + 1):
        job = make_job(answering, tables, (), whole)
        record = refine(encoded, job, policy, options.max_words)
    store_rates(answering.ledger, job.summaries)
    stages = ("search", "describe", "merge")
    record |= facts | {
        "run": run, "source": answering.source(stages), "ledger": answering.ledger, "stages": job.summaries,
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    if loaded.run is not None:
        name = f"interactions/{loaded.checkpoint}-{answering.model.digest[:8]}.json"
        loaded.run.store.write(name, json.dumps(record, default=str, indent=1).encode())
        record["stored"] = f"{loaded.run.uri}/{name}"
    return record


def encode(loaded: Any, whole: Any, queries: int = 0) -> Encoded:
    """Encode a run's test tables by its own protocol. Raises UserError."""
    from jobs._scoring import get_protocol
    from jobs._search import QueryView
    from reid_dist.data.leaks import tested
    from reid_dist.evaluation.distributed.retrieval import encode_all, plan_retrieval
    from reid_dist.evaluation.similarity import host
    from reid_dist.methods.spec import EvalSide
    from reid_dist.training.encode import encode_side

    view = tested(whole)
    protocol = get_protocol(loaded.recipe.evaluation.protocol or loaded.spec.protocol)
    retrieval = plan_retrieval(protocol, view)
    if (retrieval.query_kind, retrieval.gallery_kind) != ("text", "image"):
        raise UserError(f"protocol {protocol.name} does not search pictures by descriptions")
    features = encode_all(retrieval, lambda side: encode_side(loaded, view, side))
    trial = retrieval.trials[0]
    asked, found = trial.query[: queries or None], trial.gallery
    sides = retrieval.sides
    texts = [view.captions[row][part] for row, part in zip(sides["text"].rows, sides["text"].part, strict=True)]
    rows = sides["image"].rows[found]
    selections = trial.selection.query[: queries or None], trial.selection.gallery

    def again(sentences: Sequence[str]) -> Named:
        some: Any = QueryView([], tuple(sentences), "rgb")
        side = EvalSide("text", np.zeros(len(sentences), np.int64), np.arange(len(sentences)))
        return {name: host(values) for name, values in encode_side(loaded, some, side).items()}

    return Encoded(
        {name: host(values)[asked] for name, values in features["text"].items()},
        {name: host(values)[found] for name, values in features["image"].items()},
        tuple(texts[int(i)] for i in asked), np.asarray(view.rows)[rows], tuple(view.digests(rows)),
        (retrieval.items.labels(selections[0]), retrieval.items.labels(selections[1])), protocol.scoring,
        loaded.spec.similarity, again,
    )  # fmt: skip


def refine(encoded: Encoded, job: Any, policy: Any, max_words: int) -> dict[str, Any]:
    """All rounds over all queries; metrics before and after every round, and what it took."""
    from reid_dist.evaluation.neighbours import nearest
    from reid_dist.generation.dialogues import observations
    from reid_dist.generation.interaction import NO_ANCHOR, Search, calls_of_released_loop
    from reid_dist.generation.stages import Query

    near = nearest(encoded.query, encoded.gallery, policy.rounds, weights=encoded.shares)
    queries = [
        Query(text, bool(scores[0] > policy.threshold), tuple(encoded.gallery_images[int(i)] for i in index),
              tuple(int(encoded.gallery_rows[int(i)]) for i in index))
        for text, index, scores in zip(encoded.texts, near.index, near.score, strict=True)
    ]  # fmt: skip
    searches = []
    for record, index in zip(job.search(queries), near.index, strict=True):
        went: dict[str, Any] = record.value if record.usable else {"place": NO_ANCHOR, "round": 0, "answers": []}
        anchor = int(index[went["place"]]) if went["place"] >= 0 else NO_ANCHOR
        searches.append(Search(anchor, went["round"], tuple(went["answers"])))
    anchors = sorted({search.anchor for search in searches if search.anchor != NO_ANCHOR})
    described = job.describe({encoded.gallery_images[a]: int(encoded.gallery_rows[a]) for a in anchors})
    accepted = [i for i, search in enumerate(searches) if search.anchor != NO_ANCHOR]
    told = []
    for i in accepted:
        record = described[encoded.gallery_images[searches[i].anchor]]
        told.append((encoded.texts[i], observations(record.value) if record.usable else []))
    refined = [str(record.value) for record in job.merge(told, max_words)]
    after = {name: values.copy() for name, values in encoded.query.items()}
    for name, values in (encoded.encode(refined) if refined else {}).items():
        after[name][accepted] = values
    rounds = [
        metrics(encoded, after, np.array([search.anchor_after(number) for search in searches]), policy.weight)
        for number in range(policy.rounds + 1)
    ]
    asked = sum(len(search.answers) for search in searches)
    right = [encoded.labels[0].pid[i] == encoded.labels[1].pid[searches[i].anchor] for i in accepted]
    return {
        "before": rounds[0], "after": rounds[-1], "rounds": rounds[1:], "accepted": len(accepted),
        "anchors_right": round(float(np.mean(right)), 4) if right else None, "asked": asked,
        "asked_by_released_loop": calls_of_released_loop(searches, policy.rounds, near.index.shape[1]),
    }  # fmt: skip


def metrics(encoded: Encoded, refined: Named, anchors: np.ndarray, weight: float) -> dict[str, float]:
    """R1, R5, R10, mAP, mINP (fractions) with these anchors (-1: none). Scores exist in blocks only."""
    from reid_dist.evaluation.ranking import rank_blocks
    from reid_dist.generation.interaction import rerank

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(anchors), BLOCK):
            here = slice(start, start + BLOCK)
            yield rerank(
                {name: values[here] for name, values in encoded.query.items()},
                {name: values[here] for name, values in refined.items()},
                encoded.gallery, anchors[here], weight, encoded.shares,
            )  # fmt: skip

    record = rank_blocks(blocks(), *encoded.labels, encoded.scoring).record()
    return {name: round(float(record[name]), 6) for name in ("rank1", "rank5", "rank10", "mAP", "mINP")}


if __name__ == "__main__":
    run_job("interact", main)
