"""What CLIMB adds to a report: the order in which the Mamba head reads the patches, drawn over the picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from reid_dist.config import Recipe
from reid_dist.data.store import TableView
from reid_dist.methods.climb.head import importance
from reid_dist.methods.climb.method import camera_tensor, transform_of
from reid_dist.methods.climb.model import Climb, arch_of
from reid_dist.methods.spec import EvalSide, device_of

SAMPLE = 8  # pictures
SCALE = 2  # enlargement of the drawing


def token_order(
    model: nn.Module, recipe: Recipe, view: TableView, sides: Mapping[str, EvalSide]
) -> dict[str, Any] | None:
    """Pictures and, beside each, its patches coloured by their place in the head's reading order (first bright)."""
    assert isinstance(model, Climb)
    side = next(iter(sides.values()))
    rows = side.rows[np.unique(np.linspace(0, len(side.rows) - 1, SAMPLE).astype(np.int64))]
    images = view.images(rows)
    ranks = patch_ranks(model, recipe, view, rows, images)
    strips = []
    for row, image, rank in zip(rows.tolist(), images, ranks, strict=True):
        size = arch_of(recipe.model).image_size
        picture = Image.fromarray(image).resize((SCALE * size[1], SCALE * size[0]))
        drawn = Image.blend(picture, heat(rank, picture.size), 0.6)
        pictures = [{"png": _png(picture), "label": "image"}, {"png": _png(drawn), "label": "reading order"}]
        strips.append({"label": f"id {int(view.pid[row])}, camera {int(view.camid[row])}", "pictures": pictures})
    return {
        "kind": "images",
        "title": "Reading order of the Mamba head",
        "text": "The head scans the patches of an image by falling cosine similarity to its class token. Bright "
        "patches are read first, dark ones last.",
        "data": strips,
    }


@torch.inference_mode()
def patch_ranks(
    model: Climb, recipe: Recipe, view: TableView, rows: np.ndarray, images: list[np.ndarray]
) -> np.ndarray:
    """int64 [n, grid rows, grid columns]: place of each patch in the reading order, 0 first."""
    config, device = recipe.model, device_of(model)
    batch = transform_of(config, train=False).apply_all(images).to(device)
    camera = camera_tensor(config, view, rows).get("camera")
    tokens = model.tokens(batch, None if camera is None else camera.to(device)).tokens
    order = importance(tokens[:, 0], tokens[:, 1:]).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1).reshape(len(rows), *arch_of(config).grid).cpu().numpy()


def heat(rank: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Ranks [rows, columns] as colours from yellow (0) over red to black, enlarged to `size` (width, height)."""
    level = 1 - rank / max(1, rank.size - 1)
    colour = np.stack([np.minimum(1, 1.6 * level), np.clip(1.8 * level - 0.8, 0, 1), np.zeros_like(level)], axis=-1)
    return Image.fromarray((255 * colour).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
