"""Corruption of token ids, and captions reorganised from their groups (methods/icl.md section 3.3), given their draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reid_dist.data.captions import Groups

MASK_BELOW, REPLACE_BELOW = 0.6, 0.8  # of the chosen words: masked, replaced, else deleted


def corrupt_tokens(
    ids: np.ndarray, uniform: np.ndarray, replacement: np.ndarray, mask_id: int, share: float = 0.2
) -> np.ndarray:
    """int64 [L]: each id with 0 < id < mask_id whose uniform u is below `share` is masked, replaced or deleted.

    With v = u / share: v < 0.6 puts the mask, v < 0.8 the next of `replacement`, else later ids move left and zeros follow.

    Args:
        uniform: one number in [0, 1) per eligible id, in order.
        replacement: ids 1 ... mask_id - 1, one for each id that is replaced, in order.
    """
    eligible = np.flatnonzero((ids > 0) & (ids < mask_id))
    v = uniform / share if share else np.full(len(eligible), np.inf)
    changed = ids.copy()
    changed[eligible[v < MASK_BELOW]] = mask_id
    changed[eligible[replaced(uniform, share)]] = replacement
    kept = np.delete(changed, eligible[(v >= REPLACE_BELOW) & (v < 1)])
    return np.concatenate([kept, np.zeros(len(ids) - len(kept), dtype=ids.dtype)])


def replaced(uniform: np.ndarray, share: float) -> np.ndarray:
    """bool: which eligible ids `corrupt_tokens` replaces."""
    return (uniform >= MASK_BELOW * share) & (uniform < REPLACE_BELOW * share)


def draw_corrupted(ids: np.ndarray, rng: np.random.Generator, mask_id: int, share: float) -> np.ndarray:
    """`corrupt_tokens` with draws of `rng`."""
    uniform = rng.random(int(((ids > 0) & (ids < mask_id)).sum()))
    replacement = rng.integers(1, mask_id, int(replaced(uniform, share).sum()))
    return corrupt_tokens(ids, uniform, replacement, mask_id, share)


def join_groups(groups: Groups, order: Sequence[int], choice: Sequence[int]) -> str:
    """A reorganised caption: place j holds wording choice[j] of group order[j]; joined by single spaces."""
    return " ".join(groups[group][wording] for group, wording in zip(order, choice, strict=True))


def draw_reorganised(groups: Groups, rng: np.random.Generator) -> str:
    """`join_groups` with a shuffled order and one wording of each group, uniformly."""
    order = rng.permutation(len(groups)).tolist()
    return join_groups(groups, order, [int(rng.integers(len(groups[group]))) for group in order])
