"""The law for CLIMB's video path (the image path is among test_methods_law's), and for its memory alone.

The plan's passes of 8 tracklets in batches of 6 end in partial batches of 2, so that two ranks of four hold no row.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist.climb_cells import train_video, update_memory
from tests.pool import Pool

RTOL = 1e-4


@pytest.fixture(scope="module")
def alone(pool: Pool) -> dict[str, Any]:
    return pool.run(train_video, 1, {"zero_stage": 0}, {})[0]


@pytest.mark.parametrize(
    ("world", "stage", "pieces"), [(1, 1, 2), (2, 0, 1), (2, 1, 1), (2, 2, 1), (2, 3, 1), (4, 1, 1), (4, 1, 2)]
)
def test_video(pool: Pool, alone: dict[str, Any], world: int, stage: int, pieces: int) -> None:
    ranks = pool.run(train_video, world, {"zero_stage": stage, "micro_batches": pieces}, {})
    assert all(rank["losses"] == ranks[0]["losses"] for rank in ranks)
    assert all((rank["banks"] == ranks[0]["banks"]).all() for rank in ranks)
    ours, theirs = ranks[0]["losses"], alone["losses"]
    assert [record["rows"] for record in theirs] == [6, 2, 6, 2, 6, 2, 6, 2]
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for key, value in b.items():
            assert a[key] == pytest.approx(value, rel=RTOL, abs=1e-6), (b["step"], key)
    for name, value in alone["weights"].items():
        assert (ranks[0]["weights"][name] - value).abs().max() <= 1e-4 * max(1.0, float(value.abs().max())), name
    assert (ranks[0]["banks"] - alone["banks"]).abs().max() < 1e-4


@pytest.mark.parametrize("rule", ["official", "paper"])
@pytest.mark.parametrize("rows", [64, 13, 2])
def test_memory_is_the_same_to_the_bit(pool: Pool, rows: int, rule: str) -> None:
    """Also with uneven slices, and with fewer rows than ranks."""
    reference = update_memory(rows, rule)
    for world in (1, 2, 4):
        assert pool.run(update_memory, world, rows, rule) == [reference] * world
