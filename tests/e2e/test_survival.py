"""Losses that a cluster of cheap machines has every day, on one run: a node, an announced preemption, the driver with a half
uploaded checkpoint, and an operator who starts it a second time. The result is bit for bit that of a run that nothing struck."""

from __future__ import annotations

from pathlib import Path

import pytest

from reid_dist import methods
from tests.chaos.chain import RECIPE, cluster
from tests.worlds import small_tables


@pytest.mark.timeout(1200)
def test_run_survives_node_preemption_driver_and_second_attempt(tmp_path: Path) -> None:
    small_tables(tmp_path, methods.load_recipe(RECIPE))
    rows = cluster(tmp_path, tmp_path)
    assert [row.survived for row in rows] == [True] * 4
    assert all(row.weights_equal for row in rows), rows
    lost = {row.fault: row.steps_lost for row in rows}
    assert all(steps is not None and 0 <= steps <= 4 for steps in lost.values()), lost  # a checkpoint every second step
