"""Placement groups of this job: none may outlive the trial that took it.

A Ray Train controller that is killed (Tune stops a trial by killing its driver, and the controller with it) leaves its
placement group, and with it the workers' room, until the whole job ends. Ray Train has a cleaner for that, which asks the
dashboard whether the controller lives: a private cluster has no dashboard. Here the cluster's own table is asked, which says of
every group whether the actor that made it is dead.
"""

from __future__ import annotations

import logging
import time
from typing import Any

logger = logging.getLogger(__name__)


def remove_orphans() -> int:
    """Remove the groups of this job whose maker is dead; returns how many."""
    orphans = [group for group in _own_groups() if group.creator_actor_id.strip(b"\xff") and group.creator_actor_dead]
    return _remove(orphans)


def remove_all(patience_s: float) -> int:
    """Wait until this job has no group any more, then remove those that stay; returns how many had to be removed."""
    deadline = time.monotonic() + patience_s
    while _own_groups() and time.monotonic() < deadline:
        remove_orphans()
        time.sleep(0.2)
    return _remove(_own_groups())


def _own_groups() -> list[Any]:
    """Records of the cluster's table (PlacementGroupTableData) that this job made and that are not removed yet."""
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    own = bytes.fromhex(ray.get_runtime_context().get_job_id())
    # ray.util.placement_group_table shows neither the job nor the actor that made a group
    table = state._connect_and_get_accessor().get_placement_group_table()
    groups = [PlacementGroupTableData.FromString(entry) for entry in table]
    return [g for g in groups if g.creator_job_id == own and g.state != PlacementGroupTableData.REMOVED]


def _remove(groups: list[Any]) -> int:
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for group in groups:
        remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
    return len(groups)
