"""The `model:` section of a MUVA recipe. Defaults are the released settings (methods/muva.md sections 3-6).

The second stage (image tower) takes `training.epochs`, `optim` and `schedule` of the recipe; the first one (prompts)
its own section `prompts`. Both take `training.global_batch`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from reid_dist.config import OptimConfig, ScheduleConfig

PartName = Literal["head", "upper", "legs"]
PARTS: tuple[PartName, ...] = ("head", "upper", "legs")  # the one order of parts, also of the rows of a stored mask
StageName = Literal["prompts", "finetune"]


@dataclass(frozen=True, kw_only=True)
class PromptStageConfig:
    """Stage 1. The cosine counts from the first epoch, warm-up included; `warmup_factor` x lr is its first rate."""

    epochs: int = 120
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3.5e-4, weight_decay=1e-4))
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(mode="cosine", warmup=5, warmup_factor=1e-5 / 3.5e-4, target_lr=1e-6)
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Architecture, losses and data rules of MUVA."""

    arch: str = "ViT-B-16"  # a name of models/clip.ARCHITECTURES
    weights: str = "openai"  # start of the towers: open_clip tag, file, s3://, or empty: random
    image_size: tuple[int, int] = (256, 128)  # rows, columns
    stride: int | None = None  # None: the architecture's
    stages: tuple[StageName, ...] = ("prompts", "finetune")  # [finetune] with init=run:URI reuses a stage-1 run
    prompts: PromptStageConfig = field(default_factory=PromptStageConfig)
    # Parts and masks
    parts: tuple[PartName, ...] = PARTS  # a subset is allowed; empty: one global token, no masks (ablation)
    masks: tuple[str, ...] = ()  # side tables with the training images' part masks (masks.py), or [bands]
    part_tokens: Literal["learned", "class", "patches"] = "learned"  # "class": copies; "patches": means of bands
    gating: Literal["offline", "online"] = "offline"  # strict threshold without gradient, or a linear map with one
    threshold: float = 0.5
    gate_scale: float = 1.0  # online: additive term = scale * (2 p - 1)
    mask_heads: int = 2  # of the predictors' cross-attention; 8 with source MSMT17
    mask_temperature: float = 1.0
    # Prompts
    template: Literal["universal", "part-agnostic"] = "universal"
    prompt_words: int = 4  # learnable vectors per identity and grain
    domain_text: str = ""  # appended to every template after a comma
    contrast_temperature: float = 1.0  # stage 1
    # Losses of stage 2
    smoothing: float = 0.1
    memory_temperature: float = 0.01
    memory_momentum: float = 0.2  # share of the old prototype
    memory_update: Literal["hard", "all"] = "hard"
    i2t_normalise: bool = False
    i2t_temperature: float = 1.0
    mask_loss: Literal["bce+dice", "mse"] = "bce+dice"
    weight_id: float = 1.0
    weight_memory: float = 1.0
    weight_i2t: float = 1.0  # 0: no prompts are needed (ablation)
    weight_mask: float = 1.0
    # Optimisation and data
    freeze_patches: bool = True  # the patch embedding keeps CLIP's weights
    mask_lr_factor: float = 10.0
    neck_momentum: float = 0.19  # 1 - 0.9^2: the original calls its batch norm twice per step on the same features
    instances: int = 4  # images per identity in a batch
    flip: float = 0.5
    train_resize: Literal["bilinear", "bicubic"] = "bicubic"
    eval_resize: Literal["bilinear", "bicubic"] = "bilinear"  # memory and evaluation; the original's two differ

    def __post_init__(self) -> None:
        known = [part for part in PARTS if part in self.parts]
        if len(known) != len(self.parts):
            raise ValueError(f"parts={list(self.parts)}: name each of {', '.join(PARTS)} at most once")
        object.__setattr__(self, "parts", tuple(known))
        if self.stages not in (("prompts", "finetune"), ("prompts",), ("finetune",)):
            raise ValueError(f"stages={list(self.stages)}: choose [prompts, finetune], [prompts] or [finetune]")
        for name in ("mask_temperature", "contrast_temperature", "memory_temperature", "i2t_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")
        if not 0 <= self.memory_momentum <= 1 or not 0 <= self.smoothing < 1 or not 0 < self.neck_momentum <= 1:
            raise ValueError("memory_momentum lies in [0, 1], smoothing in [0, 1), neck_momentum in (0, 1]")
        if self.prompt_words < 1 or self.prompts.epochs < 1:
            raise ValueError("prompt_words and prompts.epochs are at least 1")
        if self.mask_temperature != 1 and self.mask_loss == "bce+dice":
            raise ValueError("mask_temperature other than 1 needs mask_loss=mse: the pixel term of bce+dice ignores it")
        if self.gating == "online" and self.gate_scale <= 0:
            raise ValueError(f"gate_scale={self.gate_scale}: online gating with 0 or less masks nothing")

    @property
    def grains(self) -> int:
        """Vectors per image and per identity text: the whole person and its parts."""
        return 1 + len(self.parts)
