"""A trained run as a model: recipe, method and weights of one checkpoint, whole on one device."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from reid_dist import methods
from reid_dist.config import Recipe, apply_overrides, build_recipe
from reid_dist.errors import UserError
from reid_dist.methods.spec import MethodSpec, ModelFacts
from reid_dist.runs import Run
from reid_dist.training import checkpoint as checkpoints
from reid_dist.training.start import init_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to encode."""

    recipe: Recipe
    spec: MethodSpec
    model: nn.Module
    device: torch.device
    run: Run | None
    checkpoint: str  # "step-00000630", "start" (before training) or "authors:PATH"
    step: int


def device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_run(uri: str, which: str = "best", overrides: Iterable[str] = (), encodes: bool = True) -> LoadedModel:
    """The model of a run. `which`: best (by the selection split; without one the last), last, start, or step-N.

    `overrides` change keys that do not shape the model (data.*, evaluation.*). Raises UserError; with `encodes` also for a
    run of a method that encodes nothing.
    """
    run = Run.read(uri)
    card = run.card()
    mapping = apply_overrides(card["recipe"], overrides)
    recipe = build_recipe(mapping, lambda name: methods.get(name).Config)
    facts = ModelFacts(**card.get("model_facts", {}))
    if encodes and methods.get(recipe.method).encode is None:
        raise UserError(
            f"{uri}: a run of {recipe.method} encodes nothing, so nothing can be searched or scored with it"
        )
    if which == "start":
        return fresh_model(recipe, facts, run, "start")
    name = _choose(run, which)
    snapshot = checkpoints.read(run, name)
    spec = methods.get(recipe.method)
    model = spec.build(recipe.model, facts)
    checkpoints.load_weights(model, snapshot.model)
    label = name.rpartition("/")[2]
    return LoadedModel(recipe, spec, model.to(device()).eval(), device(), run, label, snapshot.progress.step)


def fresh_model(recipe: Recipe, facts: ModelFacts, run: Run | None, label: str) -> LoadedModel:
    """The model before training: its seeded or published start weights."""
    spec = methods.get(recipe.method)
    torch.manual_seed(recipe.seed)
    model = spec.build(recipe.model, facts)
    init_weights(recipe)(spec, model)
    return LoadedModel(recipe, spec, model.to(device()).eval(), device(), run, label, 0)


def _choose(run: Run, which: str) -> str:
    kept = [c for c in run.checkpoints() if c["kept"]]
    if not kept:
        raise UserError(f"{run.uri} has no complete checkpoint yet: train it first, or ask for checkpoint=start")
    if which == "last":
        return str(kept[-1]["name"])
    if which == "best":
        scored = [c for c in kept if "rank1" in c["metrics"]]
        return str(
            max(scored, key=lambda c: (c["metrics"]["rank1"], c["step"]))["name"] if scored else kept[-1]["name"]
        )
    wanted = [
        c
        for c in kept
        if str(c["name"]).rpartition("/")[2].replace("step-", "").lstrip("0") == which.replace("step-", "").lstrip("0")
    ]
    if not wanted:
        steps = ", ".join(str(c["step"]) for c in kept)
        raise UserError(f"checkpoint={which}: {run.uri} keeps steps {steps}; or say best, last, start")
    return str(wanted[0]["name"])


def facts_dict(facts: ModelFacts) -> dict[str, int]:
    """For `Run.describe(model_facts=...)`."""
    return dataclasses.asdict(facts)
