"""VIPeR: 632 people, one image in each of two views (datasets specification 1.7).

A trial trains on half of the people; the others' cam_a images ask and cam_b images are searched (protocol ten-splits)
or the other way round (ten-splits-reversed). Files pair by their number, which is checked, never by sorted position.
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

NAME = "viper"
_BASENAME = re.compile(r"(\d{3})_(\d{1,3})(?i:\.bmp)")


def read(tree: Tree, splits: str = "") -> list[Record]:
    """Records by camera and path. Raises DatasetError naming a person whom one camera lacks."""
    root = tree.inside("VIPeR", "viper")
    records = [
        Record(path=path, split="", pid=int(found[1]), camid=camid, domain=NAME)
        for camid, folder in enumerate(("cam_a", "cam_b"))
        for path, found in tree.matched(f"{root}{folder}", _BASENAME, "000_45.bmp")
    ]
    ids = [[r.pid for r in records if r.camid == camid] for camid in (0, 1)]
    for pid in sorted(set(ids[0]) ^ set(ids[1])):
        with tree.noting():
            raise tree.wrong(f"{root}cam_a/, {root}cam_b/", f"do not pair: {pid:03d} is in one of them only")
    for camid in (0, 1):
        if len(set(ids[camid])) != len(ids[camid]):
            raise tree.wrong(
                f"{root}cam_{'ab'[camid]}/", "holds a person twice; VIPeR has one image per person and view"
            )

    def assign(_: np.random.Generator, train: set[int]) -> dict[str, str]:
        return {r.path: "train" if r.pid in train else ("query", "gallery")[r.camid or 0] for r in records}

    both = sorted(set(ids[0]) & set(ids[1]))
    return divided(tree, records, splits, lambda: draw_trials(records, both, len(both) // 2, assign))


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the authors' tree; cam_a sees people at 0 degrees, cam_b at 90."""
    tree = Folder(folder)
    for sample in samples:
        if sample.camid not in (0, 1):
            raise ValueError(f"viper has cameras 0 and 1, not {sample.camid}")
        tree.image(f"cam_{'ab'[sample.camid]}/{sample.pid:03d}_{90 * sample.camid}.bmp", sample.image)
    return tree.paths


LAYOUT = Layout(
    name=NAME,
    task="image",
    tree="""VIPeR/
  cam_a/ cam_b/       000_45.bmp: person, view angle
  [any.json]          option splits=any.json: divisions to use instead of ours""",
    obtain="Research download from its authors (Gray et al., UC Santa Cruz).",
    expected={"all": {"ids": 632, "images": 1264, "cameras": 2}},
    read=read,
    write=write,
)
