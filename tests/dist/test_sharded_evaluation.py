"""Encoding and scoring by Ray tasks: 1, 2 and 4 tasks and one process give the same digits; features are written once."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pytest

from jobs import evaluate as job
from jobs._cluster import connect
from reid_dist.config import DataConfig
from reid_dist.data.records import Record
from reid_dist.data.store import open_view
from reid_dist.errors import UserError
from reid_dist.evaluation.distributed.retrieval import encode_all, plan_retrieval, score
from reid_dist.evaluation.distributed.shards import encode_sharded, score_sharded
from reid_dist.evaluation.pipeline import Options
from reid_dist.evaluation.protocols import get
from reid_dist.storage import open_store
from reid_dist.training.encode import encode_side
from tests.colour import flat, loaded
from tests.s3server import S3Server, serve
from tests.tables import write_table

WEIGHTS = {"colour": 1.0}


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One bucket for the module: the cluster's processes inherit its variables."""
    with serve() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("REID_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield server


@pytest.fixture(scope="module", autouse=True)
def cluster(s3: S3Server) -> Iterator[None]:
    with connect(num_cpus=2):
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """300 items of 12 people, both modalities, usable by every protocol below."""
    rng = np.random.default_rng(4)
    n = 300
    pid = rng.integers(0, 12, n)
    path = tmp_path_factory.mktemp("features") / "x.npz"
    np.savez(
        path,
        feat=(rng.standard_normal((12, 16))[pid] + 2.0 * rng.standard_normal((n, 16))).astype(np.float32),
        pid=pid,
        camid=np.array([1, 2, 4, 5])[rng.integers(0, 4, n)],
        split=np.where(np.arange(n) < 90, "query", "gallery"),
        modality=np.where(np.arange(n) < 90, "ir", "rgb"),
        path=np.array([f"{i:03d}" for i in range(n)]),
        trial=np.zeros(n, int),
    )
    return str(path)


@pytest.mark.parametrize(
    "words",
    [
        ["image"],
        ["image", "expansion=true"],
        ["image", "rerank=true", "memory_mb=0.1"],
        ["image", "rerank=true", "expansion=true", "metric=cosine"],
        ["ten-splits", "rerank.k1=7", "rerank.k2=1", "metric=euclidean"],
        ["cuhk03-classic"],
        ["llcm-infrared-to-visible"],
    ],
    ids=" ".join,
)
def test_any_number_of_tasks_gives_the_same_digits(words: list[str], file: str, s3: S3Server) -> None:
    argv = ["--features", file, "--protocol", *words]
    alone = job.main(argv)
    assert 0 < alone["mAP"] < 1
    for shards in (1, 2, 4):
        s3.requests.clear()
        record = job.main([*argv, f"shards={shards}", f"store={s3.uri}/work"])
        assert record == alone | {"shards": shards}
        written = [path for method, path in s3.requests if method == "PUT"]
        assert len(written) == len(set(written)) == 1
    assert open_store(f"{s3.uri}/work").list() == []  # nothing is left behind


def test_tasks_name_what_a_user_can_mend(tmp_path, s3: S3Server) -> None:
    data = {"pid": np.array([1, 2, 3]), "camid": np.arange(3), "split": np.array(["query", "gallery", "gallery"])}
    np.savez(tmp_path / "x.npz", feat=np.eye(3, dtype=np.float32), **data)
    with pytest.raises(UserError, match="none of the 1 queries has a true match"):
        job.main(["--features", str(tmp_path / "x.npz"), "--protocol", "image", "shards=2"])
    np.savez(tmp_path / "x.npz", feat=np.array([[1, 0], [0, 0], [0, 1]], np.float32), **data)
    with pytest.raises(UserError, match="gallery features: row 0 is all zeros") as error:
        job.main(["--features", str(tmp_path / "x.npz"), "--protocol", "image", "shards=2"])
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A table of 60 colours around 10 people, query and gallery."""
    folder = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(7)
    centre = rng.integers(60, 190, (10, 3))
    records, images = [], []
    for i in range(60):
        split = "query" if i < 20 else "gallery"
        records.append(Record(path=f"{i:02d}.png", split=split, pid=i % 10, camid=int(i // 20)))
        images.append(flat(*(centre[i % 10] + rng.integers(-40, 40, 3)).tolist()))
    write_table(str(folder), "colours", records, images, folder / "raw", chunk=99)
    return str(folder)


def colour_encoder(root: str):
    """In a task: what jobs.evaluate does with a run."""
    model = loaded(root, ["colours"])
    view = open_view(model.recipe.data, ["colours"])
    return lambda side: encode_side(model, view, side)


def refusing_encoder(root: str):
    raise UserError(f"{root} cannot be encoded")


def test_encoding_by_tasks_gives_the_same_digits(root: str, s3: S3Server) -> None:
    retrieval = plan_retrieval(get("image"), open_view(DataConfig(root=root), ["colours"]))
    features = encode_all(retrieval, colour_encoder(root))
    record, ap = score(retrieval, features, WEIGHTS, Options())
    assert record["chance_mAP"] < record["mAP"] < 1
    for tasks in (1, 2, 4):
        place = f"{s3.uri}/encoded-{tasks}"
        stored = encode_sharded(place, retrieval, functools.partial(colour_encoder, root), 8, tasks)
        pieces = stored.pieces["image"]
        assert len(pieces) == tasks
        assert all(start % 8 == 0 for start, _ in pieces)  # every row meets the same batch
        assert [entry.key for entry in open_store(place).list()] == [f"image/{a:09d}-{b:09d}.npz" for a, b in pieces]
        assert (np.asarray(stored.all()["image"]["colour"]) == features["image"]["colour"].numpy()).all()
        wanted = np.array([59, 3, 3, 40])
        assert (stored.read("image", wanted)["colour"] == features["image"]["colour"].numpy()[wanted]).all()
        again, same = score_sharded(retrieval, stored, WEIGHTS, Options(), tasks)
        assert again == record
        assert (same == ap).all()


def test_a_table_is_scored_through_the_job(root: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "load", lambda word, which, overrides: loaded(root, ["colours"]))
    monkeypatch.setattr(job, "make_encoder", lambda word, which, overrides: colour_encoder(root))
    alone = job.main(["somewhere", "protocol=image"])
    record = job.main(["somewhere", "protocol=image", "shards=3", f"store={s3.uri}/job"])
    assert record == alone | {"shards": 3}
    assert open_store(f"{s3.uri}/job").list() == []


def test_what_a_task_refuses_is_said_in_one_line(root: str, s3: S3Server) -> None:
    retrieval = plan_retrieval(get("image"), open_view(DataConfig(root=root), ["colours"]))
    with pytest.raises(UserError, match=f"^{root} cannot be encoded$"):
        encode_sharded(f"{s3.uri}/none", retrieval, functools.partial(refusing_encoder, root), 8, 2)
