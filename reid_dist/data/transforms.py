"""Images to tensors, with every random choice drawn beforehand.

    resize -> flip -> pad with black, crop -> [0, 1], normalise -> erase

Draws and their application are apart: `draw` makes an `ImageDraws` from the row's own generator (data/draws.row_rng),
`apply` is deterministic. So the result does not depend on the worker, and golden vectors replay recorded draws. Order
and constants: methods/comoe.md section 4 (the same as methods/icl.md section 4). Erasing comes after normalisation
and yet fills with the raw mean, as the authors' recipes do.

Works on whole NumPy arrays and PIL's resize, which release the interpreter lock: loader threads scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True, slots=True)
class ImageDraws:
    """The random choices for one image. The default is none of them."""

    flip: bool = False  # left-right
    crop: tuple[int, int] | None = None  # top, left corner in the padded image
    erase: tuple[int, int, int, int] | None = None  # top, left, height, width


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """One image pipeline. Probability 0 and `pad` 0 leave a step out; `apply` without draws is for testing."""

    size: tuple[int, int]  # rows, columns
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resize: Literal["bilinear", "bicubic"] = "bilinear"
    flip: float = 0.0
    pad: int = 0  # black pixels on every side before the crop
    erase: float = 0.0
    erase_area: tuple[float, float] = (0.02, 0.4)  # share of the image
    erase_ratio: tuple[float, float] = (0.3, 3.3)  # height / width
    erase_log_ratio: bool = True  # draw the ratio's logarithm uniformly, else the ratio itself
    erase_attempts: int = 10
    erase_fill: tuple[float, float, float] = CLIP_MEAN  # in normalised units
    _scale: np.ndarray = field(init=False, repr=False, compare=False)
    _shift: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        mean, std = np.array(self.mean), np.array(self.std)
        object.__setattr__(self, "_scale", (1.0 / (255.0 * std)).astype(np.float32))
        object.__setattr__(self, "_shift", (-mean / std).astype(np.float32))

    def draw(self, rng: np.random.Generator) -> ImageDraws:
        """The choices for one image. Always the same number of draws per step taken, in this order."""
        flip = self.flip > 0 and rng.random() < self.flip
        crop = None
        if self.pad:
            top, left = rng.integers(0, 2 * self.pad + 1, size=2).tolist()
            crop = (top, left)
        erase = self._draw_box(rng) if self.erase > 0 and rng.random() < self.erase else None
        return ImageDraws(flip, crop, erase)

    def _draw_box(self, rng: np.random.Generator) -> tuple[int, int, int, int] | None:
        rows, columns = self.size
        low, high = self.erase_ratio
        for _ in range(self.erase_attempts):
            area = rng.uniform(*self.erase_area) * rows * columns
            ratio = (
                math.exp(rng.uniform(math.log(low), math.log(high))) if self.erase_log_ratio else rng.uniform(low, high)
            )
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < height < rows and 0 < width < columns:
                top, left = int(rng.integers(0, rows - height + 1)), int(rng.integers(0, columns - width + 1))
                return top, left, height, width
        return None

    def apply(self, image: np.ndarray, draws: ImageDraws | None = None) -> Tensor:
        """uint8 [h, w, 3] -> float32 [3, rows, columns]."""
        out = np.empty((3, *self.size), dtype=np.float32)
        self._write(image, draws or ImageDraws(), out)
        return torch.from_numpy(out)

    def apply_all(self, images: Sequence[np.ndarray], draws: Sequence[ImageDraws] | None = None) -> Tensor:
        """n images uint8 [h, w, 3] of any sizes -> float32 [n, 3, rows, columns]."""
        out = np.empty((len(images), 3, *self.size), dtype=np.float32)
        for index, image in enumerate(images):
            self._write(image, draws[index] if draws is not None else ImageDraws(), out[index])
        return torch.from_numpy(out)

    def _write(self, image: np.ndarray, draws: ImageDraws, out: np.ndarray) -> None:
        rows, columns = self.size
        if image.shape[:2] != self.size:
            image = np.asarray(Image.fromarray(image).resize((columns, rows), _FILTERS[self.resize]))
        if draws.flip:
            image = image[:, ::-1]
        target = out
        if draws.crop is not None:  # the padded image is never built: black border, then what overlaps
            down, right = draws.crop[0] - self.pad, draws.crop[1] - self.pad
            out[:] = self._shift[:, None, None]
            image = image[max(down, 0) : rows + min(down, 0), max(right, 0) : columns + min(right, 0)]
            top, left = max(-down, 0), max(-right, 0)
            target = out[:, top : top + image.shape[0], left : left + image.shape[1]]
        planes = np.ascontiguousarray(image.transpose(2, 0, 1))
        np.multiply(planes, self._scale[:, None, None], out=target, dtype=np.float32)
        target += self._shift[:, None, None]
        if draws.erase is not None:
            top, left, height, width = draws.erase
            out[:, top : top + height, left : left + width] = np.array(self.erase_fill, dtype=np.float32)[:, None, None]


def person_transform(size: tuple[int, int], train: bool, augment: bool = True) -> ImageTransform:
    """The text-to-image methods' pipeline: flip in training; with `augment` also pad 10, crop and erasing."""
    if not train:
        return ImageTransform(size=size)
    return ImageTransform(size=size, flip=0.5, pad=10 if augment else 0, erase=0.5 if augment else 0.0)
