"""What MUVA adds to a report: images with their pseudo masks, predicted masks and the part tokens' attention; mask IoU.

Shown are training images, because masks exist for these; the target set has none by definition.
"""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from reid_dist.config import Recipe
from reid_dist.data.store import TableView, open_view
from reid_dist.errors import UserError
from reid_dist.methods.muva.config import Config
from reid_dist.methods.muva.images import transform_of
from reid_dist.methods.muva.masks import PartMasks, open_masks
from reid_dist.methods.muva.model import Muva
from reid_dist.methods.spec import EvalSide, device_of

logger = logging.getLogger(__name__)
TITLE = "Part masks and attention of the part tokens"
SHOWN, SAMPLE, SCALE = 6, 256, 2  # images drawn, images counted, pixels per pixel in the page
COLOURS = np.array([[230, 60, 60], [60, 180, 75], [60, 100, 230]], dtype=np.float32)  # head, upper body, legs


def mask_iou(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Mean intersection over union per part [R] of masks bool [n, R, L]; images whose union is empty are left out (NaN: all)."""
    both, either = (predicted & target).sum(-1), (predicted | target).sum(-1)
    kept = either > 0
    total = np.where(kept, both / np.maximum(either, 1), 0).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares: np.ndarray = total / kept.sum(axis=0)
    return shares


def predict(model: Muva, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """image [n, 3, H, W] -> last layer's (masks bool [n, R, L], attention of part tokens to patches float32 [n, R, L])."""
    with torch.inference_mode():
        found = model.image.features(image.to(device_of(model)), attention=True)
    assert found.logits is not None
    assert found.attention is not None
    probability = (found.logits[:, -1] / model.config.mask_temperature).sigmoid()
    return (probability > model.config.threshold).cpu().numpy(), found.attention.float().cpu().numpy()


def _training(recipe: Recipe, grid: tuple[int, int]) -> tuple[TableView, PartMasks]:
    """Training images and their masks. Raises UserError where they are not at hand."""
    config: Config = recipe.model
    view = open_view(recipe.data, recipe.data.train, ("train",))  # a sample, whatever data.train_splits adds
    return view, open_masks(recipe.data, config.masks, view, grid, config.parts)


def _spread(count: int, wanted: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64))


def part_masks(
    model: nn.Module, recipe: Recipe, view: TableView, sides: Mapping[str, EvalSide]
) -> dict[str, Any] | None:
    """A strip per image: the image, its pseudo masks, the last layer's masks, and each part token's attention. None without
    parts. A target can be scored where the training images are not: the section then says so in place of the strips."""
    assert isinstance(model, Muva)
    config: Config = recipe.model
    if not config.parts:
        return None
    try:
        train, masks = _training(recipe, model.grid)
    except UserError as error:
        logger.warning("no pictures of part masks: %s", error)
        return {
            "kind": "images",
            "title": TITLE,
            "text": f"Not drawn, because training images are needed: {error}.",
            "data": [],
        }
    rows = _spread(len(train), SHOWN)
    images = train.images(rows)
    predicted, attention = predict(model, transform_of(config, train=False).apply_all(images))
    strips = []
    for number, image in enumerate(images):
        picture = _resized(image, config.image_size)
        entries = [("image", picture), ("pseudo masks", _overlay(picture, masks.visible(rows)[number], model.grid))]
        entries.append(("predicted", _overlay(picture, predicted[number], model.grid)))
        for part, weights in zip(config.parts, attention[number], strict=True):
            entries.append((f"{part}: attention", _heat(picture, weights, model.grid)))
        pictures = [{"png": _png(pixels), "label": label} for label, pixels in entries]
        strips.append({"label": train.path(int(rows[number])), "pictures": pictures})
    return {
        "kind": "images",
        "title": TITLE,
        "text": "Training images. Red: head, green: upper body, blue: legs. Attention: last layer, from each part token to the "
        "patches, mean over heads; a part token sees the patches of its predicted mask alone.",
        "data": strips,
    }


def mask_quality(
    model: nn.Module, recipe: Recipe, view: TableView, sides: Mapping[str, EvalSide]
) -> dict[str, Any] | None:
    """Table of IoU between predicted and pseudo masks over up to SAMPLE training images. None without parts or images."""
    assert isinstance(model, Muva)
    config: Config = recipe.model
    if not config.parts:
        return None
    try:
        train, masks = _training(recipe, model.grid)
    except UserError as error:
        logger.warning("no table of part masks: %s", error)
        return None
    rows = _spread(len(train), SAMPLE)
    transform = transform_of(config, train=False)
    parts = [predict(model, transform.apply_all(train.images(p)))[0] for p in np.array_split(rows, -(-len(rows) // 32))]
    shares = mask_iou(np.concatenate(parts), masks.visible(rows))
    return {
        "kind": "table",
        "title": "Predicted part masks against the pseudo masks",
        "text": f"Intersection over union on the patch grid, last layer, mean over {len(rows)} training images.",
        "data": {
            "header": ["part", "IoU"],
            "rows": [[p, f"{x:.3f}"] for p, x in zip(config.parts, shares, strict=True)],
        },
    }


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size[1] * SCALE, size[0] * SCALE), Image.Resampling.BILINEAR))


def _on_pixels(patches: np.ndarray, grid: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
    """[L] -> [H, W], nearest patch (with overlapping patches: by the patch's share of the grid)."""
    rows, columns = np.arange(size[0]) * grid[0] // size[0], np.arange(size[1]) * grid[1] // size[1]
    spread: np.ndarray = patches.reshape(grid)[rows][:, columns]
    return spread


def _overlay(picture: np.ndarray, visible: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    pixels = picture.astype(np.float32)
    for mask, colour in zip(visible, COLOURS, strict=False):
        inside = _on_pixels(mask, grid, picture.shape[:2])
        pixels[inside] = 0.6 * pixels[inside] + 0.4 * colour
    return pixels.astype(np.uint8)


def _heat(picture: np.ndarray, weights: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    strength = _on_pixels(weights / max(float(weights.max()), 1e-12), grid, picture.shape[:2])[..., None]
    shown: np.ndarray = (picture * (0.25 + 0.75 * strength)).astype(np.uint8)
    return shown


def _png(pixels: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()
