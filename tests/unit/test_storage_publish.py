"""Publishing whole folders: complete or not at all, damage found."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from reid_dist import storage
from reid_dist.storage import CorruptionError, StorageError, open_store, publish
from tests.s3server import S3Server, s3  # noqa: F401 - the fixture


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URI of an empty place of each kind."""
    if request.param == "folder":
        return str(tmp_path / "store")
    return request.getfixturevalue("s3").uri


def _folder(path: Path, **files: bytes) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def test_publish_and_fetch(place: str, tmp_path: Path) -> None:
    store = open_store(place)
    source = _folder(tmp_path / "in", **{"model": b"m" * 1000, "sub/optimizer": b"o" * 10})
    manifest = publish.publish_folder(store, "checkpoints/step-00000010", source, facts={"attempt": 3})
    assert manifest.size == 1010
    publish.publish_folder(store, "checkpoints/step-00000009", source)
    assert publish.committed(store, "checkpoints") == ["checkpoints/step-00000010", "checkpoints/step-00000009"]
    fetched = publish.fetch(store, "checkpoints/step-00000010", tmp_path / "out")
    assert fetched == manifest
    assert fetched.facts == {"attempt": 3}
    assert (tmp_path / "out" / "sub" / "optimizer").read_bytes() == b"o" * 10
    assert publish.verify(store, "checkpoints/step-00000009").size == 1010


def test_publishing_again_switches_whole(place: str, tmp_path: Path) -> None:
    store = open_store(place)
    publish.publish_folder(store, "c/x", _folder(tmp_path / "one", a=b"1", b=b"1"))
    publish.publish_folder(store, "c/x", _folder(tmp_path / "two", a=b"2"))
    publish.fetch(store, "c/x", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a"]
    assert len([e for e in store.list("c/x/") if e.key.endswith("/a")]) == 1  # the replaced files are gone


class FailsOn:
    """A store whose writes fail once a key contains `part`."""

    def __init__(self, store: storage.Store, part: str) -> None:
        self._store, self._part = store, part

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def _check(self, key: str) -> None:
        if self._part in key:
            raise StorageError(f"{key}: the disk is full")

    def upload(self, key: str, path: str) -> None:
        self._check(key)
        self._store.upload(key, path)

    def write(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        self._check(key)
        self._store.write(key, data, if_absent=if_absent)


@pytest.mark.parametrize("part", ["/b", "manifest.json"])
def test_failed_publish_leaves_nothing(tmp_path: Path, part: str) -> None:
    store = open_store(tmp_path / "store")
    with pytest.raises(StorageError, match="disk is full"):
        publish.publish_folder(FailsOn(store, part), "c/x", _folder(tmp_path / "in", a=b"1", b=b"2"))
    assert publish.committed(store, "c") == []
    assert store.list() == []


def test_torn_publish_is_not_committed_and_found_as_orphan(tmp_path: Path) -> None:
    """Killed between the last file and the marker."""
    store = open_store(tmp_path / "store")
    source = _folder(tmp_path / "in", a=b"1")
    publish.publish_folder(store, "c/step-00000001", source)
    with pytest.raises(StorageError):
        publish.publish_folder(FailsOn(store, "COMMITTED"), "c/step-00000002", source)
    assert publish.committed(store, "c") == ["c/step-00000001"]
    with pytest.raises(CorruptionError, match="never committed"):
        publish.verify(store, "c/step-00000002")
    assert publish.orphans(store, "c", time.time() - 3600) == []
    orphans = publish.orphans(store, "c", time.time() + 60)
    assert [o.rpartition("/")[0] for o in orphans] == ["c/step-00000002"]


def test_guard_stops_before_the_commit(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")

    def fenced() -> None:
        raise StorageError("a newer attempt runs")

    with pytest.raises(StorageError, match="newer attempt"):
        publish.publish_folder(store, "c/x", _folder(tmp_path / "in", a=b"1"), guard=fenced)
    assert store.list() == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest", "marker"])
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    store = open_store(tmp_path / "store")
    manifest = publish.publish_folder(store, "c/x", _folder(tmp_path / "in", a=b"1234", b=b"5678"))
    key = f"{manifest.folder}/a"
    if damage == "flip":
        store.write(key, b"1235")
    elif damage == "truncate":
        store.write(key, b"123")
    elif damage == "delete":
        store.delete(key)
    elif damage == "manifest":
        text = json.loads(store.read(f"{manifest.folder}/manifest.json"))
        text["files"]["../../../escape"] = text["files"].pop("a")
        store.write(f"{manifest.folder}/manifest.json", json.dumps(text).encode())
    else:
        store.write("c/x/COMMITTED", b"{")
    with pytest.raises(CorruptionError):
        publish.fetch(store, "c/x", tmp_path / "out")
    assert not (tmp_path / "escape").exists()
