"""Noisy correspondence as a stored permutation: caption i of the training pairs is that of pair index[i] (methods/icl.md 3.4).

A permutation is a file, `<root>/noise/<name>.npy` (int64 [N], the form of the published index files), made or imported once and
read by every rank; its digest goes into checkpoints. Pairs are the captions of the training rows in the annotation file's order.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np

from reid_dist.errors import UserError
from reid_dist.storage import check_name, open_store


@dataclass(frozen=True, slots=True, eq=False)
class NoiseIndex:
    """A permutation of captions."""

    index: np.ndarray  # int64 [N]
    digest: bytes  # SHA-256 of its int64 values

    @property
    def moved(self) -> np.ndarray:
        """bool [N]: pairs with a caption that is not theirs."""
        return self.index != np.arange(len(self.index))

    @property
    def rate(self) -> float:
        """Share of moved pairs."""
        return float(self.moved.mean()) if len(self.index) else 0.0


def draw_permutation(count: int, rate: float, seed: int) -> np.ndarray:
    """int64 [N]: floor(rate N) places are drawn and their captions permuted among themselves (some may stay).

    NumPy's legacy generator, as the published files: shuffle 0 ... N-1, take the head, shuffle a copy of it. Raises UserError.
    """
    if not 0 <= rate <= 1 or count < 1:
        raise UserError(f"rate={rate} of {count} pairs: the rate lies between 0 and 1, and there must be pairs")
    rng = np.random.RandomState(seed)
    order = np.arange(count)
    rng.shuffle(order)
    head = order[: int(rate * count)]
    moved = head.copy()
    rng.shuffle(moved)
    index = np.arange(count)
    index[head] = moved
    return index


def checked(values: np.ndarray, count: int | None, where: str) -> NoiseIndex:
    """A permutation of `count` pairs (None: of its own length). Raises UserError for another length or no permutation."""
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise UserError(f"{where}: expected whole numbers in one row, found {values.dtype} {values.shape}")
    if count is not None and len(values) != count:
        raise UserError(
            f"{where} permutes {len(values)} captions, the training tables have {count}: it was made for another set, version or "
            "split (data.val_fraction holds captions out too); make one for this table"
        )
    if not np.array_equal(np.sort(values), np.arange(len(values))):
        raise UserError(f"{where} is no permutation: each number from 0 to {len(values) - 1} must stand in it once")
    index = np.ascontiguousarray(values, dtype="<i8")
    return NoiseIndex(index, hashlib.sha256(index.tobytes()).digest())


def parse(content: bytes, count: int | None, where: str) -> NoiseIndex:
    """`checked` of an .npy file. Raises UserError for anything else, pickled arrays included."""
    try:
        values = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{where} is not a plain .npy file of numbers: {error}") from None
    return checked(values, count, where)


def _key(name: str) -> str:
    return f"noise/{check_name(name, 'permutation')}.npy"


def store_permutation(root: str, name: str, noise: NoiseIndex) -> str:
    """Publish a permutation under `name`; returns its key. Raises UserError when another one has the name."""
    stream = io.BytesIO()
    np.save(stream, noise.index)
    store, key = open_store(root), _key(name)
    if store.exists(key):
        if parse(store.read(key), None, key).digest != noise.digest:
            raise UserError(f"{store.uri}/{key} holds another permutation: runs refer to it, choose another name=")
        return key
    store.write(key, stream.getvalue())
    return key


def open_permutation(root: str, name: str, count: int) -> NoiseIndex:
    """The permutation `name` for `count` training pairs. Raises UserError when it is not there or does not fit."""
    store, key = open_store(root), _key(name)
    try:
        content = store.read(key)
    except FileNotFoundError:
        raise UserError(
            f"there is no permutation {name!r} under {root}: make it with `python -m reid_dist.methods.icl make-noise "
            f"name={name} table=TABLE rate=RATE root={root}`, or import a published file (import-noise)"
        ) from None
    return parse(content, count, f"{store.uri}/{key}")
