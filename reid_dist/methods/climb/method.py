"""CLIMB-ReID as a job: one stage, images or clips (methods/climb.md sections 4 to 7 and 10).

What we changed and why: the prototype memory is updated by an explicit call after the step, from the gathered global
batch, so every rank holds the same bank; the necks see gathered rows, so their statistics are the global batch's; every
rank computes the whole (small) objective on the gathered descriptors, which is exact for uneven and partial batches.
All of the video path is ours, the paper's or TF-CLIP's (README.md): its code was never released.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from reid_dist.config import OptimConfig, Recipe
from reid_dist.data.draws import plan_rng
from reid_dist.data.samplers import IdentityPlan
from reid_dist.data.tracklets import tracklets_of
from reid_dist.data.transforms import ImageTransform
from reid_dist.errors import UserError
from reid_dist.methods.climb import losses as own_losses
from reid_dist.methods.climb.bank import prototype_loss, prototypes, update_dual, update_single
from reid_dist.methods.climb.config import Config
from reid_dist.methods.climb.model import Climb, arch_of
from reid_dist.methods.climb.plan import CameraPlan
from reid_dist.methods.climb.tracklets import (
    DenseClips,
    Tracklets,
    clip_draws,
    cut_tracklets,
    group_tracklets,
    load_frames,
    restricted_clip,
)
from reid_dist.methods.climb.weights import import_weights, start
from reid_dist.methods.spec import (
    Batch,
    Context,
    EvalSide,
    MethodSpec,
    ModelFacts,
    Outputs,
    ParamGroup,
    Plan,
    PlanPart,
    RecipeStage,
    Reference,
    Stage,
    Terms,
    TrainingData,
    device_of,
)

if TYPE_CHECKING:
    from reid_dist.data.store import TableView

logger = logging.getLogger(__name__)

HALF = (0.5, 0.5, 0.5)  # mean and spread of the pixels (not CLIP's), and the erasing fill in normalised units


def transform_of(config: Config, train: bool) -> ImageTransform:
    """Bicubic resize; in training also flip, and with `augment` zero padding of 10, crop and erasing."""
    plain = ImageTransform(size=arch_of(config).image_size, mean=HALF, std=HALF, resize="bicubic")
    if not train:
        return plain
    return dataclasses.replace(
        plain,
        flip=0.5,
        pad=10 if config.augment else 0,
        erase=0.5 if config.augment else 0.0,
        erase_ratio=(0.3, 1 / 0.3),
        erase_log_ratio=False,
        erase_attempts=100,
        erase_fill=HALF,
    )


def group_parameters(named: Iterable[tuple[str, bool]], optim: OptimConfig, config: Config) -> list[ParamGroup]:
    """Learning rates by name, for (name, trainable) pairs: biases and the head's classifier differ. One decay for all:
    the released code ignores the no-decay marks on A_log and D."""
    groups: dict[float, list[str]] = {}
    for name, trainable in named:
        if not trainable:
            continue
        lr = optim.lr
        if name.endswith("bias"):
            lr = optim.lr * config.bias_lr_factor
        if name.startswith("classifier_head"):
            lr = optim.lr * config.head_lr_factor
        groups.setdefault(lr, []).append(name)
    return [ParamGroup(tuple(names), lr, optim.weight_decay) for lr, names in groups.items()]


def camera_tensor(config: Config, view: TableView, rows: np.ndarray) -> dict[str, Tensor]:
    """{"camera": int64 [n]} where the model has a camera embedding. Raises UserError for a camera it does not know."""
    if not config.cameras:
        return {}
    camera = np.asarray(view.camid)[rows]
    if len(camera) and not 0 <= camera.min() <= camera.max() < config.cameras:
        wrong = int(camera.min() if camera.min() < 0 else camera.max())
        raise UserError(
            f"tables {view.describe()} have camera {wrong}, model.cameras={config.cameras} knows "
            f"0..{config.cameras - 1}: set model.cameras to their number (and train again), or to 0"
        )
    return {"camera": torch.from_numpy(camera)}


class ClimbStage(RecipeStage):
    """The only stage. Items are rows of the view, or tracklets (model.frames > 0)."""

    name = "train"

    def __init__(self, recipe: Recipe, data: TrainingData) -> None:
        super().__init__(recipe, data.train)
        self.config: Config = recipe.model
        self.transform, self.test_transform = (transform_of(self.config, train) for train in (True, False))
        self.tracklets: Tracklets | None = None
        label, cams = np.asarray(data.train.label), np.asarray(data.train.camid)
        if self.config.frames:
            whole, c = group_tracklets(data.train), self.config
            self.tracklets = cut_tracklets(whole, c.cut, c.frames, c.cut_step, c.drop_short)
            label, cams = self.tracklets.label, self.tracklets.camid
        self.classes = int(np.asarray(data.train.label).max()) + 1 if len(data.train) else 0
        self.label = label
        self._plan: Plan = self._make_plan(label, cams)
        self.banks = torch.zeros(0)
        self._seen: tuple[Tensor, Tensor] = (torch.zeros(0), torch.zeros(0))

    def _make_plan(self, label: np.ndarray, cams: np.ndarray) -> Plan:
        batch, config, seed = self.recipe.training.global_batch, self.config, self.recipe.seed
        if config.sampler == "identity":
            return IdentityPlan(label, batch, config.instances, seed)
        return CameraPlan(label, cams, batch, config.instances, config.iterations, seed)

    def plan(self) -> Plan:
        return self._plan

    def load(self, part: PlanPart) -> Batch:
        """image [n, 3, h, w] or clips [n, T, 3, h, w], label [n], and camera [n] where the model has an embedding."""
        rngs = part.rngs(part.items, "image")
        batch: Batch = {"label": torch.from_numpy(self.label[part.items])}
        if self.tracklets is None:
            draws = [self.transform.draw(rng) for rng in rngs]
            batch["image"] = self.transform.apply_all(self.view.images(part.items), draws)
            return batch | camera_tensor(self.config, self.view, part.items)
        frames = self.config.frames
        clips = [
            self.tracklets.rows[item][restricted_clip(len(self.tracklets.rows[item]), frames, rng)]
            for item, rng in zip(part.items.tolist(), rngs, strict=True)
        ]
        draws = [draw for rng in rngs for draw in clip_draws(self.transform, rng, frames)]
        rows = np.stack(clips) if clips else np.zeros((0, frames), dtype=np.int64)
        batch["image"] = load_frames(self.view, rows, self.transform, draws)
        return batch | camera_tensor(self.config, self.view, rows[:, 0])

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        named = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
        return group_parameters(named, self.recipe.optim, self.config)

    def begin_epoch(self, model: nn.Module, ctx: Context) -> None:
        """Rebuild the memory from the model's own features of all training items (4.1), the same on every rank."""
        if ctx.epoch and not self.config.rebuild_every_epoch:
            return
        seen = ctx.extract(model, np.arange(len(self.label)), self._load_plain, encode_main, self.config.memory_batch)
        start_bank = prototypes(seen["main"], torch.from_numpy(self.label), self.classes)
        count = 2 if self.config.banks == "dual" else 1
        self.banks = start_bank.to(device_of(model)).expand(count, -1, -1).clone()

    def _load_plain(self, items: np.ndarray) -> Batch:
        if self.tracklets is None:
            batch: Batch = {"image": self.test_transform.apply_all(self.view.images(items))}
            return batch | camera_tensor(self.config, self.view, items)
        members = [self.tracklets.rows[item] for item in items.tolist()]
        rows = np.stack([m[restricted_clip(len(m), self.config.frames)] for m in members])
        batch = {"image": load_frames(self.view, rows, self.test_transform)}
        return batch | camera_tensor(self.config, self.view, rows[:, 0])

    def forward(self, model: nn.Module, batch: Batch, ctx: Context) -> Outputs:
        out: Outputs = model(batch["image"], batch.get("camera"))
        return out

    def losses(self, model: nn.Module, out: Outputs, batch: Batch, ctx: Context) -> Terms:
        """The whole objective on the gathered batch, the same on every rank: its mean over ranks is itself."""
        assert isinstance(model, Climb)
        label = ctx.gather(batch["label"])
        if len(label) < 2:
            raise UserError(
                "a batch of one image has no batch statistics: raise training.global_batch or model.instances"
            )
        main, head = model.features({name: ctx.gather(value) for name, value in out.items()})
        assert head is not None
        self._seen = (nn.functional.normalize(main.detach(), dim=1, eps=1e-12), label)
        c = self.config
        logits, head_logits = model.classifier(main), model.classifier_head(head)
        return {
            "memory": c.memory_weight * prototype_loss(main, label, self.banks.to(main.dtype), c.temperature).mean(),
            "id": c.id_weight * own_losses.smoothed_ce(logits, label, c.smoothing).mean(),
            "head_id": c.head_id_weight * own_losses.smoothed_ce(head_logits, label, c.smoothing).mean(),
            "triplet": c.triplet_weight * own_losses.batch_hard_triplet(head, label, c.triplet_margin).mean(),
        }

    def after_step(self, model: nn.Module, out: Outputs, batch: Batch, ctx: Context) -> None:
        """Update the memory from the features that the losses saw."""
        feat, label = self._seen[0].to(self.banks.dtype), self._seen[1]
        c = self.config
        if c.banks == "dual":
            update_dual(self.banks, feat, label, c.momentum, c.update)
        else:
            rng = plan_rng(self.recipe.seed, ctx.step, "memory")
            update_single(self.banks[0], feat, label, c.momentum, c.banks, rng)

    def state(self) -> dict[str, Tensor]:
        return {"banks": self.banks}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.banks = state["banks"].clone()


def encode_main(model: nn.Module, batch: Batch) -> Outputs:
    """{"main": [n, W + D]}: what the memory is built from."""
    assert isinstance(model, Climb)
    return {"main": model.features(model(batch["image"], batch.get("camera"), with_head=False))[0]}


def eval_batch(config: Config, view: TableView, side: EvalSide, index: np.ndarray) -> Batch:
    """image [n, 3, h, w] for images, [n, T, 3, h, w] for tracklets; for test_clips=dense clips made on demand."""
    rows, transform = side.rows[index], transform_of(config, train=False)
    wanted = "tracklet" if config.frames else "image"
    if side.kind != wanted:
        hint = "video (or model.frames=0 to train on images)" if config.frames else "image"
        raise UserError(f"CLIMB with model.frames={config.frames} encodes {wanted}s, not {side.kind}s: protocol {hint}")
    batch: Batch = dict(camera_tensor(config, view, rows))
    if not config.frames:
        return batch | {"image": transform.apply_all(view.images(rows))}
    members = tracklets_of(view, rows)
    if config.test_clips == "dense":
        return batch | {"clips": DenseClips(view, tuple(members), transform, config.frames, at_once=max(1, len(rows)))}
    clips = np.stack([m[restricted_clip(len(m), config.frames)] for m in members])
    return batch | {"image": load_frames(view, clips, transform)}


def encode(model: nn.Module, batch: Batch) -> Outputs:
    """{"descriptor": [n, 2W + D]}; of dense clips the mean over a tracklet's clips, before any normalisation."""
    assert isinstance(model, Climb)
    if "clips" not in batch:
        return {"descriptor": model.encode(batch["image"], batch.get("camera"))}
    clips: DenseClips = batch["clips"]
    device, camera = device_of(model), batch.get("camera")
    total: Tensor | None = None
    counts = torch.zeros(len(clips.rows), device=device)
    for frames, owner in clips:
        places = torch.from_numpy(owner).to(device)
        feat = model.encode(frames.to(device), None if camera is None else camera[places])
        total = feat.new_zeros(len(clips.rows), feat.shape[1]) if total is None else total
        total.index_add_(0, places, feat)
        counts.index_add_(0, places, torch.ones_like(counts[places]))
    assert total is not None
    return {"descriptor": total / counts[:, None].to(total.dtype)}


def check(recipe: Recipe) -> None:
    """Refuse what this method cannot be computed with. Raises UserError."""
    config: Config = recipe.model
    training = recipe.training
    if training.precision == "bf16":
        raise UserError(
            "training.precision=bf16: the state-space parameters A_log, D and the step bias must stay float32 "
            "(exp(A_log) in bf16 is off by up to 0.8 %) and the paper trains in float32: set training.precision=fp32"
        )
    if config.frames and config.test_clips == "dense" and training.zero_stage == 3 and training.eval_every:
        raise UserError(
            "model.test_clips=dense with training.zero_stage=3: ranks would run unequal numbers of passes while they "
            "select; train with test_clips=restricted and score the run with `jobs.evaluate RUN model.test_clips=dense`"
        )


def stages(recipe: Recipe, data: TrainingData) -> Sequence[Stage]:
    """One stage. Raises UserError."""
    check(recipe)
    return [ClimbStage(recipe, data)]


def build(config: Config, facts: ModelFacts) -> nn.Module:
    """The model with random weights."""
    return Climb(config, arch_of(config), facts.num_classes)


METHOD = MethodSpec(
    name="climb",
    task="image",
    protocol="image",
    Config=Config,
    build=build,
    stages=stages,
    eval_batch=eval_batch,
    encode=encode,
    similarity={"descriptor": 1.0},
    reference=Reference(
        paper="CLIMB-ReID: A Hybrid CLIP-Mamba Framework for Person Re-Identification (AAAI 2025)",
        repository="https://github.com/AsuradaYuci/CLIMB-ReID",
        commit="203e6ac",
    ),
    import_weights=import_weights,
    start=start,
    check=check,
    precisions=("fp32",),
)
