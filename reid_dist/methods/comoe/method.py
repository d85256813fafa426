"""CoMoE as a job: one stage, SDM + 5 ITC + balance on gathered features (methods/comoe.md sections 3, 5, 8).

What we changed and why: one global batch over all workers, so features, identities and the gates' statistics are
gathered and every rank returns its share (losses/sharding.py); the identity sampler is a plan of the global batch;
masking copies the caption. The head's statistics leave `forward` per row, so the balance term, a product of global
means, stays exact for any number of workers and micro-batches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from reid_dist import losses as shared
from reid_dist.config import OptimConfig, Recipe
from reid_dist.data.captions import caption_pairs
from reid_dist.data.samplers import EpochPlan, IdentityPlan, ShufflePlan
from reid_dist.data.text import clip_tokenizer, draw_masked
from reid_dist.data.transforms import person_transform
from reid_dist.errors import UserError
from reid_dist.methods.comoe.config import Config
from reid_dist.methods.comoe.model import CoMoE
from reid_dist.methods.comoe.moe import balance_loss, joint_balance_loss
from reid_dist.methods.comoe.weights import import_weights
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
)
from reid_dist.methods.text_to_image import text_image_batch
from reid_dist.models.clip import ClipArchitecture, architecture
from reid_dist.models.clip_weights import load_clip

if TYPE_CHECKING:
    from reid_dist.data.store import TableView

logger = logging.getLogger(__name__)


def arch_of(config: Config) -> ClipArchitecture:
    """The towers' sizes that a config asks for."""
    return architecture(
        config.arch, image_size=config.image_size, stride=config.stride, context_length=config.text_length
    )


def group_parameters(named: Iterable[tuple[str, bool]], optim: OptimConfig, config: Config) -> list[ParamGroup]:
    """Learning rates and decays by name, for (name, trainable) pairs: methods/comoe.md section 5.

    `cross` x lr_factor; then `bias` x bias_lr_factor with its own decay; then `classifier` or `mlm_head` x lr_factor.
    """
    groups: dict[tuple[float, float], list[str]] = {}
    for name, trainable in named:
        if not trainable:
            continue
        lr, decay = optim.lr, optim.weight_decay
        if "cross" in name:
            lr = optim.lr * config.lr_factor
        if "bias" in name:
            lr, decay = optim.lr * config.bias_lr_factor, config.bias_weight_decay
        if "classifier" in name or "mlm_head" in name:
            lr = optim.lr * config.lr_factor
        groups.setdefault((lr, decay), []).append(name)
    return [ParamGroup(tuple(names), lr, decay) for (lr, decay), names in groups.items()]


class CoMoEStage(RecipeStage):
    """The only stage: image-caption pairs."""

    name = "train"

    def __init__(self, recipe: Recipe, data: TrainingData) -> None:
        super().__init__(recipe, data.train)
        self.config: Config = recipe.model
        self.pairs = caption_pairs(data.train)
        if len(self.pairs) == 0:
            raise UserError(f"tables {', '.join(recipe.data.train)} have no captions: CoMoE trains on image-text pairs")
        arch = arch_of(self.config)
        self.text_length = arch.context_length
        self.tokenizer = clip_tokenizer(arch.vocab_size)
        self.transform = person_transform(arch.image_size, train=True, augment=self.config.augment)
        self._plan = self._make_plan()

    def _make_plan(self) -> EpochPlan:
        if self.config.sampler == "identity":
            pids = np.asarray(self.view.label)[self.pairs[:, 0]]
            return IdentityPlan(pids, self.global_batch, self.config.instances, self.recipe.seed)
        return ShufflePlan(len(self.pairs), self.global_batch, self.recipe.seed)

    def plan(self) -> EpochPlan:
        """Items are rows of `pairs`."""
        return self._plan

    def load(self, part: PlanPart) -> Batch:
        """image [n, 3, h, w], ids [n, L], pid [n]; with the masked-word loss also masked_ids, masked_label [n, L]."""
        rows, numbers = self.pairs[part.items].T
        draws = [self.transform.draw(rng) for rng in part.rngs(rows, "image")]
        texts = [self.view.captions[row][number] for row, number in zip(rows.tolist(), numbers.tolist(), strict=True)]
        ids = self.tokenizer.encode_all(texts, self.text_length)
        batch: Batch = {
            "image": self.transform.apply_all(self.view.images(rows), draws),
            "ids": torch.from_numpy(ids),
            "pid": torch.from_numpy(np.asarray(self.view.label)[rows]),
        }
        if "mlm" in self.config.losses:
            masked, label = np.zeros_like(ids), np.zeros_like(ids)
            for i, rng in enumerate(part.rngs(rows, "mask")):
                masked[i], label[i] = draw_masked(ids[i], rng, self.tokenizer.mask_id)
            batch |= {"masked_ids": torch.from_numpy(masked), "masked_label": torch.from_numpy(label)}
        return batch

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        named = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
        return group_parameters(named, self.recipe.optim, self.config)

    def forward(self, model: nn.Module, batch: Batch, ctx: Context) -> Outputs:
        out: Outputs = model(
            image=batch["image"],
            ids=batch["ids"],
            masked_ids=batch.get("masked_ids"),
            masked_label=batch.get("masked_label"),
            seeds=batch["row_seed"],
        )
        return out

    def losses(self, model: nn.Module, out: Outputs, batch: Batch, ctx: Context) -> Terms:
        return comoe_losses(self.config, out, batch["pid"], ctx)


def comoe_losses(config: Config, out: Outputs, own_pid: Tensor, ctx: Context) -> Terms:
    """This rank's shares of the weighted terms. `out` as of CoMoE.forward, `own_pid` int64 [n]."""
    share: dict[str, Any] = {"rows": ctx.slice(), "world_size": ctx.world_size}
    scale = 1.0 / config.temperature
    image, text, pid = ctx.gather(out["image_feat"]), ctx.gather(out["text_feat"]), ctx.gather(own_pid)
    terms: Terms = {}
    if "sdm" in config.losses:
        terms["sdm"] = shared.similarity_distribution_matching(image, text, pid, logit_scale=scale, **share)
    if "itc" in config.losses:
        terms["itc"] = config.itc_weight * shared.info_nce(image, text, logit_scale=scale, **share)
    if "cmpm" in config.losses:
        terms["cmpm"] = shared.projection_matching(image, text, pid, **share)
    if "balance" in config.losses or config.joint_balance_weight:
        usage = {
            name: (ctx.gather(out[f"{name}_probability"]), ctx.gather(out[f"{name}_chosen"]))
            for name in ("image", "text")
        }
        if "balance" in config.losses:
            both = balance_loss(*usage["image"], **share) + balance_loss(*usage["text"], **share)
            terms["balance"] = config.balance_weight * both
        if config.joint_balance_weight:
            terms["joint_balance"] = config.joint_balance_weight * joint_balance_loss(
                usage["image"], usage["text"], **share
            )
    if "id" in config.losses:
        ce = shared.identity_ce(
            out["image_logits"], out["text_logits"], own_pid, total=len(pid), world_size=ctx.world_size
        )
        terms["id"] = config.id_weight * ce
    if "mlm" in config.losses:
        total = ctx.reduce(out["masked_count"].detach().sum())
        ce = shared.masked_lm_ce(out["masked_nll"], out["masked_count"], total=total, world_size=ctx.world_size)
        terms["mlm"] = config.mlm_weight * ce
    return terms


def check(recipe: Recipe) -> None:
    """Warn about the batch axis and refuse what it cannot be computed with. Raises UserError."""
    config: Config = recipe.model
    if config.attention_axis != "batch":
        return
    training = recipe.training
    if training.num_workers > 1 or training.micro_batches > 1:
        raise UserError(
            f"model.attention_axis=batch attends across the rows of a batch, so it can be neither sharded nor cut: set "
            f"training.num_workers=1 (now {training.num_workers}) and training.micro_batches=1 "
            f"(now {training.micro_batches}), or model.attention_axis=sequence"
        )
    logger.warning(
        "model.attention_axis=batch: every feature depends on the other rows of its batch (and on evaluation.batch); "
        "the scores cannot be compared with other methods' (methods/comoe/README.md)"
    )


def start(model: nn.Module, config: Config) -> None:
    """Fill the towers with published CLIP weights where the config names some."""
    assert isinstance(model, CoMoE)
    if config.weights:
        load_clip(model.towers, config.weights)


def stages(recipe: Recipe, data: TrainingData) -> Sequence[Stage]:
    """One stage. Raises UserError."""
    check(recipe)
    return [CoMoEStage(recipe, data)]


def eval_batch(config: Config, view: TableView, side: EvalSide, index: np.ndarray) -> Batch:
    """image [n, 3, h, w] for images, ids [n, L] for captions."""
    return text_image_batch(arch_of(config), view, side, index)


def encode(model: nn.Module, batch: Batch) -> Outputs:
    """{"global": [n, D]} of a batch of images or of captions."""
    out = model(image=batch.get("image"), ids=batch.get("ids"))
    return {"global": out["image_feat"] if "image" in batch else out["text_feat"]}


def build(config: Config, facts: ModelFacts) -> nn.Module:
    """The model with random weights."""
    return CoMoE(config, facts.num_classes)


METHOD = MethodSpec(
    name="comoe",
    task="text",
    protocol="text-to-image",
    Config=Config,
    build=build,
    stages=stages,
    eval_batch=eval_batch,
    encode=encode,
    similarity={"global": 1.0},
    reference=Reference(
        paper="CoMoE: collaboration mixture-of-experts for text-based person retrieval",
        repository="https://github.com/SJJ0916/CoMoE",
        commit="6391b76",
    ),
    import_weights=import_weights,
    start=start,
    check=check,
)
