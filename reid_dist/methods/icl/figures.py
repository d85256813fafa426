"""What ICL adds to a report besides the division (record.py): the tokens that selection takes, in pictures and in texts."""

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
from reid_dist.data.text import ClipTokenizer, clip_tokenizer
from reid_dist.methods.icl.method import eval_batch
from reid_dist.methods.icl.model import DualEncoder, arch_of
from reid_dist.methods.spec import EvalSide, device_of

SHOWN, HEIGHT = 6, 256  # images drawn, pixels of height


def selected_tokens(
    model: nn.Module, recipe: Recipe, view: TableView, sides: Mapping[str, EvalSide]
) -> dict[str, Any] | None:
    """Test images beside themselves with all but the selected patches dimmed; their captions with selected pieces marked.

    None without image or text items.
    """
    assert isinstance(model, DualEncoder)
    if "image" not in sides or "text" not in sides:
        return None
    texts, images = sides["text"], sides["image"]
    first = {row: place for place, row in reversed(list(enumerate(texts.rows.tolist())))}  # an image's first caption
    shared = [place for place, row in enumerate(images.rows.tolist()) if row in first]
    if not shared:
        return None
    places = np.array(shared)[np.unique(np.linspace(0, len(shared) - 1, min(SHOWN, len(shared))).astype(np.int64))]
    rows = images.rows[places]
    patches = _patches(model, recipe, view, images, places)
    captions = _captions(model, recipe, view, texts, np.array([first[row] for row in rows.tolist()]))
    size = arch_of(recipe.model).image_size
    strips = []
    for image, mask, caption in zip(view.images(rows), patches, captions, strict=True):
        picture = np.asarray(Image.fromarray(image).resize((round(HEIGHT * size[1] / size[0]), HEIGHT)))
        pictures = [{"png": _png(picture), "label": "image"}, {"png": _png(dimmed(picture, mask)), "label": "selected"}]
        strips.append({"label": caption, "pictures": pictures})
    return {
        "kind": "images",
        "title": "Selected tokens",
        "text": "Patches and word pieces from which the second embedding is made: those to which the global token of the last "
        "block attends most. Bright patches and marked pieces are selected.",
        "data": strips,
    }


@torch.inference_mode()
def _patches(model: DualEncoder, recipe: Recipe, view: TableView, side: EvalSide, places: np.ndarray) -> np.ndarray:
    """bool [n, grid rows, grid columns]."""
    batch = eval_batch(recipe.model, view, side, places)
    chosen = model.encode_image(batch["image"].to(device_of(model)))[2].cpu().numpy() - 1
    grid = arch_of(recipe.model).grid
    mask = np.zeros((len(places), grid[0] * grid[1]), dtype=bool)
    np.put_along_axis(mask, chosen, True, axis=1)
    return mask.reshape(len(places), *grid)


@torch.inference_mode()
def _captions(
    model: DualEncoder, recipe: Recipe, view: TableView, side: EvalSide, places: np.ndarray
) -> list[list[tuple[str, bool]]]:
    ids = eval_batch(recipe.model, view, side, places)["ids"]
    _, _, index, count = model.encode_text(ids.to(device_of(model)))
    tokenizer = clip_tokenizer(arch_of(recipe.model).vocab_size)
    chosen = [set(row[:n]) for row, n in zip(index.tolist(), count.tolist(), strict=True)]
    return [marked(row, picked, tokenizer) for row, picked in zip(ids.tolist(), chosen, strict=True)]


def marked(ids: list[int], picked: set[int], tokenizer: ClipTokenizer) -> list[tuple[str, bool]]:
    """The text of `ids` in runs: (text, whether its pieces stand at places `picked`). Punctuation follows its word closely."""
    runs: list[tuple[str, bool]] = []
    for place, number in enumerate(ids):
        if number in (0, tokenizer.start_id, tokenizer.end_id):
            continue
        piece, mark = tokenizer.decode([number]), place in picked
        piece = "-" if piece == "- " else piece
        if not runs:
            runs.append((piece, mark))
            continue
        before, marks = runs.pop()
        text = before.rstrip()
        blank = " " * (text != before and piece[0].isalnum())
        if marks == mark:
            runs.append((text + blank + piece, mark))
        elif marks:  # the blank between belongs to what is not marked
            runs += [(text, True), (blank + piece, False)]
        else:
            runs += [(text + blank, False), (piece, True)]
    if runs:
        runs[-1] = (runs[-1][0].rstrip(), runs[-1][1])
    return runs


def dimmed(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] with patches outside `mask` [rows, columns] at a quarter of their brightness."""
    rows = np.arange(picture.shape[0]) * mask.shape[0] // picture.shape[0]
    columns = np.arange(picture.shape[1]) * mask.shape[1] // picture.shape[1]
    strength = np.where(mask[rows][:, columns], 1.0, 0.25)[..., None]
    shown: np.ndarray = (picture * strength).astype(np.uint8)
    return shown


def _png(pixels: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()
