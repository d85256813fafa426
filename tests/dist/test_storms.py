"""Checkpoints and tables through a proxy on a seeded schedule of faults: what is stored is whole, or was refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from reid_dist.data.records import Record
from reid_dist.data.store import TableView, open_table
from reid_dist.runs import Run, identity_of
from reid_dist.storage import StorageError, publish
from reid_dist.storage.cache import NodeCache
from reid_dist.storage.s3 import S3Store, parse_s3
from reid_dist.training import checkpoint as checkpoints
from tests.dist.test_storage_s3 import QUICK
from tests.faultproxy import SURVIVED, FaultProxy, between
from tests.s3server import S3Server, s3  # noqa: F401 - the fixture
from tests.tables import jpeg, write_table
from tests.unit.test_runs import DATA, recipe
from tests.unit.test_training_parts import snapshot

SEEDS = [1, 2]


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:  # noqa: F811
    with between(s3.endpoint, QUICK.read_s * 2) as standing:
        yield standing


@pytest.fixture
def run(s3: S3Server, proxy: FaultProxy) -> Run:  # noqa: F811
    chosen = recipe(output=s3.uri)
    opened = Run.open(chosen.uri, identity_of(chosen, DATA), chosen)
    opened.store = S3Store(*parse_s3(opened.uri), QUICK)
    return opened


def whole(run: Run) -> list[int]:
    """Steps of the committed checkpoints, each read with every byte verified and of the right content."""
    steps = []
    for name in publish.committed(run.store, "checkpoints"):
        found = checkpoints.read(run, name)
        step = found.progress.step
        assert torch.equal(found.model["w"], torch.full((3, 2), float(step)))
        steps.append(step)
    return steps


@pytest.mark.parametrize("seed", SEEDS)
def test_checkpoints_through_a_storm_are_whole(run: Run, proxy: FaultProxy, seed: int) -> None:
    """A quarter of all exchanges fails, of every kind; the newest is the last one that was saved without an error."""
    proxy.storm(seed, 0.25)
    writer = checkpoints.Writer(run, keep_last=3, keep_best=0, score="rank1")
    saved = []
    for step in range(10, 50, 10):
        writer.save(snapshot(step))
        writer.wait()
        saved.append(step)
    writer.close()
    assert whole(run) == saved[-1:-4:-1]
    newest = checkpoints.newest(run)
    assert newest is not None
    assert newest.progress.step == saved[-1]
    assert len(set(proxy.used)) > 4, "the storm was no storm"


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        ("corrupt-request", "model.safetensors"),
        ("corrupt-request", "manifest.json"),
        ("cut-request", "optimizer.safetensors"),
        ("lose-answer", "progress.json"),
    ],
)
def test_a_torn_checkpoint_is_never_taken_for_a_good_one(run: Run, proxy: FaultProxy, fault: str, part: str) -> None:
    """moto stores what it gets without looking at Content-MD5: the worst server there is. What is wrong must be found by
    the reader, which goes back to the checkpoint before."""
    writer = checkpoints.Writer(run, keep_last=3, keep_best=0, score="rank1")
    writer.save(snapshot(10))
    writer.wait()
    proxy.on(fault, "PUT", part)
    writer.save(snapshot(20))
    writer.close()
    assert proxy.used == [fault]
    newest = checkpoints.newest(run)
    assert newest is not None
    good = 10 if fault == "corrupt-request" else 20  # the other two were seen by the writer and repeated
    assert newest.progress.step == good
    assert torch.equal(newest.model["w"], torch.full((3, 2), float(good)))


def test_a_server_that_goes_away_while_a_checkpoint_is_published(run: Run, proxy: FaultProxy) -> None:
    writer = checkpoints.Writer(run, keep_last=3, keep_best=0, score="rank1")
    writer.save(snapshot(10))
    writer.wait()
    proxy.on("drop", "PUT", "step-00000020", times=10**6)
    writer.save(snapshot(20))
    with pytest.raises(StorageError, match="cannot be reached"):
        writer.wait()
    assert whole(run) == [10]
    assert publish.orphans(run.store, "checkpoints", 1e12) == []  # what had arrived was removed
    proxy.rules.clear()
    writer.save(snapshot(30))
    writer.close()
    assert whole(run) == [30, 10]


@pytest.mark.parametrize("seed", SEEDS)
def test_tables_through_a_storm_are_whole_or_refused(
    s3: S3Server,  # noqa: F811
    proxy: FaultProxy,
    tmp_path: Path,
    seed: int,
) -> None:
    records = [Record(path=f"{i}.jpg", split="train", pid=i) for i in range(12)]
    images = [jpeg(i) for i in range(12)]
    proxy.storm(seed, 0.15, [kind for kind in SURVIVED if kind != "corrupt-answer"])
    try:
        write_table(s3.uri, "t", records, images, tmp_path / "raw")
        written = True
    except Exception as error:
        assert "\n" not in str(error)
        written = False
    assert proxy.used, "the storm was no storm"
    proxy.rules.clear()
    if not written:
        write_table(s3.uri, "t", records, images, tmp_path / "raw")
    proxy.storm(seed + 100, 0.25)
    view = TableView([open_table(s3.uri, "t", cache=NodeCache(tmp_path / "cache"))])
    assert view.encoded(np.arange(12)) == images
