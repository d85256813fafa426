"""Bottleneck residual networks in pieces: stem, residual unit, trunk; torchvision's parameter names.

Methods put the pieces together (a stem per modality over one trunk, a trunk without its last stage, stride 1 in the
last stage), so there is no class for the whole network. Equal to torchvision's `resnet50` with equal weights: the 3x3
convolution and the projection carry the stride. Batch norm is synchronised (models/batchnorm.py).
Sources: He et al. (CVPR 2016); methods/rle.md section 3.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from reid_dist.errors import UserError
from reid_dist.models.batchnorm import BatchNorm2d
from reid_dist.models.published import read_published

logger = logging.getLogger(__name__)

EXPANSION = 4  # output channels of a residual unit over those of its 3x3 convolution


@dataclass(frozen=True, slots=True)
class ResNetShape:
    """Sizes of a stem and a trunk. `strides` and `depths`: one entry per stage; stage s is 2^s * width wide inside."""

    stem: int = 64
    width: int = 64
    depths: tuple[int, ...] = (3, 4, 6, 3)
    strides: tuple[int, ...] = (1, 2, 2, 2)

    @property
    def channels(self) -> int:
        """Channels of the last feature map."""
        return EXPANSION * self.width * 2 ** (len(self.depths) - 1)


SHAPES: Mapping[str, ResNetShape] = {
    "resnet50": ResNetShape(),
    "resnet-tiny": ResNetShape(stem=16, width=8, depths=(1, 1, 1, 1), strides=(1, 2, 1, 1)),  # for CPUs and tests
}


def shape_of(name: str) -> ResNetShape:
    """The shape of that name. Raises UserError listing all."""
    if name not in SHAPES:
        raise UserError(f"model.arch={name!r}: choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


class Stem(nn.Module):
    """conv 7x7/2, batch norm, ReLU, max-pool 3x3/2: [n, 3, H, W] -> [n, stem, H/4, W/4]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(image))))


class Bottleneck(nn.Module):
    """Residual unit 1x1, 3x3 (stride, dilation), 1x1: [n, in, H, W] -> [n, 4 mid, H/stride, W/stride].

    The shortcut is a projection where the shape changes.
    """

    def __init__(self, inputs: int, mid: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        outputs = EXPANSION * mid
        self.conv1 = nn.Conv2d(inputs, mid, 1, bias=False)
        self.bn1 = BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, mid, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, outputs, 1, bias=False)
        self.bn3 = BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + shortcut)


class Trunk(nn.Module):
    """The stages after the stem, named layer1, layer2, ... [n, stem, H, W] -> [n, channels, H', W']."""

    def __init__(self, shape: ResNetShape) -> None:
        super().__init__()
        inputs = shape.stem
        for stage, (depth, stride) in enumerate(zip(shape.depths, shape.strides, strict=True)):
            mid = shape.width * 2**stage
            units = [Bottleneck(inputs, mid, stride)]
            inputs = EXPANSION * mid
            units += [Bottleneck(inputs, mid) for _ in range(depth - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*units))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.children():
            x = stage(x)
        return x


def init_convolutions(module: nn.Module) -> None:
    """torchvision's start of a residual network: He's normal by fan-out; batch norm starts as the identity."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


def read_imagenet(source: str) -> dict[str, Tensor]:
    """State of torchvision's `resnet50`: "imagenet" (download of IMAGENET1K_V1), a path or s3://. Raises UserError."""
    if source == "imagenet":
        from torchvision.models import ResNet50_Weights

        try:
            state: dict[str, Tensor] = ResNet50_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"model.weights=imagenet cannot be downloaded ({error}): give model.weights=PATH to "
                'resnet50-0676ba61.pth, or model.weights="" to start from random weights'
            ) from None
        return state
    state = read_published(source)
    if "conv1.weight" not in state:
        raise UserError(f"model.weights={source}: holds no resnet50 (no tensor conv1.weight)")
    return state


def load_stem_and_trunk(stems: Iterable[nn.Module], trunk: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill stems and trunk from torchvision's names; stages that `trunk` lacks are left. Raises UserError."""
    parts = [*stems, trunk]
    for part in parts:
        own = part.state_dict()
        wrong = [name for name, value in own.items() if name not in state or state[name].shape != value.shape]
        wrong = [name for name in wrong if not name.endswith("num_batches_tracked")]  # absent from the first upload
        if wrong:
            raise UserError(f"the ImageNet weights do not fit: {len(wrong)} tensors lack or differ, first {wrong[0]}")
        part.load_state_dict({name: state.get(name, value) for name, value in own.items()})
    logger.info("ImageNet weights loaded into %d stems and %d stages", len(parts) - 1, len(list(trunk.children())))
