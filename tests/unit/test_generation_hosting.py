"""Engines on Ray, without Ray: what an actor does with shards, what it asks of the cluster, what its errors become."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from reid_dist.config import DataConfig
from reid_dist.errors import RunError, UserError
from reid_dist.generation import hosting as module
from reid_dist.generation.engine import EngineConfig
from reid_dist.generation.hosting import Host, Hosting, RayRunner, _readable
from reid_dist.generation.ledger import Ledger, Maker, Unit
from reid_dist.generation.messages import Request
from reid_dist.generation.model_folder import find_model
from reid_dist.storage import open_store
from tests.scripted import ScriptedEngine
from tests.worlds import small_table

TABLE = "synthetic-cuhk-pedes"


def hosting(root: Path, **engine: Any) -> Hosting:
    small = find_model("small")
    return Hosting(
        engine=EngineConfig(path=small.path, **engine), model="small", revision="", data=DataConfig(root=str(root)),
        tables=(TABLE,), splits=("train",), prompts="tiny", answers="strict", ledger=str(root / "ledger"), attempt=1,
        stage="ground", version="tiny-ground/v1", maker=Maker(small.digest),
    )  # fmt: skip


def test_an_actor_publishes_its_shards_and_reads_those_that_are_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_table(tmp_path, TABLE, num_train=3, num_val=0, num_test=3)
    calls: list[Request] = []
    engines: list[ScriptedEngine] = []

    def scripted(config: EngineConfig) -> ScriptedEngine:
        engines.append(ScriptedEngine(lambda request: "04 05 20 30", calls))
        return engines[-1]

    monkeypatch.setattr(module, "VllmEngine", scripted)
    Ledger(open_store(tmp_path / "ledger")).take()
    units = [Unit(f"k{row}", {"image": f"d{row}"}, {"row": row, "part": "head"}) for row in range(4)]
    shard = json.dumps([[u.key, u.inputs, u.payload] for u in units])

    async def work(*shards: str) -> list[dict[str, Any]]:
        host = Host(hosting(tmp_path))
        rows = [json.loads(row["done"][0]) async for row in host({"shard": list(shards)})]
        del host
        return rows

    first, again = asyncio.run(work(shard, shard))
    assert (len(first["outlines"]), len(calls)) == (4, 4)
    assert again["outlines"] == first["outlines"]
    assert first["began"] <= first["ended"] <= again["ended"]
    known = Ledger(open_store(tmp_path / "ledger")).read("ground")
    assert {key: record.value for key, record in known.items()} == {
        u.key: [[0.125, 0.15625, 0.625, 0.9375]] for u in units
    }
    assert [(engine.started, engine.closed) for engine in engines] == [(1, 1)], "an actor that ends ends its engine"
    asyncio.run(work(shard))
    assert len(calls) == 4, "an actor that took another one's place reads what that had published"


def test_a_model_that_differs_between_nodes_is_refused_by_the_actor(tmp_path: Path) -> None:
    small_table(tmp_path, TABLE, num_train=3, num_val=0, num_test=3)
    other = Hosting(
        **{**{f: getattr(hosting(tmp_path), f) for f in asdict(hosting(tmp_path))}, "maker": Maker("0" * 64)}
    )

    async def work() -> None:
        async for _ in Host(other)({"shard": ["[]"]}):
            raise AssertionError("nothing may be worked on")

    with pytest.raises(UserError, match="has other content on node"):
        asyncio.run(work())


def test_one_rank_takes_one_gpu_where_there_is_one(tmp_path: Path) -> None:
    runner = RayRunner(hosting(tmp_path))
    assert runner.resources(gpus=True) == {"num_cpus": 1, "num_gpus": 1}
    assert runner.resources(gpus=False) == {"num_cpus": 1, "num_gpus": 0}


def test_ranks_above_one_take_a_placement_group_per_engine_and_give_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.util

    made: list[tuple[list[dict[str, float]], str]] = []
    removed: list[int] = []

    def place(bundles: list[dict[str, float]], strategy: str) -> int:
        made.append((bundles, strategy))
        return len(made)

    monkeypatch.setattr(ray.util, "placement_group", place)
    monkeypatch.setattr(ray.util, "remove_placement_group", removed.append)
    runner = RayRunner(hosting(tmp_path, tensor_parallel=2))
    with pytest.raises(UserError, match="tensor_parallel=2: the cluster has no GPU"):
        runner.resources(gpus=False)
    options = runner.resources(gpus=True)
    assert (options["num_cpus"], options["num_gpus"]) == (1, 0), "the group holds the GPUs, not the actor"
    strategies = [options["ray_remote_args_fn"]()["scheduling_strategy"] for _ in range(2)]
    assert made == [([{"CPU": 2, "GPU": 1}, {"CPU": 1, "GPU": 1}], "STRICT_PACK")] * 2
    assert [one.placement_group for one in strategies] == [1, 2]
    assert all(one.placement_group_capture_child_tasks and one.placement_group_bundle_index == 0 for one in strategies)
    runner._release()
    assert sorted(removed) == [1, 2]


def test_what_an_actor_raised_reaches_the_user_as_itself() -> None:
    class TaskError(Exception):
        cause: BaseException

    for inner in (UserError("no tokenizer\nlong trace"), RunError("engine gone\nlong trace")):
        outer = TaskError("remote")
        outer.cause = inner
        with pytest.raises(type(inner), match=r"^(no tokenizer|engine gone)$"), _readable():
            raise RuntimeError("pipeline") from outer
    with pytest.raises(KeyError), _readable():
        raise KeyError("a defect stays one")
