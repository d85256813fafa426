"""The `model:` section of an RLE recipe. Defaults: the released code on SYSU-MM01 (methods/rle.md sections 3-8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """The training chain of section 5. Probability 0 or padding 0 leaves a step out."""

    pad: int = 10  # black pixels on every side before the crop
    grey: float = 0.0  # three-channel grey: 0.5 on RegDB and LLCM
    flip: float = 0.5
    moderate: float = 0.5  # probability of moderate linear enhancement (one random mixture of the channels)
    moderate_beta: float = 0.3
    moderate_on_infrared: bool = True  # code: both modalities (identity on grey); paper: visible only
    radical: float = 0.5  # probability of radical linear enhancement (random gains in rectangles)
    radical_beta: float = 0.4
    threshold: float = 0.1  # radical stops when some cumulative gain is below
    erase: float = 0.5
    area: tuple[float, float] = (0.02, 0.4)  # of a rectangle, as a share of the image
    least_aspect: float = 0.3  # height / width lies between this and its inverse

    def __post_init__(self) -> None:
        for name in ("grey", "flip", "moderate", "radical", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name}={getattr(self, name)}: a probability between 0 and 1")
        for name in ("moderate_beta", "radical_beta"):
            if getattr(self, name) <= 0:
                raise ValueError(f"augment.{name}={getattr(self, name)}: must be positive")
        if not 0 < self.area[0] <= self.area[1] <= 1 or not 0 < self.least_aspect <= 1:
            raise ValueError(
                f"augment.area={list(self.area)}, least_aspect={self.least_aspect}: shares between 0 and 1"
            )
        if self.pad < 0:
            raise ValueError(f"augment.pad={self.pad}: must not be negative")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Architecture, augmentation, sampler, losses and test-time scores of RLE."""

    arch: str = "resnet50"  # a name of models/resnet.SHAPES
    weights: str = "imagenet"  # start of stems and trunk: "imagenet" (torchvision's), a file, s3://, or empty: random
    last_stage: bool = True  # False: the network ends after stage 3 (RegDB)
    image_size: tuple[int, int] = (384, 192)  # rows, columns
    augment: AugmentConfig = AugmentConfig()
    instances: int = 4  # pairs per identity in a batch; identities = training.global_batch / instances
    margin: float = 0.3
    triplet: Literal["batch-hard", "weighted"] = "batch-hard"  # "weighted": AGW's, in the code but unused by RLE
    backbone_lr_factor: float = 0.1  # stems and trunk
    flip_test: bool = False  # test-time vector(image) + vector(mirrored image), not normalised again
    fusion: float = 0.2  # score (1 - a) pool + a bn. Released: 0.2 SYSU, 0.1 LLCM and RegDB v->t, 0 RegDB t->v

    def __post_init__(self) -> None:
        if self.instances < 1:
            raise ValueError(f"instances={self.instances}: at least 1")
        if not 0 <= self.fusion <= 1:
            raise ValueError(f"fusion={self.fusion}: must lie between 0 (before the necks) and 1 (after them)")
        if self.margin < 0:
            raise ValueError(f"margin={self.margin}: must not be negative")
