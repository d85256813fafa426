"""RLE's image chain (methods/rle.md section 5), one pass over an image's memory per step.

    Lanczos resize, pad with black, grey, crop, mirror, [0, 1], moderate, radical, erase, ImageNet normalisation

The padded image is never built, a mixture of channels is computed as one plane straight from the bytes, and radical
enhancement reads only the rectangles it touches. Works on NumPy arrays and Pillow, which release the interpreter lock:
loader threads scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reid_dist.methods.rle.config import AugmentConfig
from reid_dist.methods.rle.linear import (
    ERASE_FILL,
    Source,
    applies,
    first_fit,
    mix_channels,
    mix_weights,
    propose_regions,
    scale_in_place,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Choices of steps 1 to 4. The default is none of them."""

    top: int | None = None  # corner of the crop in the padded image; None: no padding and no crop
    left: int | None = None
    flip: bool = False
    grey: bool = False


@dataclass(frozen=True)
class Chain:
    """The chain for images of `size`. Without a source of draws it is the evaluation's preprocessing."""

    size: tuple[int, int]  # rows, columns
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def apply_all(
        self, images: Sequence[np.ndarray], sources: Sequence[Source] | None = None, infrared: bool = False
    ) -> Tensor:
        """n images uint8 [h, w, 3] -> float32 [n, 3, rows, columns]; `sources`: one per image, in training."""
        out = np.empty((len(images), 3, *self.size), dtype=np.float32)
        for index, image in enumerate(images):
            resized = self.resize(image)
            if sources is None:
                self.place(resized, Geometry(), out[index])
                self._normalise(out[index])
            else:
                self.place(resized, self.draw_geometry(sources[index]), out[index])
                self.enhance(out[index], sources[index], infrared)
        return torch.from_numpy(out)

    def resize(self, image: np.ndarray) -> np.ndarray:
        """Lanczos to `size`, uint8."""
        rows, columns = self.size
        if image.shape[:2] == self.size:
            return image
        return np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.LANCZOS))

    def draw_geometry(self, source: Source) -> Geometry:
        """Steps 1 to 4, drawn in the chain's order; steps that are left out draw nothing."""
        a = self.augment
        grey = a.grey > 0 and applies(source.random(), a.grey)
        top = left = None
        if a.pad:
            top, left = int(source.integers(0, 2 * a.pad + 1)), int(source.integers(0, 2 * a.pad + 1))
        return Geometry(top, left, a.flip > 0 and applies(source.random(), a.flip), grey)

    def place(self, image: np.ndarray, geometry: Geometry, out: np.ndarray) -> None:
        """Steps 1 to 5: uint8 [h, w, 3] -> `out` float32 [3, rows, columns] in [0, 1].

        With a crop the image may have any size; without one it has the chain's.
        """
        if geometry.grey:
            grey = np.asarray(Image.fromarray(image).convert("L"))
            image = np.broadcast_to(grey[:, :, None], image.shape)
        target = out
        if geometry.top is not None and geometry.left is not None:
            rows, columns = out.shape[1:]
            down, right = geometry.top - self.augment.pad, geometry.left - self.augment.pad
            image = image[max(down, 0) : max(rows + down, 0), max(right, 0) : max(columns + right, 0)]
            out[:] = 0
            top, left = max(-down, 0), max(-right, 0)
            if geometry.flip:
                left = columns - left - image.shape[1]
            target = out[:, top : top + image.shape[0], left : left + image.shape[1]]
        if geometry.flip:
            image = image[:, ::-1]
        planes = np.ascontiguousarray(image.transpose(2, 0, 1))
        np.multiply(planes, np.float32(1 / 255), out=target, dtype=np.float32)

    def enhance(self, image: np.ndarray, source: Source, infrared: bool = False) -> None:
        """Steps 6 to 9 on `image` itself, float32 [3, rows, columns] in [0, 1]."""
        a, (_, rows, columns) = self.augment, image.shape
        if a.moderate > 0 and (a.moderate_on_infrared or not infrared) and applies(source.random(), a.moderate):
            weights = mix_weights(source.beta(a.moderate_beta, a.moderate_beta) for _ in range(3))
            image[:] = mix_channels(image, weights)
        if a.radical > 0 and applies(source.random(), a.radical):
            proposals = propose_regions(source, image.shape, a.area, a.least_aspect, a.radical_beta)
            scale_in_place(image, proposals, a.threshold)
        box = None
        if a.erase > 0 and applies(source.random(), a.erase):
            box = first_fit(source, rows, columns, a.area, a.least_aspect)
        self._normalise(image)
        if box is not None:  # the fill is in units before normalisation
            fill = (np.array(ERASE_FILL) - np.array(self.mean)) / np.array(self.std)
            image[box.slices] = fill.astype(np.float32)[:, None, None]

    def _normalise(self, image: np.ndarray) -> None:
        image -= np.array(self.mean, dtype=np.float32)[:, None, None]
        image *= np.array([1 / s for s in self.std], dtype=np.float32)[:, None, None]
