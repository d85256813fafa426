"""Random draws that do not depend on the layout of the run.

Every draw comes from (seed, epoch, position in the epoch's plan, row, stream name), never from a rank, a worker or the order
in which batches happen to be prepared. So N workers, micro-batches, a resumed run and a single process all draw the same.
"""

from __future__ import annotations

import hashlib

import numpy as np


def _key(*parts: int | str) -> bytes:
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=16).digest()


def row_rng(seed: int, epoch: int, position: int, row: int, stream: str) -> np.random.Generator:
    """Generator for one row's augmentation. `position` counts the epoch's plan, `row` is the table row."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_key(seed, epoch, position, row, stream), "little")))


def plan_rng(seed: int, epoch: int, stream: str) -> np.random.Generator:
    """Generator for a whole epoch's plan (shuffles, identity draws)."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_key(seed, epoch, stream), "little")))


def row_seeds(seed: int, epoch: int, positions: np.ndarray, stream: str) -> np.ndarray:
    """int64 [n] seeds for draws inside the model (dropout): one per plan position, the same on every layout."""
    base = int.from_bytes(_key(seed, epoch, stream)[:8], "little", signed=True)
    with np.errstate(over="ignore"):
        mixed = (positions.astype(np.int64) + 1) * np.int64(-7046029254386353131) + np.int64(base)
        return mixed ^ (mixed >> np.int64(29))
