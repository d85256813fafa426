"""RSTPReid: five images per identity from different cameras, two captions each, from MSMT17 (datasets specification
4).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from reid_dist.data.layouts._captions import CaptionSet
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.records import Record

SET = CaptionSet(name="rstpreid", files=("data_captions.json",), image_key="img_path")


def read(tree: Tree) -> list[Record]:
    """Records in the file's order; the path key is `img_path`; no cameras. Raises DatasetError."""
    return SET.records(tree)


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the authors' tree: all images in one folder."""
    return SET.write(folder, samples, _place)


def _place(sample: Sample) -> str:
    camera = 0 if sample.camid is None else sample.camid + 1
    return f"{sample.pid:04d}_c{camera}_{sample.frame:04d}.jpg"


LAYOUT = Layout(
    name=SET.name,
    task="text",
    tree="""RSTPReid/
  data_captions.json  list of {split, id (from 0), img_path, captions}
  imgs/*.jpg""",
    obtain="Public links in NjtechCVLab/RSTPReid-Dataset; its images come from MSMT17, whose terms apply.",
    expected={
        "train": {"ids": 3701, "images": 18505, "captions": 37010},
        "val": {"ids": 200, "images": 1000, "captions": 2000},
        "test": {"ids": 200, "images": 1000, "captions": 2000},
    },
    read=read,
    write=write,
)
