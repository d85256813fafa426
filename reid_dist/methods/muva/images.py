"""Images with their part masks, as batches. Source: methods/muva.md section 5.2.

Training: resize, normalise with mean and deviation .5, then one flip of image and mask together. Memory and evaluation:
another resize filter (as the authors have it), no flip. There is no crop, and no erasing, which would not move the
mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reid_dist.data.transforms import ImageTransform
from reid_dist.methods.muva.config import Config
from reid_dist.methods.muva.masks import flip_patches

HALF = (0.5, 0.5, 0.5)


def transform_of(config: Config, train: bool) -> ImageTransform:
    """The image pipeline before the flip."""
    return ImageTransform(
        size=config.image_size, mean=HALF, std=HALF, resize=config.train_resize if train else config.eval_resize
    )


def flips(draws: Sequence[float], probability: float) -> np.ndarray:
    """bool [n]: draw < probability, strictly and in float32 (as torch's comparison of the original)."""
    return np.asarray(draws, dtype=np.float32) < np.float32(probability)


def paired_flip(image: Tensor, visible: np.ndarray, grid: tuple[int, int], flipped: bool) -> tuple[Tensor, np.ndarray]:
    """image [3, H, W] and mask [R, L], both mirrored left to right if `flipped`."""
    if not flipped:
        return image, visible
    return image.flip(-1), flip_patches(visible, grid)


def grounded_batch(
    images: Sequence[np.ndarray],
    visible: np.ndarray,
    transform: ImageTransform,
    grid: tuple[int, int],
    flipped: np.ndarray,
) -> tuple[Tensor, Tensor]:
    """n images uint8 [h, w, 3], masks bool [n, R, L], flips bool [n] -> (float32 [n, 3, H, W], bool [n, R, L])."""
    pixels, masks = transform.apply_all(images), np.array(visible)
    for row in np.flatnonzero(flipped).tolist():
        pixels[row], masks[row] = paired_flip(pixels[row], masks[row], grid, True)
    return pixels, torch.from_numpy(masks)
