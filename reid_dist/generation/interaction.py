"""Test-time interaction: which candidate is taken as the described person, and what that changes in the ranking.

Per query (methods/icl.md section 6; THI of ICL): s = similarity of the first of K candidates, xi a threshold.

    s >  xi: ask about candidate 1 only. Yes: it is the anchor. No: the query stays.
    s <= xi: ask about candidate 1. Yes: the query stays (a confident yes on a weak match is distrusted).
             No: ask candidates 2..K in order; the first yes is the anchor; none: the query stays.

The released loop asks every query that has no anchor in every round; the extra answers cannot change anything and are not
asked here. A query depends only on itself, so there is no barrier between rounds: the state after round k follows from the
round of acceptance. A query with an anchor is merged with the anchor's description to q^; the final score is
`w S(q, g) + (1 - w) S(q^, g)`, with S(q^, anchor) = 1: one search with the blended, un-normalised query.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reid_dist.errors import UserError

NO_ANCHOR = -1
Shown = Callable[[int], Awaitable[bool]]  # candidate (gallery row) -> whether it shows the described person


@dataclass(frozen=True, slots=True)
class Policy:
    """K rounds, threshold xi, weight of the unrefined similarity."""

    rounds: int = 5
    threshold: float = 0.5
    weight: float = 0.8

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UserError(f"rounds={self.rounds}: from 1")
        if not 0 <= self.weight <= 1:
            raise UserError(f"weight={self.weight}: between 0 and 1")


@dataclass(frozen=True, slots=True)
class Search:
    """How one query went. `answers`: yes or no of the candidates asked, in order."""

    anchor: int  # gallery row; -1: none
    round: int  # of acceptance, from 1; 0 without an anchor
    answers: tuple[bool, ...]

    def anchor_after(self, number: int) -> int:
        """The anchor at the end of round `number` (from 1)."""
        return self.anchor if 0 < self.round <= number else NO_ANCHOR


async def find_anchor(top_score: float, candidates: Sequence[int], shown: Shown, policy: Policy) -> Search:
    """Ask about one query's candidates (gallery rows, best first)."""
    if not candidates:
        return Search(NO_ANCHOR, 0, ())
    first = await shown(int(candidates[0]))
    answers = [first]
    if top_score > policy.threshold:
        return Search(int(candidates[0]), 1, (True,)) if first else Search(NO_ANCHOR, 0, (False,))
    if first:
        return Search(NO_ANCHOR, 0, (True,))
    for number, candidate in enumerate(candidates[1 : policy.rounds], start=2):
        answers.append(await shown(int(candidate)))
        if answers[-1]:
            return Search(int(candidate), number, tuple(answers))
    return Search(NO_ANCHOR, 0, tuple(answers))


def calls_of_released_loop(searches: Sequence[Search], rounds: int, candidates: int) -> int:
    """What the released loop asks: in every round every query that has no anchor yet."""
    return sum(search.round or min(rounds, candidates) for search in searches)


def candidates_of(scores: np.ndarray, count: int) -> np.ndarray:
    """int64 [n, min(count, G)]: best gallery rows of each row of `scores` [n, G], best first, ties to the lower row."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


Embeddings = Mapping[str, np.ndarray]  # named, [N, D] each


def blended(query: Embeddings, refined: Embeddings, anchors: np.ndarray, weight: float) -> dict[str, np.ndarray]:
    """The query rows to search with: unit length, and where there is an anchor `weight q + (1 - weight) q^`.

    query, refined: named embeddings [Q, D]; anchors int64 [Q], -1 for none.
    """
    has = (anchors != NO_ANCHOR)[:, None]
    mixed = {}
    for name, values in query.items():
        base, other = unit_rows(values), unit_rows(refined[name])
        mixed[name] = np.where(has, weight * base + (1 - weight) * other, base)
    return mixed


def place_anchors(scores: np.ndarray, base: np.ndarray, anchors: np.ndarray, weight: float) -> np.ndarray:
    """Overwrite each anchor's score by `weight S(q, a) + 1 - weight`, in place.

    scores [n, G]; base [n]: S(q, a) of each query's anchor (unused without one); anchors int64 [n].
    """
    rows = np.flatnonzero(anchors != NO_ANCHOR)
    scores[rows, anchors[rows]] = weight * base[rows] + (1 - weight)
    return scores


def unit_rows(values: np.ndarray) -> np.ndarray:
    """Rows at unit length, float32 or better."""
    wide = values.astype(np.float64)
    return (wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)).astype(values.dtype)


def rerank(
    query: Embeddings,
    refined: Embeddings,
    gallery: Embeddings,
    anchors: np.ndarray,
    weight: float,
    shares: Mapping[str, float] | None = None,
) -> np.ndarray:
    """Final scores [Q, G] of a block of queries: the named cosine similarities with their `shares` (default: equal ones),
    blended, anchors placed.
    """
    shares = shares or dict.fromkeys(gallery, 1 / len(gallery))
    mixed = blended(query, refined, anchors, weight)
    scores, base = np.zeros((1, 1), np.float32), np.zeros(len(anchors), np.float32)
    chosen = np.maximum(anchors, 0)
    for name, share in shares.items():
        items = unit_rows(gallery[name])
        scores = scores + share * (mixed[name] @ items.T)
        base = base + share * np.einsum("qd,qd->q", unit_rows(query[name]), items[chosen])
    return place_anchors(scores, base, anchors, weight)
