"""What ranks of the warm pool run for ICL: a tiny training on an in-memory view, with groups, noise and a division per epoch."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from reid_dist.methods.icl import METHOD
from reid_dist.methods.spec import ModelFacts, TrainingData
from reid_dist.training.checkpoint import Snapshot
from reid_dist.training.loop import Hooks, Stopped, Worker
from tests.unit.icl_names import FakeView, recipe


class Collected:
    """A tracker that keeps what it is told of divisions."""

    def __init__(self) -> None:
        self.divisions: list[dict[str, float]] = []

    def log(self, step: int, scalars: dict[str, float]) -> None:
        if any(key.startswith("division/") for key in scalars):
            self.divisions.append(scalars)

    def close(self) -> None: ...


def train_icl(
    root: str, training: dict[str, Any], model: dict[str, Any], double: bool = False, initial: Snapshot | None = None,
    stop_at: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Losses of every step, final weights, trust in the pairs and the divisions. 20 pairs in batches of 6, 6, 6, 2."""
    settings = recipe(root, {"log_every": 1, **training}, **{"temperature": 0.1, **model})

    def build() -> torch.nn.Module:
        torch.manual_seed(1)
        whole = METHOD.build(settings.model, ModelFacts())
        return whole.double() if double else whole

    data = TrainingData(train=FakeView(), val=None)  # type: ignore[arg-type]
    hooks = Hooks(should_stop=lambda: stop_at is not None and worker.losses[-1]["step"] >= stop_at)
    worker = Worker(settings, METHOD, build, data, None, hooks, torch.device("cpu"), initial=initial)
    worker.sinks = [Collected()]  # type: ignore[list-item]
    with contextlib.suppress(Stopped):
        worker.train()
    assert worker.snapshot is not None
    return {
        "losses": [{k: v for k, v in record.items() if k != "rows_per_s"} for record in worker.losses],
        "weights": worker.snapshot.model,
        "trust": worker.snapshot.method["trust"].tolist(),
        "divisions": worker.sinks[0].divisions,  # type: ignore[attr-defined]
        "snapshot": worker.snapshot,
        "types": {str(parameter.dtype) for parameter in worker.model.parameters()},
    }
