"""GRID: 250 people of an underground station in two of eight cameras (datasets specification 1.7).

`probe/` holds one image of each, `gallery/` the other one and 775 images of nobody in the probes, all called id 0,
which is never a true match. The ten divisions are the authors': `features_and_partitions.mat` lists 125 training ids
in each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from reid_dist.data.layouts._files import Folder, cells
from reid_dist.data.layouts._small import divided, with_trials
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.records import Record

NAME = "grid"
DISTRACTOR = 0
_MAT, _KEY = "features_and_partitions.mat", "trainIdxAll"
_BASENAME = re.compile(r"(\d{4})_([1-8])_(\d+)_(\d+)_(\d+)_(\d+)_(\d+)(?i:\.jpeg)")


def read(tree: Tree, splits: str = "") -> list[Record]:
    """Records by folder (probe, gallery) and path. Raises DatasetError."""
    root = tree.inside("underground_reid", "GRID", "grid")
    records = [
        Record(path=path, split=folder, pid=int(found[1]), camid=int(found[2]) - 1, domain=NAME)
        for folder in ("probe", "gallery")
        for path, found in tree.matched(f"{root}{folder}", _BASENAME, "0001_1_25004_107_32_106_221.jpeg")
    ]
    probes = {r.pid for r in records if r.split == "probe"}
    if DISTRACTOR in probes:
        raise tree.wrong(f"{root}probe/", "holds the distractors' id 0000, which belongs in gallery/ alone")
    trained = _training_ids(tree, root + _MAT, probes)

    def split(record: Record, train: set[int]) -> str:
        return "train" if record.pid in train else "query" if record.split == "probe" else "gallery"

    def published() -> list[Record]:
        return with_trials(records, {r.path: [split(r, train) for train in trained] for r in records})

    result = divided(tree, records, splits, published)
    if not splits:
        tree.notes["trials"] = _MAT
    return result


def _training_ids(tree: Tree, path: str, probes: set[int]) -> list[set[int]]:
    """Ids of each entry of trainIdxAll: the one longest list of numbers inside it."""
    entries = tree.read_mat(path, _KEY).ravel()
    result = []
    for number, entry in enumerate(entries, 1):
        lists = sorted(_numbers(entry), key=len)
        ids = {int(value) for value in lists[-1]} if lists else set()
        if len(ids) < 2 or not ids <= probes:
            raise tree.wrong(path, f"entry {number} of {_KEY}: expected a list of probe ids, found {sorted(ids)[:5]}")
        result.append(ids)
    if not result:
        raise tree.wrong(path, f"has no entries in {_KEY}")
    return result


def _numbers(item: Any) -> Iterator[np.ndarray]:
    """Every numeric list inside nested cells and structures."""
    if isinstance(item, np.void):
        for name in item.dtype.names or ():
            yield from _numbers(item[name])
    elif isinstance(item, np.ndarray) and (item.dtype == object or item.dtype.names):
        for inner in item.ravel():
            yield from _numbers(inner)
    elif isinstance(item, np.ndarray) and item.dtype.kind in "iuf":
        yield item.ravel()


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the authors' tree; a sample that asks in some trial is a probe, or, training always, of an even camera."""
    tree, training = Folder(folder), list[set[int]]()
    for sample in samples:
        if sample.camid is None or not 0 <= sample.camid < 8:
            raise ValueError(f"grid has cameras 0..7, not {sample.camid}")
        training = training or [set() for _ in sample.trials]
        for ids, split in zip(training, sample.trials, strict=True):
            ids |= {sample.pid} if split == "train" else set()
        side = "probe" if sample.frame == 0 and sample.pid != DISTRACTOR else "gallery"
        name = f"{sample.pid:04d}_{sample.camid + 1}_{25000 + sample.frame}_10_20_64_128.jpeg"
        tree.image(f"{side}/{name}", sample.image)
    entries = [{"trainPercent": 0.5, "idx_train": np.array(sorted(ids), float)} for ids in training]
    tree.mat(_MAT, {_KEY: cells(entries)})
    return tree.paths


LAYOUT = Layout(
    name=NAME,
    task="image",
    tree="""underground_reid/
  probe/ gallery/                     0001_1_25004_107_32_106_221.jpeg: person, camera, frame, box
  features_and_partitions.mat         trainIdxAll: ten lists of training ids
  [any.json]                          option splits=any.json: divisions to use instead""",
    obtain="Research download from its authors (Loy et al., QMUL).",
    expected={"all": {"ids": 251, "images": 1275, "cameras": 8}},
    read=read,
    write=write,
)
