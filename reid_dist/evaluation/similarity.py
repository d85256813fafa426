"""Embeddings in, similarities out: the arithmetic that ranking and re-ranking share.

Part of the evaluation package that can be copied alone into another project (NumPy, SciPy, torch and each other only).

Every score here is "greater is better", float32, and is one matrix product: several named embeddings become one matrix
by scaling each with the root of its weight and putting them side by side, so that sum_k w_k cos_k(q, g) = <q', g'>.
Squared Euclidean distance becomes a product too, through one more column (-|g|^2 / 2), because |q|^2 moves no rank.

Rows are padded with zeros to multiples of `TILE`: BLAS computes a ragged edge with other kernels than the inside, so
without padding the last bits of a score would depend on where its image stands, and equal features would not tie.

torch takes seconds to import, so it is imported only where a tensor shows that somebody has done so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

TILE = 64  # rows; a multiple of every BLAS kernel's tile
MAX_ROWS = 512  # rows of a block of scores: more gain nothing, the block would leave the processor's cache
CHUNK = 4096  # rows converted at a time, so that a conversion never holds a second copy of a side

Array = Any  # np.ndarray or torch.Tensor [N, D]
Features = Array | Mapping[str, Array]
Metric = Literal["cosine", "dot", "euclidean"]


class EvaluationError(ValueError):
    """Features or labels that cannot be scored. The message is one readable line: what, where, remedy."""


def combine(
    features: Features,
    side: str,
    *,
    metric: Metric = "cosine",
    weights: Mapping[str, float] | None = None,
    order: np.ndarray | None = None,
    multiple: int = TILE,
) -> Any:
    """Float32 matrix [P, D'] of one side, P rows padded with zeros to a multiple of `multiple`.

    Args:
        features: [N, D], or named embeddings of the same N. NumPy, or torch on any device (the result stays there).
        side: "query" or "gallery".
        weights: of the named embeddings' similarities; without them each has the same share of 1.
        order: rows to take, in order (default: all).
    Raises EvaluationError: wrong shape, names that differ from the weights, a non-finite or (cosine) all-zero row.
    """
    named = features if isinstance(features, Mapping) else {"": features}
    shares = _weights(named, weights)
    parts = [(_two_axes(named[name], f"{side} {name}".strip()), shares[name]) for name in shares]
    count = len(parts[0][0])
    if any(len(part) != count for part, _ in parts):
        raise EvaluationError(f"{side}: embeddings of different lengths {[len(part) for part, _ in parts]}")
    rows = np.arange(count) if order is None else order
    width = sum(part.shape[1] for part, _ in parts) + (metric == "euclidean")
    first = parts[0][0]
    padded = -(-max(len(rows), 1) // multiple) * multiple
    out = _zeros((padded, width), first)
    left = 0
    for part, weight in parts:
        right = left + part.shape[1]
        for start in range(0, len(rows), CHUNK):
            taken = rows[start : start + CHUNK]
            out[start : start + len(taken), left:right] = _scaled(part, taken, weight, metric, side)
        left = right
    if metric == "euclidean":
        body = out[: len(rows), :-1]
        out[: len(rows), -1] = 1.0 if side == "query" else -0.5 * (body * body).sum(1)
    return out


def distances(query: Array, gallery: Array, kind: Literal["euclidean", "cosine", "arccos"]) -> np.ndarray:
    """Distance matrix float32 [Q, G]: *squared* Euclidean, negative cosine, or the angle of the clipped cosine
    (climb.md 8.2).

    For looking at; the scorer never builds it. Raises EvaluationError as `combine`.
    """
    if kind == "euclidean":
        a, b = (host(_two_axes(x, side)).astype(np.float64) for x, side in ((query, "query"), (gallery, "gallery")))
        squared = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2.0 * (a @ b.T)
        return np.maximum(squared, 0.0).astype(np.float32)
    q, g = (host(combine(x, side)) for x, side in ((query, "query"), (gallery, "gallery")))
    cosine = (q @ g.T)[: len(query), : len(gallery)]
    return -cosine if kind == "cosine" else np.arccos(np.clip(cosine, -1 + 1e-5, 1 - 1e-5))


def constant_features(features: Features) -> bool:
    """True when all rows are equal (a collapsed model): jobs refuse such features, for their scores mean nothing."""
    for part in features.values() if isinstance(features, Mapping) else (features,):
        rows = _two_axes(part, "features")
        if len(rows) < 2 or bool((rows[1:] != rows[:1]).any()):
            return False
    return True


def is_tensor(x: Any) -> bool:
    """True for a torch tensor, without importing torch: who holds one has imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def on_device(x: Array) -> bool:
    """True for a torch tensor outside host memory; everything else is worked on as NumPy."""
    return is_tensor(x) and x.device.type != "cpu"


@contextmanager
def full_float32() -> Iterator[None]:
    """Without reduced-precision products (TF32), which would reorder near ties on a GPU."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def num_rows(features: Features) -> int:
    """N of [N, D], or of named embeddings."""
    return len(next(iter(features.values())) if isinstance(features, Mapping) else features)


def check_pair(query: Features, gallery: Features) -> None:
    """Raises EvaluationError unless both sides hold the same embeddings with the same dimensions."""
    sides = [x if isinstance(x, Mapping) else {"": x} for x in (query, gallery)]
    if set(sides[0]) != set(sides[1]):
        raise EvaluationError(
            f"query holds embeddings {sorted(sides[0])}, gallery {sorted(sides[1])}: both must be the same"
        )
    for name, part in sides[0].items():
        pair = ((part, "query"), (sides[1][name], "gallery"))
        widths = [_two_axes(x, f"{side} {name}".strip()).shape[1] for x, side in pair]
        if widths[0] != widths[1]:
            raise EvaluationError(
                f"{name} query features have {widths[0]} dimensions, gallery features {widths[1]}".strip()
            )


def stack(query: Features, gallery: Features) -> Features:
    """Both sides as one set, queries first. Raises EvaluationError as `check_pair`."""
    check_pair(query, gallery)
    if isinstance(query, Mapping):
        return {name: stack(part, gallery[name]) for name, part in query.items()}
    q, g = _two_axes(query, "query"), _two_axes(gallery, "gallery")
    if not on_device(g):
        return np.concatenate([host(q), g])
    import torch

    return torch.cat([torch.as_tensor(q, device=g.device), g])


def block_rows(columns: int, memory_mb: float) -> int:
    """Rows of float32 scores that fit the budget: a multiple of TILE, TILE at least, MAX_ROWS at most."""
    rows = int(memory_mb * 2**20 / (4 * max(columns, 1))) // TILE * TILE
    return min(max(rows, TILE), MAX_ROWS)


def score_blocks(q: Any, g: Any, num_query: int, num_gallery: int, rows: int) -> Iterator[tuple[int, Any]]:
    """(first row, scores float32 [n, G]) of matrices from `combine`, where the gallery lies; the next block overwrites
    them.

    Every product has the same shape, so a score does not depend on the shard or the place in which it is computed.
    """
    if on_device(g) != on_device(q):
        q = _beside(q, g) if on_device(g) else host(q)
    out = _zeros((rows, len(g)), g)
    for start in range(0, num_query, rows):
        if on_device(g):
            with full_float32():
                q[start : start + rows].matmul(g.T, out=out)
        else:
            np.matmul(q[start : start + rows], g.T, out=out)
        yield start, out[: num_query - start, :num_gallery]


def _zeros(shape: tuple[int, int], like: Array) -> Any:
    """Float32 zeros where `like` lies."""
    if not on_device(like):
        return np.zeros(shape, np.float32)
    import torch

    return torch.zeros(shape, device=like.device)


def _beside(x: Any, tensor: Any) -> Any:
    """`x` as a tensor on the device of `tensor`."""
    import torch

    return torch.as_tensor(x, device=tensor.device)


def host(x: Array) -> np.ndarray:
    """NumPy view or copy of a NumPy array or torch tensor; half precision becomes float32."""
    if not is_tensor(x):
        return np.asarray(x)
    x = x.detach()
    values: np.ndarray = (x.float() if x.dtype.is_floating_point and x.dtype.itemsize == 2 else x).cpu().numpy()
    return values


def _two_axes(x: Array, name: str) -> Any:
    x = x.detach() if on_device(x) else host(x)
    if x.ndim != 2 or 0 in x.shape:
        raise EvaluationError(f"{name} features: shape {tuple(x.shape)}, expected [N, D] with both positive")
    return x


def _weights(named: Mapping[str, Array], weights: Mapping[str, float] | None) -> dict[str, float]:
    if not named:
        raise EvaluationError("no embeddings given")
    if weights is None or set(named) == {""}:
        return dict.fromkeys(sorted(named), 1.0 / len(named))
    missing = sorted(set(weights) - set(named))
    if missing:
        raise EvaluationError(f"weights name embeddings {missing} that are not there; there are {sorted(named)}")
    if any(not np.isfinite(w) or w < 0 for w in weights.values()) or not sum(weights.values()) > 0:
        raise EvaluationError(f"weights {dict(weights)}: expected none below 0 and one above")
    return {name: float(weights[name]) for name in sorted(weights) if weights[name] > 0}


def _scaled(part: Any, rows: np.ndarray, weight: float, metric: Metric, side: str) -> Any:
    """Rows as float32, of unit length for the cosine, times the root of the weight."""
    root = float(np.sqrt(weight))
    if on_device(part):
        x = part[_beside(rows, part)].float()
        norm = x.double().norm(dim=1).cpu().numpy()
    else:
        x = part[rows].astype(np.float32, copy=False)
        norm = np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64))
    bad = np.flatnonzero(~np.isfinite(norm))
    if len(bad):
        raise EvaluationError(
            f"{side} features: row {rows[bad[0]]} is not finite ({len(bad)} of {len(rows)} looked at)"
        )
    if metric != "cosine":
        return x * root
    if not norm.all():
        raise EvaluationError(
            f"{side} features: row {rows[np.flatnonzero(norm == 0)[0]]} is all zeros, it has no direction"
        )
    scale = (root / norm).astype(np.float32)[:, None]
    return x * (_beside(scale, part) if on_device(part) else scale)
