"""Loss terms and throughput, read from the device only every `log_every` steps.

Reading a value waits for the device, so terms stay tensors until a flush, which averages all waiting steps over ranks in one
collective: every rank then holds the same global numbers, and sees a NaN at the same step as the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from reid_dist.errors import Diverged
from reid_dist.training.context import RunContext


class Meter:
    """Collects steps; `record(dict)` receives each step's global numbers, in order."""

    def __init__(self, ctx: RunContext, every: int, record: Callable[[dict[str, float]], None]) -> None:
        self.ctx, self.every, self._record = ctx, max(1, every), record
        self._waiting: list[tuple[dict[str, float], dict[str, Tensor]]] = []
        self._since = time.perf_counter()
        self.due = False  # this step ended with a flush

    def add(self, step: int, stage: int, epoch: int, lr: float, rows: int, terms: dict[str, Tensor]) -> None:
        """Note one step. Raises Diverged at a flush that finds a non-finite term."""
        head = {"step": step, "stage": stage, "epoch": epoch, "lr": lr, "rows": rows, **self.ctx.scalars}
        self.ctx.scalars.clear()
        self._waiting.append((head, terms))
        self.due = len(self._waiting) >= self.every
        if self.due:
            self.flush()

    def flush(self) -> None:
        """Read all waiting steps."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        values = torch.stack([v.float() for _, terms in waiting for v in terms.values()])
        if self.ctx.world_size > 1:
            dist.all_reduce(values)
            values /= self.ctx.world_size
        now = time.perf_counter()
        rows = sum(head["rows"] for head, _ in waiting)
        speed, self._since = rows / max(1e-9, now - self._since), now
        numbers = iter(values.tolist())
        for head, terms in waiting:
            read = {name: next(numbers) for name in terms}
            record = {**head, **read, "loss": sum(read.values()), "rows_per_s": speed}
            check_finite(record)
            self._record(record)

    def close(self) -> None:
        """Forget what was not read (the run is ending on an error or is over)."""
        self._waiting.clear()


def check_finite(record: dict[str, float]) -> None:
    """Raises Diverged naming the first term that is not a number."""
    for name, value in record.items():
        if value != value or value in (float("inf"), float("-inf")):
            raise Diverged(
                f"loss term {name} is {value} at step {int(record['step'])}: lower optim.lr (or raise optim.eps), or check the "
                "data; the last checkpoint before it is kept"
            )
