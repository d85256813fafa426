"""Stores: what a folder and a bucket must do alike, and what only one of them can get wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reid_dist import storage
from reid_dist.errors import UserError
from reid_dist.storage import AlreadyExists, CorruptionError, StorageError, local, open_store, publish, s3_connection
from reid_dist.storage import s3 as s3_module
from reid_dist.storage.cache import NodeCache
from reid_dist.storage.retry import RetryPolicy, retry
from tests.s3server import S3Server, s3  # noqa: F401 - the fixture

QUICK = RetryPolicy(tries=4, base_s=0.01, cap_s=0.05, deadline_s=5, connect_s=2, read_s=2)


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URI of an empty place of each kind."""
    if request.param == "folder":
        return str(tmp_path / "store")
    return request.getfixturevalue("s3").uri


@pytest.fixture
def quick(s3: S3Server) -> s3_module.S3Store:  # noqa: F811
    """A bucket with short retries."""
    return s3_module.S3Store(*s3_module.parse_s3(s3.uri), QUICK)


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


# --- retries


def test_retry_is_bounded_by_tries_and_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fails() -> None:
        calls.append(1)
        raise ConnectionError("gone")

    with pytest.raises(StorageError, match=r"what: gone \(4 tries"):
        retry(fails, "what", QUICK, str)
    assert len(calls) == 4
    slow = RetryPolicy(tries=1000, base_s=0.05, cap_s=0.05, deadline_s=0.3)
    started = time.monotonic()
    with pytest.raises(StorageError, match="gone"):
        retry(fails, "what", slow, str)
    assert time.monotonic() - started < 2
    with pytest.raises(ConnectionError):
        retry(fails, "what", QUICK, lambda error: None)


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (400, "BadDigest")])
def test_passing_server_faults_are_retried(s3: S3Server, quick: s3_module.S3Store, status: int, code: str) -> None:  # noqa: F811
    s3.fail(2, "PUT", status, code)
    quick.write("k", b"value")
    s3.fail(2, "GET", status, code, "/k")
    assert quick.read("k") == b"value"
    assert sum(method == "PUT" for method, _ in s3.requests) == 3


def test_lasting_server_faults_end_in_one_line(s3: S3Server, quick: s3_module.S3Store) -> None:  # noqa: F811
    s3.fail(-1, "PUT", 503, "SlowDown")
    with pytest.raises(StorageError, match=r"top/k: the server answered 503 SlowDown \(4 tries") as caught:
        quick.write("k", b"value")
    assert "secret-key" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("code", "remedy"), [("AccessDenied", "may not"), ("SignatureDoesNotMatch", "secret key")])
def test_refusals_are_not_retried(s3: S3Server, quick: s3_module.S3Store, code: str, remedy: str) -> None:  # noqa: F811
    s3.fail(-1, "PUT", 403, code)
    with pytest.raises(StorageError, match=remedy):
        quick.write("k", b"value")
    assert sum(method == "PUT" for method, _ in s3.requests) == 1


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), TimeoutError("slow")])
def test_broken_sockets_are_retried(quick: s3_module.S3Store, error: Exception) -> None:
    left = [error]

    def once(client: object) -> str:
        if left:
            raise left.pop()
        return "done"

    assert quick._call("k", once) == "done"


def test_missing_bucket_and_unreachable_server(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    with pytest.raises(StorageError, match="bucket does not exist"):
        s3_module.S3Store("no-such-bucket", "", QUICK).write("k", b"v")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match="cannot be reached"):
        s3_module.S3Store("bucket", "", QUICK).list()


def test_no_credentials_is_said(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: F811
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="no credentials"):
        s3_module.S3Store("bucket", "", QUICK).read("k")
    with pytest.raises(StorageError, match="no credentials"):
        storage.lance_options("s3://bucket/x")


def test_expired_credentials_are_read_anew(
    s3: S3Server,  # noqa: F811
    quick: s3_module.S3Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client of a session whose token ran out is dropped and one with the new token made."""
    made: list[object] = []
    real = s3_connection.make_client
    monkeypatch.setattr(s3_connection, "make_client", lambda policy: made.append(1) or real(policy))
    quick._connection.renew()
    quick.write("a", b"1")
    s3.fail(1, "PUT", 400, "ExpiredToken")
    quick.write("b", b"2")
    assert len(made) == 2
    assert quick.read("b") == b"2"


def test_lost_answer_of_a_conditional_write_is_no_refusal(s3: S3Server, quick: s3_module.S3Store) -> None:  # noqa: F811
    """The server stored the object but its answer was lost: the second try finds the key taken by ourselves."""
    quick.write("warm", b"x", if_absent=True)
    other = s3_module.S3Store(quick.bucket, quick.prefix, QUICK)
    done = []

    def stored_but_lost(environ: dict) -> tuple[int, bytes] | None:
        if environ["REQUEST_METHOD"] != "PUT" or not environ["PATH_INFO"].endswith("/mine") or done:
            return None
        done.append(1)
        other.write("mine", b"nonce")
        return 500, b""

    s3.faults.append(stored_but_lost)
    quick.write("mine", b"nonce", if_absent=True)
    with pytest.raises(AlreadyExists):
        quick.write("mine", b"other", if_absent=True)


def test_server_without_conditions_is_refused(s3: S3Server, quick: s3_module.S3Store) -> None:  # noqa: F811
    def forget(environ: dict) -> None:
        environ.pop("HTTP_IF_NONE_MATCH", None)

    s3.faults.append(forget)
    with pytest.raises(StorageError, match="could not be told apart"):
        quick.write("k", b"v", if_absent=True)
    assert not quick.exists("k")


def test_server_with_googles_condition(s3: S3Server, quick: s3_module.S3Store) -> None:  # noqa: F811
    """A server that knows only x-goog-if-generation-match is recognised and used (imitated here by translating the
    header).
    """

    def google(environ: dict) -> None:
        environ.pop("HTTP_IF_NONE_MATCH", None)
        if environ.get("HTTP_X_GOOG_IF_GENERATION_MATCH") == "0":
            environ["HTTP_IF_NONE_MATCH"] = "*"

    s3.faults.append(google)
    quick.write("k", b"v", if_absent=True)
    with pytest.raises(AlreadyExists):
        quick.write("k", b"w", if_absent=True)


# --- multipart and verification


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(s3_module, "PART", 5 * 1024**2)
    return 5 * 1024**2


def test_multipart_upload_with_faults(
    s3: S3Server,  # noqa: F811
    quick: s3_module.S3Store,
    small_parts: int,
    tmp_path: Path,
) -> None:
    source, target = tmp_path / "big", tmp_path / "copy"
    source.write_bytes(os.urandom(2 * small_parts + 12345))
    s3.fail(2, "PUT", 503, "SlowDown", "partNumber=2")
    quick.upload("big", str(source))
    assert sum(m == "PUT" for m, _ in s3.requests) == 5  # three parts, one of them three times
    s3.fail(1, "GET", 500, "InternalError", "/big")
    quick.download("big", str(target))
    assert target.read_bytes() == source.read_bytes()
    assert quick.stat("big").size == 2 * small_parts + 12345


def test_failed_multipart_leaves_nothing(
    s3: S3Server,  # noqa: F811
    quick: s3_module.S3Store,
    small_parts: int,
    tmp_path: Path,
) -> None:
    source = tmp_path / "big"
    source.write_bytes(bytes(2 * small_parts))
    s3.fail(-1, "PUT", 503, "SlowDown", "partNumber=2")
    with pytest.raises(StorageError, match="503"):
        quick.upload("big", str(source))
    assert quick.list() == []
    assert quick.sweep(-60) == []  # the upload was aborted, nothing is left to sweep


def test_unfinished_uploads_are_swept(s3: S3Server, quick: s3_module.S3Store) -> None:  # noqa: F811
    client = quick._connection.client()
    client.create_multipart_upload(Bucket=quick.bucket, Key=f"{quick.prefix}/half")
    assert quick.sweep(100 * 365 * 86400) == []  # moto dates every upload to 2010
    assert quick.sweep(-60) == ["half (unfinished upload)"]
    assert quick.sweep(-60) == []


def test_changed_bytes_are_not_taken(s3: S3Server, quick: s3_module.S3Store, tmp_path: Path) -> None:  # noqa: F811
    quick.write("k", b"good bytes")
    head = quick._connection.client().head_object(Bucket=quick.bucket, Key=f"{quick.prefix}/k")
    assert head["Metadata"]["sha256"] == hashlib.sha256(b"good bytes").hexdigest()
    client = quick._connection.client()
    client.put_object(Bucket=quick.bucket, Key=f"{quick.prefix}/k", Body=b"evil bytes", Metadata=head["Metadata"])
    with pytest.raises(CorruptionError, match="not the ones written"):
        quick.read("k")
    with pytest.raises(CorruptionError, match="not the ones written"):
        quick.download("k", str(tmp_path / "k"))
    assert list(tmp_path.iterdir()) == []


def test_truncated_answer_is_retried(s3: S3Server, quick: s3_module.S3Store, tmp_path: Path) -> None:  # noqa: F811
    quick.write("k", b"0123456789" * 100)
    left = [2]

    def truncate(environ: dict) -> tuple[int, bytes] | None:
        if environ["REQUEST_METHOD"] != "GET" or not environ["PATH_INFO"].endswith("/k") or not left[0]:
            return None
        left[0] -= 1
        return 206, b"0123"

    s3.faults.append(truncate)
    quick.download("k", str(tmp_path / "k"))
    assert (tmp_path / "k").read_bytes() == b"0123456789" * 100
    assert left == [0]


def test_stores_travel_between_processes(place: str) -> None:
    store = open_store(place)
    store.write("k", b"v")
    copied = pickle.dumps(store)
    assert b"test-secret-key" not in copied
    assert pickle.loads(copied).read("k") == b"v"


# --- publishing


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


# --- the node cache


def test_cached_file(s3: S3Server, tmp_path: Path) -> None:  # noqa: F811
    store = open_store(s3.uri)
    store.write("weights/w.bin", b"w" * 1000)
    cache = NodeCache(tmp_path / "cache")
    path = cache.file(f"{s3.uri}/weights/w.bin")
    assert Path(path).read_bytes() == b"w" * 1000
    gets = sum(m == "GET" for m, _ in s3.requests)
    assert cache.file(f"{s3.uri}/weights/w.bin") == path
    assert sum(m == "GET" for m, _ in s3.requests) == gets  # a hit asks for the tag only
    store.write("weights/w.bin", b"v" * 1000)
    assert Path(cache.file(f"{s3.uri}/weights/w.bin")).read_bytes() == b"v" * 1000
    with pytest.raises(UserError, match="does not exist"):
        cache.file(f"{s3.uri}/weights/none")
    assert storage.cached_file(path) == path
    with pytest.raises(UserError, match="is not a file"):
        storage.cached_file(str(tmp_path / "none"))


@pytest.mark.parametrize("damage", [b"x" * 1000, b"short", None])
def test_corrupted_entry_is_fetched_again(s3: S3Server, tmp_path: Path, damage: bytes | None) -> None:  # noqa: F811
    open_store(s3.uri).write("w.bin", b"w" * 1000)
    cache = NodeCache(tmp_path / "cache")
    path = Path(cache.file(f"{s3.uri}/w.bin"))
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    assert cache.file(f"{s3.uri}/w.bin") == str(path)
    assert path.read_bytes() == b"w" * 1000


def test_touched_but_unchanged_entry_is_kept(s3: S3Server, tmp_path: Path) -> None:  # noqa: F811
    open_store(s3.uri).write("w.bin", b"w" * 1000)
    cache = NodeCache(tmp_path / "cache")
    path = cache.file(f"{s3.uri}/w.bin")
    os.utime(path, (1, 1))
    gets = sum(m == "GET" for m, _ in s3.requests)
    cache.file(f"{s3.uri}/w.bin")
    assert sum(m == "GET" for m, _ in s3.requests) == gets


def test_cached_tree_is_fetched_once_by_many(s3: S3Server, tmp_path: Path) -> None:  # noqa: F811
    store = open_store(s3.uri).sub("table")
    for number in range(5):
        store.write(f"data/{number}", bytes([number]) * 10)
    cache = NodeCache(tmp_path / "cache")
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: cache.tree(store), range(4)))
    assert len(folders) == 1
    assert sum(m == "GET" and "/data/" in p for m, p in s3.requests) == 5
    assert Path(folders.pop(), "data", "3").read_bytes() == b"\3" * 10
    with pytest.raises(UserError, match="empty"):
        cache.tree(store.sub("nothing"))


def _forget_holds() -> None:
    """What the end of a process does: the kernel releases its locks."""
    from reid_dist.storage import cache as module

    for descriptor in module._in_use.values():
        os.close(descriptor)
    module._in_use.clear()


def test_eviction_by_age_spares_what_is_used(s3: S3Server, tmp_path: Path) -> None:  # noqa: F811
    store = open_store(s3.uri)
    for name in "abc":
        store.write(name, bytes(400))
    cache = NodeCache(tmp_path / "cache", max_gb=1000 / 1e9)
    first = cache.file(f"{s3.uri}/a")
    second = cache.file(f"{s3.uri}/b")
    _forget_holds()
    os.utime(Path(second).parents[1] / "entry.json", (1000, 1000))  # b was used longest ago
    third = cache.file(f"{s3.uri}/c")
    assert [Path(p).exists() for p in (first, second, third)] == [True, False, True]
    cache.file(f"{s3.uri}/a")
    assert cache.evict(0) == []  # both are in use by this process
    _forget_holds()
    assert cache.evict(0, plan=True) == [f"{s3.uri}/c", f"{s3.uri}/a"]
    assert Path(first).exists()
    assert cache.evict(0) == [f"{s3.uri}/c", f"{s3.uri}/a"]
    assert cache.entries() == []
    store.write("big", bytes(2000))
    with pytest.raises(UserError, match=r"raise data\.cache_gb"):
        cache.file(f"{s3.uri}/big")


def test_half_fetched_entry_is_no_entry(s3: S3Server, tmp_path: Path) -> None:  # noqa: F811
    store = open_store(s3.uri)
    store.write("t/a", b"1")
    cache = NodeCache(tmp_path / "cache")
    folder = Path(cache.tree(store.sub("t"))).parent
    (folder / "entry.json").unlink()  # as after kill -9 in mid-fetch
    _forget_holds()
    assert cache.evict() == [f"half-fetched {folder.name}"]
    assert Path(cache.tree(store.sub("t")), "a").read_bytes() == b"1"


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
