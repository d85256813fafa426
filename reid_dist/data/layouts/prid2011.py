"""PRID2011, single shot: two cameras, 200 people seen by both (datasets specification 1.7).

Numbers 1-200 name the same person in both views; above that, cam_a and cam_b count on for different people. A trial
draws 100 of the 200 for training; the others' cam_a images ask, their cam_b images and all people of cam_b alone are
searched. People of cam_a alone take part in nothing and are passed over.
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

NAME = "prid2011"
_BASENAME = re.compile(r"person_(\d{4})(?i:\.png)")
_OTHER = re.compile(r"(?:.*/)?(?:multi_shot/.+|readme[^/]*)")


def read(tree: Tree, splits: str = "", shared: int = 200) -> list[Record]:
    """Records by camera and path. `shared`: the last number that both cameras share. Raises DatasetError."""
    root = tree.inside("prid_2011", "prid2011")
    views = [
        [
            Record(path=path, split="", pid=int(found[1]), camid=camid, domain=NAME)
            for path, found in tree.matched(f"{root}single_shot/{folder}", _BASENAME, "person_0001.png")
        ]
        for camid, folder in enumerate(("cam_a", "cam_b"))
    ]
    tree.pass_over(_OTHER, "multi-shot images and papers")
    ids = [{r.pid for r in view if r.pid <= shared} for view in views]
    for pid in sorted(ids[0] ^ ids[1]):
        with tree.noting():
            raise tree.wrong(
                f"{root}single_shot/", f"has person_{pid:04d} in one camera only; 1 to {shared} are in both"
            )
    alone = [r for r in views[0] if r.pid > shared]
    if alone:
        tree.notes["cam_a alone"] = f"{len(alone)} images passed over"
    records = [r for r in views[0] if r.pid <= shared] + views[1]

    def assign(_: np.random.Generator, train: set[int]) -> dict[str, str]:
        return {r.path: "train" if r.pid in train else ("query", "gallery")[r.camid or 0] for r in records}

    both = sorted(ids[0] & ids[1])
    return divided(tree, records, splits, lambda: draw_trials(records, both, len(both) // 2, assign))


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the authors' tree."""
    tree = Folder(folder)
    for sample in samples:
        if sample.camid not in (0, 1):
            raise ValueError(f"prid2011 has cameras 0 and 1, not {sample.camid}")
        tree.image(f"single_shot/cam_{'ab'[sample.camid]}/person_{sample.pid:04d}.png", sample.image)
    return tree.paths


LAYOUT = Layout(
    name=NAME,
    task="image",
    tree="""prid_2011/
  single_shot/cam_a/ cam_b/     person_0001.png
  [multi_shot/]                 passed over
  [any.json]                    option splits=any.json: divisions to use instead of ours""",
    obtain="Research download from its authors (Hirzer et al., TU Graz).",
    expected={"all": {"ids": 749, "images": 949, "cameras": 2}},
    read=read,
    write=write,
)
