"""The node cache: once per node, verified, evicted by age and size, never from under a running job."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reid_dist import storage
from reid_dist.errors import UserError
from reid_dist.storage import open_store
from reid_dist.storage.cache import NodeCache
from tests.s3server import S3Server, s3  # noqa: F401 - the fixture


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
