"""Golden cases of ICL -> our modules, and a table view in memory."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reid_dist.config import DataConfig, OptimConfig, Recipe, TrainingConfig
from reid_dist.methods.icl.config import Config
from reid_dist.methods.icl.model import DualEncoder
from reid_dist.methods.icl.selection import SelectedEmbedding
from reid_dist.methods.icl.weights import import_weights, our_parameter
from reid_dist.models.clip import ClipArchitecture

HEAD = {"fc": "skip", "mlp0": "hidden", "mlp1": "out", "bn": "norm"}


def state_of(c: dict[str, Any]) -> dict[str, Tensor]:
    """The official state dict of a case; the towers alone get the prefix that they have in the whole model."""
    state = {name.removeprefix("sd."): torch.as_tensor(value) for name, value in c.items() if name.startswith("sd.")}
    whole = any(name.startswith("base_model.") for name in state)
    return state if whole else {f"base_model.{name}": value for name, value in state.items()}


def arch_of_case(c: dict[str, Any]) -> ClipArchitecture:
    state = state_of(c)
    layers = {"image": 0, "text": 0}
    for name in state:
        if name.endswith("ln_1.weight"):
            layers["image" if ".visual." in name else "text"] += 1
    width, joint = state["base_model.visual.proj"].shape
    vocabulary, text_width = state["base_model.token_embedding.weight"].shape
    return ClipArchitecture(
        image_size=tuple(c["in_images"].shape[2:]), patch=c["const_patch"], stride=c["const_stride"], image_width=width,
        image_layers=layers["image"], image_heads=c["const_heads"], text_width=text_width, text_layers=layers["text"],
        text_heads=c["const_heads"], vocab_size=vocabulary, joint_width=joint,
        context_length=len(state["base_model.positional_embedding"]),
    )  # fmt: skip


def model_of(c: dict[str, Any], **config: Any) -> DualEncoder:
    """The whole model with the case's weights, through the importer; every parameter of ours must be in the case."""
    state = state_of(c)
    ratio = c.get("const_select_ratio", 0.4)
    names = [our_parameter(name) for name in state]
    width = len(state.get("visul_emb_layer.fc.bias", torch.zeros(10)))
    model = DualEncoder(Config(weights="", select_ratio=ratio, select_width=width, **config), arch_of_case(c))
    if any(name and name.startswith("image_selection.") for name in names):
        model.load_state_dict(dict(import_weights(model, state)), strict=True)
    else:  # a case of the towers alone
        ours = {name: tensor for name, tensor in zip(names, state.values(), strict=True) if name is not None}
        model.towers.load_state_dict({name.removeprefix("towers."): t for name, t in ours.items()}, strict=True)
    return model.train()


def head_of(c: dict[str, Any], norm: str) -> SelectedEmbedding:
    """A token-selection head with the case's weights, float64."""
    embed, width = c["w_fc_weight"].shape
    head = SelectedEmbedding(width, embed, norm).double()  # type: ignore[arg-type]
    state = {"norm.num_batches_tracked": torch.tensor(0)}
    for theirs, ours in HEAD.items():
        kinds = ("weight", "bias", "running_mean", "running_var") if theirs == "bn" else ("weight", "bias")
        state |= {f"{ours}.{kind}": torch.as_tensor(c[f"w_{theirs}_{kind}"]) for kind in kinds}
    head.load_state_dict(state, strict=True)
    return head


class FakeView:
    """A table view: 13 images of 5 people, one or two captions each."""

    def __init__(self, rows: int = 13, people: int = 5) -> None:
        rng = np.random.default_rng(3)
        self.label = np.arange(rows) % people
        self.pid = 10 * self.label
        self.domain_name = np.array(["fake"] * rows)
        self.captions = [
            tuple(f"person {pid} with {j} bags and a hat {i}" for j in range((2, 1)[i % 2]))
            for i, pid in enumerate(self.pid)
        ]
        self._images = [rng.integers(0, 256, (int(rng.integers(40, 90)), 30, 3), dtype=np.uint8) for _ in range(rows)]

    def __len__(self) -> int:
        return len(self.label)

    def describe(self) -> str:
        return "fake"

    def path(self, row: int) -> str:
        return f"{row}.jpg"

    def images(self, rows: np.ndarray) -> list[np.ndarray]:
        return [self._images[row] for row in rows]

    def digests(self, rows: np.ndarray) -> list[str]:
        return [hashlib.sha256(f"image {row}".encode()).hexdigest() for row in rows.tolist()]


def recipe(root: str = "data", training: dict[str, Any] | None = None, **model: Any) -> Recipe:
    """A tiny recipe."""
    config = Config(
        **{"arch": "tiny", "weights": "", "image_size": (32, 16), "text_length": 24, "select_width": 32, **model}
    )
    return Recipe(
        name="t", method="icl", model=config, data=DataConfig(train=("t",), root=root),
        optim=OptimConfig(lr=1e-4, weight_decay=4e-5, eps=1e-3),
        training=TrainingConfig(**{"global_batch": 6, "epochs": 2, **(training or {})}),
    )  # fmt: skip
