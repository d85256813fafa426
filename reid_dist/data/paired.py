"""Visible-infrared pairs of one identity as the items of a plan (methods/rle.md section 6).

An item is a pair (visible image, infrared image) of the same identity, so every slice of the global batch holds as many
visible as infrared rows and no rank's batch norm drifts towards a modality. A plan draws P identities per batch and K
pairs of each, images with replacement. Ours: one plan of the global batch, a contiguous slice per rank.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reid_dist.data.draws import plan_rng
from reid_dist.data.samplers import EpochPlan
from reid_dist.errors import UserError

if TYPE_CHECKING:
    from reid_dist.data.store import TableView

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModalityRows:
    """View rows of both modalities and their class labels 0..n-1, each by (label, camera, path). All int64."""

    visible: np.ndarray
    visible_label: np.ndarray
    infrared: np.ndarray
    infrared_label: np.ndarray

    @property
    def classes(self) -> int:
        """Identities."""
        return int(self.visible_label.max()) + 1


def modality_rows(view: TableView) -> ModalityRows:
    """Rows that can be paired. Identities without infrared or without visible images are left out, with a warning.

    Labels count the identities that stay, ascending. Raises UserError when none stays.
    """
    label, modality = np.asarray(view.label), np.asarray(view.modality).astype(str)
    camera = np.asarray(view.camid)
    unknown = sorted(set(modality.tolist()) - {"rgb", "ir"})
    if unknown:
        raise UserError(f"{view.describe()}: modality {unknown[0]!r}; a visible-infrared set has 'rgb' and 'ir'")
    both = np.intersect1d(label[modality == "rgb"], label[modality == "ir"])
    single = np.setdiff1d(label, both)
    if not len(both):
        raise UserError(
            f"{view.describe()}: no training identity has both visible and infrared images "
            f"({len(single)} have one kind)"
        )
    if len(single):
        names = ", ".join(str(pid) for pid in np.unique(np.asarray(view.pid)[np.isin(label, single)])[:8].tolist())
        logger.warning(
            "%s: %d identities have images of one modality only and are left out of training: %s%s",
            view.describe(), len(single), names, " ..." if len(single) > 8 else "",
        )  # fmt: skip
    order = sorted(np.flatnonzero(np.isin(label, both)).tolist(), key=lambda r: (label[r], camera[r], view.path(r)))
    rows = np.array(order, dtype=np.int64)
    classes = np.searchsorted(both, label[rows]).astype(np.int64)
    visible = modality[rows] == "rgb"
    return ModalityRows(rows[visible], classes[visible], rows[~visible], classes[~visible])


def lay_out_pairs(
    visible_label: np.ndarray, infrared_label: np.ndarray, identities: int, instances: int, rng: Any
) -> np.ndarray:
    """Positions int64 [M, 2] (visible, infrared) of one epoch: floor(max(n_vis, n_ir) / (P K)) + 1 batches of P K.

    `rng` has NumPy's `choice`; per batch it draws P identities without replacement, then for each K visible and K
    infrared positions with replacement, in this order (the original's draws replay).
    """
    by_label = [_positions(labels) for labels in (visible_label, infrared_label)]
    known = np.unique(visible_label)
    batches = max(len(visible_label), len(infrared_label)) // (identities * instances) + 1
    pairs = np.empty((batches, identities, 2, instances), dtype=np.int64)
    for batch in pairs:
        for row, identity in zip(batch, rng.choice(known, identities, replace=False).tolist(), strict=True):
            row[0] = rng.choice(by_label[0][identity], instances)
            row[1] = rng.choice(by_label[1][identity], instances)
    return pairs.transpose(0, 1, 3, 2).reshape(-1, 2)


def _positions(labels: np.ndarray) -> list[np.ndarray]:
    """Positions of each label 0..n-1, ascending."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels))[:-1])


class PairedIdentityPlan(EpochPlan):
    """PK batches of pairs: global_batch = P K pairs (2 P K images). An item is visible * n_ir + infrared position."""

    def __init__(
        self, visible_label: np.ndarray, infrared_label: np.ndarray, global_batch: int, instances: int, seed: int
    ) -> None:
        """Raises UserError: a batch that is no multiple of K, or of fewer than 2 or more identities than there are."""
        identities, rest = divmod(global_batch, instances)
        if rest:
            raise UserError(
                f"training.global_batch={global_batch} pairs: must be a multiple of model.instances={instances}"
            )
        if identities < 2:
            raise UserError(
                f"training.global_batch={global_batch} with model.instances={instances} gives {identities} identity "
                "per batch: the triplet needs at least 2"
            )
        known = len(np.unique(visible_label))
        if known < identities:
            raise UserError(
                f"a batch of {identities} identities was asked for (training.global_batch={global_batch}, "
                f"model.instances={instances}), the training data has {known}: lower training.global_batch"
            )
        self._width = len(infrared_label)

        def layout(epoch: int) -> np.ndarray:
            rng = plan_rng(seed, epoch, "pairs")
            pairs = lay_out_pairs(visible_label, infrared_label, identities, instances, rng)
            return pairs[:, 0] * self._width + pairs[:, 1]

        super().__init__(global_batch, layout)

    def split(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Items -> (visible positions, infrared positions), int64 [n] each."""
        visible, infrared = np.divmod(items, self._width)
        return visible, infrared
