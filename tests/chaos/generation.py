"""A generation job with vLLM itself and the small model, struck on the way: its driver, an engine's actor and the node of an
engine are killed one after another, with the ledger in a folder and on S3.

What was published before a strike must stand as it was (a record keeps the moment of its making), and in the end every answer
stands once and equals that of a job that nothing struck.
"""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from reid_dist.config import DataConfig
from reid_dist.data.side import open_side_table
from reid_dist.data.store import open_view
from reid_dist.generation.ledger import Ledger, Record
from reid_dist.storage import open_store
from tests.chaos.struck import Row, clean_environment
from tests.e2e.cluster import Head, Node, head
from tests.e2e.job import Job
from tests.injection import wait_until
from tests.processes import MARK, marked, new_mark
from tests.s3server import serve
from tests.worlds import small_table

TABLE = "synthetic-cuhk-pedes"
IMAGES, QUESTIONS, SHARD = 240, 14, 4
MORE = 3  # shards published after one strike and before the next


class Described:
    """One table described on a cluster whose only node is `node`; each strike is one method."""

    def __init__(self, root: str, cluster: Head, mark: str) -> None:
        self.root, self.cluster, self.mark = root, cluster, mark
        self.ledger = Ledger(open_store(f"{root}/ledger/{TABLE}"))
        self.node: Node = cluster.add(2)
        self.job = self.start()
        self.before: dict[str, Record] = {}
        self.kept = True

    def start(self) -> Job:
        return Job(*words(self.root), environment=self.cluster.client)

    def published(self) -> int:
        return len(self.ledger.shards("describe"))

    def driver(self) -> None:
        """The driver goes; its actor notices and ends; the same command again."""
        self.job.kill()
        wait_until(lambda: not marked(self.mark, "MapWorker"), "the actor ends with its driver", 60)
        self.look()
        self.job = self.start()

    def actor(self) -> None:
        """The actor that holds the engine goes, in the middle of its shards."""
        actors = marked(self.mark, "MapWorker")
        assert len(actors) == 1, f"one engine, not {len(actors)}"
        actors[0].send_signal(signal.SIGKILL)
        self.look()

    def machine(self) -> None:
        """The node goes with all that runs on it; another joins."""
        self.node.kill()
        self.look()
        self.node = self.cluster.add(2)

    def look(self) -> None:
        """What stands now; what stood at the last look must be the same."""
        now = self.ledger.read("describe")
        self.kept = self.kept and all(now[key] == record for key, record in self.before.items())
        self.before = now

    def strike(self, name: str, how: Callable[[], None]) -> Row:
        """Wait until a few more shards are published, strike, and wait for the next one."""
        here = self.published() + MORE
        self.job.wait_for(lambda: self.published() >= here, 400, 0.1)
        began = time.monotonic()
        how()
        assert len(self.before) < IMAGES, "the strike came too late"
        self.job.wait_for(lambda: self.published() * SHARD > len(self.before), 400, 0.1)
        seconds = round(time.monotonic() - began, 1)
        return Row(name, True, 0, seconds, note=f"{len(self.before)} of {IMAGES} pictures were published")

    def finish(self) -> None:
        code, _, said = self.job.finish(400)
        assert code == 0, said[-2000:]
        self.look()


def killed(folder: Path, tables: Path) -> list[Row]:
    """Rows of both places."""
    quiet = str(folder / "quiet")
    small_table(Path(quiet), TABLE, num_train=IMAGES // 2, images_per_id=2)
    code, record, said = Job(*words(quiet), environment=clean_environment()).finish(600)
    assert (code, record["calls"]) == (0, IMAGES * QUESTIONS), said[-2000:]
    whole = answers(quiet)
    local = str(folder / "struck")
    copy_tables(quiet, local)
    rows = struck(local, "folder", whole)
    with serve() as s3:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        copy_tables(quiet, s3.uri)
        rows += struck(s3.uri, "S3", whole)
    return rows


def struck(root: str, place: str, whole: dict[str, Any]) -> list[Row]:
    """Three strikes on a job that describes the table at `root`."""
    mark = new_mark()
    with head(0, dashboard=False, **{MARK: mark}) as cluster:
        case = Described(root, cluster, mark)
        rows = [
            case.strike(f"generation, ledger on {place}: driver", case.driver),
            case.strike(f"generation, ledger on {place}: actor", case.actor),
            case.strike(f"generation, ledger on {place}: node", case.machine),
        ]
        case.finish()
    manifests = [case.ledger.store.read(f"{name}.manifest.json") for name in case.ledger.shards("describe")]
    stored = sum(json.loads(manifest)["rows"] for manifest in manifests)
    wrong = []
    if not case.kept:
        wrong.append("a published answer was replaced")
    if stored != IMAGES or len(case.before) != IMAGES:
        wrong.append(f"{stored} records of {len(case.before)} pictures, not {IMAGES}")
    if answers(root) != whole:
        wrong.append("the answers are not those of the undisturbed job")
    left = len(marked(mark))
    for row in rows:
        row.survived, row.left_behind = not wrong, left
        row.note = "; ".join(wrong) or f"{row.note}; answers equal, none replaced, each stands once"
    return rows


def words(root: str) -> list[str]:
    return ["jobs.generate", "describe", TABLE, f"root={root}", f"shard={SHARD}", "parallel=4"]


def copy_tables(root: str, to: str) -> None:
    store, target = open_store(root), open_store(to)
    for entry in store.list("tables/"):
        target.write(entry.key, store.read(entry.key))


def answers(root: str) -> dict[str, Any]:
    """Answers by image digest, as the side table has them."""
    view = open_view(DataConfig(root=root), (TABLE,), ("train",))
    digests = view.digests(np.arange(len(view)))
    rows = open_side_table(root, f"{TABLE}-answers").lookup([(one,) for one in digests], ["answers"])
    return {digest: row and row["answers"] for digest, row in zip(digests, rows, strict=True)}
