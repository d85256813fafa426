"""A method without weights for tests of evaluation: an image's feature is its mean colour, a tracklet's that of its
frames. Images of one flat colour make ranks that can be told by hand.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn

from reid_dist.config import DataConfig, Recipe
from reid_dist.data.store import TableView
from reid_dist.methods.spec import Batch, EvalSide
from reid_dist.training.loaded import LoadedModel
from tests.toy import toy_spec


def flat(red: int, green: int, blue: int) -> bytes:
    """A PNG of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", (4, 8), (red, green, blue)).save(stream, "PNG")
    return stream.getvalue()


def eval_batch(config: object, view: TableView, side: EvalSide, index: np.ndarray) -> Batch:
    """{"mean": [n, 3]}."""
    means = []
    for row in side.rows[index].tolist():
        rows: Sequence[int] = [row]
        if side.kind == "tracklet":
            keys = np.stack([view.pid, view.camid, view.tracklet], axis=1)
            rows = np.flatnonzero((keys == keys[row]).all(axis=1))
        means.append(np.mean([image.mean(axis=(0, 1)) for image in view.images(rows)], axis=0))
    return {"mean": torch.tensor(np.array(means), dtype=torch.float32)}


def loaded(
    root: str, tables: Sequence[str], train: Sequence[str] = (), task: str = "image", **data: object
) -> LoadedModel:
    """The method as a model that was not trained in a run."""
    spec = dataclasses.replace(
        toy_spec(), task=task, eval_batch=eval_batch, encode=lambda model, batch: {"colour": batch["mean"]},
        similarity={"colour": 1.0},
    )  # fmt: skip
    recipe = Recipe(
        name="colour", method="toy", data=DataConfig(root=root, test=tuple(tables), train=tuple(train), **data)
    )
    return LoadedModel(recipe, spec, nn.Identity(), torch.device("cpu"), None, "authors:none", 0)
