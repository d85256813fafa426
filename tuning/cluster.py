"""What the connected Ray cluster has, and what its autoscaler could add."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from tuning.capacity import NodeShape, merge_shapes
from tuning.sweep import Sweep


def connected_shapes() -> list[NodeShape]:
    """Nodes of the connected cluster by kind, joined with the node types of its autoscaler where it has one."""
    import ray
    from ray._private.state import state

    config = state.get_cluster_config()
    groups = list(config.node_group_configs) if config is not None else []
    addable = [NodeShape(g.name, _plain(g.resources), _count(g.max_count)) for g in groups if dict(g.resources)]
    return merge_shapes(running_shapes([node for node in ray.nodes() if node["Alive"]], addable), addable)


def running_shapes(nodes: list[dict[str, Any]], types: list[NodeShape]) -> list[NodeShape]:
    """Alive nodes by kind: the autoscaler's name where a node has one or looks like one of `types`, else what it has."""
    known = {tuple(sorted(shape.resources.items())): shape.name for shape in types}
    kinds: dict[tuple[str, tuple[tuple[str, float], ...]], int] = {}
    for node in nodes:
        resources = tuple(sorted(_plain(node["Resources"]).items()))
        name = node.get("Labels", {}).get("ray.io/node-group") or known.get(resources) or "node"
        kinds[name, resources] = kinds.get((name, resources), 0) + 1
    return [NodeShape(name, dict(resources), count, count) for (name, resources), count in kinds.items()]


def _plain(resources: Mapping[str, float]) -> dict[str, float]:
    """Without memory, and without the marks that every node has of its own."""
    return {
        name: float(amount)
        for name, amount in resources.items()
        if name not in ("memory", "object_store_memory") and not name.startswith("node:")
    }


def _count(most: int) -> int:
    return 1000 if most < 0 else int(most)  # -1: without limit


def least_cpus(sweep: Sweep) -> float:
    """CPUs of a private cluster: what the machine has, and at least room for one trial (as one training run gets it)."""
    own = sweep.resources
    return max(os.cpu_count() or 1, math.ceil(own.num_workers * own.cpus_per_worker + own.driver.get("CPU", 0.0)))


def this_machine(sweep: Sweep) -> list[NodeShape]:
    """What a private cluster on this machine would have."""
    import torch

    gpus = float(torch.cuda.device_count())
    return [NodeShape("this machine", {"CPU": float(least_cpus(sweep)), **({"GPU": gpus} if gpus else {})}, 1, 1)]
