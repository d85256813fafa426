"""i-LIDS: 119 people of an airport, two to eight images each (datasets specification 1.7).

There is no camera: the number in a name counts a person's images, so camid is None. A trial trains on half of the
people (59 of 119, rounded down); each of the others gives one query and one other image as gallery, drawn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from reid_dist.data.layouts._files import Folder
from reid_dist.data.layouts._small import divided, draw_trials
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.records import Record

NAME = "i-lids"
_BASENAME = re.compile(r"(\d{4})(\d{3})(?i:\.jpg)")


def read(tree: Tree, splits: str = "") -> list[Record]:
    """Records by path. Raises DatasetError naming a person with one image only."""
    root = tree.inside("i-LIDS_Pedestrian", "i-LIDS", "ilids")
    folder = next((f for f in ("Persons", "images") if any(p.startswith(f"{root}{f}/") for p in tree.sizes)), "Persons")
    records = [
        Record(path=path, split="", pid=int(found[1]), domain=NAME)
        for path, found in tree.matched(root + folder, _BASENAME, "0001001.jpg")
    ]
    images: dict[int, list[str]] = {}
    for record in records:
        images.setdefault(record.pid, []).append(record.path)
    for pid, paths in images.items():
        with tree.noting():
            if len(paths) < 2:
                raise tree.wrong(paths[0], f"is the only image of person {pid}; a query needs another one to find")
    images = {pid: paths for pid, paths in images.items() if len(paths) > 1}

    def assign(rng: np.random.Generator, train: set[int]) -> dict[str, str]:
        chosen: dict[str, str] = {}
        for pid in sorted(images):
            if pid in train:
                chosen |= dict.fromkeys(images[pid], "train")
            else:
                query, gallery = rng.permutation(len(images[pid]))[:2]
                chosen |= {images[pid][query]: "query", images[pid][gallery]: "gallery"}
        return chosen

    return divided(tree, records, splits, lambda: draw_trials(records, sorted(images), len(images) // 2, assign))


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the authors' tree."""
    tree = Folder(folder)
    for sample in samples:
        tree.image(f"Persons/{sample.pid:04d}{sample.frame + 1:03d}.jpg", sample.image)
    return tree.paths


LAYOUT = Layout(
    name=NAME,
    task="image",
    tree="""i-LIDS_Pedestrian/
  Persons/ (or images/)       0001001.jpg: person, number
  [any.json]                  option splits=any.json: divisions to use instead of ours""",
    obtain="Research download; the imagery is the UK Home Office's (i-LIDS), under its own terms.",
    expected={"all": {"ids": 119, "images": 476}},
    read=read,
    write=write,
)
