"""Protocols select the rows that the authors' code selects, and say what is missing."""

from __future__ import annotations

import random

import numpy as np
import pytest

from reid_dist.evaluation import domains, protocols
from reid_dist.evaluation.pipeline import Options
from reid_dist.evaluation.protocols import Items, check_trial, evaluate, get, num_trials, select, tracklets, trial_index
from reid_dist.evaluation.similarity import EvaluationError
from tests.golden import cases, load

MODALITY = {1: "rgb", 2: "ir"}


def sysu_items(files: np.ndarray, test_ids: np.ndarray, seed: int = 0) -> tuple[Items, np.ndarray]:
    """A shuffled table of (camera, id, file number) rows, train ids marked as train."""
    files = files[np.random.default_rng(seed).permutation(len(files))]
    items = Items(
        split=np.where(np.isin(files[:, 1], test_ids), "test", "train"),
        pid=files[:, 1],
        camid=files[:, 0],
        modality=np.where(np.isin(files[:, 0], (3, 6)), "ir", "rgb"),
        path=np.array([f"cam{c}/{p:04d}/{n:04d}.jpg" for c, p, n in files]),
    )
    return items, files


@cases("rle", "sysu_protocol")
def test_sysu_selection(case):
    z = load(case)
    items, files = sysu_items(z["in_files"], z["in_test_ids"])
    seen = 0
    for mode in ("all", "indoor"):
        protocol = get(f"sysu-{mode}-single-shot")
        for key in (k for k in z if k.startswith(f"out_gallery_{mode}_trial")):
            chosen = select(protocol, items, int(key.rpartition("trial")[2]))
            np.testing.assert_array_equal(files[chosen.query], z[f"out_query_{mode}"])
            np.testing.assert_array_equal(files[chosen.gallery], z[key])
            seen += 1
    assert seen == sum(k.startswith("out_gallery") for k in z)


@cases("rle", "llcm_protocol")
def test_llcm_selection(case):
    z = load(case)
    files = z["in_files"][np.random.default_rng(1).permutation(len(z["in_files"]))]
    items = Items(
        split=np.where(np.isin(files[:, 2], z["in_test_ids"]), "test", "train"),
        pid=files[:, 2],
        camid=files[:, 1],
        modality=np.array([MODALITY[m] for m in files[:, 0]]),
        path=np.array([f"test_{m}/cam{c}/{p:04d}/{p:04d}_{n:04d}.jpg" for m, c, p, n in files]),
    )
    seen = 0
    for gallery, name in ((1, "llcm-infrared-to-visible"), (2, "llcm-visible-to-infrared")):
        for key in (k for k in z if k.startswith(f"out_gallery_mode{gallery}_trial")):
            chosen = select(get(name), items, int(key.rpartition("trial")[2]))
            np.testing.assert_array_equal(files[chosen.query], z[f"out_query_mode{3 - gallery}"])
            np.testing.assert_array_equal(files[chosen.gallery], z[key])
            seen += 1
    assert seen == sum(k.startswith("out_gallery") for k in z)


@cases("rle", "regdb_index")
def test_regdb_trial_file(case):
    z = load(case)
    for side in ("visible", "thermal"):
        paths, labels = trial_index(z[f"in_lines_{side}"])
        assert paths == z[f"out_relpath_{side}"].tolist()
        np.testing.assert_array_equal(labels, z[f"out_label_{side}"])


def test_trial_file_with_a_ragged_line_is_refused():
    with pytest.raises(EvaluationError, match=r"idx/test_visible_1\.txt, line 2: expected '<path> <label>'"):
        trial_index(["Visible/1/a.bmp 0", "Visible/2/b.bmp", ""], "idx/test_visible_1.txt")


@pytest.mark.parametrize(
    ("seed", "expected"), [(0, [12, 13, 0, 2, 2, 0, 6]), (1, [4, 18, 0, 2, 0, 0, 7]), (9, [14, 19, 2, 2, 0, 0, 10])]
)
def test_seeded_draws_conform(seed, expected):
    """datasets.md 6.4: folder sizes 20,20,5,7,3,1,12 give these indices."""
    rows = [(1, p, n) for p, size in enumerate((20, 20, 5, 7, 3, 1, 12), 1) for n in range(size)] + [(3, 1, 0)]
    items, files = sysu_items(np.array(rows), np.arange(1, 8), seed=seed)
    chosen = select(get("sysu-all-single-shot"), items, seed)
    assert files[chosen.gallery][:, 2].tolist() == expected


def test_sysu_multi_shot_and_published_permutations():
    rows = [(c, p, n) for p in (4, 9) for c in (1, 2, 3) for n in range(12 if c == 1 else 3)]
    items, files = sysu_items(np.array(rows), np.array([4, 9]))
    chosen = files[select(get("sysu-all-multi-shot"), items, 2).gallery]
    assert [(c, p, int((chosen[:, :2] == (c, p)).all(1).sum())) for p in (4, 9) for c in (1, 2)] == [
        (1, 4, 10), (2, 4, 3), (1, 9, 10), (2, 9, 3),
    ]  # fmt: skip
    assert len({tuple(row) for row in chosen.tolist()}) == 26
    table = {(c, p): np.array([[3, 1, 2], [1, 2, 3]]) for c in (1, 2) for p in (4, 9)}
    single = select(get("sysu-all-single-shot"), items, 0, permutations=table)
    assert files[single.gallery].tolist() == [[1, 4, 2], [2, 4, 2], [1, 9, 2], [2, 9, 2]]
    with pytest.raises(EvaluationError, match="no trial 2 for camera 1, id 4"):
        select(get("sysu-all-single-shot"), items, 2, permutations=table)
    with pytest.raises(EvaluationError, match="beyond its 3 images"):
        select(get("sysu-all-single-shot"), items, 0, permutations={**table, (2, 9): np.array([[7]])})


def test_image_protocol_drops_junk_and_passes_over_train():
    items = Items(split=np.array(["query", "train", "gallery", "gallery"]), pid=np.array([5, 5, -1, 5]))
    chosen = select(get("image"), items)
    assert (chosen.query.tolist(), chosen.gallery.tolist()) == ([0], [3])
    with pytest.raises(EvaluationError, match="trials 0 to 0, not 1"):
        select(get("image"), items, 1)


def test_both_video_galleries():
    split = np.array(["query", "query", "gallery"])
    items = Items(split=split, pid=np.array([1, 1, 2]), camid=np.array([0, 1, 0]))
    assert select(get("video"), items).gallery.tolist() == [0, 1, 2]
    assert select(get("video-without-queries"), items).gallery.tolist() == [2]
    features = {"x": np.array([[1.0, 0.0], [0.9, 0.1], [0.8, 0.3]], np.float32)}
    record = evaluate(get("video"), items, features)  # the other query of the id, from another camera, is a positive
    assert (record["rank1"], record["num_invalid"], record["protocol"]) == (1.0, 0, "video")
    with pytest.raises(EvaluationError, match="none of the 2 queries"):
        evaluate(get("video-without-queries"), items, features)


def test_frames_become_tracklets():
    items = Items(
        split=np.array(["query", "gallery", "query", "gallery", "gallery"]),
        pid=np.array([1, 1, 1, 1, 2]),
        camid=np.array([0, 1, 0, 1, 1]),
        tracklet=np.array([1, 1, 1, 2, 2]),
    )
    rows, frames = tracklets(items)
    assert [f.tolist() for f in frames] == [[0, 2], [1], [3], [4]]
    assert (rows.pid.tolist(), rows.split.tolist()) == ([1, 1, 1, 2], ["query", "gallery", "gallery", "gallery"])
    with pytest.raises(EvaluationError, match="needs the column 'tracklet'"):
        tracklets(Items(split=items.split, pid=items.pid))


def test_regdb_trials_directions_and_leak():
    items = Items(
        split=np.full(8, "test"),
        pid=np.array([0, 1, 0, 1, 0, 1, 0, 1]),
        modality=np.array(["rgb", "rgb", "ir", "ir"] * 2),
        trial=np.repeat([1, 2], 4),
    )
    there, back = get("regdb-visible-to-thermal"), get("regdb-thermal-to-visible")
    chosen = select(there, items, 1)
    assert (chosen.query.tolist(), chosen.gallery.tolist()) == ([4, 5], [6, 7])
    assert select(back, items, 0).query.tolist() == [2, 3]
    right, wrong = np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)[::-1]
    record = evaluate(there, items, {"x": np.concatenate([right, right, right, wrong])})
    assert (record["num_trials"], record["rank1"], record["rank1_std"]) == (2, 0.5, 0.5)
    assert record["num_queries"] == 2
    with pytest.raises(EvaluationError, match="holds 2 trials, trial 2"):
        select(there, items, 2)
    check_trial(there, 1, 1)
    check_trial(get("image"), 0, None)
    with pytest.raises(EvaluationError, match="trained on trial 0"):
        check_trial(there, 1, 0)


def test_sysu_record_is_the_mean_of_ten_trials():
    rows = [(c, p, n) for p in range(1, 9) for c in range(1, 7) for n in range(4)]
    items, files = sysu_items(np.array(rows), np.arange(1, 9))
    rng = np.random.default_rng(0)
    features = {"x": rng.standard_normal((9, 6))[files[:, 1]] + rng.standard_normal((len(files), 6))}
    record = evaluate(get("sysu-all-single-shot"), items, features)
    assert (record["num_trials"], record["num_queries"], record["num_invalid"]) == (10, 64, 0)
    assert 0 < record["rank1_std"] < 0.2
    assert record["rank1"] > record["chance_rank1"] + 0.1


def test_text_rows_come_once_per_caption():
    items = Items(split=np.array(["test", "train", "test"]), pid=np.array([3, 4, 5]), captions=np.array([2, 1, 3]))
    chosen = select(get("text-to-image"), items)
    assert chosen.query.tolist() == [0, 0, 2, 2, 2]
    assert chosen.query_part.tolist() == [0, 1, 0, 1, 2]
    assert chosen.gallery.tolist() == [0, 2]
    back = select(get("image-to-text"), items)
    assert (back.query.tolist(), back.gallery_part.tolist()) == ([0, 2], [0, 1, 0, 1, 2])


def test_ten_splits_score_in_both_directions():
    split = np.array(["query", "gallery", "gallery"] * 10)
    items = Items(split=split, pid=np.tile([1, 1, 2], 10), trial=np.repeat(np.arange(10), 3))
    assert num_trials(get("ten-splits"), items) == 10
    assert select(get("ten-splits"), items, 3).query.tolist() == [9]
    assert select(get("ten-splits-reversed"), items, 3).query.tolist() == [10, 11]


def test_both_ways_are_averaged_inside_a_split_before_the_spread():
    """VIPeR (datasets.md 1.7): one way finds all, the other half; the ten splits are alike, so nothing spreads."""
    split = np.array(["query", "query", "gallery", "gallery"] * 10)
    pid = np.tile([1, 2, 1, 2], 10)
    items = Items(split=split, pid=pid, camid=np.tile([0, 0, 1, 1], 10), trial=np.repeat(np.arange(10), 4))
    both = get("ten-splits-both-ways")
    assert num_trials(both, items) == 10
    assert select(both, items, 6).query.tolist() == select(get("ten-splits"), items, 3).query.tolist() == [12, 13]
    assert select(both, items, 7).query.tolist() == [14, 15]
    # inner products: queries like their match most; seen from the gallery, everybody likes query 2 most
    rows = np.array([[1, 0], [5, 5], [1, 0.1], [0.1, 1.2]], np.float32)
    records = [
        evaluate(get(name), items, {"x": np.tile(rows, (10, 1))}, options=Options(metric="dot"))
        for name in ("ten-splits", "ten-splits-reversed", "ten-splits-both-ways")
    ]
    there, back, mean = (record["rank1"] for record in records)
    assert (there, back) == (1.0, 0.5)
    assert mean == pytest.approx((there + back) / 2)
    assert (records[2]["num_trials"], records[2]["rank1_std"]) == (10, 0.0)
    assert domains.get("small4/viper").protocol == "ten-splits-both-ways"


def test_cuhk03_classic_uses_one_list_for_both_sides():
    rng = random.Random(0)
    pid = np.repeat(np.arange(20), 6)
    items = Items(split=np.full(120, "test"), pid=pid, camid=np.tile([0, 0, 0, 1, 1, 1], 20))
    centre = np.array([[rng.gauss(0, 1) for _ in range(8)] for _ in range(20)])
    features = {"x": centre[pid] + 0.6 * np.array([[rng.gauss(0, 1) for _ in range(8)] for _ in pid])}
    record = evaluate(get("cuhk03-classic"), items, features)
    assert record["num_queries"] == 120
    classic = get("cuhk03-classic")
    plain = protocols.Protocol(name="x", task="image", query=classic.query, gallery=classic.gallery,
                               scoring=protocols.MARKET_RULE)  # fmt: skip
    images = evaluate(plain, items, features)
    assert record["mAP"] == images["mAP"]  # AP looks at the full list
    assert record["rank1"] != images["rank1"]  # CMC is over drawn galleries


@pytest.mark.parametrize(
    ("name", "items", "message"),
    [
        ("imagee", Items(split=np.array(["query"]), pid=np.array([1])), "there are image, "),
        ("image", Items(split=np.array(["query"]), pid=np.array([1])), "no gallery rows among splits"),
        ("sysu-all-single-shot", Items(split=np.array(["test"]), pid=np.array([1])), "needs the column 'modality'"),
        (
            "llcm-visible-to-infrared",
            Items(split=np.array(["test"]), pid=np.array([1]), modality=np.array(["rgb"]), camid=np.array([1])),
            "no gallery rows of modality 'ir'",
        ),
    ],
)
def test_what_is_missing_is_named(name, items, message):
    with pytest.raises(EvaluationError, match=message):
        select(get(name), items)


def test_columns_of_another_length_are_refused():
    with pytest.raises(EvaluationError, match=r"column camid: shape \(2,\), expected \(1,\)"):
        Items(split=np.array(["query"]), pid=np.array([1]), camid=np.array([1, 2]))


# -- domain generalisation -------------------------------------------------------------------------------------------


def test_domain_splits_are_the_published_ones():
    names = domains.DOMAIN_SPLITS
    assert sum(n.startswith("ss/") for n in names) == 12
    assert domains.get("loo4-train/msmt17").sources == ("market-1501", "dukemtmc-reid", "cuhk03-np")
    assert domains.get("small4/viper").sources == ("market-1501", "dukemtmc-reid", "cuhk02", "cuhk03-np", "cuhk-sysu")
    assert "dukemtmc-reid" not in domains.get("small4-noduke/grid").sources
    assert domains.get("loo-cs-all/market-1501").sources == ("msmt17", "cuhk03-np", "cuhk-sysu")
    assert {s.images for s in names.values() if s.name.startswith(("small4", "loo4-all", "loo-cs-all"))} == {"all"}
    assert all(s.target not in s.sources and s.protocol in protocols.PROTOCOLS for s in names.values())
    with pytest.raises(EvaluationError, match="there are loo-cs-all, loo-cs-train, loo4-all"):
        domains.get("protocol-1")
    with pytest.raises(EvaluationError, match="small4/prid2011"):
        domains.get("small4/prid")


def test_sources_join_with_offsets():
    joined = domains.join(
        [
            domains.Source("market-1501", np.array([7, 2, 7]), np.array([0, 5, 3])),
            domains.Source("cuhk-sysu", np.array([0, 9]), np.array([-1, -1])),
            domains.Source("msmt17", np.array([7, 0]), np.array([1, 0])),
        ]
    )
    assert joined.label.tolist() == [1, 0, 1, 2, 3, 5, 4]
    assert joined.camid.tolist() == [0, 5, 3, 6, 6, 8, 7]
    assert joined.domain.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert (joined.id_offset, joined.camera_offset) == ((0, 2, 4), (0, 6, 7))


@pytest.mark.parametrize(("name", "pid"), [("market-1501", 0), ("market-1501", -1), ("cuhk02", -1), ("cuhk02", None)])
def test_no_identities_are_refused(name, pid):
    ids = np.array([] if pid is None else [3, pid], np.int64)
    with pytest.raises(EvaluationError, match=name):
        domains.join([domains.Source(name, ids, np.zeros_like(ids))])
