"""Occluded-Duke: DukeMTMC-reID regrouped so that all queries and a tenth of the gallery are occluded (datasets
specification 1.8). Its names are Duke's; its counts are its own, whatever some loaders' comments say.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from reid_dist.data.layouts._boxes import read_boxes, write_boxes
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.layouts.dukemtmc_reid import BASENAME, EXAMPLE, basename
from reid_dist.data.records import Record

NAME = "occluded-duke"


def read(tree: Tree) -> list[Record]:
    """Records sorted by path within train, query, gallery, from the folder itself or one called Occluded_Duke in it."""
    return read_boxes(tree, NAME, tree.inside("Occluded_Duke"), BASENAME, EXAMPLE)


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the authors' tree."""
    return write_boxes(folder, samples, "", basename)


LAYOUT = Layout(
    name=NAME,
    task="image",
    tree="""Occluded_Duke/      (or a folder that holds it)
  bounding_box_train/ query/ bounding_box_test/     0001_c2_f0046182.jpg""",
    obtain="Name lists and a converter over DukeMTMC-reID (lightas/Occluded-DukeMTMC-Dataset); that set is withdrawn, "
    "so only for those who hold it lawfully already.",
    expected={
        "train": {"ids": 702, "images": 15618},
        "query": {"ids": 519, "images": 2210},
        "gallery": {"ids": 1110, "images": 17661},
    },
    read=read,
    write=write,
)
