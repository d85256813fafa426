"""Losses that two or more methods share (see sharding.py for the convention)."""

from reid_dist.losses.alignment import PairLoss, pair_losses, pair_losses_of_scores, trusted
from reid_dist.losses.contrastive import (
    info_nce,
    info_nce_per_row,
    projection_matching,
    sdm_per_row,
    similarity_distribution_matching,
    unit,
)
from reid_dist.losses.cross_entropy import identity_ce, masked_lm_ce, masked_lm_nll
from reid_dist.losses.sharding import share

__all__ = [
    "PairLoss",
    "identity_ce",
    "info_nce",
    "info_nce_per_row",
    "masked_lm_ce",
    "masked_lm_nll",
    "pair_losses",
    "pair_losses_of_scores",
    "projection_matching",
    "sdm_per_row",
    "share",
    "similarity_distribution_matching",
    "trusted",
    "unit",
]
