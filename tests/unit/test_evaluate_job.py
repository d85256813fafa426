"""jobs.evaluate on feature files and on tables: records by hand, options in the record, and every bad input as one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from scipy import io as scipy_io

from jobs import evaluate as job
from jobs._job import run_job
from reid_dist.data.records import Record
from reid_dist.errors import UserError
from reid_dist.evaluation.pipeline import Expansion, Options, rank_pair
from reid_dist.evaluation.protocols import PROTOCOLS
from reid_dist.evaluation.ranking import Labels, Scoring, rank_blocks
from reid_dist.evaluation.rerank import KReciprocal
from tests.colour import flat, loaded
from tests.tables import write_table

KEYS = {"rank1", "rank5", "rank10", "mAP", "mINP", "num_queries", "num_invalid", "tie_rate"}


def towards(angle: float) -> list[float]:
    """A direction whose cosine with [1, 0] falls as the angle (degrees) grows."""
    return [float(np.cos(np.radians(angle))), float(np.sin(np.radians(angle)))]


def worked(**more):
    """datasets.md 6.1: relevance 0 1 0 0 1 0 gives AP 0.45, INP 0.40; a second query has no match."""
    pid = [1, 9, 5, 1, 6, 7, 1, 8]
    data = {
        "feat": np.array([towards(0), towards(5), *(towards(10 * k) for k in range(1, 7))], np.float32),
        "pid": np.array(pid),
        "camid": np.array([0, 0, 1, 1, 1, 1, 1, 1]),
        "split": np.array(["query"] * 2 + ["gallery"] * 6),
        "path": np.array([f"{k}.png" for k in range(8)]),
    }
    return {key: value for key, value in {**data, **more}.items() if value is not None}


def saved(tmp_path, **more) -> str:
    path = tmp_path / "x.npz"
    np.savez(path, **worked(**more))
    return str(path)


def features(path: str, protocol: str, *words: str):
    return job.main(["--features", path, "--protocol", protocol, *words])


def crowd(queries: int = 40, gallery: int = 160) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    n = queries + gallery
    pid = rng.integers(0, 12, n)
    feat = rng.standard_normal((12, 16))[pid] + 1.5 * rng.standard_normal((n, 16))
    split = np.where(np.arange(n) < queries, "query", "gallery")
    return {"feat": feat.astype(np.float32), "pid": pid, "camid": rng.integers(0, 4, n), "split": split}


def test_a_file_is_scored_as_on_the_protocol_page(tmp_path):
    record = features(saved(tmp_path), "image")
    assert set(record) >= KEYS
    assert {k: record[k] for k in ("rank1", "rank5", "num_queries", "num_invalid", "tie_rate", "dim")} == {
        "rank1": 0.0, "rank5": 1.0, "num_queries": 2, "num_invalid": 1, "tie_rate": 0.0, "dim": 2,
    }  # fmt: skip
    assert record["mAP"] == pytest.approx(0.45)
    assert record["mINP"] == pytest.approx(0.40)
    assert (record["rerank"], record["expansion"], record["label"]) == (None, None, "")
    json.dumps(record)


def test_rows_that_train_are_passed_over(tmp_path):
    more = worked()
    both = {k: np.concatenate([v, v[2:4]]) for k, v in more.items()}
    both["split"][-2:] = ["train", "val"]
    assert features(saved(tmp_path, **both), "image")["mAP"] == pytest.approx(0.45)


def test_metrics_differ_where_lengths_do(tmp_path):
    feat = worked()["feat"]
    feat[6] *= 10  # the second match is far away, and long
    path = saved(tmp_path, feat=feat)
    assert features(path, "image", "metric=cosine")["mAP"] == pytest.approx(0.45)
    assert features(path, "image", "metric=euclidean")["mAP"] == pytest.approx((1 / 2 + 2 / 6) / 2)
    assert features(path, "image", "metric=dot")["mAP"] == pytest.approx((1 / 1 + 2 / 3) / 2)


def test_trials_are_averaged(tmp_path):
    data = {k: np.concatenate([v, v]) for k, v in worked().items()}
    data["trial"] = np.repeat([3, 7], 8)
    data["feat"][8:] = data["feat"][8:][[0, 1, 3, 2, 4, 5, 6, 7]]  # the second trial's first match comes first
    record = features(saved(tmp_path, **data), "ten-splits")
    assert record["num_trials"] == 2
    assert (record["rank1"], record["rank1_std"]) == (0.5, 0.5)
    assert record["mAP"] == pytest.approx((0.45 + (1 + 2 / 5) / 2) / 2)


def test_frames_are_pooled_into_tracklets(tmp_path):
    data = {k: np.repeat(v, 2, axis=0) for k, v in worked().items()}
    data["feat"] = np.stack([data["feat"] * 2 - 0.5, data["feat"] * 0 + 0.5])[np.arange(16) % 2, np.arange(16)]
    data["tracklet"] = np.repeat(np.arange(8), 2)
    record = features(saved(tmp_path, **data), "video-without-queries")  # each pair of frames has the old mean
    assert (record["num_items"], record["num_queries"]) == (8, 2)
    assert record["mAP"] == pytest.approx(0.45)
    del data["tracklet"]
    assert features(saved(tmp_path, tracklet=None, **data), "video-without-queries")["num_items"] == 16


def test_both_conventions_of_video_stand_side_by_side(tmp_path):
    """A second query of the id, from another camera, is a true match under the official rule alone."""
    data = worked(pid=np.array([1, 1, 5, 1, 6, 7, 1, 8]), camid=np.array([0, 2, 1, 1, 1, 1, 1, 1]))
    data["feat"][1] = towards(4)  # nearer to the other query than to the first gallery item
    record = features(saved(tmp_path, **data), "video")
    assert (record["rank1"], record["beside"]["video-without-queries"]["rank1"]) == (1.0, 0.0)
    data["pid"] = np.array([1, 1, 5, 2, 6, 7, 2, 8])
    record = features(saved(tmp_path, **data), "video")
    assert record["rank1"] == 1.0
    assert "none of the 2 queries has a true match" in record["beside"]["video-without-queries"]["refused"]


def test_re_ranking_and_expansion_are_done_and_recorded(tmp_path):
    data = crowd()
    np.savez(tmp_path / "c.npz", **data)
    q = data["split"] == "query"
    labels = Labels(data["pid"][q], data["camid"][q]), Labels(data["pid"][~q], data["camid"][~q])
    rule = Scoring(same_camera=True)
    ranked = KReciprocal(data["feat"][q], data["feat"][~q], k1=7, k2=2, lambda_value=0.5)
    expected = rank_blocks((-block for block in ranked.blocks()), *labels, rule).record()
    plain = features(str(tmp_path / "c.npz"), "image")
    record = features(str(tmp_path / "c.npz"), "image", "rerank.k1=7", "rerank.k2=2", "rerank.lambda_value=0.5")
    assert {k: record[k] for k in expected} == expected
    assert record["mAP"] != plain["mAP"]
    assert record["rerank"] == {"k1": 7, "k2": 2, "lambda_value": 0.5}
    assert record["label"] == "RK"
    both = features(str(tmp_path / "c.npz"), "image", "rerank=true", "expansion=true", "expansion.k=3")
    assert both["rerank"] == {"k1": 20, "k2": 6, "lambda_value": 0.3}
    assert both["expansion"] == {"k": 3, "alpha": 3.0}
    assert both["label"] == "QE+RK"
    assert both["mAP"] not in (record["mAP"], plain["mAP"])


def test_expansion_of_named_embeddings_uses_their_weighted_cosine():
    rng = np.random.default_rng(2)
    data = crowd()
    q, other = data["split"] == "query", rng.standard_normal((len(data["pid"]), 5)).astype(np.float32)
    labels = Labels(data["pid"][q]), Labels(data["pid"][~q])
    weights = {"a": 0.8, "b": 0.2}
    named = [{"a": data["feat"][side], "b": other[side]} for side in (q, ~q)]

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    joined = np.concatenate([0.8**0.5 * unit(data["feat"]), 0.2**0.5 * unit(other)], axis=1)
    options = Options(expansion=Expansion(k=4))
    first = rank_pair(*named, *labels, Scoring(), options, weights=weights).record()
    second = rank_pair(joined[q], joined[~q], *labels, Scoring(), options).record()
    assert first["mAP"] == pytest.approx(second["mAP"], abs=1e-6)


def test_cuhk03_classic_and_llcm_read_a_file(tmp_path):
    data = crowd()
    data["split"][:] = "test"
    record = features(saved(tmp_path, path=None, trial=np.zeros(200, int), **data), "cuhk03-classic")
    assert 0 < record["rank1"] <= 1
    assert record["num_queries"] == 200
    n = len(data["pid"])
    more = {"modality": np.where(np.arange(n) % 2, "rgb", "ir"), "path": np.array([f"{i:03d}" for i in range(n)])}
    record = features(
        saved(tmp_path, **{**data, **more, "camid": np.array([1, 2, 4, 5])[data["camid"]]}), "llcm-infrared-to-visible"
    )
    assert record["num_trials"] == 10
    assert record["num_queries"] == 100


def sysu(tmp_path, **more) -> str:
    """One query; its id's two visible images: the first (by path) is right beside it, the second far away."""
    data = {
        "feat": np.array([towards(0), towards(1), towards(80), towards(40)], np.float32),
        "pid": np.array([1, 1, 1, 2]),
        "camid": np.array([3, 1, 1, 1]),
        "split": np.full(4, "test"),
        "modality": np.array(["ir", "rgb", "rgb", "rgb"]),
        "path": np.array(["cam3/1", "cam1/a", "cam1/b", "cam1/c"]),
    }
    np.savez(tmp_path / "s.npz", **{**data, **more})
    return str(tmp_path / "s.npz")


def mat(tmp_path, order: list[list[int]]) -> str:
    cells = np.empty((6, 1), object)
    for camera in range(6):
        ids = np.empty((2, 1), object)
        ids[0, 0] = np.array(order) if camera == 0 else np.zeros((0, 0))
        ids[1, 0] = np.array([[1]] * len(order)) if camera == 0 else np.zeros((0, 0))
        cells[camera, 0] = ids
    scipy_io.savemat(tmp_path / "perm.mat", {"rand_perm_cam": cells})
    return f"permutations={tmp_path / 'perm.mat'}"


def test_published_permutations_choose_the_gallery(tmp_path):
    path = sysu(tmp_path)
    for first, rank1 in ((1, 1.0), (2, 0.0)):
        assert features(path, "sysu-all-single-shot", mat(tmp_path, [[first, 3 - first]] * 10))["rank1"] == rank1
    assert 0 < features(path, "sysu-all-single-shot")["rank1"] < 1  # seeded draws take either


def write_ragged(path):
    table = {"feat": pa.array([[1.0, 2.0], [1.0]]), "pid": pa.array([1, 2]), "split": pa.array(["query", "gallery"])}
    parquet.write_table(pa.table({**table, "camid": pa.array([0, 0])}), path)


ONE_SIDED = {"trial": np.array([0] * 6 + [1] * 2), "modality": np.full(8, "rgb")}
BAD = {
    "missing columns": (lambda d: [saved(d, camid=None), "image"], r"missing \['camid'\]"),
    "different dimensions": (lambda d: [write_ragged(d / "r.parquet") or str(d / "r.parquet"), "image"], r"\[1, 2\]"),
    "duplicate ids": (lambda d: [saved(d, id=np.array(list("abcdefgg"))), "image"], "id 'g' comes twice"),
    "no match": (lambda d: [saved(d, pid=np.arange(8)), "image"], "none of the 2 queries has a true match"),
    "trial without queries": (
        lambda d: [saved(d, trial=ONE_SIDED["trial"]), "ten-splits"],
        "no query rows.*in trial 1",
    ),
    "ragged trials": (
        lambda d: [saved(d, trial=np.zeros(7, int)), "ten-splits"],
        r"trial has shape \(7,\), feat has 8 rows",
    ),
    "a query modality absent": (
        lambda d: [saved(d, modality=ONE_SIDED["modality"], trial=np.zeros(8, int)), "regdb-thermal-to-visible"],
        "no query rows of modality 'ir'",
    ),
    "not a number": (
        lambda d: [saved(d, feat=np.full((8, 2), np.nan, np.float32)), "image"],
        "column feat, row 0: not a finite number",
    ),
    "constant": (lambda d: [saved(d, feat=np.ones((8, 2), np.float32)), "image"], "all features are the same.*allow"),
    "no file": (lambda d: [str(d / "none.npz"), "image"], "none.npz: no such file"),
    "unknown protocol": (lambda d: [saved(d), "imagenet"], "no protocol 'imagenet'; there are image,"),
    "unknown option": (lambda d: [saved(d), "image", "rerank.k3=2"], "unknown key 'rerank.k3'.*did you mean"),
    "an override": (lambda d: [saved(d), "image", "data.root=x"], "unknown key 'data'"),
    "senseless re-ranking": (lambda d: [saved(d), "image", "rerank.k1=0"], "k1=0"),
    "expansion off the cosine": (lambda d: [saved(d), "image", "expansion=true", "metric=dot"], "works on the cosine"),
    "draws for no draw": (lambda d: [saved(d), "image", mat(d, [[1]])], "permutations= goes with the SYSU protocols"),
    "too few draws": (lambda d: [sysu(d), "sysu-all-single-shot", mat(d, [[1, 2]])], "no trial 1 for camera 1, id 1"),
    "draws beyond the folder": (
        lambda d: [sysu(d), "sysu-all-single-shot", mat(d, [[9, 2]] * 10)],
        "permutation beyond its 2 images",
    ),
    "no permutations": (
        lambda d: [sysu(d), "sysu-all-single-shot", f"permutations={sysu(d)}"],
        "not a MATLAB 5 file",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_readable_line(what, tmp_path, monkeypatch, capsys):
    make, message = BAD[what]
    path, protocol, *words = make(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate", "--features", path, f"--protocol={protocol}", *words])
    with pytest.raises(SystemExit) as stop:
        run_job("evaluate", job.main)
    out, err = capsys.readouterr()
    record = json.loads(out.strip().splitlines()[-1])
    assert (stop.value.code, record["exit_code"]) == (2, 2)
    assert re.search(message, record["error"]), record["error"]
    assert err.strip().splitlines()[-1] == f"evaluate: {record['error']}"
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name one run"),
        (["run", "--features", "x.npz"], "name one run"),
        (["--features", "x.npz", "--features", "y.npz"], "name one run"),
        (["--features", "x.npz"], f"needs --protocol NAME: one of {next(iter(PROTOCOLS))}"),
        (["--features"], "--features needs a value"),
        (["--search", "x.npz"], "name one run"),
        (["--query", "x.jpg", "run"], "name one run"),
        (["--featrues", "x.npz"], "unknown option --featrues"),
    ],
)
def test_words_that_name_nothing_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        job.main(words)


def test_constant_features_are_scored_on_demand_and_do_not_beat_chance(tmp_path):
    record = features(saved(tmp_path, feat=np.ones((8, 2), np.float32)), "image", "allow_constant=true")
    assert record["mAP"] <= record["chance_mAP"]
    assert record["tie_rate"] == 1.0


def test_scoring_a_file_starts_light(tmp_path):
    heavy = ("torch", "ray", "deepspeed", "vllm", "lance", "boto3", "transformers", "pyarrow", "torchvision")
    code = (
        "import sys, json\nfrom jobs.evaluate import main\n"
        f"record = main(['--features', {saved(tmp_path)!r}, '--protocol', 'image'])\n"
        f"print(json.dumps([record['mAP'], [m for m in {heavy!r} if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.strip().splitlines()[-1]) == [pytest.approx(0.45), []]


# Tables: flat colours, so that ranks can be told by hand.


def evaluate(monkeypatch, model, *words: str):
    monkeypatch.setattr(job, "load", lambda word, which, overrides: model)
    return job.main(["somewhere", *words])


def test_a_table_of_frames_is_scored_by_tracklets(tmp_path, monkeypatch):
    red, green = [(200, 0, 0), (240, 0, 0)], [(0, 90, 0), (0, 50, 0)]
    tracks = [  # split, pid, camid, tracklet, frames; frames of two tracklets are mixed in the table
        ("query", 1, 0, 0, red), ("gallery", 1, 1, 1, red), ("gallery", 2, 1, 2, green), ("gallery", 1, 0, 3, green),
    ]  # fmt: skip
    records, images = [], []
    for frame in range(2):
        for split, pid, camid, tracklet, colours in tracks:
            records.append(
                Record(
                    path=f"{tracklet}/{frame}.png", split=split, pid=pid, camid=camid, tracklet=tracklet, frame=frame
                )
            )
            images.append(flat(*colours[frame]))
    write_table(str(tmp_path), "v", records, images, tmp_path / "raw")
    record = evaluate(monkeypatch, loaded(str(tmp_path), ["v"]), "protocol=video-without-queries")
    assert (record["rank1"], record["mAP"], record["num_queries"], record["num_invalid"]) == (1.0, 1.0, 1, 0)
    both = evaluate(monkeypatch, loaded(str(tmp_path), ["v"]), "protocol=video")
    same = {k: v for k, v in record.items() if k in both["beside"]["video-without-queries"]}
    assert both["beside"] == {"video-without-queries": same}  # the other convention, from the same features
    plan = evaluate(monkeypatch, loaded(str(tmp_path), ["v"]), "protocol=video", "--plan")["plan"]
    assert plan["items"] == {"tracklet": 4}


def divisions(tmp_path) -> str:
    """Two divisions of three people; in the first the query finds its match first, in the second a stranger."""
    colours = {"q1": (9, 0, 0), "g1": (9, 1, 0), "q2": (0, 9, 0), "g2": (0, 0, 9), "g3": (0, 9, 1)}
    splits = {"q1": ("query", "train"), "g1": ("gallery", "train"), "q2": ("train", "query"),
              "g2": ("train", "gallery"), "g3": ("gallery", "gallery")}  # fmt: skip
    records = [
        Record(
            path=f"{name}.png", split=splits[name][0], pid=int(name[1]), camid=int(name[0] == "g"), trials=splits[name]
        )
        for name in colours
    ]
    write_table(str(tmp_path), "ten", records, [flat(*colour) for colour in colours.values()], tmp_path / "raw")
    return str(tmp_path)


def test_all_divisions_of_a_foreign_set_are_averaged(tmp_path, monkeypatch):
    root = divisions(tmp_path)
    record = evaluate(monkeypatch, loaded(root, ["ten"]), "protocol=ten-splits")
    assert (record["num_trials"], record["rank1"], record["mAP"]) == (2, 0.5, 0.75)
    assert evaluate(monkeypatch, loaded(root, ["ten"]), "protocol=image", "trial=1")["rank1"] == 0.0
    with pytest.raises(UserError, match=r"2 train/test divisions .* choose a protocol of several trials"):
        evaluate(monkeypatch, loaded(root, ["ten"]), "protocol=image")
    with pytest.raises(UserError, match="there is no trial 2"):
        evaluate(monkeypatch, loaded(root, ["ten"]), "protocol=ten-splits", "trial=2")


@pytest.mark.parametrize(("own", "rank1"), [(0, 1.0), (1, 0.0)])
def test_a_model_of_one_division_is_scored_on_that_one_alone(own, rank1, tmp_path, monkeypatch):
    model = loaded(divisions(tmp_path), ["ten"], train=["ten"], trial=own)
    record = evaluate(monkeypatch, model, "protocol=ten-splits")
    assert (record["trial"], record["rank1"]) == (own, rank1)
    with pytest.raises(UserError, match=f"trained on division {own} of ten, whose training identities"):
        evaluate(monkeypatch, model, "protocol=ten-splits", f"trial={1 - own}")


def test_numbers_of_two_datasets_name_different_people(tmp_path, monkeypatch):
    for name, query, match in (("a", (9, 0, 0), (9, 3, 0)), ("b", (9, 1, 0), (8, 3, 0))):
        records = [
            Record(path=f"{s}.png", split=s, pid=1, camid=int(s == "gallery"), domain=name)
            for s in ("query", "gallery")
        ]
        write_table(str(tmp_path), name, records, [flat(*query), flat(*match)], tmp_path / "raw" / name)
    record = evaluate(monkeypatch, loaded(str(tmp_path), ["a", "b"]), "protocol=image")
    assert (record["num_queries"], record["rank1"]) == (2, 0.5)  # were they one person, both would find somebody first


def test_a_collapsed_model_is_refused(tmp_path, monkeypatch):
    records = [Record(path=f"{i}.png", split="gallery" if i else "query", pid=i % 2, camid=i) for i in range(4)]
    write_table(str(tmp_path), "c", records, [flat(5, 5, 5)] * 4, tmp_path / "raw")
    with pytest.raises(UserError, match="the model has collapsed"):
        evaluate(monkeypatch, loaded(str(tmp_path), ["c"]), "protocol=image")
    record = evaluate(monkeypatch, loaded(str(tmp_path), ["c"]), "protocol=image", "allow_constant=true")
    assert record["tie_rate"] == 1.0


def test_a_sysu_table_is_scored_with_its_own_cameras(tmp_path, monkeypatch):
    shots = [("ir", 3, 1, (9, 0, 0)), ("rgb", 2, 1, (9, 1, 0)), ("rgb", 1, 1, (9, 4, 0)), ("rgb", 4, 2, (9, 2, 0))]
    records = [
        Record(path=f"cam{camid}/{i}.png", split="test", pid=pid, camid=camid, modality=modality)
        for i, (modality, camid, pid, _) in enumerate(shots)
    ]
    write_table(str(tmp_path), "s", records, [flat(*colour) for *_, colour in shots], tmp_path / "raw")
    record = evaluate(monkeypatch, loaded(str(tmp_path), ["s"]), "protocol=sysu-all-single-shot")
    # camera 2 looks into the room of camera 3 and is taken out, so the stranger comes before the match
    assert (record["rank1"], record["mAP"], record["num_trials"], record["num_queries"]) == (0.0, 0.5, 10, 1)
