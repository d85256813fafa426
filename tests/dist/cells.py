"""What the ranks of a warm pool run."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from reid_dist.training.checkpoint import Progress, Snapshot
from reid_dist.training.loop import Hooks, Stopped, Worker
from tests.toy import build_toy, toy_recipe, toy_spec


def train_toy(
    training: dict[str, Any], optimizer: str = "adam", initial: Snapshot | None = None, stop_at: int | None = None
) -> dict[str, Any]:
    """Train the toy method; losses of every step and the final weights. `stop_at`: ask for a stop at that step."""
    recipe = toy_recipe(**training)
    hooks = Hooks(should_stop=lambda: stop_at is not None and worker.losses[-1]["step"] >= stop_at)
    worker = Worker(recipe, toy_spec(optimizer), build_toy, None, None, hooks, torch.device("cpu"), initial=initial)  # type: ignore[arg-type]
    progress: Progress | None = None
    with contextlib.suppress(Stopped):
        progress = worker.train()
    return {
        "losses": [{k: v for k, v in record.items() if k != "rows_per_s"} for record in worker.losses],
        "weights": worker.snapshot.model if worker.snapshot else {},
        "memory": worker.snapshot.method.get("memory") if worker.snapshot else None,
        "snapshot": worker.snapshot,
        "progress": progress,
    }


def train_recipe(
    mapping: dict[str, Any],
    run_uri: str | None = None,
    stop_at: int | None = None,
    drain_at: int | None = None,
    attempt: int = 1,
) -> dict[str, Any]:
    """Train a recipe of any method on packed tables; losses of every step and the final weights. `drain_at`: from that step on a
    node is announced to be taken away."""
    from reid_dist.config import build_recipe
    from reid_dist.methods import get
    from reid_dist.runs import Run
    from reid_dist.training.selection import evaluator
    from reid_dist.training.worker import make_worker, prepare

    recipe = build_recipe(mapping, lambda name: get(name).Config)
    prepared = prepare(recipe)
    hooks = Hooks(should_stop=lambda: stop_at is not None and worker.losses[-1]["step"] >= stop_at)
    hooks.preempted = lambda: drain_at is not None and worker.losses[-1]["step"] >= drain_at
    hooks.evaluate = evaluator(recipe, prepared)
    run = Run.attach(run_uri, attempt) if run_uri else None
    worker = make_worker(recipe, prepared, run, hooks)
    progress: Progress | None = None
    with contextlib.suppress(Stopped):
        progress = worker.train()
    return {
        "losses": [{k: v for k, v in record.items() if k != "rows_per_s"} for record in worker.losses],
        "weights": worker.snapshot.model if worker.snapshot else {},
        "metrics": worker.metrics,
        "progress": progress,
    }
