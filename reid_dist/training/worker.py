"""From a recipe to a ready worker: tables, method, model. The same for a Ray worker, a gloo process of a test and a bench."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from reid_dist import methods
from reid_dist.config import Recipe
from reid_dist.data.leaks import only_people
from reid_dist.data.store import TableView, open_view
from reid_dist.errors import UserError
from reid_dist.methods.spec import MethodSpec, ModelFacts, TrainingData
from reid_dist.runs import Run
from reid_dist.training.loop import Hooks, Worker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What every rank derives from the recipe alone."""

    spec: MethodSpec
    data: TrainingData
    facts: ModelFacts
    build: Callable[[], nn.Module]


def open_data(recipe: Recipe) -> TrainingData:
    """The training rows and the rows that select. Raises UserError when a table has no training rows.

    Selection rows are the val split of data.val (default: of data.train); where there is none and data.val_fraction is set,
    that share of the training identities is held out, drawn by the recipe's seed.
    """
    if not recipe.data.train:
        raise UserError("data.train is empty: name at least one packed table, for example data.train=[cuhk-pedes]")
    both = sorted(set(recipe.data.train) & set(recipe.data.test))
    if both and set(recipe.data.train_splits) - {"train", "val"}:
        raise UserError(
            f"data.train_splits={list(recipe.data.train_splits)} learns from the test images of {', '.join(both)}, which "
            "data.test scores: keep test tables out of data.train"
        )
    train = only_people(open_view(recipe.data, recipe.data.train, recipe.data.train_splits))
    val: TableView | None = open_view(recipe.data, recipe.data.val or recipe.data.train, ("val",))
    if val is not None and len(val) == 0:
        val = None
        if recipe.data.val_fraction > 0:
            train, val = train.hold_out(recipe.data.val_fraction, recipe.seed)
    if len(train) == 0:
        raise UserError(f"tables {', '.join(recipe.data.train)} under {recipe.data.root} have no rows of split 'train'")
    return TrainingData(train=train, val=val)


def prepare(recipe: Recipe, init_weights: Callable[[MethodSpec, nn.Module], None] | None = None) -> Prepared:
    """Open the data and the method. `build()` gives the same start weights on every rank: it seeds torch by the recipe."""
    spec = methods.get(recipe.method)
    data = open_data(recipe)
    facts = spec.facts(data)

    def build() -> nn.Module:
        torch.manual_seed(recipe.seed)
        model = spec.build(recipe.model, facts)
        if init_weights is not None:
            init_weights(spec, model)
        return model

    return Prepared(spec, data, facts, build)


def set_threads(recipe: Recipe) -> None:
    """Torch threads of this process: as many as the worker's share of CPUs, so that workers of one node do not fight."""
    training = recipe.training
    torch.set_num_threads(training.threads_per_worker or max(1, round(training.cpus_per_worker)))


def make_worker(recipe: Recipe, prepared: Prepared, run: Run | None, hooks: Hooks) -> Worker:
    """This process as one rank of the run."""
    set_threads(recipe)
    if torch.cuda.is_available() and recipe.training.use_gpu is not False:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    return Worker(recipe, prepared.spec, prepared.build, prepared.data, run, hooks, device)
