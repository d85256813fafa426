"""The `model:` section of a CoMoE recipe. Defaults are the released settings (methods/comoe.md sections 2-5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LossName = Literal["sdm", "itc", "balance", "cmpm", "id", "mlm"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Architecture, losses, data and learning-rate rules of CoMoE."""

    arch: str = "ViT-B-16"  # a name of models/clip.ARCHITECTURES
    weights: str = "openai"  # start of the towers: open_clip tag, file, s3://, or empty: random
    image_size: tuple[int, int] | None = None  # rows, columns; None: the architecture's
    stride: int | None = None
    text_length: int | None = None
    head: Literal["shared", "unshared", "base"] = "shared"
    head_blocks: int = 4
    head_heads: int = 8
    experts: int = 4
    top_k: int = 2
    reduction: int = 8  # an adapter's width is D / reduction
    dropout: float = 0.1  # inside the adapters
    attention_axis: Literal["sequence", "batch"] = "sequence"  # "batch": the released code's, one worker only
    losses: tuple[LossName, ...] = ("sdm", "itc", "balance")
    temperature: float = 0.02  # logit scale = 1 / temperature, a constant
    itc_weight: float = 5.0
    balance_weight: float = 1.0  # PHP: 0.5
    joint_balance_weight: float = 0.0  # ours: one more balance term, on both modalities together
    id_weight: float = 1.0
    mlm_weight: float = 0.5
    mlm_depth: int = 4
    augment: bool = True  # pad, crop and erase besides the flip
    sampler: Literal["random", "identity"] = "random"
    instances: int = 4  # pairs per identity in a batch of the identity sampler
    lr_factor: float = 5.0  # parameters named `cross`, `classifier` or `mlm_head`
    bias_lr_factor: float = 2.0
    bias_weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: must be positive")
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k}: must lie between 1 and experts={self.experts}")
        if len(set(self.losses)) != len(self.losses) or not self.losses:
            raise ValueError(f"losses={list(self.losses)}: name each loss once, at least one")
        if self.head == "base" and ("balance" in self.losses or self.joint_balance_weight):
            raise ValueError("head=base has no experts: take `balance` out of losses and joint_balance_weight to 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be at least 0 and below 1")
