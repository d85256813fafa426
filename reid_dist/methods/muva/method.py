"""MUVA as a job: what the framework asks of a method (methods/spec.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from reid_dist.config import Recipe
from reid_dist.data.text import clip_tokenizer
from reid_dist.errors import UserError
from reid_dist.methods.muva.config import Config
from reid_dist.methods.muva.images import transform_of
from reid_dist.methods.muva.model import Muva
from reid_dist.methods.muva.prompts import prompt_templates
from reid_dist.methods.muva.stages import stages_of
from reid_dist.methods.spec import (
    Batch,
    EvalSide,
    MethodSpec,
    ModelFacts,
    Outputs,
    Reference,
    Stage,
    TrainingData,
)
from reid_dist.models.clip import ClipArchitecture, ClipTowers, architecture
from reid_dist.models.clip_weights import load_clip

if TYPE_CHECKING:
    from reid_dist.data.store import TableView


def arch_of(config: Config) -> ClipArchitecture:
    """The towers' sizes that a config asks for. Raises UserError."""
    arch = architecture(config.arch, image_size=config.image_size, stride=config.stride)
    if arch.image_width % config.mask_heads:
        raise UserError(
            f"model.mask_heads={config.mask_heads} does not divide the image tower's width {arch.image_width}"
        )
    return arch


def build(config: Config, facts: ModelFacts) -> nn.Module:
    """The model with random weights, for `facts.num_classes` training identities. Raises UserError."""
    arch = arch_of(config)
    tokenizer = clip_tokenizer(arch.vocab_size)
    templates = prompt_templates(
        config.parts, config.prompt_words, config.template, config.domain_text, tokenizer, arch.context_length
    )
    return Muva(arch, config, facts.num_classes, templates)


def start(model: nn.Module, config: Config) -> None:
    """Fill the towers with published CLIP weights where the config names some."""
    assert isinstance(model, Muva)
    if config.weights:
        towers = ClipTowers(model.arch)
        load_clip(towers, config.weights)
        model.take_towers(towers)


def stages(recipe: Recipe, data: TrainingData) -> Sequence[Stage]:
    """One or two stages, as the recipe says. Raises UserError."""
    return stages_of(recipe, data, arch_of(recipe.model).grid)


def eval_batch(config: Config, view: TableView, side: EvalSide, index: np.ndarray) -> Batch:
    """image [n, 3, H, W]."""
    if side.kind != "image":
        raise UserError(f"MUVA encodes images, not {side.kind}s: choose a protocol between images")
    return {"image": transform_of(config, train=False).apply_all(view.images(side.rows[index]))}


def encode(model: nn.Module, batch: Batch) -> Outputs:
    """{"global": [n, F]}: all grains behind the neck, compared as one vector."""
    return {"global": model(batch["image"])}


METHOD = MethodSpec(
    name="muva",
    task="image",
    protocol="image",
    Config=Config,
    build=build,
    stages=stages,
    eval_batch=eval_batch,
    encode=encode,
    similarity={"global": 1.0},
    reference=Reference(
        paper="MUVA: multi-grained vision-language alignment for domain generalization of person ReID (arXiv 2603.14012)",
        repository="https://github.com/RikoLi/MUVA",
        commit="8965263",
    ),
    start=start,
)
