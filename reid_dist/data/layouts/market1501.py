"""Market-1501: image retrieval over six cameras (datasets specification 1.1).

Names are `<id>_c<camera>s<sequence>_<frame>_<box>.jpg`. Id -1 is junk and dropped everywhere; id 0 is a distractor:
it stays in the gallery, where no query has its number, so it is never a positive. The camera is the digit after `c`;
`s` is a time segment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from reid_dist.data.layouts._boxes import FOLDERS
from reid_dist.data.layouts._files import Folder
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.records import Record

NAME = "market-1501"
JUNK, DISTRACTOR = -1, 0
_BASENAME = re.compile(r"(-1|\d{4})_c([1-6])s([1-6])_(\d{6})_(\d{2})(?i:\.jpg)")
_EXAMPLE = "0002_c1s1_000451_03.jpg"
_OPTIONAL = re.compile(r"(?:gt_bbox|gt_query|images)/.+")


def read(tree: Tree) -> list[Record]:
    """Records sorted by path within train, query, gallery. Raises DatasetError."""
    tree.pass_over(_OPTIONAL, "gt_bbox, gt_query, images")
    records, junk = [], 0
    for split, folder in FOLDERS.items():
        for path, found in tree.matched(folder, _BASENAME, _EXAMPLE):
            with tree.noting():
                record = _record(tree, path, split, found)
                records += [record] if record.pid != JUNK else []
                junk += record.pid == JUNK
    tree.notes["junk"] = f"{junk} images with id -1 dropped"
    tree.notes["distractors"] = f"{sum(r.pid == DISTRACTOR for r in records)} gallery images with id 0"
    return records


def _record(tree: Tree, path: str, split: str, found: re.Match[str]) -> Record:
    pid = int(found[1])
    if pid == DISTRACTOR and split != "gallery":
        raise tree.wrong(path, "has the distractor id 0000, which belongs in bounding_box_test/ alone")
    return Record(path=path, split=split, pid=pid, camid=int(found[2]) - 1, domain=NAME)


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the authors' tree. Raises ValueError for an id or a camera that its names cannot hold."""
    tree = Folder(folder)
    for sample in samples:
        if sample.camid is None or not (0 <= sample.camid < 6 and JUNK <= sample.pid <= 9999):
            raise ValueError(f"market-1501 holds ids -1..9999 and cameras 0..5, not {sample.pid}, {sample.camid}")
        person = "-1" if sample.pid == JUNK else f"{sample.pid:04d}"
        number = sample.frame
        name = f"{person}_c{sample.camid + 1}s{1 + number // 100 % 6}_{number:06d}_01.jpg"
        tree.image(f"{FOLDERS[sample.split]}/{name}", sample.image)
    return tree.paths


LAYOUT = Layout(
    name=NAME,
    task="image",
    tree="""Market-1501-v15.09.15/
  bounding_box_train/ query/ bounding_box_test/     0002_c1s1_000451_03.jpg
  [gt_bbox/ gt_query/ images/]                      passed over""",
    obtain="From its authors' project page (Zheng et al., ICCV 2015); research use.",
    expected={
        "train": {"ids": 751, "images": 12936, "cameras": 6},
        "query": {"ids": 750, "images": 3368, "cameras": 6},
        "gallery": {"ids": 751, "images": 15913, "cameras": 6},
    },
    read=read,
    write=write,
)
