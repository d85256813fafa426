"""Batches prepared ahead by threads: take, decode, augment, pin.

Threads and not processes, because decoding and resizing release the interpreter lock, one table handle serves all, and
there is nothing to fork beside Lance, Ray and CUDA. What is prepared when does not matter: every draw is keyed by row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from reid_dist.data.samplers import rank_slice
from reid_dist.methods.spec import Batch, PlanPart, Stage


def batches(
    stage: Stage, *, seed: int, epoch: int, start: int, rank: int, world_size: int, threads: int, prefetch: int
) -> Iterator[tuple[int, int, Batch]]:
    """Yield (step in epoch, global rows, this rank's batch) from step `start` on.

    Every batch carries "row" (int64 [n], the plan's items) and "row_seed" (int64 [n], for draws inside the model).
    """
    plan = stage.plan()
    total = plan.steps(epoch)

    def prepare(step: int) -> tuple[int, int, Batch]:
        items, first = plan.batch(epoch, step)
        own = rank_slice(len(items), rank, world_size)
        positions = np.arange(first + own.start, first + own.stop, dtype=np.int64)
        part = PlanPart(items=items[own], positions=positions, epoch=epoch, seed=seed)
        return step, len(items), finish(stage.load(part), part)

    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="loader") as pool:
        waiting: deque[Future[tuple[int, int, Batch]]] = deque()
        upcoming = iter(range(start, total))
        try:
            for step in upcoming:
                waiting.append(pool.submit(prepare, step))
                if len(waiting) > prefetch:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def finish(batch: Batch, part: PlanPart) -> Batch:
    """Add what every batch carries and pin host memory where a GPU will read it."""
    from reid_dist.data.draws import row_seeds

    batch["row"] = torch.from_numpy(np.ascontiguousarray(part.items))
    batch["row_seed"] = torch.from_numpy(row_seeds(part.seed, part.epoch, part.positions, "model"))
    if torch.cuda.is_available():
        return {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    return batch
