"""What RLE adds to a report: the augmentation, seen on the test images."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from reid_dist.config import Recipe
from reid_dist.data.draws import row_rng
from reid_dist.data.store import TableView
from reid_dist.methods.rle.config import AugmentConfig
from reid_dist.methods.rle.transforms import Chain
from reid_dist.methods.spec import EvalSide

STRIPS = 3  # images per modality
OFF = {"pad": 0, "grey": 0.0, "flip": 0.0, "moderate": 0.0, "radical": 0.0, "erase": 0.0}
STEPS: Mapping[str, Mapping[str, Any]] = {  # what is switched on, alone
    "moderate": {"moderate": 1.0, "moderate_on_infrared": True},
    "radical": {"radical": 1.0},
    "erasing": {"erase": 1.0},
}


def _png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def enhanced(image: np.ndarray, size: tuple[int, int], augment: AugmentConfig, seed: int) -> np.ndarray:
    """uint8 [rows, columns, 3]: an image after the chain, for looking at."""
    chain = Chain(size, augment, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    out = chain.apply_all([image], [row_rng(seed, 0, 0, 0, "figure")])[0].numpy()
    return np.rint(out.transpose(1, 2, 0).clip(0, 1) * 255).astype(np.uint8)


def augmentation(
    model: nn.Module, recipe: Recipe, view: TableView, sides: Mapping[str, EvalSide]
) -> dict[str, Any] | None:
    """Test images beside their moderate, radical, erased and fully augmented forms; None without image items."""
    if "image" not in sides:
        return None
    config = recipe.model
    rows, modality = sides["image"].rows, np.asarray(view.modality).astype(str)
    strips = []
    for kind, word in (("rgb", "visible"), ("ir", "infrared")):
        found = rows[modality[rows] == kind]
        picked = found[np.linspace(0, len(found) - 1, min(STRIPS, len(found))).astype(np.int64)]
        for number, (row, image) in enumerate(zip(picked.tolist(), view.images(picked), strict=True)):
            pictures = [{"png": _png(Chain(config.image_size).resize(image)), "label": "original"}]
            for name, switches in STEPS.items():
                alone = dataclasses.replace(config.augment, **{**OFF, **switches})
                pictures.append({"png": _png(enhanced(image, config.image_size, alone, number)), "label": name})
            for draw in range(2):
                whole = enhanced(image, config.image_size, config.augment, STRIPS * (draw + 1) + number)
                pictures.append({"png": _png(whole), "label": f"whole chain, draw {draw + 1}"})
            strips.append({"label": f"{word}, {view.path(row)}", "pictures": pictures})
    return {
        "kind": "images",
        "title": "What the augmentation does",
        "text": "Moderate enhancement mixes the channels into one grey image, radical enhancement scales random "
        "rectangles channel by channel, erasing fills one. The whole chain draws each with its own probability, "
        "besides crop and mirror.",
        "data": strips,
    }
