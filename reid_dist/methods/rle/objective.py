"""RLE's objective (methods/rle.md section 4): cross-entropy + triplet, mean of the stripes plus the global branch.

L = [CE(p1) + CE(p2) + CE(p3)] / 3 + CE(g) + [T(p1) + T(p2) + T(p3)] / 3 + T(g)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.losses.sharding import own, share
from reid_dist.losses.triplet import batch_hard_triplet, weighted_regularised_triplet
from reid_dist.methods.rle.config import Config
from reid_dist.methods.spec import Terms

BRANCH_WEIGHTS = (1 / 3, 1 / 3, 1 / 3, 1.0)  # p1, p2, p3, g


def objective(
    feat: Tensor,
    label: Tensor,
    logit: Tensor,
    config: Config,
    *,
    rows: slice | None = None,
    world_size: int = 1,
) -> Terms:
    """{"id", "triplet"} shares of our rows.

    Args:
        feat: [N, 4, C] pooled features of all rows of both modalities; label int64 [N].
        logit: [n, 4, K] of our rows.
        rows: ours among the N.
    """
    rows = own(len(label), rows)
    logit = logit if logit.dtype == torch.float64 else logit.float()
    cross_entropy = sum(
        weight * share(F.cross_entropy(logit[:, b], label[rows], reduction="none"), len(label), world_size)
        for b, weight in enumerate(BRANCH_WEIGHTS)
    )

    def triplet_of(branch: Tensor) -> Tensor:
        if config.triplet == "weighted":
            return weighted_regularised_triplet(branch, label, rows=rows, world_size=world_size)
        return batch_hard_triplet(branch, label, margin=config.margin, rows=rows, world_size=world_size)

    triplet = sum(weight * triplet_of(feat[:, b]) for b, weight in enumerate(BRANCH_WEIGHTS))
    return {"id": torch.as_tensor(cross_entropy), "triplet": torch.as_tensor(triplet)}
