"""What the ranks of a warm pool run."""

from __future__ import annotations

from typing import Any

import torch

from reid_dist.training.checkpoint import Progress, Snapshot
from reid_dist.training.loop import Hooks, Stopped, Worker
from tests.toy import build_toy, toy_recipe, toy_spec


def train_toy(training: dict[str, Any], optimizer: str = "adam", initial: Snapshot | None = None) -> dict[str, Any]:
    """Train the toy method; losses of every step and the final weights."""
    recipe = toy_recipe(**training)
    worker = Worker(
        recipe, toy_spec(optimizer), build_toy, None, None, Hooks(), torch.device("cpu"), initial=initial  # type: ignore[arg-type]
    )
    progress: Progress | None = None
    try:
        progress = worker.train()
    except Stopped:
        pass
    return {
        "losses": [{k: v for k, v in record.items() if k != "rows_per_s"} for record in worker.losses],
        "weights": worker.snapshot.model if worker.snapshot else {},
        "memory": worker.snapshot.method.get("memory") if worker.snapshot else None,
        "snapshot": worker.snapshot,
        "progress": progress,
    }
