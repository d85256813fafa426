"""What ranks of the warm pool run for CLIMB: a tiny video training on an in-memory view, and the memory's update alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from reid_dist.config import DataConfig, OptimConfig, Recipe, ScheduleConfig, TrainingConfig
from reid_dist.data.samplers import rank_slice
from reid_dist.methods.climb import METHOD, bank
from reid_dist.methods.climb.config import Config
from reid_dist.methods.climb.method import ClimbStage
from reid_dist.methods.spec import Batch, ModelFacts, PlanPart, TrainingData
from reid_dist.training.context import RunContext
from reid_dist.training.loop import Hooks, Worker
from tests.unit.climb_names import FakeView


class Float64(ClimbStage):
    """Loads float64, so that a float64 model computes in it."""

    def load(self, part: PlanPart) -> Batch:
        return widened(super().load(part))

    def _load_plain(self, items: np.ndarray) -> Batch:
        return widened(super()._load_plain(items))


def widened(batch: Batch) -> Batch:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def train_video(training: dict[str, Any], people: int, double: bool = False) -> dict[str, Any]:
    """Losses of every step, the final weights and memory. Eight steps over tracklets of 1 to 9 frames."""
    config = Config(
        arch="tiny", weights="", image_size=(32, 16), states=4, frames=4, temporal_strides=(1, 2, 4), cameras=2,
        instances=2, iterations=4, memory_batch=5,
    )  # fmt: skip
    recipe = Recipe(
        name="t", method="climb", model=config, data=DataConfig(train=("t",)),
        optim=OptimConfig(name="sgd", lr=0.001, weight_decay=5e-4), schedule=ScheduleConfig(mode="step", warmup=1),
        training=TrainingConfig(epochs=2, global_batch=6, log_every=4, **training),
    )  # fmt: skip

    def build() -> torch.nn.Module:
        torch.manual_seed(1)
        model = METHOD.build(config, ModelFacts(num_classes=people))
        return model.double() if double else model

    data = TrainingData(train=FakeView(people=people, frames=(1, 3, 9)), val=None)  # type: ignore[arg-type]
    stage = Float64 if double else ClimbStage
    spec = dataclasses.replace(METHOD, stages=lambda recipe, data: [stage(recipe, data)])
    worker = Worker(recipe, spec, build, data, None, Hooks(), torch.device("cpu"))
    worker.train()
    assert worker.snapshot is not None
    return {
        "losses": [{k: v for k, v in record.items() if k != "rows_per_s"} for record in worker.losses],
        "weights": worker.snapshot.model,
        "banks": worker.snapshot.method["banks"],
    }


def update_memory(rows: int, rule: str) -> bytes:
    """The banks' bits after three updates from gathered slices of the same global batches."""
    rng = np.random.default_rng(5)
    banks = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(2, 7, 33)).astype(np.float32)), dim=2)
    ctx = RunContext(seed=1)
    for _ in range(3):
        feat = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(rows, 33)).astype(np.float32)), dim=1)
        label = torch.from_numpy(rng.integers(0, 7, rows))
        ctx.begin_step(rows)
        own = rank_slice(rows, ctx.rank, ctx.world_size)
        bank.update_dual(banks, ctx.gather(feat[own]), ctx.gather(label[own]), 0.2, rule)
    return banks.numpy().tobytes()
