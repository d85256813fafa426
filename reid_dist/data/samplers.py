"""Plans: which items make the global batch of (epoch, step), as a pure function.

A plan's state is three integers whatever the number of workers (seed, epoch, step); every rank computes the same plan
and takes its slice. Items are numbers 0 ... N-1 of whatever a stage trains on (rows, image-caption pairs, tracklets).

Where the authors seed by rank or cut the epoch into per-rank mini-batches, this replaces it (design.md section 3): one
global list, contiguous slices, partial batches kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from reid_dist.data.draws import plan_rng
from reid_dist.errors import UserError


def rank_slice(total: int, rank: int, world_size: int) -> slice:
    """Rank's contiguous part of `total` rows: sizes differ by at most one, and may be zero."""
    return slice(total * rank // world_size, total * (rank + 1) // world_size)


class EpochPlan:
    """Base of plans that lay out a whole epoch at once: `layout(epoch)` int64 [M], cut into global batches."""

    def __init__(self, global_batch: int, layout: Callable[[int], np.ndarray]) -> None:
        if global_batch < 1:
            raise UserError(f"training.global_batch={global_batch}: must be at least 1")
        self.global_batch = global_batch
        self._layout = layout
        self._cached: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def items(self, epoch: int) -> np.ndarray:
        """int64 [M] items of the whole epoch in order."""
        cached = self._cached  # read once: loader threads ask in parallel
        if cached[0] != epoch:
            cached = self._cached = (epoch, self._layout(epoch))
        return cached[1]

    def steps(self, epoch: int) -> int:
        """Global batches of the epoch; the last one may be partial."""
        return -(-len(self.items(epoch)) // self.global_batch)

    def batch(self, epoch: int, step: int) -> tuple[np.ndarray, int]:
        """(items int64 [B], place of the first one in the epoch). Raises ValueError beyond the epoch."""
        if not 0 <= step < self.steps(epoch):
            raise ValueError(f"epoch {epoch} has {self.steps(epoch)} steps, asked for step {step}")
        first = step * self.global_batch
        return self.items(epoch)[first : first + self.global_batch], first


class ShufflePlan(EpochPlan):
    """Every item once per epoch in a new order; the last partial batch is kept."""

    def __init__(self, count: int, global_batch: int, seed: int, stream: str = "shuffle") -> None:
        if count < 1:
            raise UserError("nothing to train on: the training tables have no usable rows")
        super().__init__(global_batch, lambda epoch: plan_rng(seed, epoch, stream).permutation(count))


def cut_groups(order: Sequence[int] | np.ndarray, instances: int) -> list[np.ndarray]:
    """One identity's shuffled items -> groups of `instances`; a rest is dropped."""
    order = np.asarray(order, dtype=np.int64)
    return [order[i : i + instances] for i in range(0, len(order) - instances + 1, instances)]


def compose_identity_batches(
    orders: Mapping[int, Sequence[int] | np.ndarray],
    selections: Sequence[Sequence[int] | np.ndarray] | np.ndarray,
    instances: int,
) -> np.ndarray:
    """PK composition given its draws: each selection of identities takes the next group of each. int64 [M].

    `orders` {pid: shuffled, resampled items}. Raises ValueError when an identity is selected without a group left.
    """
    groups = {int(pid): cut_groups(order, instances) for pid, order in orders.items()}
    taken: list[np.ndarray] = []
    for selection in selections:
        for pid in selection:
            if not groups[int(pid)]:
                raise ValueError(f"identity {pid} is selected once more than it has groups of {instances}")
            taken.append(groups[int(pid)].pop(0))
    return np.concatenate(taken) if taken else np.zeros(0, dtype=np.int64)


class IdentityPlan(EpochPlan):
    """PK batches: P = global_batch / K identities with K items each (methods/comoe.md section 4).

    Each identity's items are shuffled (fewer than K: resampled with replacement) and cut into groups of K; P
    identities that still have a group are drawn without replacement again and again, until fewer than P are left.
    """

    def __init__(
        self, pids: np.ndarray, global_batch: int, instances: int, seed: int, stream: str = "identity"
    ) -> None:
        self.pids = np.asarray(pids, dtype=np.int64)
        self.instances = instances
        distinct = len(np.unique(self.pids))
        if instances < 1 or global_batch % instances:
            raise UserError(f"training.global_batch={global_batch} must be a multiple of instances={instances}")
        if distinct < global_batch // instances:
            raise UserError(
                f"a batch of {global_batch} with {instances} instances needs {global_batch // instances} identities, "
                f"the training data has {distinct}: lower training.global_batch or raise model.instances"
            )
        super().__init__(global_batch, lambda epoch: self._draw(plan_rng(seed, epoch, stream)))

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        by_pid = np.argsort(self.pids, kind="stable")
        starts = np.flatnonzero(np.diff(self.pids[by_pid], prepend=self.pids[by_pid[0]] - 1))
        orders: dict[int, np.ndarray] = {}
        for items in np.split(by_pid, starts[1:]):
            if len(items) < self.instances:
                items = rng.choice(items, self.instances, replace=True)
            orders[int(self.pids[items[0]])] = rng.permutation(items)
        left = {pid: len(order) // self.instances for pid, order in orders.items()}
        available, selections = np.array(sorted(left)), []
        while len(available) >= self.global_batch // self.instances:
            selection = rng.choice(available, self.global_batch // self.instances, replace=False)
            selections.append(selection)
            for pid in selection.tolist():
                left[pid] -= 1
            available = available[[left[pid] > 0 for pid in available.tolist()]]
        return compose_identity_batches(orders, selections, self.instances)

    def estimate(self) -> int:
        """Items per epoch if no group were left over (the original's length; `steps` is exact)."""
        counts = np.maximum(np.unique(self.pids, return_counts=True)[1], self.instances)
        return int((counts - counts % self.instances).sum())
