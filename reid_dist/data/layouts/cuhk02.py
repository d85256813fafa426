"""CUHK02: five camera pairs, two images per person and view (datasets specification 1.5).

Person numbers are local to a pair: person 1 of P1 and person 1 of P5 are two people. Ours: pair * 100000 + number.
Cameras run pair by pair, P1/cam1 = 0 to P5/cam2 = 9. P5 is the test pair (cam1 asks, cam2 is searched); domain
generalisation trains on all five.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from reid_dist.data.layouts._files import Folder
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.records import Record

NAME = "cuhk02"
PAIR = 100_000  # ids of one pair
TEST_PAIR = 5
_BASENAME = re.compile(r"(\d{1,5})_.+(?i:\.png)")


def read(tree: Tree) -> list[Record]:
    """Records sorted by path, pair by pair; `Dataset/` may be there or not. Raises DatasetError."""
    root = tree.inside("Dataset")
    records = []
    for pair in range(1, 6):
        for view in (1, 2):
            split = "train" if pair != TEST_PAIR else ("query", "gallery")[view - 1]
            for path, found in tree.matched(f"{root}P{pair}/cam{view}", _BASENAME, "001_1.png"):
                pid, camid = pair * PAIR + int(found[1]), 2 * (pair - 1) + view - 1
                records.append(Record(path=path, split=split, pid=pid, camid=camid, domain=NAME))
    return records


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the authors' tree. Raises ValueError for a sample whose camera is not of its id's pair."""
    tree = Folder(folder)
    for sample in samples:
        pair, number = divmod(sample.pid, PAIR)
        if sample.camid is None or sample.camid // 2 != pair - 1 or not 1 <= pair <= 5:
            raise ValueError(f"id {sample.pid} is of pair {pair}, camera {sample.camid} is not")
        tree.image(f"Dataset/P{pair}/cam{sample.camid % 2 + 1}/{number:03d}_{sample.frame + 1}.png", sample.image)
    return tree.paths


LAYOUT = Layout(
    name=NAME,
    task="image",
    tree="""cuhk02/
  Dataset/P1/cam1/ .. P5/cam2/      001_1.png       (Dataset/ may be left out)""",
    obtain="Request it from its authors (CUHK, Li and Wang, CVPR 2013).",
    expected={
        "train": {"ids": 1577, "cameras": 8},
        "query": {"ids": 239, "images": 478, "cameras": 1},
        "gallery": {"ids": 239, "images": 478, "cameras": 1},
        "all": {"ids": 1816, "images": 7264, "cameras": 10},
    },
    read=read,
    write=write,
)
