"""The shipped sweeps, planned against small tables of the names that they ask for: every trial is possible, no split leaks."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest

from jobs import tune
from reid_dist.data.store import table_uri
from tests.worlds import small_table
from tuning.expand import make_recipe, places
from tuning.sweep import Sweep, load_sweep, shipped

FEW = {"num_train": 4, "num_test": 3}
CLUSTER = Path(__file__).resolve().parents[2] / "cluster" / "aws.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shipped")


def add_tables(root: Path, sweep: Sweep) -> None:
    """What the sweep's recipes read and score, without what its side_tables would make."""
    recipes = [make_recipe(sweep, place, {}) for place in places(sweep)]
    wanted = {name for recipe in recipes for part in ("train", "val", "test") for name in getattr(recipe.data, part)}
    for name in sorted(wanted.union(*(scoring.test for scoring in sweep.evaluate))):
        if not Path(table_uri(str(root), name)).exists():
            own_people = zlib.crc32(name.encode())  # of one seed two sets would hold the same pictures, which is a leak
            small_table(root, name, seed=own_people, **(FEW if name in ("mars", "ls-vid") else {}))


def plan(root: Path, name: str) -> dict[str, Any]:
    add_tables(root, load_sweep(name))
    record: dict[str, Any] = tune.main(
        [
            name,
            f"data.root={root}",
            f"output={root}/sweeps",
            "sweep.resources.hours_per_trial=2",
            f"cluster={CLUSTER}",
            "--plan",
        ]
    )["plan"]
    return record


@pytest.mark.parametrize("name", shipped())
def test_every_trial_of_a_shipped_sweep_can_run_on_the_shipped_cluster(root: Path, name: str) -> None:
    record = plan(root, name)
    assert record["impossible"] == []
    assert record["leak_guard"] == "no tested identity or image is trained on"
    assert record["trials"] > 0
    assert 1 <= record["concurrent_trials"] <= record["to_run"]
    assert record["per_trial"].endswith("1 GPU)")
    left = record["to_run"] - record["shared_runs"]
    assert record["estimate"]["gpu_hours"] == left * 2.0
    assert not (root / "sweeps").exists()
    assert set(record["side_tables_to_make"]) == {table.name for table in load_sweep(name).side_tables}


def test_pictures_that_two_sets_share_are_flagged_before_anything_starts(tmp_path: Path) -> None:
    """The leak guard looks across tables: one set holds pictures of the other under other names and other people."""
    for name in ("cuhk03-np", "prid2011"):
        small_table(tmp_path, name, seed=7)
    words = [
        "data.train=[cuhk03-np]",
        "data.train_splits=[train,query]",
        "data.test=[prid2011]",
        "evaluation.protocol=ten-splits",
    ]
    record = tune.main(["muva_finetune", f"data.root={tmp_path}", *words, f"cluster={CLUSTER}", "--plan"])["plan"]
    assert len(record["impossible"]) == 12
    assert "test data stands in training: 0 identities and" in record["impossible"][0]["reason"]
    assert record["leak_guard"] == "see impossible"
