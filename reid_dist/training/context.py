"""The training side of methods.spec.Context: what a stage may ask of the other ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reid_dist.data.samplers import rank_slice
from reid_dist.methods.spec import Batch, Outputs, device_of
from reid_dist.training import collectives


@dataclass
class RunContext:
    """One per worker, moved from step to step by the loop."""

    seed: int
    rank: int = field(default_factory=lambda: collectives.world()[0])
    world_size: int = field(default_factory=lambda: collectives.world()[1])
    epoch: int = 0
    step: int = 0
    threads: int = 1  # that load ahead in `extract`
    beat: Callable[[int], None] = lambda step: None  # told of every batch of `extract`, which may take long
    counts: tuple[int, ...] = ()  # rows per rank of the current step
    scalars: dict[str, float] = field(default_factory=dict)
    notes: list[dict[str, Any]] = field(default_factory=list)  # not yet written

    def begin_step(self, total_rows: int) -> slice:
        """Set the slices of a step with `total_rows` global rows; returns this rank's."""
        slices = [rank_slice(total_rows, rank, self.world_size) for rank in range(self.world_size)]
        self.counts = tuple(part.stop - part.start for part in slices)
        return slices[self.rank]

    def slice(self) -> slice:
        start = sum(self.counts[: self.rank])
        return slice(start, start + self.counts[self.rank])

    def gather(self, rows: Tensor) -> Tensor:
        return collectives.gather_rows(rows, self.counts)

    def reduce(self, value: Tensor) -> Tensor:
        return collectives.reduce_sum(value)

    def broadcast(self, value: Any) -> Any:
        return collectives.broadcast_object(value)

    def log(self, **values: float) -> None:
        self.scalars.update(values)

    def note(self, kind: str, **content: Any) -> None:
        self.notes.append({"kind": kind, "step": self.step, "epoch": self.epoch, **content})

    def take_notes(self) -> list[dict[str, Any]]:
        """What was noted since the last call."""
        taken, self.notes = self.notes, []
        return taken

    def extract(
        self,
        model: nn.Module,
        items: np.ndarray,
        load: Callable[[np.ndarray], Batch],
        encode: Callable[[nn.Module, Batch], Outputs],
        batch: int = 128,
    ) -> dict[str, Tensor]:
        """Sharded no-grad pass over `items`; all outputs on every rank, CPU, in the order of `items`.

        Shards are whole batches cut at the same places for every world size: a kernel that rounds differently for another
        number of rows would otherwise change features with the number of workers. Each rank runs the same number of
        forward passes (repeating its last batch), because ZeRO-3 gathers weights collectively. Threads load batches ahead.
        """
        device = device_of(model)
        starts = list(range(0, len(items), batch))
        shards = [rank_slice(len(starts), rank, self.world_size) for rank in range(self.world_size)]
        own = starts[shards[self.rank]]
        rounds = max(part.stop - part.start for part in shards)
        training, outputs = model.training, []
        model.eval()
        try:
            wanted = [own[i] if i < len(own) else starts[-1] for i in range(rounds)]
            loaded = _ahead(load, [items[start : start + batch] for start in wanted], self.threads)
            with torch.no_grad():
                for index, given in enumerate(loaded):
                    out = encode(model, to_device(given, device))
                    self.beat(self.step)
                    kept = slice(None) if index < len(own) else slice(0)
                    outputs.append({name: value[kept].float() for name, value in out.items()})
        finally:
            model.train(training)
        rows = [sum(min(batch, len(items) - s) for s in starts[part]) for part in shards]
        joined = {name: torch.cat([out[name] for out in outputs]) for name in outputs[0]}
        return {name: collectives.all_gather_rows(value, rows).cpu() for name, value in joined.items()}


def _ahead(load: Callable[[np.ndarray], Batch], parts: Sequence[np.ndarray], threads: int) -> Iterator[Batch]:
    """Batches of `parts` in order, `threads` of them loaded ahead."""
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="pass") as pool:
        waiting: deque[Future[Batch]] = deque()
        for part in parts:
            waiting.append(pool.submit(load, part))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Tensors of a batch on `device`, the rest as it is."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
