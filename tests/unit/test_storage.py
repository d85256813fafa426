"""Stores: what a folder and a bucket must do alike."""

from __future__ import annotations

import errno
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reid_dist import storage
from reid_dist.errors import UserError
from reid_dist.storage import AlreadyExists, StorageError, local, open_store
from tests.s3server import S3Server, s3  # noqa: F401 - the fixture


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URI of an empty place of each kind."""
    if request.param == "folder":
        return str(tmp_path / "store")
    return request.getfixturevalue("s3").uri


def test_write_read_list_delete(place: str) -> None:
    store = open_store(place)
    assert store.list() == []
    for key in ("b/two", "a", "b/one.bin", "bc"):
        store.write(key, key.encode() * 3)
    assert store.read("b/two") == b"b/twob/twob/two"
    assert [entry.key for entry in store.list()] == ["a", "b/one.bin", "b/two", "bc"]
    assert [entry.key for entry in store.list("b")] == ["b/one.bin", "b/two", "bc"]  # a prefix, not a folder
    assert [entry.key for entry in store.list("b/")] == ["b/one.bin", "b/two"]
    assert [entry.key for entry in store.sub("b").list()] == ["one.bin", "two"]
    assert store.stat("bc").size == 6
    assert abs(store.stat("bc").modified - time.time()) < 60
    assert store.exists("a")
    assert not store.exists("b")
    store.delete("a")
    store.delete("a")
    store.delete_tree("b")
    assert [entry.key for entry in store.list()] == ["bc"]
    with pytest.raises(FileNotFoundError, match="nothing"):
        store.read("nothing")
    with pytest.raises(FileNotFoundError, match="nothing"):
        store.stat("nothing")


def test_overwrite_changes_the_tag(place: str) -> None:
    store = open_store(place)
    store.write("k", b"one")
    before = store.stat("k").tag
    time.sleep(0.02)
    store.write("k", b"two")
    assert store.read("k") == b"two"
    assert store.stat("k").tag != before


def test_conditional_write_has_one_winner(place: str) -> None:
    store = open_store(place)
    store.write("once", b"first", if_absent=True)
    with pytest.raises(AlreadyExists):
        store.write("once", b"second", if_absent=True)
    assert store.read("once") == b"first"
    assert [entry.key for entry in store.list()] == ["once"]  # no probe is left behind


def test_conditional_write_race_in_a_folder(tmp_path: Path) -> None:
    """Sixteen threads, one winner, and the file is the winner's. (The bucket's atomicity is its server's, not ours.)"""
    store = open_store(tmp_path)
    gate = threading.Barrier(16)

    def attempt(number: int) -> int | None:
        gate.wait()
        try:
            store.write("fence", str(number).encode() * 1000, if_absent=True)
        except AlreadyExists:
            return None
        return number

    with ThreadPoolExecutor(16) as pool:
        winners = [n for n in pool.map(attempt, range(16)) if n is not None]
    assert len(winners) == 1
    assert store.read("fence") == str(winners[0]).encode() * 1000


def test_upload_download(place: str, tmp_path: Path) -> None:
    store = open_store(place)
    source, target = tmp_path / "in", tmp_path / "deep" / "out"
    source.write_bytes(os.urandom(100_000))
    store.upload("x/file", str(source))
    store.download("x/file", str(target))
    assert target.read_bytes() == source.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    with pytest.raises(FileNotFoundError, match="absent"):
        store.download("absent", str(target))
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/./b", "a/", "a\\b", "a\nb", "a\0b", "x" * 999]
)
def test_traversal_is_refused(tmp_path: Path, key: str) -> None:
    store = open_store(tmp_path / "inner")
    for call in (store.read, store.exists, store.delete, store.stat):
        with pytest.raises(UserError, match="not a storage key"):
            call(key)
    with pytest.raises(UserError, match="not a storage key"):
        store.write(key, b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["ftp://x/y", "gs://bucket/x", "hdfs://h/x", "http://h/x"])
def test_unknown_scheme_names_the_known_ones(uri: str) -> None:
    with pytest.raises(UserError, match=r"s3://bucket/prefix"):
        open_store(uri)


@pytest.mark.parametrize(
    "uri", ["s3://key:hunter2secret@bucket/x", "s3://bucket/x?secret=hunter2secret", "s3://B/x", "file://x"]
)
def test_uri_with_credentials_or_bad_bucket(uri: str) -> None:
    with pytest.raises(UserError) as caught:
        open_store(uri)
    assert "hunter2secret" not in str(caught.value)


def test_local_uri_forms(tmp_path: Path) -> None:
    open_store(f"file://{tmp_path}/a").write("k", b"v")
    assert open_store(tmp_path / "a").read("k") == b"v"
    with pytest.raises(UserError, match="absolute"):
        open_store("file://relative/x")


def test_local_list_follows_linked_folders_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "f").write_text("x")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "store")
    assert [e.key for e in open_store(tmp_path / "store").list()] == ["linked/f"]


def test_delete_tree_never_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "f").write_text("x")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "linked").symlink_to(tmp_path / "precious")
    open_store(tmp_path / "store").delete_tree("linked")
    assert (tmp_path / "precious" / "f").exists()
    assert open_store(tmp_path / "store").list() == []


def test_full_disk_leaves_nothing_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    store.write("k", b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local.os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full") as caught:
        store.write("k", b"new")
    assert "\n" not in str(caught.value)
    assert store.read("k") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["k"]


def test_sweep_removes_old_temporaries_only(place: str) -> None:
    store = open_store(place)
    store.write("kept", b"x")
    store.write("folder/.tmp-abc", b"half")
    assert [e.key for e in store.list()] == ["kept"]
    assert store.sweep(3600) == []
    assert store.sweep(-60, plan=True) == ["folder/.tmp-abc"]
    assert store.sweep(-60) == ["folder/.tmp-abc"]
    assert store.sweep(-60) == []
    assert store.exists("kept")


def test_stores_travel_between_processes(place: str) -> None:
    store = open_store(place)
    store.write("k", b"v")
    copied = pickle.dumps(store)
    assert b"test-secret-key" not in copied
    assert pickle.loads(copied).read("k") == b"v"


def test_one_place_configures_lance_and_ray(s3: S3Server) -> None:  # noqa: F811
    options = storage.lance_options(s3.uri)
    assert options["aws_endpoint"] == s3.endpoint
    assert options["allow_http"] == "true"
    assert options["aws_region"] == "us-east-1"
    path, filesystem = storage.ray_storage(f"{s3.uri}/ray")
    assert path == f"{s3.uri.removeprefix('s3://')}/ray"
    with filesystem.open_output_stream(f"{path}/x") as stream:
        stream.write(b"through pyarrow")
    assert open_store(s3.uri).read("ray/x") == b"through pyarrow"
    assert b"test-secret-key" not in pickle.dumps(filesystem)
    assert storage.lance_options("/tmp") == {}
    assert storage.ray_storage("/tmp/x") == ("/tmp/x", None)
