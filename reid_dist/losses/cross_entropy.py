"""Row-wise classification losses: nothing is gathered, only the global counts are needed.

Formulas: methods/comoe.md section 3 (identity loss of a 512 -> classes layer on both modalities; masked words of IRRA).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from reid_dist.losses.sharding import share


def identity_ce(
    image_logits: Tensor, text_logits: Tensor, label: Tensor, *, total: int | None = None, world_size: int = 1
) -> Tensor:
    """Mean of image and text cross-entropy. Logits of our rows [n, C], label int64 [n], `total` global rows. Scalar."""
    image = F.cross_entropy(image_logits, label, reduction="none")
    per_row = 0.5 * (image + F.cross_entropy(text_logits, label, reduction="none"))
    return share(per_row, len(label) if total is None else total, world_size)


def masked_lm_nll(scores: Tensor, label: Tensor, ignore_index: int = 0) -> Tensor:
    """Cross-entropy [m] of scores [m, V] with label int64 [m]; zero where the label is `ignore_index`."""
    return F.cross_entropy(scores, label, reduction="none", ignore_index=ignore_index)


def masked_lm_ce(nll: Tensor, count: Tensor, *, total: Tensor | None = None, world_size: int = 1) -> Tensor:
    """Mean over all labelled words. `nll`, `count` [n]: summed cross-entropy and number of labelled words of our rows;
    `total`: labelled words of the global batch. NaN if there are none (0/0): mask_tokens always labels one. Scalar."""
    return share(nll, count.sum() if total is None else total, world_size)
