"""Feature files of other libraries: what is read and what is refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from reid_dist.evaluation.featurefile import read_features
from reid_dist.evaluation.protocols import evaluate, get
from reid_dist.evaluation.ranking import Labels, Scoring, rank_features
from reid_dist.evaluation.similarity import EvaluationError


def columns(n: int = 60) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    pid = rng.integers(0, 6, n)
    feat = rng.standard_normal((6, 8))[pid] + rng.standard_normal((n, 8))
    return {
        "feat": feat.astype(np.float32),
        "pid": pid,
        "camid": rng.integers(0, 3, n),
        "split": np.where(np.arange(n) < 20, "query", "gallery"),
        "id": np.array([f"image/{i}" for i in range(n)]),
    }


def write_parquet(path, data):
    table = {k: (pa.array(v.tolist()) if v.ndim > 1 else pa.array(v)) for k, v in data.items()}
    parquet.write_table(pa.table(table), path)


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_a_file_scores_as_its_arrays(tmp_path, suffix):
    data, path = columns(), tmp_path / f"x.{suffix}"
    np.savez(path, **data) if suffix == "npz" else write_parquet(path, data)
    items, feat = read_features(path, get("image"))
    record = evaluate(get("image"), items, {"feat": feat})
    q, g = data["split"] == "query", data["split"] == "gallery"
    sides = Labels(data["pid"][q], data["camid"][q]), Labels(data["pid"][g], data["camid"][g])
    expected = rank_features(data["feat"][q], data["feat"][g], *sides, Scoring(same_camera=True)).record()
    assert {k: record[k] for k in expected} == expected
    assert expected["rank1"] > expected["chance_rank1"]


def test_byte_strings_and_double_precision_are_read(tmp_path):
    data = columns()
    np.savez(
        tmp_path / "x.npz", **{**data, "split": data["split"].astype("S"), "feat": data["feat"].astype(np.float64)}
    )
    items, feat = read_features(tmp_path / "x.npz", get("image"))
    assert items.split.tolist() == data["split"].tolist()
    assert feat.dtype == np.float32


def changed(**more):
    data = {**columns(), **more}
    return {k: v for k, v in data.items() if v is not None}


@pytest.mark.parametrize(
    ("protocol", "data", "message"),
    [
        ("image", changed(camid=None), r"missing \['camid'\]"),
        ("image", changed(feat=None, pid=None), r"missing \['feat', 'pid'\]"),
        ("regdb-visible-to-thermal", changed(), r"missing \['modality', 'trial'\]"),
        ("sysu-all-single-shot", changed(), r"missing \['modality', 'path'\]"),
        ("image", changed(feat=np.ones(60, np.float32)), r"feat has shape \(60,\)"),
        ("image", changed(feat=np.ones((60, 3), np.int64)), "type int64"),
        ("image", changed(pid=np.arange(59)), r"column pid has shape \(59,\), feat has 60 rows"),
        ("image", changed(pid=np.arange(60) + 0.5), "column pid has type float64, expected whole numbers"),
        ("image", changed(split=np.full(60, "probe")), r"column split holds \['probe'\]"),
        ("image", changed(modality=np.full(60, "thermal")), r"expected \['rgb', 'ir'\]"),
        ("text-to-image", changed(split=np.full(60, "test")), "60 rows say test, which is both"),
        ("image", changed(id=np.array(["a", "a", *map(str, range(58))])), "id 'a' comes twice on one side"),
    ],
)
def test_files_that_cannot_be_scored_are_refused(tmp_path, protocol, data, message):
    np.savez(tmp_path / "x.npz", **data)
    with pytest.raises(EvaluationError, match=message) as error:
        read_features(tmp_path / "x.npz", get(protocol))
    assert "x.npz" in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_files_are_refused(tmp_path):
    for name in ("x.npz", "x.parquet"):
        with pytest.raises(EvaluationError, match="no such file"):
            read_features(tmp_path / name, get("image"))
        (tmp_path / name).write_bytes(b"neither")
        with pytest.raises(EvaluationError, match=r"x\.(npz|parquet): not a"):
            read_features(tmp_path / name, get("image"))
    np.savez(tmp_path / "o.npz", feat=np.array([{}], dtype=object))
    with pytest.raises(EvaluationError, match="plain arrays"):
        read_features(tmp_path / "o.npz", get("image"))
    np.save(tmp_path / "single.npy", np.ones(3))
    with pytest.raises(EvaluationError, match="not an npz"):
        read_features(tmp_path / "single.npy", get("image"))


def test_ragged_and_empty_cells_in_parquet_are_refused(tmp_path):
    ragged = {"feat": pa.array([[1.0, 2.0], [1.0]]), "pid": pa.array([1, 2]), "split": pa.array(["query", "gallery"])}
    parquet.write_table(pa.table(ragged), tmp_path / "x.parquet")
    with pytest.raises(EvaluationError, match=r"rows of different dimensions \[1, 2\]"):
        read_features(tmp_path / "x.parquet", get("image"))
    holes = {"pid": pa.array([1, None]), "split": ragged["split"], "feat": pa.array([[1.0], [2.0]])}
    parquet.write_table(pa.table(holes), tmp_path / "y.parquet")
    with pytest.raises(EvaluationError, match="column pid has 1 empty"):
        read_features(tmp_path / "y.parquet", get("image"))


def test_a_trial_without_gallery_and_an_absent_modality_are_named(tmp_path):
    data = changed(trial=np.repeat([0, 1], 30), modality=np.where(np.arange(60) < 20, "rgb", "ir"))
    np.savez(tmp_path / "x.npz", **data)
    items, feat = read_features(tmp_path / "x.npz", get("regdb-visible-to-thermal"))
    with pytest.raises(EvaluationError, match=r"no query rows of modality 'rgb'.* in trial 1"):
        evaluate(get("regdb-visible-to-thermal"), items, {"feat": feat})
    with pytest.raises(EvaluationError, match="no query rows of modality 'ir'"):
        evaluate(get("regdb-thermal-to-visible"), items, {"feat": feat})
