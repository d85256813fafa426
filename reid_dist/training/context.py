"""The training side of methods.spec.Context: what a stage may ask of the other ranks."""

from __future__ import annotations

from collections.abc import Callable
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
    counts: tuple[int, ...] = ()  # rows per rank of the current step
    scalars: dict[str, float] = field(default_factory=dict)

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
        forward passes (repeating its last batch), because ZeRO-3 gathers weights collectively.
        """
        device = device_of(model)
        starts = list(range(0, len(items), batch))
        shards = [rank_slice(len(starts), rank, self.world_size) for rank in range(self.world_size)]
        own = starts[shards[self.rank]]
        rounds = max(part.stop - part.start for part in shards)
        training, outputs = model.training, []
        model.eval()
        try:
            with torch.no_grad():
                for index in range(rounds):
                    start = own[index] if index < len(own) else starts[-1]
                    out = encode(model, to_device(load(items[start : start + batch]), device))
                    if index < len(own):
                        outputs.append({name: value.float() for name, value in out.items()})
                    else:
                        empty = {name: value[:0].float() for name, value in out.items()}
                        outputs.append(empty)
        finally:
            model.train(training)
        rows = [sum(min(batch, len(items) - s) for s in starts[part]) for part in shards]
        joined = {name: torch.cat([out[name] for out in outputs]) for name in outputs[0]}
        return {name: collectives.all_gather_rows(value, rows).cpu() for name, value in joined.items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Tensors of a batch on `device`, the rest as it is."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
