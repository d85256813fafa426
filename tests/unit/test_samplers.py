"""Plans: composition given draws, and what holds for every draw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reid_dist.data.samplers import (
    IdentityPlan,
    ShufflePlan,
    compose_identity_batches,
    rank_slice,
)
from reid_dist.errors import UserError
from tests.golden import cases, load


def orders(c: dict, prefix: str) -> dict[int, np.ndarray]:
    offset = c[f"{prefix}_offset"]
    return {
        int(pid): c[f"{prefix}_flat"][offset[i] : offset[i + 1]] for i, pid in enumerate(c[f"{prefix}_pid"].tolist())
    }


@cases("comoe", "identity_sampler")
def test_identity_composition(case: Path) -> None:
    c = load(case)
    if "const_world" in c:
        prefix, expected, estimate = "in_order", c["out_global_index"], sum(c["out_length_estimate"].tolist())
    else:
        prefix, expected, estimate = "in_shuffled", c["out_index"], c["out_length_estimate"]
    result = compose_identity_batches(orders(c, prefix), c["in_selected_pid"], c["const_instances"])
    np.testing.assert_array_equal(result, expected)
    per_draw = c["const_batch_size"] // c.get("const_world", 1)
    plan = IdentityPlan(c["in_pid"], per_draw, c["const_instances"], seed=1)
    assert plan.estimate() // c.get("const_world", 1) * c.get("const_world", 1) == estimate


@cases("comoe", "identity_sampler_ddp")
def test_rank_slices_of_identity_batches(case: Path) -> None:
    c = load(case)
    result = compose_identity_batches(orders(c, "in_order"), c["in_selected_pid"], c["const_instances"])
    world, batch = c["const_world"], c["const_batch_size"]
    for rank in range(world):  # our contiguous slices of whole global batches are the original's blocks r, r + W, ...
        whole = [result[i : i + batch] for i in range(0, len(result) - batch + 1, batch)]
        ours = np.concatenate([part[rank_slice(batch, rank, world)] for part in whole])
        np.testing.assert_array_equal(ours, c[f"out_rank{rank}_index"][: len(ours)])


@pytest.mark.parametrize(("total", "world"), [(10, 1), (10, 3), (2, 4), (0, 2), (64, 8)])
def test_rank_slices_cover_everything_once(total: int, world: int) -> None:
    slices = [rank_slice(total, rank, world) for rank in range(world)]
    assert [i for s in slices for i in range(total)[s]] == list(range(total))
    sizes = [s.stop - s.start for s in slices]
    assert max(sizes) - min(sizes) <= 1


def test_shuffle_plan_keeps_every_item_and_the_partial_batch() -> None:
    plan = ShufflePlan(10, 4, seed=3)
    assert plan.steps(0) == 3
    batches = [plan.batch(0, step) for step in range(3)]
    assert [first for _, first in batches] == [0, 4, 8]
    assert sorted(np.concatenate([items for items, _ in batches]).tolist()) == list(range(10))
    np.testing.assert_array_equal(plan.batch(0, 1)[0], ShufflePlan(10, 4, seed=3).batch(0, 1)[0])
    assert plan.items(0).tolist() != plan.items(1).tolist()
    assert plan.items(0).tolist() != ShufflePlan(10, 4, seed=4).items(0).tolist()
    with pytest.raises(ValueError, match="has 3 steps"):
        plan.batch(0, 3)


def test_identity_plan_batches_hold_p_identities_with_k_items() -> None:
    counts = [1, 2, 3, 4, 5, 6, 9, 9]
    pids = np.repeat(np.arange(100, 108), counts)
    pids = np.random.default_rng(0).permutation(pids)
    plan = IdentityPlan(pids, 6, 3, seed=2)
    seen = []
    for epoch in range(3):
        for step in range(plan.steps(epoch)):
            items, _ = plan.batch(epoch, step)
            assert items.shape == (6,)
            groups = pids[items].reshape(2, 3)
            assert (groups == groups[:, :1]).all()
            assert groups[0, 0] != groups[1, 0]
        seen.append(plan.items(epoch))
        kept, uses = np.unique(seen[-1], return_counts=True)
        small = np.isin(pids[kept], [100, 101])
        assert (uses[~small] == 1).all()  # only identities with fewer than K items repeat some
        assert plan.estimate() - len(seen[-1]) < 6 * 3
    assert seen[0].tolist() != seen[1].tolist()


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(UserError, match="multiple of instances"):
        IdentityPlan(np.arange(8), 6, 4, seed=1)
    with pytest.raises(UserError, match="needs 4 identities"):
        IdentityPlan(np.arange(3), 16, 4, seed=1)
    with pytest.raises(UserError, match="nothing to train on"):
        ShufflePlan(0, 4, seed=1)
