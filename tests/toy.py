"""A toy method for the loop's own tests: linear tower, in-batch softmax loss, classifier, a memory and row dropout.

It exercises what the real methods need of the loop: gathered features, a head inside the losses, state updated after the step
from the global batch, draws inside the model, two stages with different trainable sets.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reid_dist.config import OptimConfig, Recipe, ScheduleConfig, TrainingConfig
from reid_dist.methods.spec import Batch, Context, MethodSpec, Outputs, ParamGroup, PlanPart, Reference, Stage, Terms

ROWS, CLASSES, WIDTH = 37, 5, 12


class ToyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(WIDTH, 19), nn.GELU(), nn.Linear(19, 7))
        self.head = nn.Linear(7, CLASSES)


class ToyPlan:
    def __init__(self, batch: int) -> None:
        self.size = batch

    def steps(self, epoch: int) -> int:
        return -(-ROWS // self.size)

    def batch(self, epoch: int, step: int) -> tuple[np.ndarray, int]:
        order = np.random.Generator(np.random.PCG64(epoch)).permutation(ROWS)
        return order[step * self.size : (step + 1) * self.size], step * self.size


class ToyStage(Stage):
    def __init__(self, name: str, epochs: int, batch: int, optim: OptimConfig, trainable: tuple[str, ...]) -> None:
        self.name, self.epochs, self.size, self._optim, self.trainable = name, epochs, batch, optim, trainable
        generator = torch.Generator().manual_seed(5)
        self.rows = torch.randn(ROWS, WIDTH, generator=generator)
        self.labels = torch.arange(ROWS) % CLASSES
        self.memory = torch.zeros(CLASSES, 7)

    def plan(self) -> ToyPlan:
        return ToyPlan(self.size)

    def load(self, part: PlanPart) -> Batch:
        index = torch.from_numpy(part.items)
        return {"x": self.rows[index], "label": self.labels[index]}

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        names = [n for n, _ in model.named_parameters() if n.startswith(self.trainable)]
        weights = tuple(n for n in names if n.endswith("weight"))
        biases = tuple(n for n in names if n.endswith("bias"))
        return [ParamGroup(weights, self._optim.lr, 1e-2), ParamGroup(biases, 2 * self._optim.lr, 0.0)]

    def optim(self) -> OptimConfig:
        return self._optim

    def schedule(self) -> ScheduleConfig:
        return ScheduleConfig(mode="cosine", unit="step", warmup=2)

    def forward(self, model: ToyModel, batch: Batch, ctx: Context) -> Outputs:  # type: ignore[override]
        feat = model.tower(batch["x"].to(model.head.weight.dtype)).float()
        keep = ((batch["row_seed"][:, None] >> torch.arange(7)) & 3) > 0
        return {"feat": feat * keep / 0.75}

    def losses(self, model: ToyModel, out: Outputs, batch: Batch, ctx: Context) -> Terms:  # type: ignore[override]
        own, everyone = F.normalize(out["feat"], dim=1), F.normalize(ctx.gather(out["feat"]), dim=1)
        labels = ctx.gather(batch["label"])
        same = (batch["label"][:, None] == labels[None]).float()
        log_p = F.log_softmax(8 * own @ everyone.T, dim=1)
        share = ctx.world_size / len(labels)
        logits = model.head(out["feat"].to(model.head.weight.dtype)).float()
        return {
            "contrast": -share * (log_p * same / same.sum(1, keepdim=True)).sum(),
            "identity": share * F.cross_entropy(logits, batch["label"], reduction="sum"),
            "memory": share * 0.1 * (out["feat"] - self.memory[batch["label"]]).square().sum(),
        }

    def after_step(self, model: nn.Module, out: Outputs, batch: Batch, ctx: Context) -> None:
        feats, labels = ctx.gather(out["feat"].detach()), ctx.gather(batch["label"])
        for feat, label in zip(feats, labels.tolist(), strict=True):
            self.memory[label] = 0.9 * self.memory[label] + 0.1 * feat

    def state(self) -> dict[str, Tensor]:
        return {"memory": self.memory}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.memory = state["memory"].clone()


def toy_spec(name: str = "adam") -> MethodSpec:
    optim = OptimConfig(lr=0.02, eps=1e-3) if name == "adam" else OptimConfig(name="sgd", lr=0.05, momentum=0.9)
    return MethodSpec(
        name="toy", task="image", protocol="image", Config=dict, build=lambda config, facts: ToyModel(),
        stages=lambda recipe, data: [
            ToyStage("warm", 1, 11, optim, ("head",)),
            ToyStage("whole", 2, 8, optim, ("tower", "head")),
        ],
        eval_batch=None, encode=None, similarity={}, reference=Reference("", "", ""), facts=None,  # type: ignore[arg-type]
    )  # fmt: skip


def toy_recipe(**training: object) -> Recipe:
    return Recipe(name="toy", method="toy", training=TrainingConfig(log_every=4, **training))  # type: ignore[arg-type]


def build_toy() -> ToyModel:
    torch.manual_seed(3)
    return ToyModel()
