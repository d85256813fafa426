"""The `model:` section of an ICL or RDE recipe. Defaults are the released settings (methods/icl.md sections 1 to 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reid_dist.losses import PairLoss


@dataclass(frozen=True, kw_only=True)
class Config:
    """Architecture, losses, trust in pairs, text pipeline and learning-rate rules. RDE is ICL without `groups`."""

    arch: str = "ViT-B-16"  # a name of models/clip.ARCHITECTURES
    weights: str = "openai"  # start of the towers: open_clip tag, file, s3://, or empty: random
    pretrained: str = ""  # towers pre-trained for re-identification, over `weights`: file or s3://
    image_size: tuple[int, int] | None = None  # rows, columns; None: the architecture's
    stride: int | None = None
    text_length: int | None = None
    text_positions: Literal["interpolate", "random"] = "interpolate"  # of another length than 77; released runs: random
    select_ratio: float = 0.3  # share of patches and of text positions that token selection takes
    select_width: int = 1024  # of the embedding made of selected tokens
    select_norm: Literal["frozen", "batch"] = "frozen"  # its batch norm: start statistics for good, or the batch's

    loss: PairLoss = "tal"  # with groups always tal
    temperature: float = 0.015  # tal, trl
    margin: float = 0.1  # tal, trl
    logit_scale: float = 50.0  # sdm, infonce
    loss_scale: float = 1.0  # tal and trl are sums over pairs: 64 / global_batch keeps their size in larger batches

    groups: tuple[str, ...] = ()  # side tables of caption groups (data/captions.py): a second, reorganised caption
    second_weight_step: float = 0.03  # the second caption's terms weigh max(least, 1 - step * epoch), epochs from 1
    second_weight_least: float = 0.1

    consensus: bool = True  # divide the pairs into clean and noisy before every epoch; False: trust all
    consensus_from: int = 1  # first epoch (from 1) with a division; networks that start at random know nothing before
    mixture: Literal["auto", "tight", "loose"] = "auto"  # how exactly the mixtures are fitted (consensus.py)
    noise: str = ""  # permutation of captions <root>/noise/<name>.npy (noise.py); empty: captions stay where they are

    augment: bool = True  # pad, crop and erase besides the flip
    corruption: float = 0.2  # share of words that are masked (60 %), replaced (20 %) or deleted (20 %)

    bias_lr_factor: float = 2.0  # biases of the towers; no bias decays
    select_lr: float = 1e-3  # both token-selection heads
    text_positions_lr_factor: float = 5.0  # text positions of another length than 77

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.loss_scale <= 0:
            raise ValueError(f"temperature={self.temperature}, loss_scale={self.loss_scale}: both must be positive")
        if not 0 < self.select_ratio <= 1:
            raise ValueError(f"select_ratio={self.select_ratio}: must be above 0 and at most 1")
        if self.select_width < 2 or self.select_width % 2:
            raise ValueError(f"select_width={self.select_width}: must be even and at least 2")
        if not 0 <= self.corruption < 1:
            raise ValueError(f"corruption={self.corruption}: must be at least 0 and below 1")
        if self.consensus_from < 1:
            raise ValueError(f"consensus_from={self.consensus_from}: epochs count from 1")

    @property
    def pair_loss(self) -> PairLoss:
        """The loss that trains: with a second caption always tal."""
        return "tal" if self.groups else self.loss
