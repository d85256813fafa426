"""The four small sets of domain generalisation: ten random divisions into training and test identities.

Datasets specification 1.7. The literature's divisions come from unseeded draws that were cached with absolute paths.
Ours are `reid-small4-v1`: trial k permutes the sorted identities with PCG64(20210 + k), the first ones train. A split
file (ours or one in circulation, a JSON list of {"train", "query", "gallery"} whose entries are paths or [path, id,
camera]) is taken verbatim instead: names only, so that absolute paths in it do no harm.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from reid_dist.data.layouts.base import Tree
from reid_dist.data.records import Record, first_split

VERSION = "reid-small4-v1"
TRIALS = 10
_SEED = 20210

Assign = Callable[[np.random.Generator, set[int]], dict[str, str]]  # (trial's generator, training ids) -> {path: split}


def draw_trials(records: Sequence[Record], shared: Sequence[int], num_train: int, assign: Assign) -> list[Record]:
    """Fill `trials` of all records: per trial `num_train` of the `shared` ids train, `assign` gives every row's
    split.
    """
    trials: dict[str, list[str]] = {record.path: [] for record in records}
    for k in range(TRIALS):
        rng = np.random.Generator(np.random.PCG64(_SEED + k))
        order = rng.permutation(np.array(sorted(shared)))
        splits = assign(rng, {int(pid) for pid in order[:num_train]})
        for path, row in trials.items():
            row.append(splits.get(path, ""))
    return with_trials(records, trials)


def with_trials(records: Sequence[Record], trials: dict[str, list[str]]) -> list[Record]:
    """Records with {path: splits}."""
    return [replace(r, split=first_split(trials[r.path]), trials=tuple(trials[r.path])) for r in records]


def read_splits(tree: Tree, records: Sequence[Record], file: str) -> list[Record]:
    """Records divided as a split file says. Raises DatasetError naming what it cannot find."""
    content = tree.read_json(tree.one_of(file))
    if isinstance(content, dict):
        content = content.get("trials")
    if not isinstance(content, list) or not content or not all(isinstance(trial, dict) for trial in content):
        raise tree.wrong(file, 'is no split file: expected a list of {"train", "query", "gallery"}')
    by_name = {record.path: record.path for record in records}
    for record in records:
        parts = record.path.split("/")
        by_name.update({"/".join(parts[i:]): record.path for i in range(1, len(parts) - 1)})
    trials: dict[str, list[str]] = {record.path: [""] * len(content) for record in records}
    for k, trial in enumerate(content):
        for split in ("train", "query", "gallery"):
            for entry in trial.get(split, []):
                with tree.noting():
                    trials[_find(tree, file, entry, by_name)][k] = split
    return with_trials(records, trials)


def _find(tree: Tree, file: str, entry: Any, by_name: dict[str, str]) -> str:
    name = entry if isinstance(entry, str) else entry[0] if isinstance(entry, list) and entry else ""
    parts = str(name).split("/")
    for start in range(len(parts)):
        if found := by_name.get("/".join(parts[start:])):
            return found
    raise tree.wrong(file, f"names {name!r:.100}, which is not there")


def splits_json(records: Sequence[Record]) -> bytes:
    """The divisions of records as a split file: {"split_version", "trials": [{split: [path, ...]}]}."""
    count = len(records[0].trials) if records else 0
    trials = [
        {split: [r.path for r in records if r.trials[k] == split] for split in ("train", "query", "gallery")}
        for k in range(count)
    ]
    return json.dumps({"split_version": VERSION, "trials": trials}, indent=0).encode()


def divided(tree: Tree, records: Sequence[Record], splits: str, draw: Callable[[], list[Record]]) -> list[Record]:
    """The records by the file `splits` below the root, or by our own draw when it is empty; notes which."""
    tree.notes["trials"] = splits or VERSION
    return read_splits(tree, records, splits) if splits else draw()
