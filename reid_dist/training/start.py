"""Start weights of a fresh run: what `init` names, else what the method's config names (published CLIP weights and the like).

`init: run:URI` takes the newest verified checkpoint of another run; `init: authors:PATH` a checkpoint published by the method's
authors, through the method's key map. Weights are read without executing anything (`weights_only`, safetensors).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import nn

from reid_dist.config import Recipe
from reid_dist.errors import UserError
from reid_dist.methods.spec import MethodSpec
from reid_dist.models.published import read_published

logger = logging.getLogger(__name__)


def init_weights(recipe: Recipe) -> Callable[[MethodSpec, nn.Module], None]:
    """What `prepare` calls on a freshly built model. Raises UserError for an unknown form of `init`."""
    kind, _, place = recipe.init.partition(":")
    if recipe.init and (kind not in ("run", "authors") or not place):
        raise UserError(f"init={recipe.init!r}: write run:URI (another run) or authors:PATH (a published checkpoint)")
    if kind == "run":
        return lambda spec, model: _from_run(place, model)
    if kind == "authors":
        return lambda spec, model: _from_authors(place, spec, model)

    def start(spec: MethodSpec, model: nn.Module) -> None:
        if spec.start is not None:
            spec.start(model, recipe.model)

    return start


def _from_run(uri: str, model: nn.Module) -> None:
    from reid_dist.runs import Run
    from reid_dist.training.checkpoint import newest

    snapshot = newest(Run.read(uri))
    if snapshot is None:
        raise UserError(f"init=run:{uri}: that run has no complete checkpoint")
    own = model.state_dict()
    fitting = {name: value for name, value in snapshot.model.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise UserError(f"init=run:{uri}: none of its weights fits this model")
    model.load_state_dict(fitting, strict=False)
    logger.info("start weights: %d of %d tensors from %s", len(fitting), len(own), uri)


def _from_authors(path: str, spec: MethodSpec, model: nn.Module) -> None:
    if spec.import_weights is None:
        raise UserError(f"init=authors:{path}: method {spec.name} has no importer for its authors' checkpoints")
    weights = spec.import_weights(model, read_published(path))
    model.load_state_dict(dict(weights), strict=False)
