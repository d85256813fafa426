"""The law for CLIMB's video path (the image path is among test_methods_law's), and for its memory alone.

Batch norm over two rows multiplies rounding by hundreds, so a float32 comparison over partial batches of two would test the
rounding. Partial batches of two rows (two of four ranks hold none) are compared in float64, those of four rows in float32.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist.climb_cells import train_video, update_memory
from tests.pool import Pool


def assert_same(ranks: list[dict[str, Any]], alone: dict[str, Any], rtol: float, rows: list[int]) -> None:
    assert all(rank["losses"] == ranks[0]["losses"] for rank in ranks)
    assert all((rank["banks"] == ranks[0]["banks"]).all() for rank in ranks)
    ours, theirs = ranks[0]["losses"], alone["losses"]
    assert [record["rows"] for record in theirs] == rows
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for key, value in b.items():
            assert a[key] == pytest.approx(value, rel=rtol, abs=1e-6), (b["step"], key)
    for name, value in alone["weights"].items():
        assert (ranks[0]["weights"][name] - value).abs().max() <= rtol * max(1.0, float(value.abs().max())), name
    assert (ranks[0]["banks"] - alone["banks"]).abs().max() < rtol


@pytest.fixture(scope="module")
def exact(pool: Pool) -> dict[str, Any]:
    """Four people: passes of 8 tracklets in batches of 6 and 2."""
    return pool.run(train_video, 1, {"zero_stage": 0}, 4, True)[0]


@pytest.mark.parametrize(("world", "pieces"), [(1, 2), (2, 1), (4, 1), (4, 2)])
def test_video_with_empty_slices(pool: Pool, exact: dict[str, Any], world: int, pieces: int) -> None:
    ranks = pool.run(train_video, world, {"zero_stage": 0, "micro_batches": pieces}, 4, True)
    assert_same(ranks, exact, 1e-6, [6, 2] * 4)


@pytest.fixture(scope="module")
def alone(pool: Pool) -> dict[str, Any]:
    """Five people: passes of 10 tracklets in batches of 6 and 4."""
    return pool.run(train_video, 1, {"zero_stage": 0}, 5)[0]


@pytest.mark.parametrize(("world", "stage", "pieces"), [(1, 1, 2), (2, 1, 1), (2, 2, 2), (2, 3, 1), (4, 1, 1)])
def test_video_at_every_stage(pool: Pool, alone: dict[str, Any], world: int, stage: int, pieces: int) -> None:
    ranks = pool.run(train_video, world, {"zero_stage": stage, "micro_batches": pieces}, 5)
    assert_same(ranks, alone, 1e-4, [6, 4] * 4)


@pytest.mark.parametrize("rule", ["official", "paper"])
@pytest.mark.parametrize("rows", [64, 13, 2])
def test_memory_is_the_same_to_the_bit(pool: Pool, rows: int, rule: str) -> None:
    """Also with uneven slices, and with fewer rows than ranks."""
    reference = update_memory(rows, rule)
    for world in (1, 2, 4):
        assert pool.run(update_memory, world, rows, rule) == [reference] * world
