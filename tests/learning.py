"""Training a shipped recipe on a synthetic table in this process, and scoring it: for learning tests and benches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from reid_dist import methods
from reid_dist.config import Recipe
from reid_dist.methods.spec import MethodSpec
from tests.worlds import small_table

if TYPE_CHECKING:
    from reid_dist.training.worker import Prepared

KEYS = ("rank1", "mAP", "chance_rank1", "chance_mAP")
ALONE = ("training.num_workers=1", "training.checkpoint_every=0", "training.log_every=100")


def prepare(root: Path, name: str, words: Sequence[str], world: dict[str, Any]) -> tuple[Recipe, Prepared]:
    """A recipe over tables below `root`, which are drawn where they are not yet there (`world`: their options)."""
    from reid_dist.training import worker

    recipe = methods.load_recipe(name, [f"data.root={root}", f"output={root}/runs", *ALONE, *words])
    for table in dict.fromkeys((*recipe.data.train, *recipe.data.test)):
        small_table(root, table, **world)
    return recipe, worker.prepare(recipe)


def learn(root: Path, name: str, protocols: Sequence[str], words: Sequence[str] = (), **world: Any) -> dict[str, Any]:
    """{"untrained", "trained": {protocol: record}, "steps", "seconds", "recipe", "model"} of a recipe on one process."""
    from reid_dist.training.loop import Hooks
    from reid_dist.training.worker import make_worker

    recipe, prepared = prepare(root, name, words, world)
    worker = make_worker(recipe, prepared, None, Hooks())
    untrained = scores(recipe, prepared.build(), protocols)
    started = time.perf_counter()
    progress = worker.train()
    seconds = time.perf_counter() - started
    trained = scores(recipe, worker.model, protocols)
    return {"untrained": untrained, "trained": trained, "steps": progress.step, "seconds": seconds, "recipe": recipe,
            "model": worker.model}  # fmt: skip


def stored(root: Path, name: str, words: Sequence[str] = (), **world: Any) -> str:
    """Train as `learn`, into a run below `root`; returns where it is."""
    from reid_dist.runs import Run, identity_of
    from reid_dist.training.loaded import facts_dict
    from reid_dist.training.loop import Hooks
    from reid_dist.training.worker import make_worker

    recipe, prepared = prepare(root, name, words, world)
    run = Run.open(recipe.uri, identity_of(recipe, prepared.data.train.versions), recipe)
    run.describe(model_facts=facts_dict(prepared.spec.facts(prepared.data)))
    make_worker(recipe, prepared, run, Hooks()).train()
    run.write_record({"steps": len(run.metrics())})
    return run.uri


def scores(
    recipe: Recipe, model: nn.Module, protocols: Sequence[str], spec: MethodSpec | None = None
) -> dict[str, dict[str, float]]:
    """{protocol: rank1, mAP and what chance gives} by the job's own extraction and scoring; `spec`: not the method's own."""
    from reid_dist.data.leaks import tested
    from reid_dist.data.store import open_view
    from reid_dist.evaluation.distributed.retrieval import encode_all, plan_retrieval, score
    from reid_dist.evaluation.pipeline import Options
    from reid_dist.evaluation.protocols import get
    from reid_dist.training.encode import encode_side
    from reid_dist.training.loaded import LoadedModel, device

    spec, view = spec or methods.get(recipe.method), tested(open_view(recipe.data, recipe.data.test))
    loaded = LoadedModel(recipe, spec, model.to(device()).eval(), device(), None, "", 0)
    result = {}
    for name in protocols:
        retrieval = plan_retrieval(get(name), view, trial=recipe.data.trial)
        features = encode_all(retrieval, lambda side: encode_side(loaded, view, side))
        record, _ = score(retrieval, features, spec.similarity, Options())
        result[name] = {key: record[key] for key in KEYS}
    return result
