"""The pack job on a private Ray cluster: folder and bucket, order and bytes whatever the parallelism, faults, running
twice.
"""

from __future__ import annotations

import hashlib
import io
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import pack as job
from jobs._cluster import connect
from reid_dist.config import DataConfig
from reid_dist.data import layouts, pack
from reid_dist.data.decode import DecodeError
from reid_dist.data.records import DatasetError
from reid_dist.data.store import TableView, open_table, open_view
from reid_dist.data.synthetic import write_synthetic
from reid_dist.data.tracklets import read_tracklets
from reid_dist.errors import UserError
from reid_dist.storage import StorageError, open_store
from tests.s3server import S3Server, serve
from tests.tables import jpeg

IMAGES = 50


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    """One bucket for the module: the cluster's processes inherit its variables."""
    with serve() as server:
        yield server


@pytest.fixture(scope="module")
def cluster(s3: S3Server) -> Iterator[None]:
    with connect(num_cpus=2):
        yield


def market(folder: Path) -> Path:
    """A Market-1501 tree of noise."""
    for split, first in (("bounding_box_train", 0), ("bounding_box_test", 100), ("query", 100)):
        (folder / split).mkdir(parents=True)
        for number in range(IMAGES):
            name = f"{first + number // 5 + 1:04d}_c{number % 6 + 1}s1_{number:06d}_01.jpg"
            (folder / split / name).write_bytes(jpeg(number + (1000 if split == "query" else first)))
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return market(tmp_path / "raw_2024_c3")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "CHUNK", 32)


def files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("data/*")) if p.is_file()}


def test_rows_are_the_tree_in_order(cluster: None, tree: Path, tmp_path: Path) -> None:
    record = job.main(["market-1501", str(tree), f"root={tmp_path}/root"])
    assert record["rows"] == record["packed"] == 3 * IMAGES
    assert record["splits"]["train"]["images"] == IMAGES
    view = TableView([open_table(f"{tmp_path}/root", "market-1501")])
    wanted = [
        f"{split}/{name}"
        for split in ("bounding_box_train", "query", "bounding_box_test")  # the order of the layout
        for name in sorted((path.name for path in (tree / split).iterdir()), key=str.encode)
    ]
    assert [view.path(i) for i in range(len(view))] == wanted
    assert view.encoded(np.arange(len(view))) == [(tree / path).read_bytes() for path in wanted]
    assert len(files(tmp_path / "root")) == 5  # 150 rows in files of 32


def test_packing_twice_is_no_work(cluster: None, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["market-1501", str(tree), f"root={tmp_path}/root", "name=m"]
    first = job.main(words)
    before = files(tmp_path / "root")

    def refuse(*_: object) -> None:
        raise AssertionError("a task was started")

    with monkeypatch.context() as patch:
        patch.setattr(pack, "_run_chunks", refuse)
        again = job.main(words)
        assert job.main([*words, "--plan"])["up_to_date"] is True
    assert again["packed"] == 0
    assert again["content"] == first["content"]
    assert files(tmp_path / "root") == before
    (tree / "query" / "0101_c1s1_000000_01.jpg").write_bytes(jpeg(9999, 40, 20))
    third = job.main(words)
    assert third["packed"] == 3 * IMAGES
    assert third["version"] == first["version"] + 1
    assert third["content"] != first["content"]


def test_bytes_do_not_depend_on_parallelism(tree: Path, tmp_path: Path, cluster: None) -> None:
    """Two tasks at a time on Ray, against the chunks one after the other, in reverse, without Ray."""
    job.main(["market-1501", str(tree), f"root={tmp_path}/ray"])
    todo = pack.plan("market-1501", str(tree), f"{tmp_path}/plain")
    results = []
    for number in reversed(range(todo.chunks)):
        part = todo.parsed.records[number * 32 : (number + 1) * 32]
        results.append({"chunk": number, **pack._write_chunk(number, part, todo.source, todo.uri, todo.tag, "stop")})
    results = results[::-1]
    pack.commit(todo.uri, todo.tag, results, pack._facts(todo, results))
    assert files(tmp_path / "plain") == files(tmp_path / "ray")
    facts = [open_table(f"{tmp_path}/{place}", "market-1501").facts for place in ("ray", "plain")]
    assert facts[0] == facts[1]


def test_bucket_to_bucket(cluster: None, s3: S3Server, tree: Path, tmp_path: Path) -> None:
    raw, root = f"{s3.uri}/raw", f"{s3.uri}/root"
    store = open_store(raw)
    for path in tree.rglob("*.jpg"):
        store.upload(path.relative_to(tree).as_posix(), str(path))
    there = job.main(["market-1501", raw, f"root={root}"])
    here = job.main(["market-1501", str(tree), f"root={tmp_path}/root"])
    assert there["content"] == here["content"]
    view = open_view(DataConfig(root=root, cache=str(tmp_path / "cache")), ("market-1501",), ("query",))
    assert len(view) == IMAGES
    assert view.encoded([0]) == [(tree / view.path(0)).read_bytes()]
    assert not [e.key for e in open_store(root).list() if "stop" in e.key]
    assert job.main(["market-1501", raw, f"root={root}"])["packed"] == 0


PEOPLE = {"size": (32, 16), "num_train": 6, "num_test": 4}
OTHERS = {"ufine6926": {}, "llcm": {"images_per_id": 2}, "sysu-mm01": {"num_val": 3, "images_per_id": 2},
          "mars": {"num_distractors": 3, "max_frames": 4}}  # fmt: skip


@pytest.mark.parametrize("layout", OTHERS)
def test_long_captions_infrared_and_video_go_to_a_bucket(
    cluster: None, s3: S3Server, layout: str, tmp_path: Path
) -> None:
    write_synthetic(tmp_path / "set", layout, **PEOPLE, **OTHERS[layout])
    parsed = layouts.get(layout).parse(open_store(str(tmp_path / "set")))
    root = f"{s3.uri}/others"
    record = job.main([layout, str(tmp_path / "set"), f"root={root}"])
    assert record["rows"] == len(parsed.records)
    view = open_view(DataConfig(root=root, cache=str(tmp_path / "cache")), (layout,))
    for name in ("path", "split", "pid", "modality", "captions"):
        shown = [view.path(row) for row in range(len(view))] if name == "path" else getattr(view, name).tolist()
        assert shown == [getattr(r, name) for r in parsed.records], name
    assert view.camid.tolist() == [-1 if r.camid is None else r.camid for r in parsed.records]
    if layout == "ufine6926":
        assert np.mean([len(text.split()) for texts in view.captions for text in texts]) > 60
    if layout in ("llcm", "sysu-mm01"):
        assert set(view.modality) == {"rgb", "ir"}
    if layout == "mars":
        rows = read_tracklets(root, layout, record["content"])
        assert record["tracklets"] == len(rows) == len({r.tracklet for r in parsed.records})
        assert sorted(row for tracklet in rows for row in tracklet["rows"]) == list(range(len(view)))
    assert job.main([layout, str(tmp_path / "set"), f"root={root}"])["packed"] == 0


BROKEN = "bounding_box_test/0105_c3s1_000020_01.jpg"


@pytest.mark.parametrize("damage", ["truncated", "text"])
def test_corrupt_image_stops_with_its_name(cluster: None, tree: Path, tmp_path: Path, damage: str) -> None:
    data = (tree / BROKEN).read_bytes()
    (tree / BROKEN).write_bytes(data[: len(data) // 2] if damage == "truncated" else b"<html>404</html>")
    with pytest.raises(DecodeError, match=BROKEN.replace(".", r"\.")) as caught:
        job.main(["market-1501", str(tree), f"root={tmp_path}/root"])
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    assert [e.key for e in open_store(tmp_path / "root").list()] == []
    assert open_store(tmp_path / "root").sweep(-60) == []


def test_quarantine_lists_and_counts(cluster: None, tree: Path, tmp_path: Path) -> None:
    (tree / BROKEN).write_bytes(b"no image")
    png = io.BytesIO()
    Image.new("RGB", (16, 32)).save(png, "PNG")
    (tree / "query/0101_c1s1_000000_01.jpg").write_bytes(png.getvalue())
    words = ["market-1501", str(tree), f"root={tmp_path}/root"]
    record = job.main([*words, "on_error=quarantine"])
    assert record["quarantined"] == [BROKEN]
    assert record["rows"] == 3 * IMAGES - 1
    assert record["misnamed"] == 1
    view = TableView([open_table(f"{tmp_path}/root", "market-1501")])
    assert BROKEN not in {view.path(i) for i in range(len(view))}
    assert view.tables[0].facts.quarantined == (BROKEN,)
    assert job.main([*words, "on_error=quarantine"])["packed"] == 0
    with pytest.raises(DecodeError):  # a table with gaps is not what on_error=stop promises
        job.main(words)
    assert len(TableView([open_table(f"{tmp_path}/root", "market-1501")])) == 3 * IMAGES - 1


def test_nothing_left_after_quarantine(cluster: None, tree: Path, tmp_path: Path) -> None:
    for path in tree.rglob("*.jpg"):
        path.write_bytes(b"no image")
    with pytest.raises(DatasetError, match="none of the 150 images"):
        job.main(["market-1501", str(tree), f"root={tmp_path}/root", "on_error=quarantine"])
    assert open_store(tmp_path / "root").list() == []


def test_failed_repack_keeps_the_old_version(cluster: None, tree: Path, tmp_path: Path) -> None:
    words = ["market-1501", str(tree), f"root={tmp_path}/root"]
    first = job.main(words)
    before = files(tmp_path / "root")
    (tree / BROKEN).write_bytes(b"no image")
    with pytest.raises(DecodeError):
        job.main(words)
    assert files(tmp_path / "root") == before
    assert open_table(f"{tmp_path}/root", "market-1501").version == first["version"]


def test_storage_that_fails_publishes_nothing(cluster: None, s3: S3Server, tree: Path) -> None:
    root = f"{s3.uri}/failing"
    s3.fail(-1, "PUT", 403, "AccessDenied", "000003.lance")
    try:
        with pytest.raises(StorageError, match="may not") as caught:
            job.main(["market-1501", str(tree), f"root={root}"])
    finally:
        s3.faults.clear()
    assert "\n" not in str(caught.value)
    assert open_store(root).list() == []


def test_data_file_lost_before_the_commit(
    cluster: None, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pack._facts

    def lose_one(todo: pack.Plan, results: list) -> object:
        open_store(todo.uri).delete(f"data/{todo.tag}-000001.lance")
        return real(todo, results)

    monkeypatch.setattr(pack, "_facts", lose_one)
    with pytest.raises(StorageError, match="vanished before the commit"):
        job.main(["market-1501", str(tree), f"root={tmp_path}/root"])
    assert open_store(tmp_path / "root").list() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["market-1501"], "expected LAYOUT and SOURCE"),
        (["market-1501", "{tree}"], "root= is missing"),
        (["market", "{tree}", "root=x"], "market-1501"),
        (["market-1501", "{tree}/none", "root=x"], "none"),
        (["market-1501", "{tree}", "root=x", "on_error=ignore"], "stop or quarantine"),
        (["market-1501", "{tree}", "root=x", "nonsense=1"], "nonsense"),
        (["market-1501", "{tree}", "root=x", "--force"], "--force"),
        (["market-1501", "{tree}", "root=ftp://x"], "not known"),
        (["market-1501", "{tree}", "root=x", "name=../x"], "table"),
    ],
)
def test_wrong_input_is_refused_before_ray(tree: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        job.main([word.format(tree=tree) for word in words])


def test_plan_and_list_start_nothing(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(job, "connect", refuse)
    planned = job.main(["market-1501", str(tree), f"root={tmp_path}/root", "--plan"])
    assert planned["images"] == 3 * IMAGES
    assert planned["files"] == 5
    assert planned["up_to_date"] is False
    assert not (tmp_path / "root").exists()


def test_list_shows_tree_access_published_counts_and_options(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    shown = job.main(["--list"])["layouts"]
    assert set(shown) == set(layouts.names())
    assert shown["msmt17"]["published"]["gallery"] == {"ids": 3060, "images": 82161, "cameras": 15}
    assert shown["msmt17"]["options"] == {"val_to_train": True}
    for name, facts in shown.items():
        text = next(message for message in caplog.messages if message.startswith(f"{name} ("))
        assert facts["obtain"] in text
        assert all(line in text for line in facts["tree"].splitlines())
        for what, number in (pair for counts in facts["published"].values() for pair in counts.items()):
            assert f"{number:,} {what if number != 1 else what.removesuffix('s')}" in text
    assert list(job.main(["--list", "grid"])["layouts"]) == ["grid"]


def test_check_says_what_is_wrong_and_packs_nothing(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    good = job.main(["--check", "market-1501", str(tree)])
    assert (good["num_problems"], good["images"], "error" in good) == (0, 3 * IMAGES, False)
    assert any("train has" in warning and "published" in warning for warning in good["warnings"])
    (tree / BROKEN).write_bytes(b"no image")
    (tree / "query" / "notes.txt").write_text("x")
    found = job.main(["market-1501", str(tree), f"root={tmp_path}/root", "--check"])
    assert (found["exit_code"], found["num_problems"], len(found["problems"])) == (2, 2, 2)
    assert found["error"].startswith("2 problems, first: ")
    assert any(BROKEN in message for message in caplog.messages)
    assert any("query/notes.txt" in message for message in caplog.messages)
    assert not (tmp_path / "root").exists()
    with pytest.raises(UserError, match="no option 'colour'"):
        job.main(["--check", "market-1501", str(tree), "colour=red"])


def test_killed_pack_leaves_no_table_and_goes_through_next_time(cluster: None, tree: Path, tmp_path: Path) -> None:
    """SIGKILL between the data files and the commit: no version exists; the next run writes the same names."""
    code = (
        "import os, signal, sys; from reid_dist.data import pack\n"
        f"pack.CHUNK = 32; todo = pack.plan('market-1501', {str(tree)!r}, {str(tmp_path / 'root')!r})\n"
        "part = todo.parsed.records[:32]\n"
        "pack._write_chunk(0, part, todo.source, todo.uri, todo.tag, 'stop')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(job.__file__).parents[1], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(UserError, match="no table"):
        open_table(f"{tmp_path}/root", "market-1501")
    assert len(files(tmp_path / "root")) == 1
    job.main(["market-1501", str(tree), f"root={tmp_path}/root"])
    assert len(files(tmp_path / "root")) == 5
