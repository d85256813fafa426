"""How many trials fit: from the nodes that there are and those that the autoscaler may add. Pure arithmetic.

A trial takes one bundle for its driver and one per worker. Counting whole trials that can be packed at the same time, and
starting no more, is what keeps drivers from taking the room that workers wait for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reid_dist.config import parse_yaml
from reid_dist.errors import UserError

Bundle = Mapping[str, float]  # resource name -> amount
SLACK = 1e-9


@dataclass(frozen=True)
class NodeShape:
    """Nodes of one kind."""

    name: str
    resources: Bundle
    count: int
    running: int = 0  # of `count`; the others could be added

    def describe(self) -> str:
        parts = ", ".join(f"{amount:g} {name}" for name, amount in self.resources.items() if name in ("CPU", "GPU"))
        return f"{self.count} x {self.name} ({parts or 'no CPU'}; {self.running} running)"


def demand(worker: Bundle, num_workers: int, driver: Bundle) -> list[Bundle]:
    """The bundles of a trial, driver first."""
    return [driver, *[worker] * num_workers]


def how_many(shapes: Iterable[NodeShape], bundles: Sequence[Bundle], limit: int) -> int:
    """How many trials can be packed at the same time, at most `limit`; first fit, the fullest kind of node first."""
    ordered = sorted(shapes, key=lambda shape: -shape.resources.get("GPU", 0.0))
    room = [dict(shape.resources) for shape in ordered for _ in range(shape.count)]
    for packed in range(limit):
        for bundle in sorted(bundles, key=lambda b: -b.get("GPU", 0.0)):
            # what needs no GPU goes where none is, as long as there is room
            nodes = sorted(room, key=lambda node: node.get("GPU", 0.0) > 0) if not bundle.get("GPU") else room
            free = next((node for node in nodes if _fits(bundle, node)), None)
            if free is None:
                return packed
            for name, amount in bundle.items():
                free[name] = free.get(name, 0.0) - amount
    return limit


def _fits(bundle: Bundle, node: Bundle) -> bool:
    return all(node.get(name, 0.0) + SLACK >= amount for name, amount in bundle.items() if amount > 0)


def why_not(shapes: Sequence[NodeShape], bundles: Sequence[Bundle]) -> str:
    """Why not even one trial fits."""
    have = "; ".join(shape.describe() for shape in shapes) or "no nodes"
    for bundle in bundles:
        if not any(_fits(bundle, shape.resources) for shape in shapes if shape.count):
            return f"{_text(bundle)} fit on no node: the cluster has {have}"
    return f"{len(bundles) - 1} workers of {_text(bundles[-1])} and a driver do not fit at the same time: the cluster has {have}"


def _text(bundle: Bundle) -> str:
    return " + ".join(f"{amount:g} {name}" for name, amount in bundle.items())


def merge_shapes(running: Sequence[NodeShape], addable: Sequence[NodeShape]) -> list[NodeShape]:
    """Running nodes and node types joined: a type counts as many nodes as it may have, never fewer than run."""
    types = {shape.name: shape for shape in addable}
    counts = {name: sum(shape.count for shape in running if shape.name == name) for name in types}
    joined = [NodeShape(t.name, t.resources, max(t.count, counts[t.name]), counts[t.name]) for t in types.values()]
    return [*(shape for shape in running if shape.name not in types), *joined]


def shapes_of_file(path: str) -> list[NodeShape]:
    """The node types of a cluster launcher file (`available_node_types`). Raises UserError."""
    try:
        with open(path, encoding="utf-8") as file:
            tree: Any = parse_yaml(file.read(), path)
    except OSError as error:
        raise UserError(f"cluster={path} cannot be read: {error.strerror}") from None
    types = tree.get("available_node_types") if isinstance(tree, dict) else None
    if not isinstance(types, dict) or not types:
        raise UserError(f"cluster={path}: no available_node_types; give a cluster launcher file")
    limit, head = int(tree.get("max_workers", 2)), tree.get("head_node_type")
    shapes = []
    for name, facts in types.items():
        resources = facts.get("resources") or {}
        if not resources:
            raise UserError(f"cluster={path}: node type {name} does not say its resources, so nothing can be planned")
        most = 1 if name == head else min(int(facts.get("max_workers", limit)), limit)
        shapes.append(NodeShape(str(name), {k: float(v) for k, v in resources.items()}, most))
    return shapes
