"""Losses per image-caption pair of RDE and ICL, from cosine scores: one value for each pair, to be weighted by trust.

Sources: triplet alignment (TAL) and hardest triplet (TRL) - RDE (CVPR 2024); SDM - IRRA (CVPR 2023); InfoNCE - CLIP. Formulas:
methods/icl.md section 2. Every loss has two directions, rows of images against columns of texts and the reverse, which are
added (InfoNCE: averaged). Positives are all pairs of the same identity, not the diagonal alone.

Ours: masked softmax and logsumexp instead of exp(score / temperature); a row without a negative has loss and gradient 0 (the
original's gradient is NaN); a text without words is no column, and its pair no anchor (`usable`).

Shapes: B global pairs, n own pairs.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.losses.contrastive import sdm_per_row, unit

PairLoss = Literal["tal", "trl", "sdm", "infonce"]
SUMMED = ("tal", "trl")  # reduced by a sum over pairs; the others by a mean over the trusted ones
BLOCKED = -1e4  # a logit that takes no part: its softmax weight is exactly 0, and unlike -inf it makes no NaN


def triplet_alignment_rows(
    scores: Tensor, positive: Tensor, negative: Tensor, temperature: float, margin: float
) -> Tensor:
    """TAL of one direction: [margin - sum_j a_j s_j + t log sum_negatives exp(s_j / t)]+, a = softmax of positives, detached.

    scores (cosines), positive, negative bool [n, B] -> [n]; 0 where a row has no negative.
    """
    logits = scores / temperature
    weight = logits.masked_fill(~positive, BLOCKED).softmax(dim=1).detach()
    nearest = temperature * logits.masked_fill(~negative, BLOCKED).logsumexp(dim=1)
    hinge = F.relu(margin - (weight * scores).sum(dim=1) + nearest)
    return torch.where(negative.any(dim=1), hinge, torch.zeros_like(hinge))


def hardest_triplet_rows(
    scores: Tensor, positive: Tensor, negative: Tensor, temperature: float, margin: float
) -> Tensor:
    """TRL of one direction: TAL's positive term, and the largest of the negatives' scores and 0 (positives count as 0). [n]."""
    weight = (scores / temperature).masked_fill(~positive, BLOCKED).softmax(dim=1).detach()
    hardest = (scores * negative).amax(dim=1)
    return F.relu(margin - (weight * scores).sum(dim=1) + hardest)


def _one_direction(
    kind: PairLoss, scores: Tensor, same: Tensor, target: Tensor, usable: Tensor, temperature: float, margin: float,
    logit_scale: float,
) -> Tensor:  # fmt: skip
    positive, negative = same & usable, ~same & usable
    if kind == "tal":
        return triplet_alignment_rows(scores, positive, negative, temperature, margin)
    if kind == "trl":
        return hardest_triplet_rows(scores, positive, negative, temperature, margin)
    logits = (logit_scale * scores).masked_fill(~usable, BLOCKED)
    if kind == "infonce":
        return 0.5 * F.cross_entropy(logits, target, reduction="none")
    targets = positive.to(scores.dtype)
    return sdm_per_row(logits, targets / targets.sum(dim=1, keepdim=True).clamp(min=1))


def pair_losses_of_scores(
    kind: PairLoss, image_scores: Tensor, text_scores: Tensor, pid: Tensor, *, rows: slice, usable: Tensor | None = None,
    temperature: float = 0.015, margin: float = 0.1, logit_scale: float = 50.0,
) -> Tensor:  # fmt: skip
    """Loss of each own pair [n], both directions.

    Args:
        image_scores: cosines [n, B] of our images with all texts; text_scores: of our texts with all images.
        pid: int64 [B]; rows: which of the B pairs are ours; usable: bool [B], texts that have words (default: all).
    A pair whose text is not usable has loss 0, and its text is nobody's positive or negative.
    """
    everywhere = torch.ones_like(pid, dtype=torch.bool)
    usable = everywhere if usable is None else usable
    same = pid[rows, None] == pid[None, :]
    target = torch.arange(rows.start, rows.stop, device=pid.device)
    settings = (temperature, margin, logit_scale)
    loss = _one_direction(kind, image_scores, same, target, usable, *settings)
    loss = loss + _one_direction(kind, text_scores, same, target, everywhere, *settings)
    return torch.where(usable[rows], loss, torch.zeros_like(loss))


def pair_losses(
    kind: PairLoss, image_feat: Tensor, text_feat: Tensor, pid: Tensor, *, rows: slice | None = None,
    usable: Tensor | None = None, temperature: float = 0.015, margin: float = 0.1, logit_scale: float = 50.0,
) -> Tensor:  # fmt: skip
    """`pair_losses_of_scores` of features [B, D] of the whole batch, normalised here; `rows`: ours (default: all). [n]."""
    rows = slice(0, len(pid)) if rows is None else rows
    image, text = unit(image_feat), unit(text_feat)
    return pair_losses_of_scores(
        kind, image[rows] @ text.T, text[rows] @ image.T, pid, rows=rows, usable=usable, temperature=temperature,
        margin=margin, logit_scale=logit_scale,
    )  # fmt: skip


def trusted(kind: PairLoss, per_pair: Tensor, trust: Tensor, total_trust: Tensor, world_size: int = 1) -> Tensor:
    """Scalar whose mean over ranks is the global term: the sum of trust * loss for TAL and TRL, for the others divided by the
    sum of trust over all pairs (0 when nothing is trusted). per_pair, trust [n]; total_trust scalar of the whole batch."""
    value = (trust.to(per_pair.dtype) * per_pair).sum() * world_size
    return value if kind in SUMMED else value / total_trust.to(per_pair.dtype).clamp(min=1)
