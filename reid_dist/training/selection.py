"""Evaluation inside training: the selection split, encoded by all workers, scored by rank 0."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
from torch import nn

from reid_dist.config import Recipe
from reid_dist.data.store import open_view
from reid_dist.evaluation.distributed.retrieval import encode_all, plan_retrieval, score
from reid_dist.evaluation.pipeline import Options
from reid_dist.evaluation.protocols import get as get_protocol
from reid_dist.training.context import RunContext
from reid_dist.training.worker import Prepared

logger = logging.getLogger(__name__)

Evaluator = Callable[[nn.Module, RunContext], dict[str, float]]


def evaluator(recipe: Recipe, prepared: Prepared) -> Evaluator | None:
    """The loop's evaluate hook for `training.select_on`, or None when nothing selects.

    Selecting on the test split is what several papers did; it is off unless asked for, and said when on.
    """
    training, spec = recipe.training, prepared.spec
    if training.select_on == "none" or training.eval_every == 0:
        return None
    if spec.judge is not None:
        return spec.judge(recipe, prepared.data)
    eval_batch, encode = spec.eval_batch, spec.encode
    assert eval_batch, f"{spec.name} neither encodes nor judges"
    assert encode
    if training.select_on == "test":
        logger.warning(
            "training.select_on=test: checkpoints are chosen on the test split, so its scores are optimistic"
        )
        view = open_view(recipe.data, recipe.data.test or recipe.data.train, ("test", "query", "gallery"))
    elif prepared.data.val is None:
        logger.info(
            "no val split and data.val_fraction=0: nothing is evaluated during training, the last checkpoint counts"
        )
        return None
    else:
        view = prepared.data.val
    protocol = get_protocol(recipe.evaluation.protocol or spec.protocol)
    retrieval = plan_retrieval(protocol, view, training.select_on == "val", trial=recipe.data.trial)
    options = Options(memory_mb=recipe.evaluation.memory_mb)

    def evaluate(model: nn.Module, ctx: RunContext) -> dict[str, float]:
        features = encode_all(
            retrieval,
            lambda side: ctx.extract(
                model,
                items=np.arange(len(side.rows), dtype=np.int64),
                load=lambda index: eval_batch(recipe.model, view, side, index),
                encode=encode,
                batch=recipe.evaluation.batch,
            ),
        )
        record = score(retrieval, features, spec.similarity, options, refuse_constant=False)[0] if ctx.rank == 0 else {}
        numbers = {key: value for key, value in record.items() if isinstance(value, (int, float))}
        return dict(ctx.broadcast(numbers))

    return evaluate
