"""RLE as a job: one stage of visible-infrared pairs, synchronised batch norm, gathered triplet (methods/rle.md).

What we changed and why: one plan of the global batch in pairs, so every slice holds both modalities equally; every
batch norm sums over ranks; the triplet sees all rows; augmentation draws are keyed by pair, so nothing depends on the
number of workers. `training.global_batch` counts pairs: 24 are 24 visible and 24 infrared images.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from reid_dist.config import Recipe
from reid_dist.data.paired import PairedIdentityPlan, modality_rows
from reid_dist.errors import UserError
from reid_dist.methods.rle.config import Config
from reid_dist.methods.rle.model import TwoStream, build_network, test_vectors
from reid_dist.methods.rle.objective import objective
from reid_dist.methods.rle.transforms import Chain
from reid_dist.methods.rle.weights import import_weights
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
from reid_dist.models.resnet import load_stem_and_trunk, read_imagenet

if TYPE_CHECKING:
    from reid_dist.data.store import TableView

logger = logging.getLogger(__name__)


class RLEStage(RecipeStage):
    """The only stage: pairs of a visible and an infrared image of one identity."""

    name = "train"
    row_wise = False  # batch norm in the forward pass

    def __init__(self, recipe: Recipe, view: TableView) -> None:
        """Raises UserError for data that cannot be paired."""
        super().__init__(recipe, view)
        self.config: Config = recipe.model
        self.rows = modality_rows(view)
        self.chain = Chain(self.config.image_size, self.config.augment)
        self._plan = PairedIdentityPlan(
            self.rows.visible_label,
            self.rows.infrared_label,
            recipe.training.global_batch,
            self.config.instances,
            recipe.seed,
        )

    def plan(self) -> PairedIdentityPlan:
        """Items are pairs (data/paired.py)."""
        return self._plan

    def load(self, part: PlanPart) -> Batch:
        """visible, infrared [n, 3, H, W], label int64 [n]; draws of the two images are independent."""
        visible, infrared = self._plan.split(part.items)
        return {
            "visible": self._images(part, self.rows.visible[visible], "visible"),
            "infrared": self._images(part, self.rows.infrared[infrared], "infrared"),
            "label": torch.from_numpy(self.rows.visible_label[visible]),
        }

    def _images(self, part: PlanPart, rows: np.ndarray, stream: str) -> Tensor:
        return self.chain.apply_all(self.view.images(rows), part.rngs(rows, stream), infrared=stream == "infrared")

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        """Stems and trunk at a tenth of the rate; decay on every trained tensor."""
        optim = self.recipe.optim
        groups: tuple[list[str], list[str]] = ([], [])
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups[name.startswith("head.")].append(name)
        return [
            ParamGroup(tuple(groups[0]), optim.lr * self.config.backbone_lr_factor, optim.weight_decay),
            ParamGroup(tuple(groups[1]), optim.lr, optim.weight_decay),
        ]

    def forward(self, model: nn.Module, batch: Batch, ctx: Context) -> Outputs:
        """feat [n, 2, 4, C], logit [n, 2, 4, K]: a row is a pair, visible first."""
        out = model(batch["visible"], batch["infrared"])
        n = len(batch["label"])
        return {name: torch.stack([out[name][:n], out[name][n:]], dim=1) for name in ("feat", "logit")}

    def losses(self, model: nn.Module, out: Outputs, batch: Batch, ctx: Context) -> Terms:
        ours = ctx.slice()
        return objective(
            ctx.gather(out["feat"]).flatten(0, 1),
            ctx.gather(batch["label"]).repeat_interleave(2),
            out["logit"].flatten(0, 1),
            self.config,
            rows=slice(2 * ours.start, 2 * ours.stop),
            world_size=ctx.world_size,
        )


def stages(recipe: Recipe, data: TrainingData) -> Sequence[Stage]:
    """One stage. Raises UserError."""
    check(recipe)
    return [RLEStage(recipe, data.train)]


def check(recipe: Recipe) -> None:
    """Refuse what batch norm cannot be computed with. Raises UserError."""
    if recipe.training.activation_checkpointing:
        raise UserError(
            "training.activation_checkpointing=true: RLE has batch norm, whose running statistics would move twice per "
            "step; set it to false and use more workers if memory is short"
        )


def start(model: nn.Module, config: Config) -> None:
    """Fill stems and trunk with ImageNet weights where the config names some."""
    if not config.weights:
        return
    assert isinstance(model, TwoStream)
    stems = (model.visible_stem, model.infrared_stem)
    if config.arch != "resnet50":
        raise UserError(f'model.arch={config.arch} has no ImageNet weights: set model.weights=""')
    load_stem_and_trunk(stems, model.trunk, read_imagenet(config.weights))


def eval_batch(config: Config, view: TableView, side: EvalSide, index: np.ndarray) -> Batch:
    """image [n, 3, H, W], infrared bool [n], and what shapes the score."""
    if side.kind != "image":
        raise UserError(f"RLE encodes images, not {side.kind}s: choose a visible-infrared protocol")
    rows = side.rows[index]
    infrared = np.asarray(view.modality).astype(str)[rows] == "ir"
    return {
        "image": Chain(config.image_size).apply_all(view.images(rows)),
        "infrared": torch.from_numpy(infrared),
        "flip": config.flip_test,
        "fusion": config.fusion,
    }


def encode(model: nn.Module, batch: Batch) -> Outputs:
    """{"fused": [n, 8 C], with mirroring [n, 8 C + 2]}.

    Between a visible and an infrared row, inner product and cosine both rank by the released score
    (1 - a) pool + a bn (a = 0.5: as its sum score).

    Without mirroring the fused vectors have norm 1. With it they are sums, whose lengths take part in the released
    inner product; the evaluator ranks by cosine, so each is filled up to the largest possible length in a column that
    the other modality leaves at 0.
    """
    assert isinstance(model, TwoStream)
    vectors = test_vectors(model, batch["image"], batch["infrared"], batch["flip"])
    a = batch["fusion"]
    fused = torch.cat([math.sqrt(1 - a) * vectors["pool"], math.sqrt(a) * vectors["bn"]], dim=1)
    if not batch["flip"]:
        return {"fused": fused}
    filling = (4.0 - fused.square().sum(dim=1)).clamp(min=0).sqrt()  # a sum of two unit vectors is at most 2 long
    infrared = batch["infrared"].to(fused.dtype)
    return {"fused": torch.cat([fused, torch.stack([filling * (1 - infrared), filling * infrared], dim=1)], dim=1)}


def facts(data: TrainingData) -> ModelFacts:
    """Classes are the identities that can be paired."""
    return ModelFacts(num_classes=modality_rows(data.train).classes)


def build(config: Config, facts: ModelFacts) -> nn.Module:
    """The network with random weights."""
    return build_network(config, facts.num_classes)


METHOD = MethodSpec(
    name="rle",
    task="visible-infrared",
    protocol="sysu-all-single-shot",
    Config=Config,
    build=build,
    stages=stages,
    eval_batch=eval_batch,
    encode=encode,
    similarity={"fused": 1.0},
    reference=Reference(
        paper="RLE: a unified perspective of data augmentation for cross-spectral re-identification (NeurIPS 2024)",
        repository="https://github.com/stone96123/RLE",
        commit="c3245b3",
    ),
    facts=facts,
    import_weights=import_weights,
    start=start,
    check=check,
)
