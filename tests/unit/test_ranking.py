"""Ranking against the authors' vectors, against a float64 oracle written the plain way, and its promises one by one."""

from __future__ import annotations

import re
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from reid_dist.evaluation import blocks
from reid_dist.evaluation.neighbours import nearest
from reid_dist.evaluation.ranking import (
    EvaluationError,
    Labels,
    RankingSums,
    Scoring,
    average_records,
    chance,
    rank_blocks,
    rank_features,
    rank_scores,
)
from reid_dist.evaluation.similarity import constant_features, distances
from tests.golden import cases, load

MARKET = Scoring(same_camera=True)
SYSU = Scoring(camera_pairs=((3, 2),), unique_ids=True)
LLCM = Scoring(same_camera=True, unique_ids=True)


def oracle(scores, query: Labels, gallery: Labels, scoring: Scoring) -> dict[str, np.ndarray]:
    """Per-query rank, AP, INP by sorting everything in float64, negatives before matches where scores tie."""
    out = {"rank": [], "ap": [], "inp": [], "matches": [], "kept": [], "tied": []}
    for i, (pid, cam) in enumerate(zip(query.pid, query.cameras(), strict=True)):
        keep = gallery.pid != -1
        if scoring.same_camera:
            keep &= ~((gallery.pid == pid) & (gallery.cameras() == cam) & (cam != -1))
        for q_cam, g_cam in scoring.camera_pairs:
            if cam == q_cam:
                keep &= gallery.cameras() != g_cam
        values, ids = np.asarray(scores[i], np.float64)[keep], gallery.pid[keep]
        match = ids == pid
        order = np.lexsort((match, -values))
        match, ids = match[order], ids[order]
        where = np.flatnonzero(match) + 1
        precision = np.arange(1, len(where) + 1) / where
        if scoring.trapezoid:
            before = [(k / (r - 1) if r > 1 else 1.0) for k, r in enumerate(where)]
            precision = (precision + np.array(before)) / 2
        found = len(where) > 0 and pid != -1
        first = where[0] if found else 0
        if found and scoring.unique_ids:
            first = len(dict.fromkeys(ids[: where[0]].tolist()))
        out["rank"].append(first)
        out["ap"].append(precision.mean() if found else 0.0)
        out["inp"].append(len(where) / where[-1] if found else 0.0)
        out["matches"].append(len(where) if found else 0)
        out["kept"].append(keep.sum())
        negatives = set(values[ids_of(gallery, keep) != pid].tolist())
        out["tied"].append(sum(v in negatives for v in values[ids_of(gallery, keep) == pid]) if found else 0)
    return {key: np.array(value) for key, value in out.items()}


def ids_of(gallery: Labels, keep: np.ndarray) -> np.ndarray:
    return gallery.pid[keep]


def world(seed: int, q: int = 130, g: int = 700, ids: int = 40, cams: int = 4, dim: int = 16, noise: float = 1.5):
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal((ids + 3, dim))
    query = Labels(rng.integers(0, ids + 3, q), rng.integers(-1, cams, q))
    gallery = Labels(rng.integers(-1, ids, g), rng.integers(-1, cams, g))
    noisy = [centre[x.pid] + noise * rng.standard_normal((len(x.pid), dim)) for x in (query, gallery)]
    return noisy[0].astype(np.float32), noisy[1].astype(np.float32), query, gallery


def assert_equals_oracle(sums: RankingSums, expected: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(sums.rank[:, 0], expected["rank"])
    for name in ("matches", "kept", "tied"):
        np.testing.assert_array_equal(getattr(sums, name), expected[name], err_msg=name)
    for name in ("ap", "inp"):
        np.testing.assert_allclose(getattr(sums, name), expected[name], rtol=0, atol=1e-14, err_msg=name)


# -- authors' vectors ------------------------------------------------------------------------------------------------


@cases("comoe", "rank_metrics")
def test_comoe_rank_metrics(case):
    z = load(case)
    sums = rank_scores(z["in_similarity"], Labels(z["in_query_pid"]), Labels(z["in_gallery_pid"]))
    np.testing.assert_allclose(100 * sums.cmc(z["const_max_rank"]), z["out_cmc_percent"], rtol=1e-5)
    record = sums.record()
    assert 100 * record["mAP"] == pytest.approx(z["out_map_percent"], rel=1e-5)
    assert 100 * record["mINP"] == pytest.approx(z["out_minp_percent"], rel=1e-5)
    found = nearest(np.eye(len(z["in_similarity"]), dtype=np.float32), z["in_similarity"].T, 1000, metric="dot")
    np.testing.assert_array_equal(found.index, z["out_order"])


@cases("comoe", "retrieval_eval")
def test_comoe_retrieval_both_directions(case):
    z = load(case)
    text, image = Labels(z["in_text_pid"]), Labels(z["in_image_pid"])
    t2i = rank_features(z["in_text_feat"], z["in_image_feat"], text, image)
    i2t = rank_features(z["in_image_feat"], z["in_text_feat"], image, text)
    for sums, name in ((t2i, "t2i"), (i2t, "i2t")):
        np.testing.assert_allclose(100 * sums.cmc(len(z[f"out_{name}_cmc"])), z[f"out_{name}_cmc"], rtol=1e-5)
        assert 100 * sums.record()["mAP"] == pytest.approx(z[f"out_{name}_map"], rel=1e-5)
        assert 100 * sums.record()["mINP"] == pytest.approx(z[f"out_{name}_minp"], rel=1e-5)
    assert 100 * t2i.record()["rank1"] == pytest.approx(z["out_selection_score"])


@cases("icl", "text_metrics")
def test_icl_text_metrics(case):
    z = load(case)
    sums = rank_scores(z["in_similarity"], Labels(z["in_query_pids"]), Labels(z["in_gallery_pids"]))
    record = sums.record()
    np.testing.assert_allclose(100 * sums.cmc(len(z["out_cmc"])), z["out_cmc"], atol=1e-4)
    assert 100 * record["mAP"] == pytest.approx(z["out_mAP"], abs=1e-4)
    assert 100 * record["mINP"] == pytest.approx(z["out_mINP"], abs=1e-4)
    row = [100 * record[k] for k in ("rank1", "rank5", "rank10", "mAP", "mINP")]
    np.testing.assert_allclose([*row, sum(row[:3])], z["out_row"], atol=1e-4)


@cases("icl", "dual_similarity")
def test_icl_mean_of_two_cosines(case):
    z = load(case)
    text = {"bge": z["in_txt_bge"], "tse": z["in_txt_tse"]}
    image = {"tse": z["in_img_tse"], "bge": z["in_img_bge"]}
    record = rank_features(text, image, Labels(z["in_query_pids"]), Labels(z["in_gallery_pids"])).record()
    assert 100 * record["rank1"] == pytest.approx(z["out_rank1"], abs=1e-3)
    found = nearest(text, image, z["out_similarity"].shape[1])
    dense = np.empty_like(z["out_similarity"])
    np.put_along_axis(dense, found.index, found.score, axis=1)
    np.testing.assert_allclose(dense, z["out_similarity"], atol=1e-5)


@cases("muva", "cmc_map")
@pytest.mark.parametrize("_", [0])
def test_muva_cmc_map(case, _):
    check_cmc_map(load(case), "in_max_rank")


@cases("climb", "cmc_map")
def test_climb_cmc_map(case):
    check_cmc_map(load(case), "const_max_rank")


def check_cmc_map(z, max_rank):
    query, gallery = Labels(z["in_query_pid"], z["in_query_cam"]), Labels(z["in_gallery_pid"], z["in_gallery_cam"])
    sums = rank_scores(-z["in_dist"], query, gallery, MARKET)
    curve = sums.cmc(z[max_rank])
    np.testing.assert_allclose(curve[: len(z["out_cmc"])], z["out_cmc"], rtol=1e-6, atol=1e-7)
    assert (curve[len(z["out_cmc"]) :] == curve[len(z["out_cmc"]) - 1]).all()  # a short curve ends at its last value
    assert sums.record()["mAP"] == pytest.approx(z["out_map"], abs=1e-6)


@cases("muva", "retrieval_eval")
def test_muva_retrieval(case):
    z = load(case)
    n = z["in_num_query"]
    sides = [Labels(z["in_pid"][part], z["in_cam"][part]) for part in (slice(None, n), slice(n, None))]
    metric = "cosine" if z["in_l2_normalise"] else "euclidean"
    sums = rank_features(z["in_feat"][:n], z["in_feat"][n:], *sides, MARKET, metric=metric)
    np.testing.assert_allclose(sums.cmc(len(z["out_cmc"])), z["out_cmc"], rtol=1e-6)
    assert sums.record()["mAP"] == pytest.approx(z["out_map"], rel=1e-6)
    feat = z["in_feat"]
    if z["in_l2_normalise"]:
        feat = feat / np.linalg.norm(feat, axis=1, keepdims=True)
    np.testing.assert_allclose(distances(feat[:n], feat[n:], "euclidean"), z["out_dist"], rtol=1e-4, atol=1e-5)


@cases("climb", "reid_evaluator")
def test_climb_evaluator(case):
    z = load(case)
    n, pid, cam = z["const_num_query"], z["in_pid"], z["in_cam"]
    sides = Labels(pid[:n], cam[:n]), Labels(pid[n:], cam[n:])
    main, sp = z["in_feat_main"], z["in_feat_sp"]
    concat = "cosine" if z["const_normalised_in_original"] else "euclidean"
    scored = {
        "concat": rank_features(z["in_feat"][:n], z["in_feat"][n:], *sides, MARKET, metric=concat),
        "main": rank_features(main[:n], main[n:], *sides, MARKET),
        "sp": rank_features(sp[:n], sp[n:], *sides, MARKET),
        "sum": rank_features({"a": main[:n], "b": sp[:n]}, {"a": main[n:], "b": sp[n:]}, *sides, MARKET),
    }
    for name, sums in scored.items():
        np.testing.assert_allclose(sums.cmc(len(z[f"out_cmc_{name}"])), z[f"out_cmc_{name}"], atol=1e-6, err_msg=name)
        assert sums.record()["mAP"] == pytest.approx(z[f"out_map_{name}"], abs=1e-6)


@cases("climb", "feature_distances")
def test_climb_distances(case):
    z = load(case)
    for kind, key, atol in (
        ("euclidean", "sq_euclidean", 1e-5),
        ("arccos", "arccos", 1e-4),
        ("cosine", "negative_cosine", 1e-5),
    ):
        found, expected = distances(z["in_query"], z["in_gallery"], kind), z[f"out_{key}"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol * max(1.0, np.abs(expected).max()), err_msg=kind)


@cases("rle", "metric_sysu", "metric_llcm", "metric_regdb")
def test_rle_metrics(case):
    z = load(case)
    kind = re.match(r"metric_([a-z]+)__", case.name)[1]
    scoring = {"sysu": SYSU, "llcm": LLCM, "regdb": Scoring()}[kind]
    query, gallery = Labels(z["in_q_pid"], z.get("in_q_cam")), Labels(z["in_g_pid"], z.get("in_g_cam"))
    sums = rank_scores(-z["in_dist"], query, gallery, scoring)
    np.testing.assert_allclose(sums.cmc(len(z["out_cmc"])), z["out_cmc"], atol=1e-6)
    assert sums.record()["mAP"] == pytest.approx(z["out_map"], abs=1e-6)
    assert sums.record()["mINP"] == pytest.approx(z["out_minp"], abs=1e-6)


# -- oracle ----------------------------------------------------------------------------------------------------------

RULES = [Scoring(), MARKET, SYSU, LLCM, Scoring(same_camera=True, trapezoid=True)]


@pytest.mark.parametrize("scoring", RULES)
@pytest.mark.parametrize("levels", [None, 9])
def test_scores_equal_float64_oracle(scoring, levels):
    q, g, query, gallery = world(3)
    scores = q.astype(np.float64) @ g.T.astype(np.float64)
    if levels:  # ties everywhere
        scores = np.round(scores / np.abs(scores).max() * levels)
    assert_equals_oracle(rank_scores(scores, query, gallery, scoring), oracle(scores, query, gallery, scoring))


@pytest.mark.parametrize("sort_above", [0, 96])
@pytest.mark.parametrize("ids", [3, 40])
def test_both_ways_of_counting_equal_the_oracle(sort_above, ids, monkeypatch):
    monkeypatch.setattr(blocks, "SORT_ABOVE", sort_above)
    q, g, query, gallery = world(5, ids=ids, noise=0.4)
    scores = np.round(q @ g.T, 1)
    assert_equals_oracle(rank_scores(scores, query, gallery, MARKET), oracle(scores, query, gallery, MARKET))


@pytest.mark.parametrize("scoring", RULES)
def test_device_block_gives_the_same_integers(scoring, monkeypatch):
    q, g, query, gallery = world(6)
    scores = np.round(q @ g.T, 1)
    expected = rank_scores(scores, query, gallery, scoring)
    monkeypatch.setattr("reid_dist.evaluation.ranking.block_of", lambda s: blocks.DeviceBlock(torch.tensor(s)))
    found = rank_scores(scores, query, gallery, scoring)
    for name in ("rank", "ap", "inp", "matches", "kept", "tied"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def test_features_equal_float64_oracle_and_torch_equals_numpy():
    q, g, query, gallery = world(7)
    unit = [x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (q, g)]
    expected = oracle(unit[0] @ unit[1].T, query, gallery, MARKET)
    sums = rank_features(q, g, query, gallery, MARKET)
    assert_equals_oracle(sums, expected)
    from_torch = rank_features(torch.tensor(q), torch.tensor(g), query, gallery, MARKET)
    assert from_torch.record() == sums.record()
    half = rank_features(torch.tensor(q).bfloat16(), torch.tensor(g).bfloat16(), query, gallery, MARKET).record()
    assert half["mAP"] == pytest.approx(sums.record()["mAP"], abs=0.02)


# -- promises --------------------------------------------------------------------------------------------------------


def test_worked_example_of_the_protocol_page():
    scores = -np.arange(6.0)[None]
    gallery = Labels(np.array([2, 1, 2, 2, 1, 2]))
    record = rank_scores(scores, Labels(np.array([1])), gallery).record()
    assert (record["mAP"], record["mINP"], record["rank1"], record["rank5"]) == (pytest.approx(0.45), 0.4, 0.0, 1.0)
    trapezoid = rank_scores(scores, Labels(np.array([1])), gallery, Scoring(trapezoid=True)).record()
    assert trapezoid["mAP"] == pytest.approx(0.2875)


@pytest.mark.parametrize("shards", [1, 2, 4, 7])
@pytest.mark.parametrize("scoring", [MARKET, LLCM, Scoring(same_camera=True, gallery_draws=3)])
def test_shards_give_the_same_digits(shards, scoring):
    q, g, query, gallery = world(8, q=301)
    whole = rank_features(q, g, query, gallery, scoring)
    cuts = np.linspace(0, len(q), shards + 1).astype(int)
    parts = [
        rank_features(q[a:b], g, query.take(np.arange(a, b)), gallery, scoring, first_query=a)
        for a, b in pairwise(cuts)
    ]
    merged = RankingSums.merge(parts[::-1])
    assert merged.record() == whole.record()
    np.testing.assert_array_equal(merged.cmc(), whole.cmc())


def test_memory_budget_and_gallery_order_change_no_digit():
    q, g, query, gallery = world(9, q=600, g=1500, dim=70)
    g[700:] = g[:800]  # exact duplicates under other ids: ties that an unstable order would decide
    record = rank_features(q, g, query, gallery, MARKET).record()
    assert record["tie_rate"] > 0.3
    for budget in (0.4, 0.8, 1.6, 500):
        assert rank_features(q, g, query, gallery, MARKET, memory_mb=budget).record() == record
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(g))
        assert rank_features(q, g[order], query, gallery.take(order), MARKET).record() == record


def test_constant_features_never_beat_chance():
    _, _, query, gallery = world(10)
    same = [np.ones((len(x.pid), 33), np.float32) for x in (query, gallery)]
    for seed in range(5):
        shuffled = gallery.take(np.random.default_rng(seed).permutation(len(gallery.pid)))
        record = rank_features(*same, query, shuffled, MARKET).record()
        assert record["tie_rate"] == 1.0
        assert record["rank1"] == 0.0
        assert record["mAP"] <= record["chance_mAP"]
    assert constant_features(same[0])
    assert not constant_features(world(1)[0])


def test_chance_formula_against_the_page_and_simulation():
    for n, matches, expected in ((90, 1, 0.057), (90, 4, 0.088), (300, 4, 0.031), (649, 1, 0.011)):
        assert chance(np.array([matches]), np.array([n]))[1] == pytest.approx(expected, abs=1e-3)  # the page simulated
    lists = [np.flatnonzero(order) + 1 for order in set(permutations([1, 1, 1, 0, 0, 0, 0]))]  # all there are, exactly
    exact = np.mean([np.mean(np.arange(1, 4) / places) for places in lists])
    assert chance(np.array([3]), np.array([7])) == (pytest.approx(3 / 7), pytest.approx(exact))
    rng = np.random.default_rng(0)
    scores = rng.random((4000, 30))
    gallery = Labels(np.repeat([0, 1, 2, 3, 4], 6))
    sums = rank_scores(scores, Labels(rng.integers(0, 5, 4000)), gallery)
    record = sums.record()
    for name in ("rank1", "mAP"):
        terms = sums.ap if name == "mAP" else sums.rank[:, 0] == 1
        assert abs(record[name] - record[f"chance_{name}"]) < 3 * terms.std() / np.sqrt(4000)


def test_invalid_queries_are_counted_not_averaged():
    gallery = Labels(np.array([1, 1, 2, -1]), np.array([0, 1, 0, 0]))
    query = Labels(np.array([1, 2, 3, -1]), np.array([0, 0, 0, 0]))  # 2: same camera only; 3: absent; -1: junk
    record = rank_scores(np.ones((4, 4)), query, gallery, MARKET).record()
    assert (record["num_queries"], record["num_invalid"]) == (4, 3)
    nobody = rank_scores(np.ones((2, 4)), Labels(np.array([8, 9])), gallery, MARKET)
    with pytest.raises(EvaluationError, match="none of the 2 queries has a true match"):
        nobody.record()


def test_absent_cameras_take_no_part_in_removal():
    gallery, query = Labels(np.array([1, 2]), np.array([-1, 0])), Labels(np.array([1]), np.array([-1]))
    assert rank_scores(np.array([[2.0, 1.0]]), query, gallery, MARKET).record()["rank1"] == 1.0


def test_single_gallery_shot_cmc_against_exact_expectation():
    # Two images of the query's id at scores 9 and 1, another id with 5 and 0: rank 1 when 9 is drawn, or 1 beside 0.
    scores = np.tile([9.0, 1.0, 5.0, 0.0], (500, 1))
    query, gallery = Labels(np.zeros(500, int)), Labels(np.array([0, 0, 1, 1]))
    sums = rank_scores(scores, query, gallery, Scoring(gallery_draws=10))
    assert sums.cmc(2)[0] == pytest.approx(0.75, abs=3 * np.sqrt(0.75 * 0.25 / 5000))
    assert sums.cmc(2)[1] == 1.0
    assert sums.record()["mAP"] == pytest.approx((1 + 2 / 3) / 2)
    with pytest.raises(EvaluationError, match="gallery_draws"):
        Scoring(gallery_draws=2, unique_ids=True)


def test_roc_equals_counting_pairs():
    q, g, query, gallery = world(12)
    sums = rank_features(q, g, query, gallery, Scoring(same_camera=True, roc=True))
    fpr, tpr = sums.roc()
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, g)]
    scores = unit[0] @ unit[1].T
    use = np.broadcast_to((gallery.pid != -1)[None], scores.shape)
    same = query.pid[:, None] == gallery.pid[None]
    use = use & ~(same & (query.cameras()[:, None] == gallery.cameras()) & (query.cameras()[:, None] != -1))
    for level in (-0.5, 0.0, 0.3):
        at = int((1 - level) / 2 * len(fpr)) - 1
        assert fpr[at] == pytest.approx((scores[use & ~same] >= level).mean(), abs=1e-3)
        assert tpr[at] == pytest.approx((scores[use & same] >= level).mean(), abs=2e-3)
    with pytest.raises(EvaluationError, match="roc"):
        rank_features(q, g, query, gallery, Scoring(roc=True), metric="dot")
    with pytest.raises(EvaluationError, match="roc"):
        rank_scores(scores, query, gallery, Scoring(roc=True))
    with pytest.raises(EvaluationError, match="histograms"):
        rank_features(q, g, query, gallery).roc()


def test_weights_and_metrics_select_what_they_say():
    q, g, query, gallery = world(13)
    noise = np.random.default_rng(0).standard_normal((len(q) + len(g), 5)).astype(np.float32)
    two = {"a": q, "b": noise[: len(q)]}, {"b": noise[len(q) :], "a": g}
    only_a = rank_features(*two, query, gallery, MARKET, weights={"a": 1.0, "b": 0.0}).record()
    assert only_a == rank_features(q, g, query, gallery, MARKET).record()
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, g, noise)]
    dense = 0.8 * unit[0] @ unit[1].T + 0.2 * unit[2][: len(q)] @ unit[2][len(q) :].T
    weighted = rank_features(*two, query, gallery, MARKET, weights={"a": 0.8, "b": 0.2}).record()
    assert weighted["mAP"] == pytest.approx(rank_scores(dense, query, gallery, MARKET).record()["mAP"], abs=1e-5)
    dot = rank_features(q, g, query, gallery, MARKET, metric="dot").record()
    assert dot["mAP"] == pytest.approx(rank_scores(q @ g.T, query, gallery, MARKET).record()["mAP"], abs=1e-6)
    far = -distances(q, g, "euclidean")
    euclid = rank_features(q, g, query, gallery, MARKET, metric="euclidean").record()
    assert euclid["mAP"] == pytest.approx(rank_scores(far, query, gallery, MARKET).record()["mAP"], abs=1e-6)


def test_what_is_refused():
    q, g, query, gallery = world(19)
    bad = g.copy()
    assert (gallery.pid[[17, 5]] >= 0).all()
    bad[17, 2] = np.nan
    zero = g.copy()
    zero[5] = 0
    for message, call in (
        ("row 17 is not finite", lambda: rank_features(q, bad, query, gallery)),
        ("row 5 is all zeros", lambda: rank_features(q, zero, query, gallery)),
        ("16 dimensions, gallery features 15", lambda: rank_features(q, g[:, 1:], query, gallery)),
        ("must be the same", lambda: rank_features({"a": q}, {"b": g}, query, gallery)),
        ("that are not there", lambda: rank_features({"a": q}, {"a": g}, query, gallery, weights={"c": 1.0})),
        ("expected none below 0", lambda: rank_features({"a": q}, {"a": g}, query, gallery, weights={"a": -1.0})),
        ("700 features but 699 labels", lambda: rank_features(q, g, query, gallery.take(np.arange(699)))),
        ("not finite", lambda: rank_scores(np.full((130, 700), np.nan), query, gallery)),
        ("scores of shape", lambda: rank_scores(np.ones((130, 699)), query, gallery)),
        ("scores for 60 queries", lambda: rank_blocks(iter([np.ones((60, 700))]), query, gallery)),
        ("gallery is empty", lambda: rank_features(q, g, query, Labels(np.full(700, -1)))),
        ("whole numbers", lambda: Labels(np.array([1.5]))),
        ("2 pids but 3 camids", lambda: Labels(np.arange(2), np.arange(3))),
        ("expected \\[N, D\\]", lambda: rank_features(q[0], g, query, gallery)),
        ("scored twice", lambda: RankingSums.merge([rank_features(q, g, query, gallery)] * 2)),
    ):
        with pytest.raises(EvaluationError, match=message):
            call()


def test_trials_are_averaged_with_their_spread():
    q, g, query, gallery = world(15)
    records = [rank_features(q + i, g, query, gallery).record() for i in range(3)]
    mean = average_records(records)
    assert mean["num_trials"] == 3
    assert mean["num_queries"] == 130
    assert mean["mAP"] == pytest.approx(np.mean([r["mAP"] for r in records]))
    assert mean["mAP_std"] == pytest.approx(np.std([r["mAP"] for r in records]))


@pytest.mark.parametrize("levels", [None, 5])
def test_nearest_equals_a_stable_sort(levels):
    q, g, *_ = world(16, g=5000)
    if levels:
        q, g = np.round(q * levels), np.round(g * levels)
    for k in (1, 10, 4999, 9000):
        found = nearest(q, g, k, metric="dot")
        scores = q @ g.T
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        np.testing.assert_allclose(found.score, np.take_along_axis(scores, order, axis=1), atol=1e-3)
        if levels:  # whole numbers: products are exact, so are ties
            np.testing.assert_array_equal(found.index, order)
        np.testing.assert_allclose(found.lowest, scores.min(axis=1), atol=1e-3)


def test_the_package_stands_alone():
    folder = Path(__file__).resolve().parents[2] / "reid_dist" / "evaluation"
    for file in folder.glob("*.py"):
        for line in re.findall(r"^\s*(?:from|import) +([\w.]+)", file.read_text(), re.M):
            ours = line.startswith("reid_dist")
            assert not ours or line.startswith("reid_dist.evaluation."), f"{file.name} imports {line}"
            assert line.split(".")[0] not in ("ray", "deepspeed", "vllm", "lance", "boto3"), (
                f"{file.name} imports {line}"
            )
