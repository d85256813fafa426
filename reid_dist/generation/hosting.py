"""Engines on Ray: generation's one Ray file.

Ray Data's autoscaling pool hosts one actor per engine under `map_batches`. A row of the dataset is a shard of units, every
unit a coroutine, so vLLM batches over units and shards, and no list waits for its slowest; the engine's queue is bounded,
and so is the number of shards that an actor works on. When an actor or its node dies, Ray starts another and gives it the
same shards: those that were published are read, the others are asked for anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from reid_dist.config import DataConfig
from reid_dist.errors import RunError, UserError
from reid_dist.generation.engine import EngineConfig, VllmEngine
from reid_dist.generation.ledger import Ledger, Maker, Unit
from reid_dist.generation.model_folder import find_model
from reid_dist.generation.shards import Outline, ShardDone, Stage, work_shard
from reid_dist.generation.stages import Answerer, dialogues
from reid_dist.generation.supervise import Supervised
from reid_dist.storage import open_store

logger = logging.getLogger(__name__)
QUEUE = 8  # requests inside an engine, of what it can work on at a time: enough that its batches are always full


@dataclass(frozen=True, kw_only=True)
class Hosting:
    """What an actor needs to answer. Plain data, sent to every actor."""

    engine: EngineConfig
    model: str  # as the user named it: every node finds it for itself
    revision: str
    data: DataConfig
    tables: tuple[str, ...]
    splits: tuple[str, ...]
    prompts: str
    answers: str
    ledger: str
    attempt: int
    stage: str
    version: str
    maker: Maker


class Host:
    """The actor: one engine, any number of shards at a time."""

    def __init__(self, hosting: Hosting) -> None:
        """Does nothing that can fail: what the first call raises reaches the driver as it is."""
        logging.basicConfig(level=logging.INFO)
        self.hosting = hosting
        self.stage = Stage(self.hosting.stage, self.hosting.version, self.hosting.maker)
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self._loading = asyncio.Lock()
        self._loaded: tuple[Ledger, Supervised, Answerer] | None = None

    def __del__(self) -> None:
        """Ray Data drops the object when the actor ends in order."""
        if loaded := getattr(self, "_loaded", None):
            loaded[1].drop()

    def _load(self) -> tuple[Ledger, Supervised, Answerer]:
        from reid_dist.data.store import open_view

        hosting = self.hosting
        view = open_view(hosting.data, hosting.tables, hosting.splits)
        found = find_model(hosting.model, hosting.revision, hosting.maker.model)
        engine = replace(hosting.engine, path=found.path)
        ask = Supervised(lambda: VllmEngine(engine), engine.stall_s, queue=engine.parallel * QUEUE)
        speak = dialogues(hosting.prompts, hosting.answers)
        answerer = Answerer(speak, ask, lambda row: view.encoded([row])[0], engine.pixels)
        return Ledger(open_store(hosting.ledger), hosting.attempt), ask, answerer

    async def _ready(self) -> tuple[Ledger, Answerer]:
        """Raises UserError, EngineDied."""
        async with self._loading:
            if self._loaded is None:
                self._loaded = await asyncio.to_thread(self._load)
        ledger, ask, answerer = self._loaded
        await ask.ready()
        return ledger, answerer

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Rows of "shard" (units as JSON) -> rows of "done" (a ShardDone as JSON)."""
        for text in batch["shard"]:
            units = [Unit(*fields) for fields in json.loads(str(text))]
            ledger, answerer = await self._ready()
            began = time.time()
            work = functools.partial(answerer, self.stage.name)
            records = await work_shard(ledger, self.stage, units, work, self.hosting.engine.parallel * QUEUE)
            done = ShardDone([Outline.of(record) for record in records], self.name, began, time.time())
            yield {"done": [json.dumps(asdict(done))]}


@dataclass
class RayRunner:
    """Shards on a pool of engines that grows from `least` to `most` with the queue. `connect` is called before Ray is used:
    a job that finds all its answers in the ledger needs none.
    """

    hosting: Hosting
    least: int = 1
    most: int = 1
    shards_under_way: int = 4  # per engine
    connect: Callable[[], Any] = lambda: None
    _groups: list[Any] = field(default_factory=list)

    def run(self, ledger: Ledger, stage: Stage, shards: Sequence[list[Unit]]) -> Iterator[ShardDone]:
        """As Runner says. Raises UserError and RunError of the actors as themselves."""
        self.connect()
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        hosting = replace(
            self.hosting, attempt=ledger.attempt, stage=stage.name, version=stage.version, maker=stage.maker
        )
        rows = [{"shard": json.dumps([[u.key, dict(u.inputs), dict(u.payload)] for u in shard])} for shard in shards]
        most = max(1, min(self.most, len(rows)))
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Host, fn_constructor_args=(hosting,), batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=min(self.least, most), max_size=most, max_tasks_in_flight_per_actor=self.shards_under_way,
                max_concurrent_calls_per_actor=self.shards_under_way,
            ),
            **self.resources(bool(ray.cluster_resources().get("GPU", 0))),
        )  # fmt: skip
        try:
            with _readable():
                for row in done.iter_rows():
                    fields = json.loads(row["done"])
                    yield ShardDone(**{**fields, "outlines": [Outline(**one) for one in fields["outlines"]]})
        finally:
            self._release()

    def resources(self, gpus: bool) -> dict[str, Any]:
        """What every actor asks of Ray: a CPU and, where the cluster has any, a GPU; with a tensor parallel size above one
        a placement group of its own instead, in which vLLM starts its ranks.
        """
        ranks = self.hosting.engine.tensor_parallel
        if ranks == 1:
            return {"num_cpus": 1, "num_gpus": 1 if gpus else 0}
        if not gpus:
            raise UserError(f"tensor_parallel={ranks}: the cluster has no GPU")
        return {"num_cpus": 1, "num_gpus": 0, "ray_remote_args_fn": self._placement}

    def _placement(self) -> dict[str, Any]:
        """Of one more actor: one GPU per rank, all on one node. Held until the stage has ended."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        ranks = self.hosting.engine.tensor_parallel
        # The first bundle also holds the actor itself.
        bundles = [{"CPU": 2 if rank == 0 else 1, "GPU": 1} for rank in range(ranks)]
        group = ray.util.placement_group(bundles, strategy="STRICT_PACK")
        self._groups.append(group)
        return {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
            )
        }

    def _release(self) -> None:
        """Give the placement groups back, or the next stage's engines would wait for their GPUs for ever."""
        import ray

        while self._groups:
            ray.util.remove_placement_group(self._groups.pop())


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """What an actor raised, as itself and in one line."""
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (UserError, RunError)):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None:
            raise
        raise type(cause)(str(cause).splitlines()[0]) from None
