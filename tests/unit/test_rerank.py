"""k-reciprocal re-ranking against the authors' vectors and a dense float64 oracle; query expansion by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from reid_dist.evaluation.expansion import expand_queries
from reid_dist.evaluation.ranking import EvaluationError, Labels, Scoring, rank_blocks, rank_scores
from reid_dist.evaluation.rerank import KReciprocal
from tests.golden import cases, load


def dense(query, gallery, k1, k2, lambda_value) -> np.ndarray:
    """datasets.md 6.9 line by line with N x N matrices, in float64."""
    x = np.concatenate([query, gallery]).astype(np.float64)
    squared = ((x[:, None] - x[None]) ** 2).sum(-1)
    distance = (squared / squared.max(axis=0)).T
    order = np.argsort(distance, axis=1, kind="stable")
    n = len(x)

    def reciprocal(i, k):
        forward = order[i, : k + 1]
        return [j for j in forward if i in order[j, : k + 1]]

    weights = np.zeros((n, n))
    for i in range(n):
        base = reciprocal(i, k1)
        members = set(base)
        for j in base:
            candidate = reciprocal(j, round(k1 / 2))
            if len(set(candidate) & set(base)) > 2 / 3 * len(candidate):
                members |= set(candidate)
        chosen = sorted(members)
        weights[i, chosen] = np.exp(-distance[i, chosen])
        weights[i] /= weights[i].sum()
    if k2 > 1:
        weights = np.stack([weights[order[i, :k2]].mean(axis=0) for i in range(n)])
    q = len(query)
    shared = np.minimum(weights[:q, None], weights[None, q:]).sum(-1)
    return (1 - lambda_value) * (1 - shared / (2 - shared)) + lambda_value * distance[:q, q:]


def crowd(seed, q=40, g=260, ids=30, dim=24, noise=0.6):
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal((ids, dim))
    pid = rng.integers(0, ids, q + g)
    x = (centre[pid] + noise * rng.standard_normal((q + g, dim))).astype(np.float32)
    return x[:q], x[q:], Labels(pid[:q]), Labels(pid[q:])


@cases("muva", "re_ranking")
def test_muva_re_ranking(case):
    z = load(case)
    found = KReciprocal(
        z["in_query"], z["in_gallery"], k1=z["in_k1"], k2=z["in_k2"], lambda_value=z["in_lambda"], metric="euclidean"
    ).matrix()
    np.testing.assert_allclose(found, z["out_dist"], rtol=5e-3, atol=3e-3)


@cases("climb", "k_reciprocal_rerank")
def test_climb_re_ranking(case):
    z = load(case)
    parameters = {"k1": z["const_k1"], "k2": z["const_k2"], "lambda_value": z["const_lambda"]}
    found = KReciprocal(z["in_query"], z["in_gallery"], metric="euclidean", **parameters).matrix()
    np.testing.assert_allclose(found, z["out_dist"], rtol=0, atol=6e-3)


@pytest.mark.parametrize(("k1", "k2"), [(20, 6), (5, 1), (15, 3), (7, 12), (400, 6)])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_equals_the_dense_oracle(k1, k2, metric):
    q, g, *_ = crowd(k1, q=12, g=60, ids=8) if k1 > 100 else crowd(k1)  # more neighbours than items
    found = KReciprocal(q, g, k1=k1, k2=k2, metric=metric).matrix()
    if metric == "cosine":
        q, g = (x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (q, g))
    np.testing.assert_allclose(found, dense(q, g, k1, k2, 0.3), rtol=0, atol=2e-5)


def test_blocks_budget_and_torch_change_no_digit():
    q, g, *_ = crowd(1, q=300, g=2000, ids=150)
    whole = KReciprocal(q, g).matrix()
    for budget in (0.6, 2.5):
        np.testing.assert_array_equal(KReciprocal(q, g, memory_mb=budget).matrix(), whole)
    np.testing.assert_array_equal(KReciprocal(torch.tensor(q), torch.tensor(g)).matrix(), whole)
    assert [len(b) for b in KReciprocal(q, g, memory_mb=0.6).blocks()] == [64, 64, 64, 64, 44]


def test_gallery_order_changes_nothing():
    q, g, *_ = crowd(2)
    order = np.random.default_rng(0).permutation(len(g))
    np.testing.assert_allclose(KReciprocal(q, g[order]).matrix(), KReciprocal(q, g).matrix()[:, order], atol=1e-6)


def test_equal_features_stay_finite_and_it_helps_the_ranking():
    same = np.ones((30, 4), np.float32)
    assert np.isfinite(KReciprocal(same[:5], same[5:]).matrix()).all()
    q, g, query, gallery = crowd(3, noise=0.8)
    plain = rank_scores(q @ g.T, query, gallery).record()["mAP"]
    better = rank_blocks((-b for b in KReciprocal(q, g).blocks()), query, gallery, Scoring()).record()
    assert better["mAP"] > plain + 0.03
    assert better == rank_scores(-KReciprocal(q, g).matrix(), query, gallery).record()


@pytest.mark.parametrize("parts", [2, 4, 7])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_shares_of_the_work_give_the_same_digits(metric, parts):
    q, g, *_ = crowd(7)

    def made(reach=None) -> KReciprocal:
        return KReciprocal(q, g, metric=metric, memory_mb=0.1, reach=reach)

    def shares(count):
        return itertools.pairwise(np.linspace(0, count, parts + 1).astype(int).tolist())

    found = [made().neighbours(*share) for share in shares(len(q) + len(g))]
    reach = made().fit(found)
    blocks = [block.copy() for share in shares(len(q)) for block in made(reach).blocks(*share)]
    np.testing.assert_array_equal(np.concatenate(blocks), made().matrix())
    with pytest.raises(EvaluationError, match="neighbours of"):
        made().fit(found[:-1])


def test_named_embeddings_add_their_squared_distances():
    q, g, *_ = crowd(4)
    halves = {"a": q[:, :12], "b": q[:, 12:]}, {"a": g[:, :12], "b": g[:, 12:]}
    found = KReciprocal(*halves, weights={"a": 1.0, "b": 1.0}, metric="euclidean").matrix()
    np.testing.assert_allclose(found, KReciprocal(q, g, metric="euclidean").matrix(), atol=1e-6)


def test_parameters_that_make_no_sense_are_refused():
    q, g, *_ = crowd(5)
    for bad in ({"k1": 0}, {"k2": 0}, {"lambda_value": 1.5}, {"metric": "dot"}):
        with pytest.raises(EvaluationError):
            KReciprocal(q, g, **bad)


def test_query_expansion_by_hand():
    q = np.array([[2.0, 0.0]], np.float32)
    g = np.array([[3.0, 4.0], [0.0, 1.0], [-1.0, 0.0]], np.float32)
    expected = np.array([1.0, 0.0]) + 0.6**2 * np.array([0.6, 0.8])
    found = expand_queries(q, g, k=3, alpha=2.0)  # the others have cosines 0 and -1: no weight
    np.testing.assert_allclose(found[0], expected / np.linalg.norm(expected), rtol=1e-6)
    plain = np.array([1.6, 0.8])
    np.testing.assert_allclose(expand_queries(q, g, k=1, alpha=0.0)[0], plain / np.linalg.norm(plain), rtol=1e-6)
    q, g, query, gallery = crowd(6, noise=0.9)
    scores = [x @ (g / np.linalg.norm(g, axis=1, keepdims=True)).T for x in (q, expand_queries(q, g))]
    before, after = (rank_scores(s, query, gallery).record()["mAP"] for s in scores)
    assert after > before
    with pytest.raises(EvaluationError, match="alpha"):
        expand_queries(q, g, alpha=-1)
    with pytest.raises(EvaluationError, match="k=0"):
        expand_queries(q, g, k=0)
