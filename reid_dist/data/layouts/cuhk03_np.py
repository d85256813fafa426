"""CUHK03 in the new protocol, 767 training and 700 test identities, two cameras (datasets specification 1.4).

The boxes come twice: `detected` by a person detector (the default; MUVA uses it) and `labeled` by hand. Which one was
read stands in the notes. Its numbers must not be compared with those of the classic protocol.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from reid_dist.data.layouts._boxes import read_boxes, within, write_boxes
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.records import Record
from reid_dist.errors import UserError

NAME = "cuhk03-np"
VARIANTS = ("detected", "labeled")
_BASENAME = re.compile(r"(\d{4})_c([12])_(\d{1,2})(?i:\.png)")


def read(tree: Tree, variant: str = "detected") -> list[Record]:
    """Records sorted by path within train, query, gallery of one variant; the other is passed over."""
    if variant not in VARIANTS:
        raise UserError(f"variant={variant!r}: choose detected or labeled")
    root = tree.inside("cuhk03np", "cuhk03-np", "CUHK03-NP")
    other = VARIANTS[1 - VARIANTS.index(variant)]
    tree.pass_over(re.compile(rf"{re.escape(root)}{other}/.+"), f"{other} boxes")
    tree.notes["variant"] = variant
    return read_boxes(tree, NAME, f"{root}{variant}/", _BASENAME, "0001_c1_1.png")


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the authors' tree, the same boxes in both variants; paths are those of `detected`."""
    samples = list(samples)
    write_boxes(folder, samples, "labeled/", _name)
    return write_boxes(folder, samples, "detected/", _name)


def _name(sample: Sample) -> str:
    return f"{sample.pid:04d}_c{within(sample, 2) + 1}_{sample.frame + 1}.png"


LAYOUT = Layout(
    name=NAME,
    task="image",
    tree="""cuhk03np/
  detected/bounding_box_train/ query/ bounding_box_test/      0001_c1_1.png
  labeled/ (the same three)                                   option variant=labeled""",
    obtain="Request CUHK03 from its authors (CUHK); the new protocol's folders are made from it "
    "(zhunzhong07/person-re-ranking).",
    expected={
        "train": {"ids": 767, "images": 7365, "cameras": 2},
        "query": {"ids": 700, "images": 1400, "cameras": 2},
        "gallery": {"ids": 700, "images": 5332, "cameras": 2},
    },
    read=read,
    write=write,
)
