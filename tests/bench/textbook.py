"""Evaluation as every textbook and most ReID code bases write it: the baseline that bench_evaluation.py measures
against.

All distances, one index sort of all pairs, labels gathered for all pairs, vectorised average precision; re-ranking with
dense N x N matrices. Written for this bench; nothing in the library uses it.
"""

from __future__ import annotations

import numpy as np


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def rank(query, gallery, q_pid, g_pid, q_cam=None, g_cam=None) -> dict[str, float]:
    """CMC-1, mAP, mINP of features [Q, D] against [G, D], with same-id same-camera removal where cameras are given."""
    return rank_distance(-(unit(query) @ unit(gallery).T), q_pid, g_pid, q_cam, g_cam)


def rank_distance(distance, q_pid, g_pid, q_cam=None, g_cam=None) -> dict[str, float]:
    order = np.argsort(distance, axis=1)
    matches = g_pid[order] == q_pid[:, None]
    first, precisions, inverse = [], [], []
    for i in range(len(distance)):
        found = matches[i]
        if q_cam is not None:
            found = found[~(found & (g_cam[order[i]] == q_cam[i]))]
        if not found.any():
            continue
        hits = found.cumsum()
        precision = hits / np.arange(1, len(hits) + 1)
        first.append(found[0])
        precisions.append((precision * found).sum() / hits[-1])
        inverse.append(hits[-1] / (np.flatnonzero(found)[-1] + 1))
    return {"rank1": float(np.mean(first)), "mAP": float(np.mean(precisions)), "mINP": float(np.mean(inverse))}


def rerank(query, gallery, k1=20, k2=6, lambda_value=0.3) -> np.ndarray:
    """k-reciprocal distances [Q, G] with dense matrices (datasets.md 6.9, float32)."""
    x = unit(np.concatenate([query, gallery]))
    n, q = len(x), len(query)
    distance = 2.0 - 2.0 * (x @ x.T)
    distance = (distance / distance.max(axis=0)).T
    order = np.argsort(distance, axis=1)
    half = round(k1 / 2)
    weights = np.zeros_like(distance)
    for i in range(n):
        base = reciprocal(order, i, k1)
        members = base
        for j in base:
            candidate = reciprocal(order, j, half)
            if len(np.intersect1d(candidate, base)) > 2 / 3 * len(candidate):
                members = np.append(members, candidate)
        members = np.unique(members)
        weight = np.exp(-distance[i, members])
        weights[i, members] = weight / weight.sum()
    if k2 > 1:
        weights = np.stack([weights[order[i, :k2]].mean(axis=0) for i in range(n)])
    holders = [np.flatnonzero(weights[:, j]) for j in range(n)]
    result = np.empty((q, n - q), np.float32)
    for i in range(q):
        shared = np.zeros(n, np.float32)
        for j in np.flatnonzero(weights[i]):
            shared[holders[j]] += np.minimum(weights[i, j], weights[holders[j], j])
        result[i] = (1 - lambda_value) * (1 - shared[q:] / (2 - shared[q:])) + lambda_value * distance[i, q:]
    return result


def reciprocal(order: np.ndarray, i: int, k: int) -> np.ndarray:
    forward = order[i, : k + 1]
    return forward[(order[forward, : k + 1] == i).any(axis=1)]
