"""The law for every method of the registry: 1, 2 and 4 workers, ZeRO 0 to 3, the same loss sequence over 20 steps, in one pool
of gloo processes; and exact continuation from storage, also with another number of workers.

A new method is tested by having `recipes/tiny.yaml` (the smallest form that uses everything of it).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reid_dist import methods
from reid_dist.config import to_mapping
from reid_dist.errors import UserError
from reid_dist.runs import Run, identity_of
from tests.dist.cells import train_recipe
from tests.pool import Pool
from tests.worlds import small_tables

TINY = [name for name in methods.recipes() if name.endswith("/tiny")]
RTOL = 1e-4
CELLS = [(1, 1), (2, 0), (2, 1), (2, 2), (2, 3), (4, 1)]


def test_every_method_has_a_tiny_recipe() -> None:
    assert {name.split("/")[0] for name in TINY} == set(methods.names())


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {}


def mapping_of(name: str, root: Path, output: str = "runs", **training: Any) -> dict[str, Any]:
    overrides = [f"data.root={root}", f"output={output}", *(f"training.{k}={v}" for k, v in training.items())]
    recipe = methods.load_recipe(name, overrides)
    small_tables(root, recipe)
    mapping: dict[str, Any] = to_mapping(recipe)
    return mapping


def reference(pool: Pool, references: dict[str, Any], name: str, root: Path) -> dict[str, Any]:
    """One worker, stage 0."""
    if name not in references:
        references[name] = pool.run(train_recipe, 1, mapping_of(name, root, num_workers=1, zero_stage=0))[0]
    result: dict[str, Any] = references[name]
    return result


def horizon(mapping: dict[str, Any]) -> int | None:
    """Steps over which float32 can be compared; None: all.

    Batch norm inside a model over a dozen rows, with hard mining behind it, multiplies rounding about tenfold per step
    (measured: 4e-7, 2e-7, 3e-5, 2e-2 over the first five): three steps show that values, gradients and updates agree. Such
    a method holds the law over its whole run in float64 in a test of its own (test_<method>_law.py).
    """
    return None if all(stage.row_wise for stage in stages_of(mapping)) else 3


def assert_same_losses(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], steps: int | None = None) -> None:
    assert len(ours) == len(theirs) >= 10
    for a, b in list(zip(ours, theirs, strict=True))[:steps]:
        assert a.keys() == b.keys()
        for key, value in b.items():
            assert a[key] == pytest.approx(value, rel=RTOL, abs=1e-6), (b["step"], key)


@pytest.mark.parametrize(("world", "stage"), CELLS)
@pytest.mark.parametrize("name", TINY)
def test_workers_and_stages(
    pool: Pool, references: dict[str, Any], tables: Path, name: str, world: int, stage: int
) -> None:
    alone = reference(pool, references, name, tables)
    mapping = mapping_of(name, tables, num_workers=world, zero_stage=stage)
    ranks = pool.run(train_recipe, world, mapping)
    assert all(rank["losses"] == ranks[0]["losses"] for rank in ranks)
    steps = horizon(mapping)
    assert_same_losses(ranks[0]["losses"], alone["losses"], steps)
    if steps is None:
        assert ranks[0]["metrics"] == pytest.approx(alone["metrics"], abs=0.05), "selection metrics differ"


@pytest.mark.parametrize("name", TINY)
def test_killed_and_continued_from_storage_with_other_workers(
    pool: Pool, references: dict[str, Any], tables: Path, tmp_path: Path, name: str
) -> None:
    alone = reference(pool, references, name, tables)
    mapping = mapping_of(name, tables, str(tmp_path), num_workers=2, zero_stage=1, log_every=1)
    uri = start_run(mapping)
    first = pool.run(train_recipe, 2, mapping, uri, 7)
    assert first[0]["progress"] is None
    assert Run.read(uri).latest_step() == 7
    second = pool.run(train_recipe, 4, {**mapping, "training": {**mapping["training"], "zero_stage": 2}}, uri)
    assert_same_losses(first[0]["losses"] + second[0]["losses"], alone["losses"], horizon(mapping))
    stored = [record for record in Run.read(uri).metrics() if record["kind"] == "step"]
    assert [record["step"] for record in stored] == [record["step"] for record in alone["losses"]]


@pytest.mark.parametrize("name", TINY)
def test_same_workers_continue_bit_for_bit(pool: Pool, tables: Path, tmp_path: Path, name: str) -> None:
    mapping = mapping_of(name, tables, str(tmp_path), num_workers=2, zero_stage=1, log_every=1)
    whole = pool.run(train_recipe, 2, mapping)[0]
    uri = start_run(mapping)
    first = pool.run(train_recipe, 2, mapping, uri, 13)[0]
    second = pool.run(train_recipe, 2, mapping, uri)[0]
    assert first["losses"] + second["losses"] == whole["losses"]
    assert all((second["weights"][key] == value).all() for key, value in whole["weights"].items())


def test_an_announced_preemption_leaves_a_checkpoint_at_once_and_training_goes_on(
    pool: Pool, references: dict[str, Any], tables: Path, tmp_path: Path
) -> None:
    alone = reference(pool, references, "comoe/tiny", tables)
    mapping = mapping_of("comoe/tiny", tables, str(tmp_path), num_workers=2, log_every=1, checkpoint_every=0)
    uri = start_run(mapping)
    assert_same_losses(pool.run(train_recipe, 2, mapping, uri, None, 7)[0]["losses"], alone["losses"])
    run = Run.read(uri)
    assert [note["step"] for note in run.notes() if note["kind"] == "drain"] == [7]
    assert [saved["step"] for saved in run.checkpoints()] == [7, len(alone["losses"])]


def start_run(mapping: dict[str, Any]) -> str:
    """A run in storage, as jobs.train makes it."""
    from reid_dist.config import build_recipe
    from reid_dist.training.worker import open_data

    recipe = build_recipe(mapping, lambda name: methods.get(name).Config)
    return Run.open(recipe.uri, identity_of(recipe, open_data(recipe).train.versions), recipe).uri


@pytest.mark.parametrize("saver", [{"activation_checkpointing": True}, {"micro_batches": 3}])
@pytest.mark.parametrize("name", TINY)
def test_memory_savers_change_nothing_or_are_refused(
    pool: Pool, references: dict[str, Any], tables: Path, name: str, saver: dict[str, Any]
) -> None:
    """Recomputed activations and micro-batches: exact, or refused with a sentence where batch norm stands inside the model."""
    mapping = mapping_of(name, tables, num_workers=2, zero_stage=1, **saver)
    if refuses(mapping):
        with pytest.raises(AssertionError, match=r"UserError: training.*batch norm"):
            pool.run(train_recipe, 2, mapping)
        return
    alone = reference(pool, references, name, tables)
    assert_same_losses(pool.run(train_recipe, 2, mapping)[0]["losses"], alone["losses"], horizon(mapping))


def refuses(mapping: dict[str, Any]) -> bool:
    """A method whose own check says no, or micro-batches of a stage that is not row-wise."""
    try:
        stages = stages_of(mapping)
    except UserError:
        return True
    return mapping["training"]["micro_batches"] > 1 and not all(stage.row_wise for stage in stages)


def stages_of(mapping: dict[str, Any]) -> list[Any]:
    from reid_dist.config import build_recipe
    from reid_dist.training.worker import open_data

    recipe = build_recipe(mapping, lambda name: methods.get(name).Config)
    return list(methods.get(recipe.method).stages(recipe, open_data(recipe)))
