"""A node whose disk is full, whose cache is damaged, or whose clock is an hour off; and a bucket behind a bad line.

Two plain gloo processes train here, without Ray: what is struck is what they share with every worker, storage and cache.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from reid_dist.runs import Run
from reid_dist.storage import StorageError, open_store
from reid_dist.training import checkpoint as checkpoints
from tests.chaos.struck import Row, attempt, judged, uninterrupted, warm
from tests.dist.cells import train_recipe
from tests.faultproxy import between
from tests.injection import Faults
from tests.pool import Pool
from tests.s3server import serve

RECIPE = "comoe/tiny"


def _trained(root: str, output: str, stop_at: int | None = None, pool: Pool | None = None) -> Run:
    """One more attempt of a run, from where it stands to its end (or to `stop_at`)."""
    run, mapping = attempt(RECIPE, root, output)
    (pool or warm()).run(train_recipe, 2, mapping, run.uri, stop_at, None, run.attempt)
    run.write_record({"exit_code": 0} if stop_at is None else {"exit_code": 1, "error": "stopped"})
    return run


@contextmanager
def own_pool() -> Iterator[Pool]:
    """Processes that have the environment of now."""
    pool = Pool()
    try:
        yield pool
    finally:
        pool.close()


def _judged(row: Row, run: Run, tables: Path) -> list[Row]:
    return judged([row], run, uninterrupted(RECIPE, tables))


@contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """A real file system of that size. Raises OSError where mounting is not allowed."""
    with tempfile.TemporaryDirectory(prefix="reid-disk-") as folder:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            raise OSError(f"no small file system can be mounted here: {done.stderr.strip()}")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def full_disk(folder: Path, tables: Path) -> list[Row]:
    """A run continues on a node whose disk is full: refused with a sentence, not sent back; with room it goes on."""
    run = _trained(str(tables), str(folder / "runs"), stop_at=10)
    with small_disk(1) as disk, mock.patch.object(tempfile, "tempdir", str(disk)):
        (disk / "other").write_bytes(b"x" * 900_000)
        try:
            checkpoints.newest(run)
            said = "nothing was said"
        except StorageError as error:
            said = str(error).rpartition(": ")[2]
    run = _trained(str(tables), str(folder / "runs"))
    return _judged(Row("disk of a node full", said == "the disk is full", 0, note=f'refused: "{said}"'), run, tables)


def damaged_cache(folder: Path, tables: Path) -> list[Row]:
    """Every file of a node's cached table gets a wrong bit between two attempts."""
    cache = folder / "cache"
    with serve() as s3, mock.patch.dict(os.environ, {"REID_CACHE": str(cache)}), own_pool() as pool:
        here = open_store(tables)
        for entry in here.list("tables/"):
            open_store(s3.uri).upload(entry.key, str(tables / entry.key))
        _trained(s3.uri, f"{s3.uri}/runs", 10, pool)
        victims = [
            path for path in cache.rglob("*") if path.is_file() and path.parent.name == "data" and path.stat().st_size
        ]
        for victim in victims:
            data = bytearray(victim.read_bytes())
            data[len(data) // 2] ^= 1
            victim.write_bytes(bytes(data))
        run = _trained(s3.uri, f"{s3.uri}/runs", pool=pool)
        note = f"{len(victims)} files, one wrong bit each; found and fetched again"
        return _judged(Row("cache of a node corrupted", bool(victims), 0, note=note), run, tables)


def skewed_clock(folder: Path, tables: Path) -> list[Row]:
    """The first attempt runs on hosts whose clocks are an hour ahead, the second on right ones."""
    faults = Faults(folder / "faults")
    with mock.patch.dict(os.environ, {**faults.environment, "REID_SKEW": "3600"}), own_pool() as pool:
        _trained(str(tables), str(folder / "runs"), 10, pool)
    before = time.time()
    run = _trained(str(tables), str(folder / "runs"))
    ahead = max(note["time"] for note in run.notes() if note["attempt"] == 1) - before
    row = Row(
        "clock an hour ahead",
        run.checkpoints()[-1]["attempt"] == 2,
        0,
        note=f"notes {ahead / 60:.0f} min in the future",
    )
    return _judged(row, run, tables)


def storm(folder: Path, tables: Path) -> list[Row]:
    """A tenth of all exchanges with the bucket fails in one of eight ways while a run trains and continues."""
    with serve() as s3, between(s3.endpoint) as proxy, own_pool() as pool:
        proxy.storm(5, 0.1)
        _trained(str(tables), f"{s3.uri}/runs", 10, pool)
        run = _trained(str(tables), f"{s3.uri}/runs", pool=pool)
        proxy.rules.clear()
        met = ", ".join(f"{count} {fault}" for fault, count in sorted(Counter(proxy.used).items()))
        return _judged(Row("storage: a tenth of all requests fails", bool(met), 0, note=met), run, tables)
