"""What MUVA adds to the report: pixels of the overlays, the table's numbers, and what is said without training images."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reid_dist import methods
from reid_dist.config import Recipe
from reid_dist.data import layouts
from reid_dist.data.store import open_view
from reid_dist.data.synthetic import world_for, write_synthetic
from reid_dist.methods.muva import METHOD
from reid_dist.methods.muva.exact import exact_masks
from reid_dist.methods.muva.figures import COLOURS, SCALE, mask_iou, part_masks
from reid_dist.methods.muva.masks import write_masks
from reid_dist.methods.muva.model import Muva
from reid_dist.methods.spec import ModelFacts
from reid_dist.reporting.sections import section_of
from reid_dist.storage import open_store
from tests.tables import write_table

GRID, TRAINED = (8, 4), 4
WORLD: dict[str, Any] = {"num_train": TRAINED, "num_test": 3, "num_distractors": 3, "images_per_id": 2}
SHOWN_ROWS = slice(0, 2)  # the model below predicts the grid's first rows for every part


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    write_synthetic(folder / "raw", "market-1501", **WORLD)
    parsed = layouts.get("market-1501").parse(open_store(str(folder / "raw")))
    images = [(folder / "raw" / record.path).read_bytes() for record in parsed.records]
    write_table(str(folder), "synthetic-a", parsed.records, images, folder / "raw", chunk=64)
    write_masks(
        str(folder), "synthetic-a-masks", exact_masks(world_for("market-1501", **WORLD), "market-1501", GRID), GRID, "x"
    )
    return folder


def recipe_for(root: Path, *words: str) -> Recipe:
    return methods.load_recipe("muva/synthetic", [f"data.root={root}", *words])


def first_rows_model(recipe: Recipe) -> Muva:
    """A model that predicts, for every image and part, the patches of the grid's first two rows."""
    torch.manual_seed(0)
    model = METHOD.build(recipe.model, ModelFacts(num_classes=TRAINED))
    assert isinstance(model, Muva)
    bias = torch.full(GRID, -5.0)
    bias[SHOWN_ROWS] = 5.0
    with torch.no_grad():
        for block in model.image.predictors:
            block.fc2.weight.zero_()
            block.fc2.bias.copy_(bias.flatten())
    return model.eval()


def figures_of(recipe: Recipe) -> list[dict[str, Any]]:
    model = first_rows_model(recipe)
    made = [figure(model, recipe, None, {}) for figure in METHOD.figures]
    return [figure for figure in made if figure is not None]


def pixels(picture: dict[str, str]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["png"])))).astype(np.float32)


def test_strips_show_image_masks_and_attention(root: Path) -> None:
    strips, _ = figures_of(recipe_for(root))
    assert len(strips["data"]) == 6
    exact = {row.digest: row.visible for row in exact_masks(world_for("market-1501", **WORLD), "market-1501", GRID)}
    (digest,) = open_view(recipe_for(root).data, ("synthetic-a",), ("train",)).digests(np.array([0]))
    first = exact[digest].reshape(3, *GRID)
    pictures = strips["data"][0]["pictures"]
    labels = ["image", "pseudo masks", "predicted", "head: attention", "upper: attention", "legs: attention"]
    assert [picture["label"] for picture in pictures] == labels
    plain, pseudo, predicted, *attention = (pixels(picture) for picture in pictures)
    assert plain.shape == (64 * SCALE, 32 * SCALE, 3)
    size = plain.shape[0] // GRID[0]  # of a patch in the page, square
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            here = slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size)
            expected = plain[here]
            for mask, colour in zip(first, COLOURS, strict=True):
                expected = 0.6 * expected + 0.4 * colour if mask[row, column] else expected
            assert np.abs(pseudo[here] - expected).max() < 1.01
            inside = row < SHOWN_ROWS.stop
            assert (np.abs(predicted[here] - plain[here]).max() > 1) == inside
            for heat in attention:  # what a token cannot see is dimmed to a quarter
                assert inside or np.abs(heat[here] - 0.25 * plain[here]).max() < 1.01
    html = str(section_of(strips).content[0])
    assert html.count("<img") == 36


def test_table_of_iou_is_that_of_the_masks(root: Path) -> None:
    _, table = figures_of(recipe_for(root))
    target = np.stack([row.visible for row in exact_masks(world_for("market-1501", **WORLD), "market-1501", GRID)])
    predicted = np.zeros((len(target), 3, *GRID), dtype=bool)
    predicted[:, :, SHOWN_ROWS] = True
    shares = mask_iou(predicted.reshape(target.shape), target)
    assert shares[0] > shares[2]  # the first rows hold heads, not legs
    assert table["data"]["rows"] == [
        [part, f"{share:.3f}"] for part, share in zip(("head", "upper", "legs"), shares, strict=True)
    ]
    assert "mean over 8 training images" in table["text"]


def test_without_training_images_the_page_says_so(root: Path, tmp_path: Path) -> None:
    for words in ((f"data.root={tmp_path}",), ("model.masks=[other]",)):
        (said,) = figures_of(recipe_for(root, *words))
        assert said["data"] == []
        assert said["text"].startswith("Not drawn, because training images are needed: ")
        assert "<img" not in str(section_of(said).content[0])


def test_without_parts_there_is_nothing_to_show(root: Path) -> None:
    assert figures_of(recipe_for(root, "model.parts=[]")) == []
    assert METHOD.figures[0] is part_masks
