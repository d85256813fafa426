"""A full disk, a damaged node cache and clocks an hour apart: refused, mended or without effect, never a wrong result."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import runs as jobs_runs
from reid_dist.runs import Run, identity_of
from reid_dist.storage import StorageError, Store, open_store
from reid_dist.storage.cache import NodeCache
from reid_dist.storage.local import explained
from reid_dist.storage.publish import committed, publish_folder
from tests.unit.test_runs import DATA, recipe

HOUR = 3600.0


class Full:
    """A store from which `room` bytes can be downloaded before the node's disk is full."""

    def __init__(self, store: Store, room: int) -> None:
        self.store, self.room = store, room

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def download(self, key: str, path: str) -> None:
        self.room -= self.store.stat(key).size
        if self.room < 0:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).with_name(".tmp-half").write_bytes(b"half")
            with explained(path):
                raise OSError(errno.ENOSPC, "No space left on device", path)
        self.store.download(key, path)


@pytest.fixture
def table(tmp_path: Path) -> Store:
    store = open_store(tmp_path / "bucket")
    for number in range(4):
        store.write(f"data/{number}", bytes([number]) * 1000)
    return store


def release() -> None:
    """Give up the cache's locks, as the end of a process does."""
    from reid_dist.storage import cache as module

    for descriptor in module._in_use.values():
        os.close(descriptor)
    module._in_use.clear()


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    yield
    release()


# --- disk


def test_full_disk_in_mid_download_leaves_no_half_entry(table: Store, tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "cache")
    with pytest.raises(StorageError, match="the disk is full"):
        cache.tree(Full(table, 2500))  # type: ignore[arg-type]
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size] == []  # locks
    folder = cache.tree(Full(table, 4000))  # type: ignore[arg-type]
    assert Path(folder, "data", "3").read_bytes() == b"\3" * 1000


def test_full_disk_while_a_checkpoint_is_fetched_does_not_send_the_run_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from reid_dist.training import checkpoint as checkpoints

    run = start(tmp_path)
    writer = checkpoints.Writer(run, keep_last=9, keep_best=0, score="rank1")
    for step in (10, 20):
        snapshot = checkpoints.Snapshot(checkpoints.Progress(step=step, metrics={}), {"w": torch.ones(100)}, {}, {})
        writer.save(snapshot)
    writer.close()
    full = Run(Full(run.store, 200), run.attempt)  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="the disk is full"):
        checkpoints.newest(full)
    newest = checkpoints.newest(run)
    assert newest is not None
    assert newest.progress.step == 20


# --- cache


def entry_of(cache: NodeCache, table: Store) -> Path:
    return Path(cache.tree(table)).parent


@pytest.mark.parametrize("damage", ["garbage", "empty", "lies", "swapped", "linked"])
def test_damaged_cache_is_fetched_again(table: Store, tmp_path: Path, damage: str) -> None:
    cache = NodeCache(tmp_path / "cache")
    folder = entry_of(cache, table)
    record = json.loads((folder / "entry.json").read_text())
    if damage == "garbage":
        (folder / "entry.json").write_bytes(b"\x00\xff{")
    elif damage == "empty":
        (folder / "entry.json").write_text("{}")
    elif damage == "lies":
        record["files"]["data/1"]["size"] = 999
        (folder / "entry.json").write_text(json.dumps(record))
    elif damage == "swapped":  # two files of equal length change places, as after a bad fsck
        first, second = (folder / "data/data" / name for name in "01")
        one, two = first.read_bytes(), second.read_bytes()
        first.write_bytes(two)
        second.write_bytes(one)
    else:
        (folder / "data/data/1").unlink()
        (folder / "data/data/1").symlink_to("/nowhere")
    again = Path(cache.tree(table))
    assert [(again / "data" / str(number)).read_bytes() for number in range(4)] == [bytes([n]) * 1000 for n in range(4)]


def test_cache_whose_times_lie_in_the_future_is_used_and_evicted(table: Store, tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "cache")
    folder = entry_of(cache, table)
    ahead = time.time() + HOUR
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (ahead, ahead))
    fetches = Full(table, 0)  # any download would fail
    assert Path(cache.tree(fetches)).parent == folder  # type: ignore[arg-type]
    release()
    assert cache.evict(0) == [table.uri]
    assert not folder.exists()


# --- clocks


def start(folder: Path) -> Run:
    chosen = recipe(output=str(folder / "runs"))
    return Run.open(chosen.uri, identity_of(chosen, DATA), chosen)


@pytest.mark.parametrize("skew", [-HOUR, HOUR])
def test_attempts_on_hosts_whose_clocks_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew: float) -> None:
    """The second host's clock is an hour off: the newer attempt still wins, and its numbers, whatever the times say."""
    now = time.time
    first = start(tmp_path)
    first.write_metrics({"kind": "step", "step": 1, "loss": 1.0})
    first.flush_metrics()
    first.note_checkpoint("checkpoints/step-00000010", 10, {"rank1": 0.1}, 1)
    monkeypatch.setattr(time, "time", lambda: now() + skew)
    second = start(tmp_path)
    second.write_metrics({"kind": "step", "step": 1, "loss": 2.0})
    second.flush_metrics()
    second.note_checkpoint("checkpoints/step-00000020", 20, {"rank1": 0.2}, 1)
    second.write_record({"exit_code": 0})
    card = Run.read(second.uri).card()
    assert [attempt["number"] for attempt in card["attempts"]] == [1, 2]
    assert [checkpoint["step"] for checkpoint in card["checkpoints"]] == [10, 20]
    assert card["metrics"] == {"rank1": 0.2}
    assert [record["loss"] for record in second.metrics()] == [2.0]
    assert card["status"] == "done"
    with pytest.raises(RuntimeError, match="replaced by a newer one"):
        first.check_fence()


@pytest.mark.parametrize("skew", [-HOUR, 0.0, HOUR])
def test_cleaning_up_with_a_wrong_clock_spares_running_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    """A folder without a marker may be a publish in progress: an hour of skew must not make it look a day old."""
    run = start(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "w").write_bytes(b"1")
    publish_folder(run.store, "checkpoints/step-00000001", tmp_path / "in")
    run.store.write("checkpoints/step-00000002/unfinished/w", b"1")
    run.store.write("checkpoints/step-00000003/old/w", b"1")
    old = time.time() - 26 * HOUR
    os.utime(Path(run.uri) / "checkpoints/step-00000003/old/w", (old, old))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + skew)
    removed = jobs_runs.main(["gc", f"runs={tmp_path}/runs", f"root={tmp_path}/none", f"cache={tmp_path}/cache"])[
        "removed"
    ]
    assert removed == [f"{run.uri}/checkpoints/step-00000003/old"]
    assert run.store.exists("checkpoints/step-00000002/unfinished/w")
    assert committed(run.store, "checkpoints") == ["checkpoints/step-00000001"]


def test_a_clock_beyond_what_s3_accepts_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import ClientError

    from reid_dist.storage.retry import RetryPolicy
    from reid_dist.storage.s3_connection import Connection

    answer = {"Error": {"Code": "RequestTimeTooSkewed"}, "ResponseMetadata": {"HTTPStatusCode": 403}}

    def refused(client: object) -> None:
        raise ClientError(answer, "PutObject")  # type: ignore[arg-type]

    connection = Connection(RetryPolicy())
    monkeypatch.setattr(connection, "client", lambda: None)
    with pytest.raises(StorageError, match="clock is off by more than 15 minutes: set it"):
        connection.call("s3://b/k", refused)


def test_a_listing_that_cannot_be_parsed_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.parsers import ResponseParserError

    from reid_dist.storage.retry import RetryPolicy
    from reid_dist.storage.s3_connection import Connection

    answers = [ResponseParserError("Unable to parse response (not well-formed)"), None]

    def listing(client: object) -> str:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return "listed"

    connection = Connection(RetryPolicy(tries=2, base_s=0.0))
    monkeypatch.setattr(connection, "client", lambda: None)
    assert connection.call("s3://b/", listing) == "listed"
    answers[:] = [ResponseParserError("x")] * 2
    with pytest.raises(StorageError, match="cannot be read"):
        connection.call("s3://b/", listing)
