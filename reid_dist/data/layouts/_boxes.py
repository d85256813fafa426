"""Sets in Market-1501's shape: `bounding_box_train/`, `query/`, `bounding_box_test/` of cropped people."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from reid_dist.data.layouts._files import Folder
from reid_dist.data.layouts.base import Sample, Tree
from reid_dist.data.records import Record

FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}


def read_boxes(tree: Tree, domain: str, root: str, pattern: re.Pattern[str], example: str) -> list[Record]:
    """Records sorted by path within train, query, gallery. `pattern` groups: pid, camera from 1. Raises
    DatasetError.
    """
    return [
        Record(path=path, split=split, pid=int(found[1]), camid=int(found[2]) - 1, domain=domain)
        for split, folder in FOLDERS.items()
        for path, found in tree.matched(root + folder, pattern, example)
    ]


def write_boxes(folder: Path, samples: Iterable[Sample], root: str, name: Callable[[Sample], str]) -> list[str]:
    """Write samples; `name(sample)` is the file's. Returns their paths. Raises ValueError for a split of no folder."""
    tree = Folder(folder)
    for sample in samples:
        if sample.split not in FOLDERS:
            raise ValueError(f"there is no folder for split {sample.split!r}")
        tree.image(f"{root}{FOLDERS[sample.split]}/{name(sample)}", sample.image)
    return tree.paths


def within(sample: Sample, cameras: int, first: int = 0) -> int:
    """The sample's camera. Raises ValueError when the set's names cannot hold its camera or id."""
    if sample.camid is None or not (first <= sample.camid < first + cameras and 0 <= sample.pid <= 9999):
        raise ValueError(
            f"ids 0..9999 and cameras from {first} on, {cameras} of them, not {sample.pid}, {sample.camid}"
        )
    return sample.camid
