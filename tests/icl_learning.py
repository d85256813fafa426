"""A world of four colours in which ICL learns within seconds, with noise on request: for tests.

A picture is four flat stripes (hat, coat, trousers, shoes) with pixel noise, a caption names them in any order; people differ in
at least one stripe. The views live in memory; training and embeddings are the method's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from reid_dist.config import OptimConfig, Recipe, ScheduleConfig
from reid_dist.evaluation.ranking import Labels, rank_features
from reid_dist.methods.icl import METHOD
from reid_dist.methods.icl.noise import checked, draw_permutation, store_permutation
from reid_dist.methods.spec import EvalSide, ModelFacts, TrainingData
from tests.unit.icl_names import FakeView
from tests.unit.icl_names import recipe as tiny_recipe

COLOURS = {
    "red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 210), "yellow": (220, 200, 50),
    "white": (230, 230, 230), "black": (25, 25, 25),
}  # fmt: skip
WEAR = ("hat", "coat", "trousers", "shoes")
IMAGES = 2  # of each person
TEST_PEOPLE = 40


class ColourView(FakeView):
    """A table view of `people` persons, all different; views of one seed and other `first` share nobody."""

    def __init__(self, seed: int, people: int, first: int = 0) -> None:
        rng = np.random.default_rng(seed)
        codes = rng.permutation(len(COLOURS) ** len(WEAR))[first : first + people]
        worn = np.stack(np.unravel_index(codes, (len(COLOURS),) * len(WEAR)), axis=1)
        rng = np.random.default_rng([seed, first])
        self.label = np.repeat(np.arange(people), IMAGES)
        self.domain_name = np.array(["colours"] * len(self.label))
        names, values = list(COLOURS), np.array(list(COLOURS.values()))
        self.captions, self._images = [], []
        for person in self.label:
            order = rng.permutation(len(WEAR))
            self.captions.append(
                ("a person with " + " and ".join(f"{names[worn[person, i]]} {WEAR[i]}" for i in order),)
            )
            stripes = values[worn[person]].repeat(8, axis=0)[:, None].repeat(16, axis=1)
            self._images.append((stripes + rng.normal(0, 25, stripes.shape)).clip(0, 255).astype(np.uint8))


@torch.inference_mode()
def scores(model: nn.Module, recipe: Recipe, view: ColourView) -> dict[str, float]:
    """The evaluator's record of captions against images, by the method's own embeddings and weights."""
    rows, features = np.arange(len(view)), {}
    for kind in ("text", "image"):
        side = EvalSide(kind, rows, np.zeros_like(rows))
        batch = METHOD.eval_batch(recipe.model, view, side, rows)  # type: ignore[arg-type]
        features[kind] = METHOD.encode(model.eval(), batch)
    labels = Labels(view.label)
    return rank_features(features["text"], features["image"], labels, labels, weights=METHOD.similarity).record()


def learn(
    root: str, seed: int, *, people: int = 150, noise: float = 0.0, epochs: int = 10, **model: Any
) -> dict[str, Any]:
    """Train on this process; {"before", "after"}: records on people never seen, "divisions": records of each, "losses"."""
    from reid_dist.training.loop import Hooks, Worker

    train, test = ColourView(seed, people), ColourView(seed, TEST_PEOPLE, first=people)
    if noise:
        permutation = checked(draw_permutation(len(train), noise, seed), len(train), "noise")
        store_permutation(root, f"noise-{seed}", permutation)
        model["noise"] = f"noise-{seed}"
    small = {"text_length": 20, "loss": "infonce", "logit_scale": 20.0, "augment": False, "corruption": 0.0}
    settings = replace(
        tiny_recipe(root, {"epochs": epochs, "global_batch": 32, "log_every": 100}, **{**small, **model}),
        seed=seed, optim=OptimConfig(lr=1e-3, weight_decay=4e-5),
        schedule=ScheduleConfig(mode="cosine", unit="step", warmup=10),
    )  # fmt: skip

    def build() -> nn.Module:
        torch.manual_seed(seed)
        return METHOD.build(settings.model, ModelFacts())

    data = TrainingData(train=train, val=None)  # type: ignore[arg-type]
    worker = Worker(settings, METHOD, build, data, None, Hooks(), torch.device("cpu"))
    notes: list[dict[str, Any]] = []
    worker._write = lambda record: notes.append(record) if record["kind"] == "division" else None  # type: ignore[method-assign]
    worker.train()
    return {
        "before": scores(build(), settings, test), "after": scores(worker.model, settings, test), "divisions": notes,
        "losses": [record["loss"] for record in worker.losses],
    }  # fmt: skip
