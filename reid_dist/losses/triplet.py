"""Triplet losses over all rows of the global batch, whatever their modality.

Sources: batch-hard - Hermans et al. (2017), as in RLE (methods/rle.md section 4); weighted regularised - AGW (TPAMI
2021). Every function takes the features of the whole batch and `rows`, the slice that is ours (losses/sharding.py).
Ours: an anchor's distance to itself is the constant that exact arithmetic gives (sqrt of the clamp, without gradient);
the expansion of the square would leave rounding noise there, amplified by the root.

Shapes: N global rows, n own rows, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.losses.sharding import own, share

CLAMP = 1e-12  # least squared distance


def pairwise_euclidean(feat: Tensor, rows: slice | None = None) -> Tensor:
    """Distances of our rows to all: [N, D] -> [n, N], sqrt(max(|a|^2 + |b|^2 - 2 ab, 1e-12)); float32 or wider.

    The clamp passes no gradient below 1e-12.
    """
    rows = own(len(feat), rows)
    feat = feat if feat.dtype == torch.float64 else feat.float()  # the expansion cancels badly in bfloat16
    norm = feat.square().sum(dim=1)
    squared = norm[rows, None] + norm[None, :] - 2 * feat[rows] @ feat.T
    self_pair = torch.arange(rows.start, rows.stop, device=feat.device)[:, None] == torch.arange(
        len(feat), device=feat.device
    )
    return squared.masked_fill(self_pair, CLAMP).clamp(min=CLAMP).sqrt()


def batch_hard_triplet(
    feat: Tensor, label: Tensor, *, margin: float = 0.3, rows: slice | None = None, world_size: int = 1
) -> Tensor:
    """mean max(0, hardest positive (self included) - hardest negative + margin). feat [N, D], label int64 [N]. Scalar.

    Exact ties share the gradient (amax, amin). The global batch must hold two identities (the plan sees to it).
    """
    rows = own(len(label), rows)
    distance = pairwise_euclidean(feat, rows)
    same = label[rows, None] == label[None, :]
    positive = distance.masked_fill(~same, -torch.inf).amax(dim=1)
    negative = distance.masked_fill(same, torch.inf).amin(dim=1)
    return share(F.relu(positive - negative + margin), len(label), world_size)


def weighted_pairs(
    feat: Tensor, label: Tensor, *, normalize: bool = False, rows: slice | None = None
) -> tuple[Tensor, Tensor]:
    """AGW's softmax-weighted mean distance of each of our rows to its positives and to its negatives: ([n], [n]).

    Weights of positives grow with distance (shifted by the largest), those of negatives fall with it (the original's
    shift is a maximum over masked zeros, hence 0: beyond distances of about 14 the 1e-6 below takes over; kept).
    """
    rows = own(len(label), rows)
    if normalize:
        feat = feat / (feat.norm(dim=1, keepdim=True) + CLAMP)
    distance = pairwise_euclidean(feat, rows)
    same = label[rows, None] == label[None, :]
    shift = distance.masked_fill(~same, 0.0).amax(dim=1, keepdim=True)
    closer = (distance - shift).exp() * same
    farther = (-distance).exp() * ~same
    positive = (closer / (closer.sum(dim=1, keepdim=True) + 1e-6) * distance).sum(dim=1)
    negative = (farther / (farther.sum(dim=1, keepdim=True) + 1e-6) * distance).sum(dim=1)
    return positive, negative


def weighted_regularised_triplet(
    feat: Tensor, label: Tensor, *, normalize: bool = False, rows: slice | None = None, world_size: int = 1
) -> Tensor:
    """mean softplus(weighted positive - weighted negative). feat [N, D], label int64 [N]. Scalar."""
    positive, negative = weighted_pairs(feat, label, normalize=normalize, rows=rows)
    return share(F.softplus(positive - negative), len(label), world_size)
