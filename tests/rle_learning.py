"""Training RLE on the synthetic visible-infrared world in this process, and scoring both directions: for test and bench."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import nn

from reid_dist import methods
from reid_dist.config import Recipe
from tests.worlds import small_table

DIRECTIONS = ("regdb-visible-to-thermal", "regdb-thermal-to-visible")
KEYS = ("rank1", "mAP", "chance_rank1", "chance_mAP")


def learn(root: Path, *words: str, people: int = 400, images: int = 5) -> dict[str, Any]:
    """{"untrained", "trained": {direction: record}, "steps", "seconds"} of `rle/synthetic` on one process.

    `people` are halved by the division that the recipe names, `images` in each modality of everybody; `words` are
    overrides.
    """
    from reid_dist.training.loop import Hooks
    from reid_dist.training.worker import make_worker, prepare

    small_table(root, "synthetic-regdb", num_train=0, num_test=people, images_per_id=images)
    alone = ["training.num_workers=1", "training.checkpoint_every=0", "training.log_every=100"]
    recipe = methods.load_recipe("rle/synthetic", [f"data.root={root}", *alone, *words])
    prepared = prepare(recipe)
    worker = make_worker(recipe, prepared, None, Hooks())
    untrained = scores(recipe, prepared.build())
    started = time.perf_counter()
    progress = worker.train()
    seconds = time.perf_counter() - started
    trained = scores(recipe, worker.model)
    return {"untrained": untrained, "trained": trained, "steps": progress.step, "seconds": seconds}


def scores(recipe: Recipe, model: nn.Module) -> dict[str, dict[str, float]]:
    """{direction: rank1, mAP and what chance gives} by the job's own extraction and scoring."""
    import torch

    from reid_dist.data.leaks import tested
    from reid_dist.data.store import open_view
    from reid_dist.evaluation.distributed.retrieval import encode_all, plan_retrieval, score
    from reid_dist.evaluation.pipeline import Options
    from reid_dist.evaluation.protocols import get
    from reid_dist.training.encode import encode_side
    from reid_dist.training.loaded import LoadedModel

    spec, view = methods.get(recipe.method), tested(open_view(recipe.data, recipe.data.test))
    loaded = LoadedModel(recipe, spec, model.eval(), torch.device("cpu"), None, "", 0)
    result = {}
    for name in DIRECTIONS:
        retrieval = plan_retrieval(get(name), view, trial=recipe.data.trial)
        features = encode_all(retrieval, lambda side: encode_side(loaded, view, side))
        record, _ = score(retrieval, features, spec.similarity, Options())
        result[name] = {key: record[key] for key in KEYS}
    return result
