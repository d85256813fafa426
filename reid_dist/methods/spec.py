"""The contract between a method and everything else. A method is a folder whose package exposes `METHOD = MethodSpec(...)`.

How a step is computed (training/loop.py), for B rows of the global batch cut into contiguous, possibly uneven slices:

1. `stage.load(part)`      host threads: decode and augment this rank's rows -> Batch of tensors with n rows.
2. `stage.forward(...)`    rows in, row-wise tensors out (first axis n). Nothing here may look at another row except through
                           `ctx.reduce` inside synchronised batch norm.
3. `stage.losses(...)`     sees this rank's outputs and may gather everybody's. Each returned term must be scaled so that the
                           *mean over ranks* is the global term; gradients are averaged over ranks.
4. optimizer step, then `stage.after_step(...)` (memories, banks: same update on every rank).

A model of which a large part is never trained may set `frozen_is_rebuilt = True`: `build` fills its frozen weights, and
checkpoints hold the trained ones alone.

A module's forward returns tensors, tuples (NamedTuple) or dicts of tensors: ZeRO-3 looks for parameters and gradients in them
and does not see into other classes.

Because forward is row-wise, a step can be cut into micro-batches with exact in-batch losses: outputs are computed without
gradient, losses and their gradients on the whole batch, then each piece is run again with the gradient of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from reid_dist.config import OptimConfig, Recipe, ScheduleConfig
from reid_dist.data.draws import row_rng
from reid_dist.errors import UserError

if TYPE_CHECKING:
    from reid_dist.data.store import TableView

Batch = dict[str, Any]  # tensors have the n rows first, the rest is carried along; the loader adds row, row_seed
Outputs = dict[str, Tensor]  # row-wise tensors [n, ...]
Terms = dict[str, Tensor]  # scalar loss terms, weighted; the objective is their sum


class Context(Protocol):
    """What a stage may ask of the other ranks. The single-process context answers everything by itself."""

    rank: int
    world_size: int
    seed: int
    epoch: int  # within the stage
    step: int  # optimizer steps done in the whole run

    def gather(self, rows: Tensor) -> Tensor:
        """[n, ...] of this rank -> [B, ...] of all ranks in rank order. Differentiable; slices may be uneven or empty."""
        ...

    def slice(self) -> slice:
        """Where this rank's rows lie in the gathered batch of the current step."""
        ...

    def reduce(self, value: Tensor) -> Tensor:
        """Differentiable sum over ranks of equally shaped tensors."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Rank 0's (picklable) value on every rank."""
        ...

    def extract(self, model: nn.Module, items: np.ndarray, load: Callable[[np.ndarray], Batch],
                encode: Callable[[nn.Module, Batch], Outputs], batch: int = 128) -> dict[str, Tensor]:  # fmt: skip
        """One sharded no-grad pass over `items`; every rank gets all outputs (CPU tensors) in the order of `items`."""
        ...

    def log(self, **values: float) -> None:
        """Scalars for the step's record, the same on every rank."""
        ...

    def note(self, kind: str, **content: Any) -> None:
        """One record of its own in the run's metrics, plain (JSON) content, the same on every rank."""
        ...


@dataclass(frozen=True, slots=True)
class PlanPart:
    """This rank's slice of one global batch."""

    items: np.ndarray  # int64 [n] entries of the plan (what an item is, the stage says)
    positions: np.ndarray  # int64 [n] places in the epoch's plan, the key of every random draw
    epoch: int
    seed: int

    def rngs(self, rows: np.ndarray, stream: str) -> list[np.random.Generator]:
        """A generator of its own for each of the table rows int64 [n] that the items use, whoever loads it."""
        places = zip(self.positions.tolist(), rows.tolist(), strict=True)
        return [row_rng(self.seed, self.epoch, position, row, stream) for position, row in places]


class Plan(Protocol):
    """(epoch, step) -> the items of the global batch; pure, so its state is three integers (data/samplers.py)."""

    def steps(self, epoch: int) -> int: ...

    def batch(self, epoch: int, step: int) -> tuple[np.ndarray, int]:
        """(items int64 [B], position of the first one in the epoch's plan)."""
        ...


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Parameters that share learning rate and decay. Parameters in no group are frozen."""

    names: tuple[str, ...]
    lr: float
    weight_decay: float


class Stage:
    """One training stage. Subclasses override what they need; the defaults do nothing."""

    name: str = "train"
    epochs: int = 1
    row_wise: bool = True  # False: `forward` holds batch norm, so a step cannot be cut into micro-batches

    def plan(self) -> Plan:
        raise TypeError(f"stage {self.name} has no plan")

    def load(self, part: PlanPart) -> Batch:
        """Decode and augment; runs in loader threads, so it must not touch the model or torch's global RNG."""
        raise TypeError(f"stage {self.name} loads nothing")

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        raise TypeError(f"stage {self.name} has no parameter groups")

    def optim(self) -> OptimConfig:
        raise TypeError(f"stage {self.name} has no optimizer")

    def schedule(self) -> ScheduleConfig:
        raise TypeError(f"stage {self.name} has no schedule")

    def rate(self, base_lr: float, t: int, total: int) -> float | None:
        """A group's learning rate at time `t` of `total`, from 0, as `schedule().unit` counts; None: the schedule's own."""
        return None

    def begin_stage(self, model: nn.Module, ctx: Context) -> None: ...

    def begin_epoch(self, model: nn.Module, ctx: Context) -> None: ...

    def forward(self, model: nn.Module, batch: Batch, ctx: Context) -> Outputs:
        raise TypeError(f"stage {self.name} has no forward")

    def losses(self, model: nn.Module, out: Outputs, batch: Batch, ctx: Context) -> Terms:
        raise TypeError(f"stage {self.name} has no losses")

    def after_step(self, model: nn.Module, out: Outputs, batch: Batch, ctx: Context) -> None: ...

    def state(self) -> dict[str, Tensor]:
        """Tensors to checkpoint beside weights and optimizer; equal on every rank."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None: ...


class RecipeStage(Stage):
    """A stage whose length, batch, optimizer and schedule are those of the recipe: the usual one."""

    def __init__(self, recipe: Recipe, view: TableView) -> None:
        self.recipe, self.view = recipe, view
        self.epochs, self.global_batch = recipe.training.epochs, recipe.training.global_batch

    def optim(self) -> OptimConfig:
        return self.recipe.optim

    def schedule(self) -> ScheduleConfig:
        return self.recipe.schedule


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a method sees of the data. Views are lists of rows over one or more tables, joined in recipe order."""

    train: TableView
    val: TableView | None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's shape may depend on; saved with the run so that evaluation needs no training table."""

    num_classes: int = 0
    num_cameras: int = 0
    num_domains: int = 1


def training_identities(data: TrainingData) -> ModelFacts:
    """Classes are the training identities."""
    return ModelFacts(num_classes=len(np.unique(np.asarray(data.train.label))))


@dataclass(frozen=True, slots=True)
class Reference:
    """Where a method comes from."""

    paper: str
    repository: str
    commit: str


@dataclass(frozen=True, slots=True)
class EvalSide:
    """Query or gallery of a retrieval: which items are encoded, and by what.

    `encode` names its embeddings by what they are compared with, not by their kind: text->image methods return the same
    names ("global", ...) for a caption as for an image, so that `similarity` can weigh query-gallery cosines by name.
    """

    kind: str  # "image" | "text" | "tracklet"
    rows: np.ndarray  # int64 [N] rows of the view
    part: np.ndarray  # int64 [N] caption number (text), otherwise 0


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """A method, whole.

    One that encodes nothing for retrieval opts out: `protocol` "", `eval_batch` and `encode` None, `similarity` empty, and
    where something is to be evaluated while it trains, `judge`.
    """

    name: str
    task: str  # "text" | "image" | "video" | "visible-infrared" | "answers"
    protocol: str  # default protocol of its evaluation (a name of evaluation/protocols.py); "": it ranks nothing
    Config: type
    build: Callable[[Any, ModelFacts], nn.Module]
    stages: Callable[[Recipe, TrainingData], Sequence[Stage]]
    # (config, view, side, indices into side) -> batch
    eval_batch: Callable[[Any, TableView, EvalSide, np.ndarray], Batch] | None
    # embeddings [n, D], not yet normalised; the same names for either side
    encode: Callable[[nn.Module, Batch], Outputs] | None
    similarity: Mapping[str, float]  # weights of the named embeddings' cosine similarities
    reference: Reference
    facts: Callable[[TrainingData], ModelFacts] = training_identities
    # authors' file -> our names
    import_weights: Callable[[nn.Module, Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    start: Callable[[nn.Module, Any], None] | None = None  # (model, config): published start weights; fresh runs only
    # in place of retrieval on the selection split: what the loop calls, None where there is nothing to evaluate
    judge: Callable[[Recipe, TrainingData], Callable[[nn.Module, Context], dict[str, float]] | None] | None = None
    check: Callable[[Recipe], None] | None = None  # refuse (UserError) or warn before any job with this recipe starts
    precisions: tuple[str, ...] = ("fp32", "bf16")  # of `training.precision`: what its modules can be computed in
    figures: Sequence[Callable[..., Any]] = ()  # report sections of its own (reporting/sections.py)
    # (the run's metrics records) -> report sections of what training noted (Context.note)
    training_figures: Callable[[Sequence[Mapping[str, Any]]], Sequence[Mapping[str, Any]]] | None = None

    def refuse(self, recipe: Recipe) -> None:
        """What no job is started with. Raises UserError naming the remedy."""
        if self.check is not None:
            self.check(recipe)
        if recipe.training.precision not in self.precisions:
            raise UserError(
                f"training.precision={recipe.training.precision}: {self.name} trains in {' or '.join(self.precisions)}"
            )


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters live."""
    return next(model.parameters()).device
