"""Tables, views and decoding: rows in order, labels over domains, images on demand, damage found."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageFile

from jobs import runs as jobs_runs
from reid_dist.config import DataConfig
from reid_dist.data.decode import DecodeError, decode, inspect
from reid_dist.data.records import Record
from reid_dist.data.side import open_side_table, write_side_table
from reid_dist.data.store import TableView, open_table, open_view, table_uri
from reid_dist.data.tables import SCHEMA, referenced_files
from reid_dist.errors import UserError
from reid_dist.storage import CorruptionError, StorageError, open_store
from reid_dist.storage.cache import NodeCache
from tests.s3server import S3Server, s3  # noqa: F401 - the fixture
from tests.tables import jpeg, write_table

# --- decoding


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def gradient(height: int = 8, width: int = 4) -> np.ndarray:
    return (np.arange(height * width * 3) % 251).reshape(height, width, 3).astype(np.uint8)


def test_decode_png_exactly() -> None:
    assert np.array_equal(decode(encoded(Image.fromarray(gradient()), "PNG"), "x.png"), gradient())


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("CMYK", "JPEG"), ("1", "PNG")]
)
def test_every_mode_becomes_rgb(mode: str, kind: str) -> None:
    image = Image.new("RGB", (6, 9), (255, 255, 255)).convert(mode)
    result = decode(encoded(image, kind), "x")
    assert result.shape == (9, 6, 3)
    assert result.dtype == np.uint8
    assert result.min() >= 250


def test_sixteen_bit_grey_is_not_clipped() -> None:
    grey = (np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)
    assert np.array_equal(decode(encoded(Image.fromarray(grey), "PNG"), "x")[..., 0], (grey >> 8).astype(np.uint8))


def test_exif_rotation_is_applied() -> None:
    image = Image.fromarray(gradient(8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    data = encoded(image, "PNG", exif=exif)
    assert np.array_equal(decode(data, "x"), np.rot90(gradient(8, 4), -1))
    assert (inspect(data, "x.png").height, inspect(data, "x.png").width) == (4, 8)


@pytest.mark.parametrize("cut", [0, 1, 100, -200, -30])
def test_truncated_images_are_refused(cut: int) -> None:
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)), "JPEG")[
        :cut
    ]
    with pytest.raises(DecodeError, match=r"folder/x\.jpg"):
        decode(data, "folder/x.jpg")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize("data", [b"<html>not found</html>", b"\0" * 1000, b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError, match="not an image") as caught:
        decode(data, "x.jpg")
    assert "\n" not in str(caught.value)


def test_decompression_bomb_is_refused() -> None:
    header = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    )
    with pytest.raises(DecodeError, match=r"x\.png"):
        decode(header + b"\0" * 100, "x.png")


def test_misnamed_files_are_counted() -> None:
    image = Image.fromarray(gradient())
    assert inspect(encoded(image, "PNG"), "a.jpg").misnamed
    assert not inspect(encoded(image, "PNG"), "a.PNG").misnamed
    assert not inspect(encoded(image, "JPEG"), "a.jpeg").misnamed
    assert not inspect(encoded(image, "BMP"), "a.bmp").misnamed


# --- tables


def person(number: int, pid: int, split: str = "train", **facts: object) -> Record:
    return Record(path=f"imgs/{number:03d}.jpg", split=split, pid=pid, **facts)  # type: ignore[arg-type]


@pytest.fixture
def root(tmp_path: Path) -> str:
    """Two tables: `a` with captions and cameras, `b` without cameras, whose ids overlap with those of `a`."""
    a = [person(i, [7, 3, 7, 9, 3, 9, 2, 2, 5, 5][i], "train" if i < 6 else "test", camid=i % 3, domain="a",
                captions=(f"caption {i}", f"other {i}")) for i in range(10)]  # fmt: skip
    b = [person(i, 3 + i % 2, domain="b", tracklet=i, frame=2 * i, modality="ir") for i in range(5)]
    write_table(str(tmp_path / "root"), "a", a, [jpeg(i) for i in range(10)], tmp_path / "raw-a")
    write_table(str(tmp_path / "root"), "b", b, [jpeg(100 + i, 40, 20) for i in range(5)], tmp_path / "raw-b")
    return str(tmp_path / "root")


def test_table_columns(root: str) -> None:
    table = open_table(root, "a")
    view = TableView([table])
    assert len(view) == 10
    assert view.pid.tolist() == [7, 3, 7, 9, 3, 9, 2, 2, 5, 5]
    assert view.camid.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert view.tracklet.tolist() == [-1] * 10
    assert view.split.tolist() == ["train"] * 6 + ["test"] * 4
    assert view.captions[4] == ("caption 4", "other 4")
    assert view.path(9) == "imgs/009.jpg"
    assert view.height.tolist() == [32] * 10
    assert view.width.tolist() == [16] * 10
    assert view.digests(np.array([2]))[0] == hashlib.sha256(jpeg(2)).hexdigest()
    assert table.facts.rows == 10
    assert len(list((Path(root) / "tables/a.lance/data").iterdir())) == 3


def test_view_over_two_tables(root: str) -> None:
    view = open_view(DataConfig(root=root), ("a", "b"), ("train",))
    assert len(view) == 11
    assert view.domain.tolist() == [0] * 6 + [1] * 5
    # (a,3) (a,7) (a,9) (b,3) (b,4): the 3 of one domain is not the 3 of the other
    assert view.label.tolist() == [1, 0, 1, 2, 0, 2, 3, 4, 3, 4, 3]
    assert view.camid.tolist()[6:] == [-1] * 5
    assert view.modality.tolist()[5:7] == ["rgb", "ir"]
    assert view.frame.tolist()[6:] == [0, 2, 4, 6, 8]
    assert set(view.versions) == {"a", "b"}
    assert view.versions["b"]["rows"] == 5
    assert view.describe() == "a, b"


def test_images_in_any_order_with_doubles(root: str) -> None:
    view = open_view(DataConfig(root=root), ("a", "b"), ("train",))
    rows = np.array([8, 0, 5, 0, 10, 2])
    images = view.images(rows)
    wanted = [jpeg(102, 40, 20), jpeg(0), jpeg(5), jpeg(0), jpeg(104, 40, 20), jpeg(2)]
    assert view.encoded(rows) == wanted
    for image, data in zip(images, wanted, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(io.BytesIO(data))))
    images[1][:] = 77  # an array of its own: drawing on one changes no other
    assert images[3].min() != images[3].max()
    assert view.images(np.array([], dtype=np.int64)) == []


def test_images_from_many_threads(root: str) -> None:
    view = open_view(DataConfig(root=root), ("a", "b"))
    draws = [np.random.default_rng(seed).integers(0, len(view), 16) for seed in range(32)]
    wanted = [jpeg(i) for i in range(10)] + [jpeg(100 + i, 40, 20) for i in range(5)]
    with ThreadPoolExecutor(8) as pool:
        for rows, got in zip(draws, pool.map(view.encoded, draws), strict=True):
            assert got == [wanted[row] for row in rows]


def test_select(root: str) -> None:
    view = open_view(DataConfig(root=root), ("a",))
    some = view.select(view.split == "test")
    assert some.pid.tolist() == [2, 2, 5, 5]
    assert some.label.tolist() == [0, 0, 1, 1]
    assert some.select(np.array([3, 0])).path(0) == "imgs/009.jpg"
    assert some.encoded([0]) == [jpeg(6)]
    assert len(view.select(np.zeros(10, dtype=bool))) == 0
    assert view.select(np.zeros(10, dtype=bool)).label.tolist() == []
    with pytest.raises(ValueError, match="mask of 3"):
        view.select(np.ones(3, dtype=bool))
    with pytest.raises(ValueError, match="read-only"):
        view.pid[0] = 1


def test_hold_out(root: str) -> None:
    view = open_view(DataConfig(root=root), ("a", "b"), ("train",))
    train, val = view.hold_out(0.34, seed=1)
    assert len(train) + len(val) == len(view)
    assert not set(zip(train.domain_name, train.pid, strict=True)) & set(zip(val.domain_name, val.pid, strict=True))
    assert {len(np.unique(v.pid[v.domain_name == "a"])) for v in (val,)} == {1}
    again = view.select(np.arange(len(view))[::-1]).hold_out(0.34, seed=1)[1]
    assert sorted(again.rows.tolist()) == sorted(val.rows.tolist())  # the order of rows plays no part
    draws = {tuple(view.hold_out(0.34, seed=seed)[1].rows.tolist()) for seed in range(8)}
    assert len(draws) > 1
    for fraction in (0.0, 1.0, -1.0):
        with pytest.raises(UserError, match="val_fraction"):
            view.hold_out(fraction, 1)
    with pytest.raises(UserError, match="too few"):
        view.select(view.pid == 7).hold_out(0.5, 1)
    most, rest = view.hold_out(0.999, seed=1)[::-1]
    assert set(rest.domain_name) == {"a", "b"}
    assert len(most) > len(rest)


def test_missing_table_and_version(root: str) -> None:
    with pytest.raises(UserError, match=r"no table 'c' .*found: a, b.*jobs\.pack"):
        open_table(root, "c")
    with pytest.raises(UserError, match="no version 99"):
        open_table(root, "a", version=99)
    for name in ("../a", "a/b", ""):
        with pytest.raises(UserError, match="table"):
            open_table(root, name)
    with pytest.raises(UserError, match="twice"):
        open_view(DataConfig(root=root), ("a", "a"))
    lance.write_dataset(pa.table({"x": [1]}), table_uri(root, "foreign"))
    with pytest.raises(UserError, match=r"not one that jobs\.pack wrote"):
        open_table(root, "foreign")


def test_missing_data_file_is_found(root: str) -> None:
    table = open_table(root, "a")
    for path in (Path(root) / "tables/a.lance/data").iterdir():
        path.unlink()
    with pytest.raises((CorruptionError, StorageError)):
        open_table(root, "a")
    with pytest.raises(CorruptionError, match="table a"):
        TableView([table]).encoded([0])


def test_content_does_not_depend_on_the_place(tmp_path: Path) -> None:
    records, images = [person(i, i) for i in range(9)], [jpeg(i) for i in range(9)]
    found = []
    for place in ("one", "two"):
        write_table(str(tmp_path / place), "t", records, images, tmp_path / f"raw-{place}")
        folder = tmp_path / place / "tables/t.lance/data"
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        found.append((open_table(str(tmp_path / place), "t").facts, files))
    assert found[0] == found[1]
    other = [jpeg(i + (i == 8)) for i in range(9)]
    write_table(str(tmp_path / "three"), "t", records, other, tmp_path / "raw-three")
    assert open_table(str(tmp_path / "three"), "t").facts.content != found[0][0].content


def test_older_version_stays_readable(tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    first = write_table(root, "t", [person(0, 1)], [jpeg(1)], tmp_path / "raw1")
    second = write_table(root, "t", [person(0, 1), person(1, 2)], [jpeg(1), jpeg(2)], tmp_path / "raw2")
    assert second > first
    assert len(TableView([open_table(root, "t")])) == 2
    old = open_table(root, "t", version=first)
    assert TableView([old]).encoded([0]) == [jpeg(1)]
    assert old.version == first
    assert len(referenced_files(table_uri(root, "t"))) == 2


def test_remote_table_through_the_cache(s3: S3Server, tmp_path: Path) -> None:  # noqa: F811
    records, images = [person(i, i % 3) for i in range(10)], [jpeg(i) for i in range(10)]
    write_table(s3.uri, "t", records, images, tmp_path / "raw")
    view = open_view(DataConfig(root=s3.uri, cache=str(tmp_path / "cache")), ("t",))
    assert view.encoded([9, 0]) == [jpeg(9), jpeg(0)]
    before = len(s3.requests)
    assert len(view.images(np.arange(10))) == 10
    assert len(s3.requests) == before  # images come from the node's own disk
    again = open_table(s3.uri, "t", cache=NodeCache(tmp_path / "cache"))
    assert {method for method, _ in s3.requests[before:]} == {"GET"}
    assert len(s3.requests) - before <= 3  # listings only
    assert again.facts == view.tables[0].facts


def test_schema_is_what_the_design_says() -> None:
    wanted = "image sha256 path split pid camid modality tracklet frame domain captions trials height width"
    assert SCHEMA.names == wanted.split()


# --- side tables


def test_side_table_joins_by_content(root: str, tmp_path: Path) -> None:
    view = open_view(DataConfig(root=root), ("a",))
    digests = view.digests(np.arange(10))
    rows = pa.table({"image": digests[:4], "caption": ["d"] * 4, "text": [f"text {i}" for i in range(4)]})
    write_side_table(root, "rda", rows, ("image", "caption"), {"model": "m"})
    side = open_side_table(root, "rda")
    assert side.keys == ("image", "caption")
    assert side.facts == {"model": "m"}
    found = side.lookup([(digests[3], "d"), ("nothing", "d"), (digests[0], "d"), (digests[3], "d")], ["text"])
    assert found == [{"text": "text 3"}, None, {"text": "text 0"}, {"text": "text 3"}]
    assert side.lookup([], ["text"]) == []
    second = write_side_table(root, "rda", rows.slice(0, 1), ("image", "caption"), {"model": "n"})
    assert open_side_table(root, "rda").lookup([(digests[3], "d")], ["text"]) == [None]
    assert open_side_table(root, "rda", version=second - 1).facts == {"model": "m"}
    for bad, message in ((("absent",), "missing"), ((), "missing"), (("caption",), "share a key")):
        with pytest.raises(UserError, match=message):
            write_side_table(root, "rda", rows, bad, {})
    with pytest.raises(UserError, match="no side table"):
        open_side_table(root, "none")
    with pytest.raises(UserError, match="no version"):
        open_side_table(root, "rda", version=9)


# --- jobs.runs over tables and caches


def test_gc_removes_what_no_version_names(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(root)
    store.write("tables/a.lance/data/orphan.lance", b"half a pack")
    store.write("tables/dead.lance/data/x.lance", b"never committed")
    store.write("tables/.tmp-1", b"half a file")
    words = [f"runs={tmp_path}/runs", f"root={root}", f"cache={tmp_path}/cache"]
    assert jobs_runs.main(["gc", *words])["removed"] == []  # all of it is younger than a day
    monkeypatch.setattr(jobs_runs, "OLD_S", -60.0)
    wanted = [f"{root}/tables/{key}" for key in (".tmp-1", "a.lance/data/orphan.lance", "dead.lance/data/x.lance")]
    assert jobs_runs.main(["gc", "--plan", *words]) == {"plan": True, "removed": wanted}
    assert store.exists("tables/dead.lance/data/x.lance")
    assert jobs_runs.main(["gc", *words])["removed"] == wanted
    assert jobs_runs.main(["gc", *words])["removed"] == []
    assert len(open_table(root, "a").facts.content) == 64
    assert open_view(DataConfig(root=root), ("a",)).encoded([9]) == [jpeg(9)]


def test_gc_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path / "runs")
    store.write("r1/run.json", b"{}")
    marker = json.dumps({"folder": "good", "manifest_sha256": "0" * 64}).encode()
    for key, data in {"good/w": b"1", "torn/w": b"2", "COMMITTED": marker}.items():
        store.write(f"r1/checkpoints/step-00000001/{key}", data)
    store.write("r1/checkpoints/step-00000002/torn/w", b"3")
    store.write("r1/ray/state", b"4")
    words = [f"runs={tmp_path}/runs", f"root={tmp_path}/none", f"cache={tmp_path}/cache"]
    assert jobs_runs.main(["gc", *words])["removed"] == []
    monkeypatch.setattr(jobs_runs, "OLD_S", -60.0)
    removed = [path.removeprefix(f"{tmp_path}/runs/r1/") for path in jobs_runs.main(["gc", *words])["removed"]]
    assert removed == ["checkpoints/step-00000001/torn", "checkpoints/step-00000002/torn", "ray"]
    left = [entry.key for entry in store.list("r1/")]
    assert left == ["r1/checkpoints/step-00000001/COMMITTED", "r1/checkpoints/step-00000001/good/w", "r1/run.json"]


def test_ls(root: str, tmp_path: Path, s3: S3Server) -> None:  # noqa: F811
    open_store(s3.uri).write("w", b"123")
    cache = NodeCache(tmp_path / "cache")
    cache.file(f"{s3.uri}/w")
    found = jobs_runs.main(["ls", f"runs={tmp_path}/runs", f"root={root}", f"cache={tmp_path}/cache"])
    assert [(Path(t["uri"]).name, t["rows"]) for t in found["tables"]] == [("a.lance", 10), ("b.lance", 5)]
    assert [entry["uri"] for entry in found["cache"]] == [f"{s3.uri}/w"]
    assert found["runs"] == []
    assert time.time() - found["cache"][0]["used"] < 60


@pytest.mark.parametrize(
    "words", [["gc", "--force"], ["ls", "root"], ["drop"], [], ["ls", "rot=x"], ["gc", "cache_gb=many"]]
)
def test_wrong_words_are_refused(words: list[str]) -> None:
    with pytest.raises(UserError):
        jobs_runs.main(words)
