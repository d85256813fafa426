"""Small synthetic tables by name: `synthetic-<layout>` is the world written in that layout, parsed and packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reid_dist.config import Recipe
from reid_dist.data import layouts
from reid_dist.data.synthetic import write_synthetic
from reid_dist.storage import open_store
from tests.tables import pack_tree

PREFIX = "synthetic-"
SMALL: dict[str, Any] = {"num_train": 12, "num_test": 6, "images_per_id": 2}

OF_LAYOUT: dict[str, dict[str, Any]] = {
    "cuhk-pedes": {"num_val": 4},
    "cuhk03-np": {"images_per_id": 4},  # a query from each camera, and something left to find
    "regdb": {"num_train": 0, "num_test": 16},  # its divisions halve one set of people
    **{set_: {"num_train": 0, "num_test": 16} for set_ in ("grid", "i-lids", "ilids-vid", "prid2011", "viper")},
}


def small_table(root: Path, name: str, **options: Any) -> str:
    """Write the small world of a table name below `root` and pack it (without Ray); returns the table's name."""
    layout = layouts.get(name.removeprefix(PREFIX))
    raw = root / f"raw-{name}"
    if not raw.exists():
        write_synthetic(raw, layout.name, **{**SMALL, **OF_LAYOUT.get(layout.name, {}), **options})
        parsed = layout.parse(open_store(str(raw)))
        pack_tree(str(root), name, parsed.records, raw, chunk=64)
    return name


def small_tables(root: Path, recipe: Recipe) -> None:
    """All tables that a recipe names."""
    for name in dict.fromkeys((*recipe.data.train, *recipe.data.val, *recipe.data.test)):
        small_table(root, name)


def read_record(output: str) -> dict[str, Any]:
    """The record that a job printed: the last line of its stdout."""
    record: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return record
