"""ICL and RDE as a job: one stage with a division of the pairs before every epoch (methods/icl.md sections 2 to 5, 9).

What must be global: features, identities and trust (gathered, objective.py); the losses that divide the pairs (one sharded pass
in which every batch of the pass stays whole, so that each loss sees the same batch for any number of workers; mixtures fitted
once by rank 0 and broadcast; coins from (seed, epoch)); with `select_norm: batch` the norm's statistics. Labels of the epoch go
into checkpoints, so a restart in the middle of an epoch divides nothing anew.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from reid_dist.config import OptimConfig, Recipe
from reid_dist.data.captions import GroupTable, caption_pairs, open_caption_groups
from reid_dist.data.draws import plan_rng
from reid_dist.data.samplers import EpochPlan, ShufflePlan
from reid_dist.data.text import clip_tokenizer
from reid_dist.data.transforms import person_transform
from reid_dist.errors import UserError
from reid_dist.losses import pair_losses
from reid_dist.methods.icl.config import Config
from reid_dist.methods.icl.consensus import divide, mixture_settings
from reid_dist.methods.icl.model import DualEncoder, arch_of
from reid_dist.methods.icl.noise import NoiseIndex, open_permutation
from reid_dist.methods.icl.objective import BRANCHES, loss_settings, objective
from reid_dist.methods.icl.record import division_record
from reid_dist.methods.icl.selection import count_words
from reid_dist.methods.icl.text import draw_corrupted, draw_reorganised
from reid_dist.methods.icl.weights import CLIP_LENGTH, import_weights, start
from reid_dist.methods.spec import (
    Batch,
    Context,
    EvalSide,
    MethodSpec,
    ModelFacts,
    Outputs,
    ParamGroup,
    PlanPart,
    RecipeStage,
    Reference,
    Stage,
    Terms,
    TrainingData,
    device_of,
)  # fmt: skip
from reid_dist.methods.text_to_image import text_image_batch

if TYPE_CHECKING:
    from reid_dist.data.store import TableView

logger = logging.getLogger(__name__)


def group_parameters(
    named: Iterable[tuple[str, bool]], optim: OptimConfig, config: Config, text_length: int
) -> list[ParamGroup]:
    """Learning rates and decays by name, for (name, trainable) pairs: methods/icl.md section 4. No bias decays."""
    groups: dict[tuple[float, float], list[str]] = {}
    for name, trainable in named:
        if not trainable:
            continue
        lr, decay = optim.lr, optim.weight_decay
        if "bias" in name:
            lr, decay = optim.lr * config.bias_lr_factor, 0.0
        if name.startswith(("image_selection.", "text_selection.")):
            lr = config.select_lr
        elif name == "towers.text.embed.positions" and text_length != CLIP_LENGTH:
            lr = optim.lr * config.text_positions_lr_factor
        groups.setdefault((lr, decay), []).append(name)
    return [ParamGroup(tuple(names), lr, decay) for (lr, decay), names in groups.items()]


class IclStage(RecipeStage):
    """The only stage: image-caption pairs, some of which may be mismatched."""

    name = "train"

    def __init__(self, recipe: Recipe, data: TrainingData) -> None:
        super().__init__(recipe, data.train)
        self.config: Config = recipe.model
        self.row_wise = self.config.select_norm == "frozen"
        self.pairs = caption_pairs(data.train)
        self._refuse_empty()
        arch, self.pid = arch_of(self.config), np.asarray(data.train.label)
        self.text_length, self.tokenizer = arch.context_length, clip_tokenizer(arch.vocab_size)
        self.transform = person_transform(arch.image_size, train=True, augment=self.config.augment)
        self.noise: NoiseIndex | None = None
        self.caption_of = np.arange(len(self.pairs))  # pair -> pair whose caption (and groups) it has
        if self.config.noise:
            self.noise = open_permutation(recipe.data.root, self.config.noise, len(self.pairs))
            self.caption_of = self.noise.index
        self.groups: GroupTable | None = None
        if self.config.groups:
            self.groups = open_caption_groups(recipe.data, self.config.groups, data.train, self.pairs)
        self.trust = torch.ones(len(self.pairs), dtype=torch.int64)
        self._plan = ShufflePlan(len(self.pairs), self.global_batch, recipe.seed)

    def _refuse_empty(self) -> None:
        if len(self.pairs) == 0:
            raise UserError(
                f"{self.view.describe()}: no captions to train on; this method learns from image-text pairs"
            )
        for row, number in self.pairs.tolist():
            if not self.view.captions[row][number].strip():
                raise UserError(
                    f"{self.view.path(row)}: caption {number} is empty; write one or remove it, then pack the table again"
                )

    def plan(self) -> EpochPlan:
        """Items are rows of `pairs`."""
        return self._plan

    def load(self, part: PlanPart) -> Batch:
        """image [n, 3, h, w], ids [n, L], pid [n]; with groups also second_ids [n, L], the reorganised captions."""
        batch = self._load(part, "")
        if self.groups is not None:
            rows = self.pairs[part.items, 0]
            groups = self.groups.of(self.caption_of[part.items])
            drawn = zip(groups, part.rngs(rows, "reorganise"), strict=True)
            texts = [draw_reorganised(of_one, rng) for of_one, rng in drawn]
            batch["second_ids"] = self._words(texts, part, rows, "second")
        return batch

    def _load(self, part: PlanPart, prefix: str) -> Batch:
        """Images and their captions, augmented and corrupted by the streams that `prefix` names."""
        rows = self.pairs[part.items, 0]
        draws = [self.transform.draw(rng) for rng in part.rngs(rows, f"{prefix}image")]
        captions = self.pairs[self.caption_of[part.items]].tolist()
        texts = [self.view.captions[row][number] for row, number in captions]
        return {
            "image": self.transform.apply_all(self.view.images(rows), draws),
            "ids": self._words(texts, part, rows, f"{prefix}words"),
            "pid": torch.from_numpy(self.pid[rows]),
        }

    def _words(self, texts: Sequence[str], part: PlanPart, rows: np.ndarray, stream: str) -> Tensor:
        ids = self.tokenizer.encode_all(texts, self.text_length)
        for i, rng in enumerate(part.rngs(rows, stream)):
            ids[i] = draw_corrupted(ids[i], rng, self.tokenizer.mask_id, self.config.corruption)
        return torch.from_numpy(ids)

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        named = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
        return group_parameters(named, self.recipe.optim, self.config, self.text_length)

    def begin_stage(self, model: nn.Module, ctx: Context) -> None:
        self.trust = self.trust.to(device_of(model))

    def begin_epoch(self, model: nn.Module, ctx: Context) -> None:
        """Divide the pairs; note what came out in the run's metrics."""
        if not self.config.consensus or ctx.epoch + 1 < self.config.consensus_from:
            self.trust = torch.ones_like(self.trust)
            return
        losses = self.division_losses(model, ctx)
        answer: tuple[np.ndarray, dict[str, Any]] | None = None
        if ctx.rank == 0:
            rate = self.noise.rate if self.noise else 0.0
            settings = mixture_settings(rate, np.unique(self.view.domain_name).tolist(), self.config.mixture)
            found = divide(losses.numpy(), settings, plan_rng(ctx.seed, ctx.epoch, "coins"))
            answer = found.trust, division_record(found, ctx.epoch + 1, self.noise.moved if self.noise else None)
        trust, record = ctx.broadcast(answer)
        self.trust = torch.from_numpy(trust).to(self.trust.device)
        ctx.note("division", **record)
        logger.info("epoch %d: %.1f %% of the pairs are trusted", ctx.epoch + 1, 100 * record["clean"])

    def division_losses(self, model: nn.Module, ctx: Context) -> Tensor:
        """float32 [N, 2]: loss of every pair for both branches, in shuffled whole batches, augmented and corrupted as in
        training; NaN where corruption left no words."""
        order = plan_rng(ctx.seed, ctx.epoch, "division").permutation(len(self.pairs))

        def load(positions: np.ndarray) -> Batch:
            return self._load(PlanPart(order[positions], positions, ctx.epoch, ctx.seed), "division-")

        def encode(whole: nn.Module, batch: Batch) -> Outputs:
            out = whole(image=batch["image"], ids=batch["ids"])
            usable = count_words(batch["ids"]) > 0
            found = [
                pair_losses(
                    self.config.pair_loss, out[f"image_{branch}"], out[f"text_{branch}"], batch["pid"], usable=usable,
                    **loss_settings(self.config),
                )
                for branch in BRANCHES
            ]  # fmt: skip
            return {"losses": torch.stack(found, dim=1).masked_fill(~usable[:, None], torch.nan)}

        in_order = ctx.extract(model, np.arange(len(order)), load, encode, batch=self.global_batch)["losses"]
        losses = torch.empty_like(in_order)
        losses[torch.from_numpy(order)] = in_order
        return losses

    def forward(self, model: nn.Module, batch: Batch, ctx: Context) -> Outputs:
        out: Outputs = model(image=batch["image"], ids=batch["ids"], second_ids=batch.get("second_ids"))
        return out

    def losses(self, model: nn.Module, out: Outputs, batch: Batch, ctx: Context) -> Terms:
        usable = {"text": count_words(batch["ids"]) > 0}
        if "second_ids" in batch:
            usable["second"] = count_words(batch["second_ids"]) > 0
        return objective(self.config, out, batch["pid"], self.trust[batch["row"]], usable, ctx.epoch + 1, ctx)

    def state(self) -> dict[str, Tensor]:
        """Labels of the epoch, and what the run reads besides its tables."""
        return {
            "trust": self.trust,
            "noise_digest": _digest(self.noise.digest if self.noise else None),
            "groups_digest": _digest(self.groups.content if self.groups else None),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises UserError when the permutation or the caption groups are not those that the run began with."""
        own = self.state()
        for name, what in (
            ("noise_digest", f"noise={self.config.noise}"),
            ("groups_digest", f"groups={self.config.groups}"),
        ):
            if not torch.equal(state[name].cpu(), own[name]):
                raise UserError(
                    f"model.{what} holds something else than when this run began: restore it, or start a new run"
                )
        self.trust = state["trust"].clone()


def _digest(content: bytes | None) -> Tensor:
    return torch.frombuffer(bytearray(content or bytes(32)), dtype=torch.uint8)


def eval_batch(config: Config, view: TableView, side: EvalSide, index: np.ndarray) -> Batch:
    """image [n, 3, h, w] for images, ids [n, L] for captions."""
    return text_image_batch(arch_of(config), view, side, index)


def encode(model: nn.Module, batch: Batch) -> Outputs:
    """{"global": [n, D], "selected": [n, E]} of a batch of images or of captions, from one pass."""
    out = model(image=batch.get("image"), ids=batch.get("ids"))
    return {branch: out[f"{'image' if 'image' in batch else 'text'}_{branch}"] for branch in BRANCHES}


def stages(recipe: Recipe, data: TrainingData) -> Sequence[Stage]:
    """One stage. Raises UserError."""
    return [IclStage(recipe, data)]


def build(config: Config, facts: ModelFacts) -> nn.Module:
    """The model with random weights."""
    return DualEncoder(config)


METHOD = MethodSpec(
    name="icl",
    task="text",
    protocol="text-to-image",
    Config=Config,
    build=build,
    stages=stages,
    eval_batch=eval_batch,
    encode=encode,
    similarity={"global": 0.5, "selected": 0.5},
    precisions=("fp32", "bf16", "fp16_pure"),
    reference=Reference(
        paper="ICL: interactive cross-modal learning for text-to-image person re-identification (CVPR 2025), on RDE (CVPR 2024)",
        repository="https://github.com/QinYang79/ICL",
        commit="",
    ),
    import_weights=import_weights,
    start=start,
)
