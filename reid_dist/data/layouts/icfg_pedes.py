"""ICFG-PEDES: one long caption per image, derived from MSMT17, no val split (datasets specification 4).

`imgs/train` and `imgs/test` are MSMT17's folders and not the split: only the JSON's `split` counts. Its two spellings
in circulation, ICFG-PEDES.json and ICFG_PEDES.json, are the same file.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from reid_dist.data.layouts._captions import CaptionSet
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.records import Record

SET = CaptionSet(
    name="icfg-pedes",
    files=("ICFG-PEDES.json", "ICFG_PEDES.json"),
    image_key="file_path",
    splits=("train", "test"),
)


def read(tree: Tree) -> list[Record]:
    """Records in the file's order; no cameras. Raises DatasetError."""
    return SET.records(tree)


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the authors' tree with MSMT17-like names; folders go by identity, so that they are no split here either."""
    return SET.write(folder, samples, _place)


def _place(sample: Sample) -> str:
    camera = 1 if sample.camid is None else sample.camid + 1
    name = f"{sample.pid:04d}_{sample.frame:03d}_{camera:02d}_0303morning_{sample.frame:04d}_0.jpg"
    return f"{('train', 'test')[sample.pid % 2]}/{sample.pid:04d}/{name}"


LAYOUT = Layout(
    name=SET.name,
    task="text",
    tree="""ICFG-PEDES/
  ICFG-PEDES.json     (or ICFG_PEDES.json) list of {split, id (from 0), file_path, captions, processed_tokens}
  imgs/train/ imgs/test/      MSMT17's folders, not the split""",
    obtain="Request it from its authors (zifyloo/SSAN); its images come from MSMT17, whose terms apply.",
    expected={
        "train": {"ids": 3102, "images": 34674, "captions": 34674},
        "test": {"ids": 1000, "images": 19848, "captions": 19848},
    },
    read=read,
    write=write,
)
