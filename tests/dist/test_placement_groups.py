"""What a killed maker leaves in a private cluster, which has no dashboard that Ray Train's own cleaner could ask."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table

from jobs._cluster import connect
from reid_dist.training.launch import _trainer
from tuning.groups import remove_all, remove_orphans


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # as `connect` does, here for this test alone
    with connect(2):
        yield


class Maker:
    """Stands for a Ray Train controller."""

    def make(self) -> str:
        group = placement_group([{"CPU": 0.75}])
        ray.get(group.ready())
        return str(group.id.hex())


def living() -> set[str]:
    return {name for name, facts in placement_group_table().items() if facts["state"] != "REMOVED"}


def test_the_group_of_a_dead_maker_goes_at_once_and_no_other(cluster: None) -> None:
    makers = [ray.remote(num_cpus=0)(Maker).remote() for _ in range(2)]
    stays, goes = ray.get([maker.make.remote() for maker in makers])
    own = placement_group([{"CPU": 0.25}])  # of the driver, as those of Tune
    ray.get(own.ready())
    assert remove_orphans() == 0
    ray.kill(makers[1])
    deadline = time.monotonic() + 30
    while not (removed := remove_orphans()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert removed == 1
    assert living() == {stays, own.id.hex()}
    assert ray.get(makers[0].make.remote(), timeout=30) != goes  # the room is free again: 0.75 beside 0.75 and 0.25
    assert remove_all(patience_s=0.1) == 3
    assert living() == set()


@pytest.mark.parametrize(("watcher", "has_cleaner"), [("0", False), ("1", True)])
def test_actors_that_nobody_needs_are_not_started(watcher: str, has_cleaner: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", watcher)
    made = {type(callback).__name__ for callback in _trainer()(lambda: None)._create_default_callbacks()}
    assert ("PlacementGroupCleanerCallback" in made) is has_cleaner
    assert "DatasetsCallback" not in made
    assert "BackendSetupCallback" in made
