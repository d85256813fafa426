"""DukeMTMC-VideoReID: tracklets in folders `<split>/<id>/<tracklet>/` (datasets specification 2.4).

Frame names come with underscores (new) or without (old); frame numbers may begin anywhere and have holes. Withdrawn by
its owners, and none of our methods needs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from reid_dist.data.layouts._files import Folder
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.records import Record

NAME = "dukemtmc-videoreid"
SPLITS = ("train", "query", "gallery")
_NAME = re.compile(r"(\d{4})/(\d+)/(\d{4})_?C([1-8])_?F(\d{4})_?X(\d+)(?i:\.jpg)")


def read(tree: Tree) -> list[Record]:
    """Records by split, person, tracklet and frame. Raises DatasetError naming the file."""
    root = tree.inside("DukeMTMC-VideoReID")
    records = []
    tracklets: dict[tuple[str, str, str], tuple[int, str]] = {}
    for split in SPLITS:
        for path, found in tree.matched(f"{root}{split}", _NAME, "0001/0001/0001_C6_F0099_X30823.jpg"):
            with tree.noting():
                number, camera = tracklets.setdefault((split, found[1], found[2]), (len(tracklets), found[4]))
                if found[1] != found[3] or camera != found[4]:
                    raise tree.wrong(path, f"is of another person or camera than its tracklet {found[1]}/{found[2]}")
                records.append(
                    Record(path=path, split=split, pid=int(found[1]), camid=int(camera) - 1, tracklet=number,
                           frame=int(found[5]), domain=NAME)
                )  # fmt: skip
    return records


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the authors' tree with the newer names."""
    tree = Folder(folder)
    for sample in samples:
        if sample.camid is None or not 0 <= sample.camid < 8 or sample.tracklet is None or sample.split not in SPLITS:
            raise ValueError(f"no place for split {sample.split}, camera {sample.camid}, tracklet {sample.tracklet}")
        name = f"{sample.pid:04d}_C{sample.camid + 1}_F{sample.frame:04d}_X{10000 + sample.frame}.jpg"
        tree.image(f"{sample.split}/{sample.pid:04d}/{sample.tracklet:04d}/{name}", sample.image)
    return tree.paths


LAYOUT = Layout(
    name=NAME,
    task="video",
    tree="""DukeMTMC-VideoReID/     (or a folder that holds it)
  train/ query/ gallery/        0001/0001/0001_C6_F0099_X30823.jpg: person, tracklet; older: 0001C6F0099X30823.jpg""",
    obtain="Withdrawn by its owners in 2019 over consent and privacy; only for those who hold it lawfully already.",
    expected={"train": {"ids": 702, "tracklets": 2196}, "query": {"ids": 702}, "gallery": {"tracklets": 2636}},
    read=read,
    write=write,
)
