"""RLE's network: a stem per modality, one trunk, stripes, batch-norm necks, classifiers (methods/rle.md section 3).

Plain average pooling; no GeM, no non-local block: the released constructor's switches for them do nothing. Only what is
used is built (26.77 M parameters for 395 classes instead of the released 97.28 M).

Shapes: n rows, C channels of the last map, branches p1, p2, p3 (stripes from the top) and g (whole map), K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from reid_dist.errors import UserError
from reid_dist.methods.rle.config import Config
from reid_dist.models.batchnorm import BatchNorm1d
from reid_dist.models.resnet import ResNetShape, Stem, Trunk, init_convolutions, shape_of

BRANCHES = ("p1", "p2", "p3", "g")
STRIPES = 3


def stripe_heights(height: int) -> tuple[int, ...]:
    """ceil(H/3), ceil(H/3), rest. Raises UserError for heights that leave a stripe empty (1, 2 and 4)."""
    tall = math.ceil(height / STRIPES)
    rest = height - (STRIPES - 1) * tall
    if rest < 1:
        raise UserError(f"a feature map of {height} rows has no {STRIPES} stripes: raise the rows of model.image_size")
    return tall, tall, rest


def unit_power(x: Tensor, power: int = 2) -> Tensor:
    """Rows [n, D] over their p-norm (p even), clamped at 1e-12 where the original divides zero by zero."""
    return x / x.pow(power).sum(dim=1, keepdim=True).pow(1.0 / power).clamp(min=1e-12)


class PartHead(nn.Module):
    """Stripe and global pooling, necks whose shift stays 0, bias-free classifiers."""

    def __init__(self, channels: int, classes: int) -> None:
        """`classes` 0: for evaluation alone, without classifiers."""
        super().__init__()
        self.classes = classes
        for branch in BRANCHES:
            neck = BatchNorm1d(channels)
            nn.init.normal_(neck.weight, 1.0, 0.01)
            neck.bias.requires_grad_(False)
            self.add_module(f"bnneck_{branch}", neck)
            if classes:
                classifier = nn.Linear(channels, classes, bias=False)
                nn.init.normal_(classifier.weight, std=0.001)
                self.add_module(f"classifier_{branch}", classifier)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """[n, C, H, W] -> feat [n, 4, C] pooled, neck [n, 4, C], and logit [n, 4, K] in training; float32 or wider."""
        wide = features if features.dtype == torch.float64 else features.float()
        stripes = [part.mean(dim=(2, 3)) for part in wide.split(stripe_heights(wide.shape[2]), dim=2)]
        pooled = [*stripes, wide.mean(dim=(2, 3))]
        necks = [self.get_submodule(f"bnneck_{b}")(x) for b, x in zip(BRANCHES, pooled, strict=True)]
        out = {"feat": torch.stack(pooled, dim=1), "neck": torch.stack(necks, dim=1)}
        if self.training and self.classes:
            layers = [self.get_submodule(f"classifier_{b}") for b in BRANCHES]
            logits = [layer(x.to(layer.weight.dtype)) for layer, x in zip(layers, necks, strict=True)]
            out["logit"] = torch.stack(logits, dim=1).to(wide.dtype)
        return out


class TwoStream(nn.Module):
    """Stems, trunk and head as one network; any modules of fitting shapes."""

    def __init__(self, visible_stem: nn.Module, infrared_stem: nn.Module, trunk: nn.Module, head: PartHead) -> None:
        super().__init__()
        self.visible_stem, self.infrared_stem, self.trunk, self.head = visible_stem, infrared_stem, trunk, head

    def forward(self, visible: Tensor, infrared: Tensor) -> dict[str, Tensor]:
        """[a, 3, H, W] and [b, 3, H, W] (either may be empty) -> the head's outputs, visible rows first."""
        kind = next(self.visible_stem.parameters()).dtype
        maps = [self.visible_stem(visible.to(kind)), self.infrared_stem(infrared.to(kind))]
        out: dict[str, Tensor] = self.head(self.trunk(torch.cat(maps)))
        return out


def test_vectors(model: TwoStream, image: Tensor, infrared: Tensor, flip: bool) -> dict[str, Tensor]:
    """{"pool", "bn"}: [n, 4 C] unit vectors before and after the necks, of rows of either modality.

    image [n, 3, H, W]; infrared bool [n]. `flip`: the sum with the mirrored image's vectors, not normalised again.
    """
    rows = [torch.nonzero(~infrared)[:, 0], torch.nonzero(infrared)[:, 0]]
    place = torch.argsort(torch.cat(rows))

    def vectors(pictures: Tensor) -> tuple[Tensor, Tensor]:
        out = model(pictures[rows[0]], pictures[rows[1]])
        return unit_power(out["feat"].flatten(1)), unit_power(out["neck"].flatten(1))

    pool, bn = vectors(image)
    if flip:
        mirrored = vectors(image.flip(3))
        pool, bn = pool + mirrored[0], bn + mirrored[1]
    return {"pool": pool[place], "bn": bn[place]}


def network_shape(config: Config) -> ResNetShape:
    """Sizes of the config's stems and trunk, without the last stage where it asks for that."""
    shape = shape_of(config.arch)
    depths = shape.depths if config.last_stage else shape.depths[:-1]
    strides = (*shape.strides[:-1], 1) if config.last_stage else shape.strides[: len(depths)]
    return ResNetShape(shape.stem, shape.width, depths, strides)


def map_height(config: Config) -> int:
    """Rows of the last feature map."""
    height = config.image_size[0]
    for stride in (2, 2, *network_shape(config).strides):  # stem's convolution and pooling, then the stages
        height = (height - 1) // stride + 1
    return height


def build_network(config: Config, classes: int) -> TwoStream:
    """The network with random weights. Raises UserError for an image too low for three stripes."""
    stripe_heights(map_height(config))
    shape = network_shape(config)
    model = TwoStream(Stem(shape.stem), Stem(shape.stem), Trunk(shape), PartHead(shape.channels, classes))
    for part in (model.visible_stem, model.infrared_stem, model.trunk):
        init_convolutions(part)
    return model
