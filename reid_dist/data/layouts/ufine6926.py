"""UFine6926: very long captions, two per image, about 81 words each (datasets specification 4).

Ids count from 1 and are shifted in every split; paths start at the dataset's root (`images/1.jpg`), not at `imgs/`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from reid_dist.data.layouts._captions import CaptionSet
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.records import Record

SET = CaptionSet(
    name="ufine6926",
    files=("UFine6926_Annotations.json",),
    image_key="file_path",
    folder="",
    first_id=1,
    splits=("train", "test"),
    stem="UFine6926_Annotations",
)


def read(tree: Tree) -> list[Record]:
    """Records in the order of UFine6926_Annotations*.json; no cameras. Raises DatasetError."""
    return SET.records(tree)


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the authors' tree: all images in one folder."""
    return SET.write(folder, samples, _place)


def _place(sample: Sample) -> str:
    return f"images/{sample.pid + 1:05d}_{0 if sample.camid is None else sample.camid + 1}_{sample.frame}.jpg"


LAYOUT = Layout(
    name=SET.name,
    task="text",
    tree="""UFine6926/
  UFine6926_Annotations*.json   list of {split, id (from 1), file_path, captions}
  images/*.jpg""",
    obtain="Signed licence with its authors (Zplusdragon/UFineBench).",
    expected={
        "train": {"ids": 4926, "images": 18577, "captions": 37154},
        "test": {"ids": 2000, "images": 7629, "captions": 15258},
    },
    read=read,
    write=write,
)
