"""RLE's chain as one would first write it: one step after another on whole images, for the bench to compare with."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN, STD, FILL = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.4914, 0.4822, 0.4465)


def _box(rng: np.random.Generator, rows: int, columns: int) -> tuple[int, int, int, int] | None:
    area, aspect = rng.uniform(0.02, 0.4) * rows * columns, rng.uniform(0.3, 1 / 0.3)
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if not (height < rows and width < columns):
        return None
    return int(rng.integers(0, rows - height + 1)), int(rng.integers(0, columns - width + 1)), height, width


def moderate(image: Tensor, rng: np.random.Generator) -> Tensor:
    if rng.random() > 0.5:
        return image
    draws = [rng.beta(0.3, 0.3) for _ in range(3)]
    mixed = sum(image[c] * (draws[c] / sum(draws)) for c in range(3))
    return torch.stack([mixed, mixed, mixed])


def radical(image: Tensor, rng: np.random.Generator) -> Tensor:
    if rng.random() > 0.5:
        return image
    image, memory = image.clone(), torch.ones_like(image)
    for _ in range(100):
        box = _box(rng, *image.shape[1:])
        if box is None:
            continue
        top, left, height, width = box
        factors = [rng.beta(0.4, 0.4) for _ in range(3)]
        for c in range(3):
            region = image[c, top : top + height, left : left + width]
            most = float(region.max()) or 1.0
            image[c, top : top + height, left : left + width] = region / most * factors[c]
            memory[c, top : top + height, left : left + width] *= factors[c] / most
        if float(memory.min()) < 0.1:
            break
    return image


def erasing(image: Tensor, rng: np.random.Generator) -> Tensor:
    if rng.random() > 0.5:
        return image
    for _ in range(100):
        box = _box(rng, *image.shape[1:])
        if box is not None:
            top, left, height, width = box
            for c in range(3):
                image[c, top : top + height, left : left + width] = FILL[c]
            return image
    return image


def chain(image: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """uint8 [h, w, 3] -> float32 [3, rows, columns]."""
    rows, columns = size
    picture = Image.fromarray(image)
    if image.shape[:2] != size:
        picture = picture.resize((columns, rows), Image.Resampling.LANCZOS)
    padded = np.pad(np.asarray(picture), ((10, 10), (10, 10), (0, 0)))
    top, left = rng.integers(0, 21, size=2).tolist()
    cropped = padded[top : top + rows, left : left + columns]
    if rng.random() < 0.5:
        cropped = cropped[:, ::-1]
    tensor = torch.from_numpy(np.ascontiguousarray(cropped)).permute(2, 0, 1).contiguous().float() / 255
    tensor = erasing(radical(moderate(tensor, rng), rng), rng)
    return (tensor - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
