"""CUHK-PEDES: text-based person retrieval, two captions for most images (datasets specification 4)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from reid_dist.data.layouts._captions import CaptionSet
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.records import Record

SET = CaptionSet(name="cuhk-pedes", files=("reid_raw.json",), image_key="file_path", first_id=1)
_FOLDERS = ("cam_a", "cam_b", "CUHK01", "CUHK03", "Market", "test_query", "train_query")
_OTHER_ANNOTATION = re.compile(r"caption_all\.json")  # the authors' file without splits


def read(tree: Tree) -> list[Record]:
    """Records in the order of reid_raw.json; no cameras. Raises DatasetError."""
    tree.pass_over(_OTHER_ANNOTATION, "caption_all.json")
    return SET.records(tree)


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the authors' tree; source folders go by identity, so that no folder is a split."""
    return SET.write(folder, samples, _place)


def _place(sample: Sample) -> str:
    camera = 0 if sample.camid is None else sample.camid + 1
    return f"{_FOLDERS[sample.pid % len(_FOLDERS)]}/{sample.pid + 1:05d}_c{camera}_{sample.frame}.jpg"


LAYOUT = Layout(
    name=SET.name,
    task="text",
    tree="""CUHK-PEDES/
  reid_raw.json       list of {split, id (from 1), file_path, captions, processed_tokens}
  imgs/cam_a/ cam_b/ CUHK01/ CUHK03/ Market/ test_query/ train_query/""",
    obtain="Request it from its authors (ShuangLI59/Person-Search-with-Natural-Language-Description); academic use.",
    expected={
        "train": {"ids": 11003, "images": 34054, "captions": 68126},
        "val": {"ids": 1000, "images": 3078, "captions": 6158},
        "test": {"ids": 1000, "images": 3074, "captions": 6156},
    },
    read=read,
    write=write,
)
