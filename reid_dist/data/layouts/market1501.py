"""Market-1501: image retrieval over six cameras (datasets specification 1.1).

Names are `<id>_c<camera>s<sequence>_<frame>_<box>.jpg`. Id -1 is junk and dropped everywhere; id 0 is a distractor:
it stays in the gallery, where no query has its number, so it is never a positive. The camera is the digit after `c`;
`s` is a time segment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from reid_dist.data.layouts.base import Layout, Sample, Tree, match_name
from reid_dist.data.records import DatasetError, Record

NAME = "market-1501"
JUNK, DISTRACTOR = -1, 0
_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
_BASENAME = re.compile(r"(-1|\d{4})_c([1-6])s([1-6])_(\d{6})_(\d{2})(?i:\.jpg)")
_EXAMPLE = "0002_c1s1_000451_03.jpg"
_OPTIONAL = re.compile(r"(?:gt_bbox|gt_query|images)/.+")


def read(tree: Tree) -> list[Record]:
    """Records sorted by path within train, query, gallery. Raises DatasetError."""
    tree.pass_over(_OPTIONAL, "gt_bbox, gt_query, images")
    records, junk = [], 0
    for split, folder in _FOLDERS.items():
        for path in tree.below(folder):
            if tree.strict or _BASENAME.fullmatch(path.removeprefix(f"{folder}/")):
                record = _record(tree, path, split, folder)
                records += [record] if record.pid != JUNK else []
                junk += record.pid == JUNK
    tree.notes["junk"] = f"{junk} images with id -1 dropped"
    tree.notes["distractors"] = f"{sum(r.pid == DISTRACTOR for r in records)} gallery images with id 0"
    return records


def _record(tree: Tree, path: str, split: str, folder: str) -> Record:
    found = match_name(tree, path, _BASENAME, _EXAMPLE)
    if path.count("/") != 1:
        raise DatasetError(f"{tree.store.uri}: {path} lies too deep; images lie directly in {folder}/")
    pid = int(found[1])
    if pid == DISTRACTOR and split != "gallery":
        raise DatasetError(
            f"{tree.store.uri}: {path} has the distractor id 0000, which belongs in bounding_box_test/ alone"
        )
    return Record(path=tree.image(path), split=split, pid=pid, camid=int(found[2]) - 1, domain=NAME)


def write(folder: Path, samples: Iterable[Sample]) -> None:
    """Write the authors' tree. Raises ValueError for an id or a camera that its names cannot hold."""
    taken: set[str] = set()
    for sample in samples:
        if sample.camid is None or not (0 <= sample.camid < 6 and JUNK <= sample.pid <= 9999):
            raise ValueError(f"market-1501 holds ids -1..9999 and cameras 0..5, not {sample.pid}, {sample.camid}")
        person = "-1" if sample.pid == JUNK else f"{sample.pid:04d}"
        number = sample.frame
        name = f"{_FOLDERS[sample.split]}/{person}_c{sample.camid + 1}s{1 + number // 100 % 6}_{number:06d}_01.jpg"
        if name in taken:
            raise ValueError(f"two samples are called {name}")
        taken.add(name)
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(sample.image)


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
