"""Consensus division (CCD of RDE): which training pairs are trusted in an epoch (methods/icl.md section 2).

Each branch's losses over all pairs are scaled to 0 ... 1 and fitted by two Gaussians; a pair is clean for a branch when the
component of the smaller mean has probability above one half. Both branches say clean: trusted; both noisy: not; else a coin.

Guarded: a loss that is not a number counts as the largest (a text without words, or a diverged model); losses that are all the
same divide nothing, every pair is clean.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from reid_dist.methods.icl.mixture import LOOSE, TIGHT, Mixture, MixtureSettings, fit_two_gaussians

logger = logging.getLogger(__name__)

HIGH_NOISE = 0.4  # above this rate of mismatched pairs the mixtures are fitted tightly
TIGHT_DOMAINS = ("rstpreid",)
THRESHOLD = 0.5


def mixture_settings(
    rate: float, domains: Sequence[str], choice: Literal["auto", "tight", "loose"] = "auto"
) -> MixtureSettings:
    """`rate`: known share of mismatched pairs; `domains`: names of the training sets."""
    if choice != "auto":
        return TIGHT if choice == "tight" else LOOSE
    return TIGHT if rate > HIGH_NOISE or any(name.lower() in TIGHT_DOMAINS for name in domains) else LOOSE


def scaled(losses: np.ndarray) -> np.ndarray:
    """[N] -> float64 in 0 ... 1 by the least and the largest; what is not a number counts as the largest. Zeros when all are
    the same."""
    values = np.asarray(losses, dtype=np.float64)
    known = np.isfinite(values)
    if not known.all():
        logger.warning("%d of %d losses are not a number and count as the largest", int((~known).sum()), len(values))
    if not known.any():
        return np.zeros(len(values))
    low, high = values[known].min(), values[known].max()
    if low == high:
        return np.where(known, 0.0, 1.0)
    return (np.where(known, values, high) - low) / (high - low)


def split_clean(probability: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """bool [N]: probability strictly above the threshold. When nothing looks noisy, the threshold rises to the value at place
    N // 100 of the sorted probabilities, so that about 1 % (at least one) is noisy."""
    if probability.min() > threshold:
        threshold = np.sort(probability)[len(probability) // 100]
    return np.asarray(probability > threshold)


def vote(first: np.ndarray, second: np.ndarray, coins: np.ndarray) -> np.ndarray:
    """int64 [N] in {0, 1}: what both say, else the next of `coins` (0 or 1), in the order of the pairs."""
    trust = (first & second).astype(np.int64)
    differ = np.flatnonzero(first != second)
    trust[differ] = coins[: len(differ)]
    return trust


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """One branch's view of the pairs."""

    losses: np.ndarray  # float64 [N], scaled
    probability: np.ndarray  # [N] of being clean
    clean: np.ndarray  # bool [N]
    mixture: Mixture | None  # None: the losses are all the same


def divide_branch(losses: np.ndarray, settings: MixtureSettings) -> Branch:
    """Losses [N] of one branch -> its view."""
    values = scaled(losses)
    if values.min() == values.max():
        logger.warning("all %d losses of a branch are the same: every pair counts as clean", len(values))
        return Branch(values, np.ones(len(values)), np.ones(len(values), dtype=bool), None)
    mixture = fit_two_gaussians(values, settings)
    probability = mixture.low(values)
    return Branch(values, probability, split_clean(probability), mixture)


@dataclass(frozen=True, slots=True, eq=False)
class Division:
    """One epoch's division."""

    trust: np.ndarray  # int64 [N] in {0, 1}
    branches: tuple[Branch, Branch]  # global, selected

    @property
    def disagreement(self) -> float:
        """Share of pairs that were decided by a coin."""
        return float((self.branches[0].clean != self.branches[1].clean).mean())


def divide(losses: np.ndarray, settings: MixtureSettings, rng: np.random.Generator) -> Division:
    """Losses [N, 2] of all pairs (global, selected) -> the division; coins from `rng`."""
    first, second = (divide_branch(losses[:, branch], settings) for branch in range(2))
    return Division(vote(first.clean, second.clean, rng.integers(0, 2, len(losses))), (first, second))
