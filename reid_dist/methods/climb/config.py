"""The `model:` section of a CLIMB recipe; defaults: the released image settings (methods/climb.md sections 2 to 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Config:
    """Architecture, memory, losses, data and learning rates of CLIMB-ReID."""

    arch: str = "ViT-B-16"  # a name of models/clip.ARCHITECTURES
    weights: str = "openai"  # start of the tower: open_clip tag, file, s3://, or empty: random
    image_size: tuple[int, int] | None = (256, 128)  # rows, columns; None: the architecture's
    stride: int | None = None
    states: int = 16  # of the Mamba head
    step_rank: int | None = None  # rank of its step sizes; None: ceil(width / 16)
    cameras: int = 0  # rows of the camera embedding; 0: none (Market-1501), 15: MSMT17
    camera_weight: float = 1.0

    banks: Literal["dual", "instance", "mean", "hard", "random"] = "dual"  # others: paper table 4, one bank
    update: Literal["official", "paper"] = "official"  # of the dual banks
    momentum: float = 0.2  # weight of the old prototype
    temperature: float = 0.05
    rebuild_every_epoch: bool = True  # the paper initialises once
    memory_batch: int = 128  # images (or clips) per forward pass of the rebuilding

    memory_weight: float = 1.0
    id_weight: float = 0.25
    head_id_weight: float = 1.0
    triplet_weight: float = 1.0
    smoothing: float = 0.1
    triplet_margin: float | None = None  # None: soft margin

    sampler: Literal["camera", "identity"] = "camera"  # camera-aware identity sampler, or plain P x K
    instances: int = 8  # images (or tracklets) per identity
    iterations: int = 200  # steps per epoch of the camera sampler
    augment: bool = True  # pad, crop and erase besides the flip

    head_lr_factor: float = 10.0  # of the head's classifier
    bias_lr_factor: float = 1.0

    frames: int = 0  # of a clip; 0: images
    temporal_strides: tuple[int, ...] = (1, 4, 8)  # fragments of the multi-temporal head
    test_clips: Literal["restricted", "dense"] = "restricted"  # one clip per tracklet, or all consecutive ones
    cut: Literal["whole", "pieces", "windows"] = "whole"  # training tracklets: LS-VID pieces, iLIDS-VID windows
    cut_step: int = 48  # frames per piece, or the windows' stride
    drop_short: bool = False  # pieces: leave out tracklets shorter than cut_step, as TF-CLIP does

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 1 or self.temperature <= 0:
            raise ValueError(f"momentum={self.momentum} must lie in 0..1, temperature={self.temperature} above 0")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing={self.smoothing}: must be at least 0 and below 1")
        if min(self.instances, self.iterations, self.memory_batch, self.states, self.cut_step) < 1:
            raise ValueError("instances, iterations, memory_batch, states and cut_step must be at least 1")
        if self.frames < 0 or self.cameras < 0:
            raise ValueError(f"frames={self.frames}, cameras={self.cameras}: must not be negative")
        wrong = [s for s in self.temporal_strides if s < 1 or self.frames % s]
        if self.frames and (wrong or not self.temporal_strides):
            raise ValueError(f"temporal_strides={list(self.temporal_strides)}: each must divide frames={self.frames}")
