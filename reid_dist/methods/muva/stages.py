"""MUVA's two stages: learn the prompts of every identity, then the image tower (methods/muva.md sections 4, 6 and 9).

Stage "prompts": class centroids of image features (once, pseudo masks, eval mode) stay fixed; every step draws P
identities times K as the original does, and each distinct identity's text is computed once, on the few tokens that
can matter. Stage "finetune": the identities' text features are computed once; the prototype memory is rebuilt at
every epoch's start by a sharded pass and moved after every step with the gathered batch. Training and testing use
predicted masks, the passes pseudo masks.

What must be global: the neck's batch statistics (models/batchnorm.py, called in `losses`, so that `forward` stays
row-wise and micro-batches stay exact), centroids, text features and memory (tables that every rank holds, computed
from gathered rows).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from reid_dist.config import OptimConfig, Recipe, ScheduleConfig
from reid_dist.data.samplers import EpochPlan, IdentityPlan
from reid_dist.methods.muva import losses as terms
from reid_dist.methods.muva.config import Config
from reid_dist.methods.muva.images import flips, grounded_batch, transform_of
from reid_dist.methods.muva.masks import PartMasks, open_masks
from reid_dist.methods.muva.model import Muva
from reid_dist.methods.muva.prompts import check_prompts, people_keys, settings_keys
from reid_dist.methods.muva.schedule import finetune_lr, prompt_lr
from reid_dist.methods.spec import Batch, Context, Outputs, ParamGroup, PlanPart, Stage, Terms, TrainingData


def parameter_groups(
    names: Sequence[str], stage: str, optim: OptimConfig, mask_lr_factor: float = 10.0, freeze_patches: bool = True
) -> list[ParamGroup]:
    """Who trains in a stage.

    "prompts": the learnable words. "finetune": image tower, neck weight and classifier; the mask predictors with their
    own rate and no decay. The text tower and the neck's bias never train.
    """
    if stage == "prompts":
        return [ParamGroup(("prompts.context",), optim.lr, optim.weight_decay)]
    frozen = {"image.embed.patches.weight"} if freeze_patches else set()
    trained = [n for n in names if n.startswith(("image.", "neck.weight", "classifier.")) and n not in frozen]
    masks = tuple(n for n in trained if n.startswith("image.predictors."))
    others = tuple(n for n in trained if n not in set(masks))
    groups = [
        ParamGroup(others, optim.lr, optim.weight_decay),
        ParamGroup(masks, optim.lr * mask_lr_factor, 0.0),
    ]
    return [group for group in groups if group.names]


class _MuvaStage(Stage):
    """What both stages share: rows of the training view by identity, and passes over all of them with pseudo masks."""

    def __init__(self, recipe: Recipe, data: TrainingData, masks: PartMasks | None, grid: tuple[int, int]) -> None:
        self.recipe, self.config, self.view, self.masks, self.grid = recipe, _config(recipe), data.train, masks, grid
        self.label = np.asarray(self.view.label)
        digests = self.view.digests(np.arange(len(self.view)))
        self.people = people_keys(self.view.domain_name, self.view.pid, self.label, digests)
        self.settings = settings_keys(self.config)
        self._plan: EpochPlan = IdentityPlan(
            self.label, recipe.training.global_batch, self.config.instances, recipe.seed, stream=f"muva-{self.name}"
        )

    def plan(self) -> EpochPlan:
        """Items are rows of the training view."""
        return self._plan

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        names = [name for name, _ in model.named_parameters()]
        return parameter_groups(names, self.name, self.optim(), self.config.mask_lr_factor, self.config.freeze_patches)

    def _visible(self, rows: np.ndarray) -> np.ndarray:
        if self.masks is None:
            return np.zeros((len(rows), 0, self.grid[0] * self.grid[1]), dtype=bool)
        return self.masks.visible(rows)

    def _load_plain(self, rows: np.ndarray) -> Batch:
        """Rows for a pass over the training images: evaluation transform, pseudo masks, no flip."""
        transform, none = transform_of(self.config, train=False), np.zeros(len(rows), dtype=bool)
        image, visible = grounded_batch(self.view.images(rows), self._visible(rows), transform, self.grid, none)
        return {"image": image, "visible": visible}

    def _pass(self, model: nn.Module, ctx: Context, neck: bool) -> Tensor:
        """Features of all training images in order, [M, F], before or behind the neck."""

        def encode(whole: nn.Module, batch: Batch) -> Outputs:
            assert isinstance(whole, Muva)
            feat = whole.image.features(batch["image"], batch["visible"]).feat
            return {"feat": whole.neck(feat) if neck else feat}

        return ctx.extract(model, np.arange(len(self.view)), self._load_plain, encode)["feat"]

    def _prototypes(self, model: nn.Module, ctx: Context, neck: bool) -> Tensor:
        """Unit mean feature of each identity, [N, F], on the model's device."""
        feat = self._pass(model, ctx, neck)
        if neck:  # the memory normalises images before their mean, the centroids of stage 1 do not (section 4.2)
            feat = terms.unit(feat)
        return terms.class_centroids(feat, torch.from_numpy(self.label)).to(next(model.parameters()).device)


def _config(recipe: Recipe) -> Config:
    config: Config = recipe.model
    return config


class PromptStage(_MuvaStage):
    """Stage 1: the learnable words of every identity, against fixed centroids of its images."""

    name = "prompts"

    def __init__(self, recipe: Recipe, data: TrainingData, masks: PartMasks | None, grid: tuple[int, int]) -> None:
        super().__init__(recipe, data, masks, grid)
        self.epochs = self.config.prompts.epochs
        self.centroids: Tensor | None = None

    def load(self, part: PlanPart) -> Batch:
        """label [n]: this stage reads no image."""
        return {"label": torch.from_numpy(self.label[part.items])}

    def optim(self) -> OptimConfig:
        return self.config.prompts.optim

    def schedule(self) -> ScheduleConfig:
        return self.config.prompts.schedule

    def rate(self, base_lr: float, t: int, total: int) -> float:
        return prompt_lr(base_lr, t + 1, total, self.schedule())

    def begin_epoch(self, model: nn.Module, ctx: Context) -> None:
        if self.centroids is None:
            self.centroids = self._prototypes(model, ctx, neck=False)

    def forward(self, model: nn.Module, batch: Batch, ctx: Context) -> Outputs:
        """text [n, F]."""
        assert isinstance(model, Muva)
        return {"text": model.text_features(batch["label"])}

    def losses(self, model: nn.Module, out: Outputs, batch: Batch, ctx: Context) -> Terms:
        assert self.centroids is not None
        text, temperature = terms.unit(out["text"]), self.config.contrast_temperature
        logits = terms.prototype_logits(text, self.centroids, temperature, normalise=False)
        total = len(ctx.gather(batch["label"]))
        return terms.shares({"contrast": (1.0, terms.smoothed_ce(logits, batch["label"], 0.0))}, total, ctx.world_size)

    def after_step(self, model: nn.Module, out: Outputs, batch: Batch, ctx: Context) -> None:
        """After the last step, write into the model whose prompts these are: half-learnt ones seed no stage 2."""
        assert isinstance(model, Muva)
        if ctx.epoch + 1 == self.epochs and ctx.step + 1 == self._steps:  # this is always a run's first stage
            model.prompts.sign(self.people, self.settings)

    @cached_property
    def _steps(self) -> int:
        return sum(self._plan.steps(epoch) for epoch in range(self.epochs))

    def state(self) -> dict[str, Tensor]:
        return {} if self.centroids is None else {"centroids": self.centroids}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.centroids = state["centroids"].clone() if "centroids" in state else None


class FinetuneStage(_MuvaStage):
    """Stage 2: the image tower, its part tokens and mask predictors, with five losses."""

    name = "finetune"

    def __init__(self, recipe: Recipe, data: TrainingData, masks: PartMasks | None, grid: tuple[int, int]) -> None:
        super().__init__(recipe, data, masks, grid)
        self.epochs = recipe.training.epochs
        self.text: Tensor | None = None  # [N, F] of the frozen prompts
        self.memory: terms.PrototypeMemory | None = None

    def load(self, part: PlanPart) -> Batch:
        """image [n, 3, H, W], visible bool [n, R, L], label [n]."""
        draws = [rng.random() for rng in part.rngs(part.items, "flip")]
        image, visible = grounded_batch(
            self.view.images(part.items), self._visible(part.items), transform_of(self.config, train=True), self.grid,
            flips(draws, self.config.flip),
        )  # fmt: skip
        return {"image": image, "visible": visible, "label": torch.from_numpy(self.label[part.items])}

    def optim(self) -> OptimConfig:
        return self.recipe.optim

    def schedule(self) -> ScheduleConfig:
        return self.recipe.schedule

    def rate(self, base_lr: float, t: int, total: int) -> float | None:
        """The published step schedule, whose warm-up and milestones multiply; other modes are the framework's."""
        return finetune_lr(base_lr, t + 1, self.schedule()) if self.schedule().mode == "step" else None

    def begin_stage(self, model: nn.Module, ctx: Context) -> None:
        """Refuse prompts that were never learnt, or learnt for other people or otherwise. Raises UserError."""
        assert isinstance(model, Muva)
        if self.config.weight_i2t:
            check_prompts(model.prompts, self.people, self.settings)

    def begin_epoch(self, model: nn.Module, ctx: Context) -> None:
        assert isinstance(model, Muva)
        if self.config.weight_i2t and self.text is None:
            out = ctx.extract(
                model, np.arange(len(self.people)), lambda labels: {"label": torch.from_numpy(labels)}, _encode_text
            )
            self.text = out["text"].to(next(model.parameters()).device)
        self._remember(self._prototypes(model, ctx, neck=True))

    def _remember(self, rows: Tensor) -> None:
        config = self.config
        hard = config.memory_update == "hard"
        self.memory = terms.PrototypeMemory(rows, config.memory_temperature, config.memory_momentum, hard)

    def forward(self, model: nn.Module, batch: Batch, ctx: Context) -> Outputs:
        """feat [n, F] before the neck; with parts also logits [n, layers, R, L]."""
        assert isinstance(model, Muva)
        found = model.image.features(batch["image"])
        return {"feat": found.feat} if found.logits is None else {"feat": found.feat, "logits": found.logits}

    def losses(self, model: nn.Module, out: Outputs, batch: Batch, ctx: Context) -> Terms:
        """Five weighted terms. Leaves `query`, the feature behind the neck, in `out` for the memory's update."""
        assert isinstance(model, Muva)
        assert self.memory is not None
        config, label = self.config, batch["label"]
        query = model.neck(out["feat"])  # one call: with momentum 0.19 the statistics move as by the original's two
        out["query"] = query
        logits = model.classifier(query.to(model.classifier.weight.dtype)).to(query.dtype)
        found = {
            "id": (config.weight_id, terms.smoothed_ce(logits, label, config.smoothing)),
            "memory": (config.weight_memory, self.memory.loss(query, label)),
        }
        if self.text is not None:
            near = terms.prototype_logits(out["feat"], self.text, config.i2t_temperature, config.i2t_normalise)
            found["i2t"] = (config.weight_i2t, terms.smoothed_ce(near, label, config.smoothing))
        if "logits" in out:
            shown = (out["logits"] / config.mask_temperature).sigmoid()
            pixel, dice = terms.mask_loss(out["logits"], shown, batch["visible"], config.mask_loss)
            found |= {"mask": (config.weight_mask, pixel), "dice": (config.weight_mask, dice)}
        return terms.shares(found, len(ctx.gather(label)), ctx.world_size)

    def after_step(self, model: nn.Module, out: Outputs, batch: Batch, ctx: Context) -> None:
        assert self.memory is not None
        self.memory.update(ctx.gather(out["query"]), ctx.gather(batch["label"]))

    def state(self) -> dict[str, Tensor]:
        state = {} if self.memory is None else {"memory": self.memory.rows}
        return state if self.text is None else {**state, "text": self.text}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if "memory" in state:
            self._remember(state["memory"].clone())
        self.text = state["text"].clone() if "text" in state else None


def _encode_text(model: nn.Module, batch: Batch) -> Outputs:
    assert isinstance(model, Muva)
    return {"text": model.text_features(batch["label"])}


def stages_of(recipe: Recipe, data: TrainingData, grid: tuple[int, int]) -> list[Stage]:
    """The recipe's stages over one set of masks. Raises UserError."""
    config = _config(recipe)
    masks = open_masks(recipe.data, config.masks, data.train, grid, config.parts) if config.parts else None
    made: dict[str, type[_MuvaStage]] = {"prompts": PromptStage, "finetune": FinetuneStage}
    return [made[name](recipe, data, masks, grid) for name in config.stages]
