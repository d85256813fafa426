"""CLIMB's training order (methods/climb.md section 6.3).

Camera-aware identity sampler: identities in random order; of each an anchor, then K - 1 more from its other cameras
(where it has one camera: its other images). One pass shows each identity once. An epoch is a fixed number of batches:
passes follow each other, every pass's last partial batch is used, and the pass running at the epoch's end is dropped.
An identity with one image is repeated K times (ours; the original yields it once, which shifts all later batches).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from reid_dist.data.draws import plan_rng
from reid_dist.errors import UserError


def cut_passes(make_pass: Callable[[], np.ndarray], batch: int, iterations: int) -> list[np.ndarray]:
    """`iterations` batches from as many passes as it takes; a batch never joins two passes."""
    batches: list[np.ndarray] = []
    while len(batches) < iterations:
        items = make_pass()
        batches.extend(items[start : start + batch] for start in range(0, len(items), batch))
    return batches[:iterations]


def candidates(cams: np.ndarray, anchor: int) -> np.ndarray:
    """Places in an identity's list from which the anchor's companions come: other cameras, else other images."""
    other = np.flatnonzero(cams != cams[anchor])
    return other if len(other) else np.delete(np.arange(len(cams)), anchor)


def draws_with_replacement(count: int, instances: int) -> bool:
    """Sic: as if K and not K - 1 were drawn."""
    return count < instances


def compose_pass(
    members: Sequence[np.ndarray],
    order: Sequence[int],
    anchors: Sequence[int],
    picks: Sequence[np.ndarray],
    instances: int,
) -> np.ndarray:
    """int64 [ids * K]: members[i] are an identity's items; anchors and picks are places in them, one per `order`."""
    parts = []
    for identity, anchor, chosen in zip(order, anchors, picks, strict=True):
        items = members[identity]
        parts.append(items[[anchor, *chosen]] if len(items) > 1 else np.repeat(items, instances))
    return np.concatenate(parts)


class CameraPlan:
    """Batches of P x K items, `iterations` per epoch; pure in (seed, epoch)."""

    def __init__(
        self, pids: np.ndarray, cams: np.ndarray, global_batch: int, instances: int, iterations: int, seed: int
    ) -> None:
        if instances < 1 or global_batch % instances:
            raise UserError(f"training.global_batch={global_batch} must be a multiple of model.instances={instances}")
        pids, cams = np.asarray(pids), np.asarray(cams)
        _, first, inverse = np.unique(pids, return_index=True, return_inverse=True)
        if len(first) < 2:
            raise UserError(f"the training data has {len(first)} identities: at least two are needed to tell apart")
        members = np.split(np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse))[:-1])
        self.members = [members[i] for i in np.argsort(first)]  # identities in first-seen order
        self.cams = [cams[items] for items in self.members]
        self.global_batch, self.instances, self.iterations, self.seed = global_batch, instances, iterations, seed
        self._cached: tuple[int, list[np.ndarray]] = (-1, [])

    def _pass(self, rng: np.random.Generator) -> np.ndarray:
        order = rng.permutation(len(self.members))
        anchors, picks = [], []
        for identity in order.tolist():
            cams = self.cams[identity]
            anchors.append(int(rng.integers(len(cams))))
            eligible = candidates(cams, anchors[-1])
            if len(eligible):
                replace = draws_with_replacement(len(eligible), self.instances)
                picks.append(rng.choice(eligible, self.instances - 1, replace=replace))
            else:
                picks.append(eligible)
        return compose_pass(self.members, order.tolist(), anchors, picks, self.instances)

    def batches(self, epoch: int) -> list[np.ndarray]:
        """All batches of an epoch."""
        cached = self._cached  # read once: loader threads ask in parallel
        if cached[0] != epoch:
            rng = plan_rng(self.seed, epoch, "camera-identity")
            cached = self._cached = (epoch, cut_passes(lambda: self._pass(rng), self.global_batch, self.iterations))
        return cached[1]

    def steps(self, epoch: int) -> int:
        """Steps per epoch."""
        return self.iterations

    def batch(self, epoch: int, step: int) -> tuple[np.ndarray, int]:
        """(items int64 [B], place of the first one in the epoch). Raises ValueError beyond the epoch."""
        if not 0 <= step < self.iterations:
            raise ValueError(f"epoch {epoch} has {self.iterations} steps, asked for step {step}")
        every = self.batches(epoch)
        return every[step], sum(len(items) for items in every[:step])
