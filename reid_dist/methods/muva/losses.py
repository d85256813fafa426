"""MUVA's losses on this rank's rows against tables that every rank holds, and the prototype memory.

Source: methods/muva.md section 4; what must be global: section 9. There are no in-batch negatives: every loss is a
mean over the B global rows, so each rank returns its share (losses/sharding.py).

Shapes: n own rows, N identities, F feature width, R parts, L patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.losses import share, unit

DICE_SMOOTHING = 1e-3  # the original divides probabilities and targets by 1000 and adds 1e-6: the same number


def smoothed_ce(logits: Tensor, label: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy per row [n] of logits [n, N]; `smoothing` is spread over all N classes."""
    return F.cross_entropy(logits, label, reduction="none", label_smoothing=smoothing)


def prototype_logits(feat: Tensor, prototypes: Tensor, temperature: float, normalise: bool) -> Tensor:
    """feat [n, F] against prototypes [N, F] -> [n, N]; `normalise` both sides, each as one vector over all grains."""
    if normalise:
        feat, prototypes = unit(feat), unit(prototypes)
    return feat @ prototypes.T / temperature


def mask_targets(visible: Tensor) -> Tensor:
    """bool [...] -> float32: 1 where the part is visible."""
    return visible.to(torch.float32)


def mask_loss(logit: Tensor, probability: Tensor, visible: Tensor, kind: str = "bce+dice") -> tuple[Tensor, Tensor]:
    """Pixel and Dice terms per row, [n] each, of logit and probability [n, layers, R, L], visible bool [n, R, L].

    "bce+dice": BCE on logits; 1 - Dice per (layer, row, part). "mse": squared error of probabilities, Dice is 0.
    Computed in float32 at least.
    """
    wide = torch.promote_types(logit.dtype, torch.float32)
    logit, probability = logit.to(wide), probability.to(wide)
    target = mask_targets(visible).to(wide)[:, None].expand_as(logit)
    if kind == "mse":
        pixel = (probability - target).square().flatten(1).mean(dim=1)
        return pixel, torch.zeros_like(pixel)
    pixel = F.binary_cross_entropy_with_logits(logit, target, reduction="none").flatten(1).mean(dim=1)
    overlap, size = (probability * target).sum(dim=-1), (probability + target).sum(dim=-1)
    dice = (2 * overlap + DICE_SMOOTHING) / (size + DICE_SMOOTHING)
    return pixel, 1 - dice.flatten(1).mean(dim=1)


def class_centroids(feat: Tensor, label: Tensor, normalise: bool = True) -> Tensor:
    """Mean of feat [M, F] per class of label int64 [M] -> [N, F], L2-normalised on request; label -1 is left out.

    Sums run in float64, so the order of rows does not show. Raises ValueError for a class without rows.
    """
    kept = label >= 0
    feat, label = feat[kept], label[kept]
    classes = int(label.max()) + 1 if len(label) else 0
    count = torch.bincount(label, minlength=classes)
    if classes == 0 or bool((count == 0).any()):
        absent = torch.nonzero(count == 0).flatten().tolist()
        raise ValueError(f"classes without rows: {absent[:5] or 'all'}; every class needs a prototype")
    sums = torch.zeros(classes, feat.shape[1], dtype=torch.float64, device=feat.device).index_add_(
        0, label, feat.double()
    )
    mean = (sums / count[:, None]).to(feat.dtype)
    return unit(mean) if normalise else mean


class PrototypeMemory:
    """One unit row per identity: compared with by softmax, moved by momentum after the step. No gradient, no rank.

    The original moves it inside backward, also on steps that its loss scaler skips; here `update` is called once, after
    the optimizer step, with the global batch, so every rank holds the same rows.
    """

    def __init__(self, rows: Tensor, temperature: float, momentum: float, hard: bool) -> None:
        """rows [N, F], owned by the memory from now on."""
        self.rows, self.temperature, self.momentum, self.hard = rows, temperature, momentum, hard

    def loss(self, query: Tensor, label: Tensor) -> Tensor:
        """Cross-entropy per row [n] of queries [n, F] (normalised here)."""
        rows = self.rows.to(query.dtype)
        return F.cross_entropy(unit(query) @ rows.T / self.temperature, label, reduction="none")

    @torch.no_grad()
    def update(self, query: Tensor, label: Tensor) -> None:
        """Move the rows of the batch's classes, given the global batch [B, F], int64 [B], in its order.

        hard: towards the instance least like the row (the first of equals). Otherwise: towards each instance in turn.
        """
        query = unit(query.detach()).to(self.rows.dtype)
        if not self.hard:
            for vector, place in zip(query, label.tolist(), strict=True):
                self._move(place, vector)
            return
        for place in label.unique().tolist():
            own = query[label == place]
            self._move(place, own[(own @ self.rows[place]).argmin()])

    def _move(self, place: int, vector: Tensor) -> None:
        self.rows[place] = unit(self.momentum * self.rows[place] + (1 - self.momentum) * vector)


def shares(terms: dict[str, tuple[float, Tensor]], total: int, world_size: int) -> dict[str, Tensor]:
    """{name: (weight, terms [n] of our rows)} -> {name: weighted share of the mean over `total` rows}."""
    return {name: weight * share(rows, total, world_size) for name, (weight, rows) in terms.items()}
