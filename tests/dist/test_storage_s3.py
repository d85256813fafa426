"""Stores against a server that misbehaves on the wire: a proxy that drops, stalls, truncates, corrupts and answers
errors.

Every fault must end as retried and right, or refused; a torn publish is never taken for a good one.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from reid_dist.data.records import Record
from reid_dist.data.store import TableView, open_table
from reid_dist.storage import AlreadyExists, CorruptionError, StorageError, publish
from reid_dist.storage import s3 as s3_module
from reid_dist.storage.cache import NodeCache
from reid_dist.storage.retry import RetryPolicy
from tests.faultproxy import FaultProxy, between
from tests.s3server import S3Server, s3  # noqa: F401 - the fixture
from tests.tables import jpeg, write_table

QUICK = RetryPolicy(tries=8, base_s=0.01, cap_s=0.05, deadline_s=30, connect_s=2, read_s=1)


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:  # noqa: F811
    """The proxy stands where the AWS variables point to."""
    with between(s3.endpoint, QUICK.read_s * 2) as proxy:
        yield proxy


@pytest.fixture
def store(s3: S3Server, proxy: FaultProxy) -> s3_module.S3Store:  # noqa: F811
    return s3_module.S3Store(*s3_module.parse_s3(s3.uri), QUICK)


FAULTS = ["drop", "stall", "500", "503", "cut-request", "truncate", "lose-answer"]


@pytest.mark.parametrize("fault", FAULTS)
def test_reads_and_writes_survive(store: s3_module.S3Store, proxy: FaultProxy, tmp_path: Path, fault: str) -> None:
    data = os.urandom(50_000)
    proxy.faults = [fault]
    store.write("k", data)
    proxy.faults = [fault]
    assert store.read("k") == data
    proxy.faults = ["", fault]  # the HEAD passes, the GET fails
    store.download("k", str(tmp_path / "k"))
    assert (tmp_path / "k").read_bytes() == data
    proxy.faults = [fault]
    assert [entry.key for entry in store.list()] == ["k"]
    proxy.faults = [fault]
    store.write("once", b"nonce", if_absent=True)
    with pytest.raises(AlreadyExists):
        store.write("once", b"other", if_absent=True)
    assert proxy.used.count(fault) == 5


def test_corrupted_answers_are_asked_for_again(store: s3_module.S3Store, proxy: FaultProxy, tmp_path: Path) -> None:
    data = os.urandom(50_000)
    store.write("k", data)
    proxy.faults = ["corrupt-answer"]
    assert store.read("k") == data
    proxy.faults = ["", "corrupt-answer"]
    store.download("k", str(tmp_path / "k"))
    assert (tmp_path / "k").read_bytes() == data
    proxy.faults = ["corrupt-answer"] * 100
    with pytest.raises(CorruptionError, match="not the ones written"):
        store.read("k")


def test_corrupted_upload_is_never_taken_for_good(store: s3_module.S3Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """A server that checks Content-MD5 refuses it at once; moto does not, so here the reader must find it."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "w").write_bytes(os.urandom(50_000))
    proxy.on("corrupt-request", "PUT", "/w")
    publish.publish_folder(store, "c/step-00000001", tmp_path / "in")
    proxy.faults = []
    with pytest.raises((CorruptionError, StorageError)):
        publish.verify(store, "c/step-00000001")


def test_publish_through_a_storm(store: s3_module.S3Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """Every fourth exchange fails in some way; each publish is either whole or reported as failed."""
    random.seed(3)
    folder = tmp_path / "in"
    folder.mkdir()
    contents = {}
    for step in range(1, 7):
        for name in ("model", "optimizer"):
            (folder / name).write_bytes(os.urandom(20_000 + step))
        contents[step] = (folder / "model").read_bytes()
        proxy.faults = [random.choice(FAULTS) if random.random() < 0.25 else "" for _ in range(40)]
        publish.publish_folder(store, f"c/step-{step:08d}", folder)
    proxy.faults = [random.choice(FAULTS) if random.random() < 0.25 else "" for _ in range(200)]
    names = publish.committed(store, "c")
    assert names == [f"c/step-{step:08d}" for step in range(6, 0, -1)]
    for step in range(1, 7):
        publish.fetch(store, f"c/step-{step:08d}", tmp_path / "out")
        assert (tmp_path / "out" / "model").read_bytes() == contents[step]


def test_multipart_through_a_storm(
    store: s3_module.S3Store,
    proxy: FaultProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_module, "PART", 5 * 1024**2)
    source = tmp_path / "big"
    source.write_bytes(os.urandom(12 * 1024**2))
    proxy.faults = ["500", "", "drop", "", "lose-answer", "", "", "lose-answer"]
    store.upload("big", str(source))
    proxy.faults = ["drop", "", "truncate", "500", "", "drop"]
    store.download("big", str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert store.sweep(-60) == []


def test_unreachable_half_way_publishes_nothing(
    s3: S3Server,  # noqa: F811
    store: s3_module.S3Store,
    proxy: FaultProxy,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(4):
        (folder / str(number)).write_bytes(os.urandom(1000))
    proxy.faults = [""] * 3 + ["drop"] * 1000
    with pytest.raises(StorageError, match="cannot be reached") as caught:
        publish.publish_folder(store, "c/step-00000001", folder)
    assert "\n" not in str(caught.value)
    assert "test-secret-key" not in str(caught.value)
    proxy.faults = []
    assert publish.committed(store, "c") == []


def test_table_is_cached_through_a_storm(
    s3: S3Server,  # noqa: F811
    proxy: FaultProxy,
    tmp_path: Path,
) -> None:
    records = [Record(path=f"{i}.jpg", split="train", pid=i) for i in range(20)]
    write_table(s3.uri, "t", records, [jpeg(i) for i in range(20)], tmp_path / "raw")
    proxy.faults = ["500", "", "", "truncate", "drop", "", "corrupt-answer", "", "drop"]
    view = TableView([open_table(s3.uri, "t", cache=NodeCache(tmp_path / "cache"))])
    assert view.encoded(np.arange(20)) == [jpeg(i) for i in range(20)]
    assert proxy.faults == []
