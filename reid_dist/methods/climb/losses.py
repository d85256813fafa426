"""Losses of CLIMB beside the memory loss (methods/climb.md section 5).

    total = L_mem + 0.25 SCE(logits) + SCE(logits_head) + Tri(head feature)

Every function sees the whole gathered batch and returns one value per row, so that partial batches and any number of
ranks are weighted by rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.losses.contrastive import unit
from reid_dist.losses.triplet import pairwise_euclidean


def smoothed_ce(logits: Tensor, label: Tensor, epsilon: float = 0.1) -> Tensor:
    """Label-smoothed cross-entropy [B]: targets (1 - eps) onehot + eps / C. logits [B, C], label int64 [B]."""
    log_p = logits.log_softmax(dim=1)
    target = log_p.gather(1, label[:, None])[:, 0]
    return -(1 - epsilon) * target - epsilon * log_p.mean(dim=1)


@dataclass(frozen=True, slots=True)
class HardPairs:
    """Hardest pairs of each anchor, all [B]."""

    positive: Tensor  # distance; the anchor itself is a positive, so a lone image has one
    negative: Tensor  # infinite where the batch holds one identity only


def hardest_pairs(feat: Tensor, label: Tensor, normalise: bool = False) -> HardPairs:
    """Batch-hard mining by masked maximum and minimum, so classes may differ in size. feat [B, D], label int64 [B]."""
    distance = pairwise_euclidean(unit(feat) if normalise else feat)
    same = label[:, None] == label[None, :]
    # max and min by index: of equal distances one pair gets the gradient, as in the original (amax shares it).
    positive = distance.masked_fill(~same, -torch.inf).max(dim=1).values
    return HardPairs(positive, distance.masked_fill(same, torch.inf).min(dim=1).values)


def batch_hard_triplet(
    feat: Tensor, label: Tensor, margin: float | None = None, normalise: bool = False, hard_factor: float = 0.0
) -> Tensor:
    """Per anchor [B]: softplus(d_ap - d_an), or max(0, d_ap - d_an + margin), with d_ap (1 + hf) and d_an (1 - hf).

    An anchor without a negative (a last partial batch of one identity) contributes 0.
    """
    pairs = hardest_pairs(feat, label, normalise)
    alone = pairs.negative.isinf()
    negative = pairs.negative.masked_fill(alone, 0.0) * (1 - hard_factor)
    gap = pairs.positive * (1 + hard_factor) - negative
    term = F.softplus(gap) if margin is None else F.relu(gap + margin)
    return term.masked_fill(alone, 0.0)
