"""In-batch image-text losses on gathered features.

Sources: SDM - IRRA (CVPR 2023); InfoNCE - CLIP; CMPM - Zhang & Lu (ECCV 2018). Formulas: methods/comoe.md section 3.
Every function takes the features of the whole global batch and `rows`, the slice that is ours (losses/sharding.py);
defaults give the plain single-process loss. Ours: zero vectors are clamped at norm 1e-12 where the original gives
NaN.

Shapes: B global rows, n own rows, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.losses.sharding import own, share


def unit(x: Tensor) -> Tensor:
    """[..., D] / max(L2 norm, 1e-12)."""
    return F.normalize(x, dim=-1, eps=1e-12)


def _both_scores(image_feat: Tensor, text_feat: Tensor, rows: slice, logit_scale: float) -> tuple[Tensor, Tensor]:
    """(our images x all texts, our texts x all images), both [n, B]: scaled cosine similarities."""
    image, text = unit(image_feat), unit(text_feat)
    return logit_scale * image[rows] @ text.T, logit_scale * text[rows] @ image.T


def match_targets(pid: Tensor, image_id: Tensor | None = None, factor: float = 0.3) -> Tensor:
    """q [B, B] of SDM: q_ij = Y_ij / sum_l Y_jl with Y = [same pid].

    With `image_id`, Y is softened to 1 for the same image and `factor` for another one of the identity. The original
    divides column j by the sum of *row* j; kept, and visible only in the soft form.
    """
    same = (pid[:, None] == pid[None, :]).to(torch.float32)
    if image_id is not None:
        image = (image_id[:, None] == image_id[None, :]).to(torch.float32)
        same = image + factor * (same - image)
    return same / same.sum(dim=1)[None, :]


def sdm_per_row(scores: Tensor, targets: Tensor, epsilon: float = 1e-8) -> Tensor:
    """KL(softmax(scores) || targets) [n] of one direction; scores (scaled) and targets [n, B]."""
    log_p = scores.log_softmax(dim=1)
    return (log_p.exp() * (log_p - (targets.to(scores.dtype) + epsilon).log())).sum(dim=1)


def similarity_distribution_matching(
    image_feat: Tensor,
    text_feat: Tensor,
    pid: Tensor,
    *,
    logit_scale: float,
    rows: slice | None = None,
    world_size: int = 1,
    image_id: Tensor | None = None,
    factor: float = 0.3,
    epsilon: float = 1e-8,
) -> Tensor:
    """Sum of both directions of SDM (IRRA eq. 3). image_feat, text_feat [B, D]; pid, image_id int64 [B]. Scalar."""
    rows = own(len(pid), rows)
    targets = match_targets(pid, image_id, factor)[rows]
    image_scores, text_scores = _both_scores(image_feat, text_feat, rows, logit_scale)
    per_row = sdm_per_row(image_scores, targets, epsilon) + sdm_per_row(text_scores, targets, epsilon)
    return share(per_row, len(pid), world_size)


def info_nce_per_row(image_scores: Tensor, text_scores: Tensor, rows: slice) -> Tensor:
    """Mean of both directions' cross-entropies [n]; scores [n, B], the target of own row i is column rows.start + i."""
    target = torch.arange(rows.start, rows.stop, device=image_scores.device)
    image = F.cross_entropy(image_scores, target, reduction="none")
    return 0.5 * (image + F.cross_entropy(text_scores, target, reduction="none"))


def info_nce(
    image_feat: Tensor, text_feat: Tensor, *, logit_scale: float, rows: slice | None = None, world_size: int = 1
) -> Tensor:
    """Symmetric InfoNCE: pair i is the positive, other pairs are negatives even of the same identity. Scalar."""
    rows = own(len(image_feat), rows)
    scores = _both_scores(image_feat, text_feat, rows, logit_scale)
    return share(info_nce_per_row(*scores, rows), len(image_feat), world_size)


def projection_matching(
    image_feat: Tensor,
    text_feat: Tensor,
    pid: Tensor,
    *,
    rows: slice | None = None,
    world_size: int = 1,
    epsilon: float = 1e-8,
) -> Tensor:
    """CMPM: softmax of unnormalised features projected on the other modality's unit vectors, no temperature.

    Targets: [same pid] over the row's L2 norm, as the original code has it (the paper divides by the row's sum).
    Scalar.
    """
    rows = own(len(pid), rows)
    same = (pid[rows, None] == pid[None, :]).to(image_feat.dtype)
    targets = same / same.norm(dim=1, keepdim=True)
    image_scores = image_feat[rows] @ unit(text_feat).T
    text_scores = text_feat[rows] @ unit(image_feat).T
    per_row = sdm_per_row(image_scores, targets, epsilon) + sdm_per_row(text_scores, targets, epsilon)
    return share(per_row, len(pid), world_size)
