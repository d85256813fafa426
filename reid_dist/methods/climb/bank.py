"""Prototype memories (methods/climb.md section 4; paper equations 3 to 7).

One bank "mean" and one bank "hard" of C unit rows each, started from the model's own features and updated by different
rules after each step. The original hides the update in an autograd backward; here it is a function of the gathered
global batch in its order, called once per optimizer step on every rank, so all ranks hold the same bits.

Official update (released code), mu = weight of the old value, n(v) = v / |v|, class c with samples X_c:
    mean[c] <- n(mu mean[c] + (1 - mu) x)     for each x of X_c in turn
    hard    =  the x of X_c least similar to mean[c]
    mean[c] <- n(mu mean[c] + (1 - mu) average(X_c))
    hard[c] <- n(mu hard[c] + (1 - mu) hard)
`paper`: no per-sample updates, and the hardest sample is the one least similar to hard[c] (equations 3 to 5).

Shapes: B rows, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.errors import UserError


def prototypes(feat: Tensor, label: Tensor, classes: int) -> Tensor:
    """Unit mean of each class's unit features: feat [N, D], label int64 [N] (-1 is passed over) -> float32 [C, D].

    Summed in float64 in row order. A class whose features cancel keeps a zero row. Raises UserError for a class without
    rows or a label outside -1..C-1 (the original gives NaN).
    """
    used = label >= 0
    feat, label = F.normalize(feat[used].double(), dim=1, eps=1e-12), label[used]
    if len(label) and int(label.max()) >= classes:
        raise UserError(f"prototype memory: label {int(label.max())} with {classes} classes")
    counts = torch.bincount(label, minlength=classes)
    if (counts == 0).any():
        missing = torch.nonzero(counts == 0)[:5, 0].tolist()
        raise UserError(f"prototype memory: classes {missing} of {classes} have no image; give labels 0..{classes - 1}")
    sums = feat.new_zeros(classes, feat.shape[1]).index_add_(0, label, feat)
    sums[sums.norm(dim=1) < 1e-6] = 0  # rounding left over from features that cancel has no direction
    return F.normalize(sums / counts[:, None], dim=1, eps=1e-12).float()


def prototype_loss(feat: Tensor, label: Tensor, banks: Tensor, temperature: float = 0.05) -> Tensor:
    """Mean over the banks of CE(unit feat . bank / temperature, label) [B]. banks [M, C, D], no gradient to them."""
    scores = F.normalize(feat, dim=1, eps=1e-12) @ banks.detach().mT / temperature  # [M, B, C]
    per_bank = [F.cross_entropy(score, label, reduction="none") for score in scores]
    return torch.stack(per_bank).mean(0)


def _mix(old: Tensor, new: Tensor, momentum: float) -> Tensor:
    mixed = momentum * old + (1 - momentum) * new
    return mixed / mixed.norm(dim=1, keepdim=True)


def _rounds(label: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For j = 0, 1, ...: (classes that have a j-th sample, its row). Classes do not interact: one step serves all."""
    order = label.argsort(stable=True)
    classes, counts = label[order].unique_consecutive(return_counts=True)
    first = counts.cumsum(0) - counts
    for j in range(int(counts.max()) if len(counts) else 0):
        has = counts > j
        yield classes[has], order[first[has] + j]


def _each(bank: Tensor, feat: Tensor, label: Tensor, momentum: float) -> None:
    for classes, rows in _rounds(label):
        bank[classes] = _mix(bank[classes], feat[rows], momentum)


def _averages(feat: Tensor, label: Tensor, classes: int) -> Tensor:
    """[C, D] mean of each class's rows, added in batch order; rows of absent classes are zero."""
    total, count = feat.new_zeros(classes, feat.shape[1]), feat.new_zeros(classes, 1)
    for present, rows in _rounds(label):
        total[present] += feat[rows]
        count[present] += 1
    return total / count.clamp(min=1)


def _hardest(bank: Tensor, feat: Tensor, label: Tensor) -> Tensor:
    """[C] row of each class's sample least similar to its prototype, the first of equals; 0 for absent classes."""
    similarity = (feat * bank[label]).sum(1)
    least = similarity.new_full((len(bank),), torch.inf)
    chosen = torch.zeros(len(bank), dtype=torch.int64, device=feat.device)
    for present, rows in _rounds(label):
        better = similarity[rows] < least[present]
        least[present[better]], chosen[present[better]] = similarity[rows[better]], rows[better]
    return chosen


def update_dual(banks: Tensor, feat: Tensor, label: Tensor, momentum: float = 0.2, rule: str = "official") -> None:
    """Update banks [2, C, D] (mean, hard) in place from the global batch: unit, detached feat [B, D], label [B]."""
    mean, hard = banks
    present = label.unique()
    if rule == "official":
        _each(mean, feat, label, momentum)
    chosen = feat[_hardest(mean if rule == "official" else hard, feat, label)[present]]
    average = _averages(feat, label, len(mean))[present]
    mean[present] = _mix(mean[present], average, momentum)
    hard[present] = _mix(hard[present], chosen, momentum)


def update_single(
    bank: Tensor, feat: Tensor, label: Tensor, momentum: float, rule: str, rng: np.random.Generator | None = None
) -> None:
    """Update one bank [C, D] in place. rule: "instance" (every sample in turn), "hard" (the least similar sample),
    "mean" (the average), "random" (a sample drawn by `rng`); the last three once per class (paper table 4)."""
    if rule == "instance":
        _each(bank, feat, label, momentum)
        return
    present = label.unique()
    if rule == "hard":
        new = feat[_hardest(bank, feat, label)[present]]
    elif rule == "mean":
        new = _averages(feat, label, len(bank))[present]
    else:
        assert rng is not None
        places = [torch.nonzero(label == c)[:, 0] for c in present.tolist()]
        new = feat[torch.stack([rows[int(rng.integers(len(rows)))] for rows in places])]
    bank[present] = _mix(bank[present], new, momentum)


def camera_proxy_labels(label: np.ndarray, camera: np.ndarray) -> np.ndarray:
    """int64 [N]: consecutive number of each (label, camera) pair in sorted order; -1 where the label is -1.

    A helper of the released code for splitting identities by camera; its recipe does not use it.
    """
    result = np.full(len(label), -1, dtype=np.int64)
    used = np.asarray(label) >= 0
    pairs = np.stack([np.asarray(label)[used], np.asarray(camera)[used]], axis=1)
    result[used] = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
    return result
