"""DukeMTMC-reID: image retrieval over eight cameras (datasets specification 1.2).

Names are `<id>_c<camera>_f<frame>`. There is no junk and no distractor number: 408 identities stand in the gallery
alone and are ordinary numbers. Its owners withdrew the set in 2019 over consent and privacy, so no recipe of ours
needs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from reid_dist.data.layouts._boxes import read_boxes, within, write_boxes
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.records import Record

NAME = "dukemtmc-reid"
BASENAME = re.compile(r"(\d{4})_c([1-8])_f(\d{7})(?i:\.jpg)")
EXAMPLE = "0001_c2_f0046182.jpg"
_EXTRA = re.compile(r"(?:.*/)?(?i:CITATION|LICENSE|README)[^/]*")


def read(tree: Tree) -> list[Record]:
    """Records sorted by path within train, query, gallery, from the folder itself or one called DukeMTMC-reID in it."""
    tree.pass_over(_EXTRA, "companion papers")
    return read_boxes(tree, NAME, tree.inside("DukeMTMC-reID"), BASENAME, EXAMPLE)


def basename(sample: Sample) -> str:
    """The authors' name of a sample. Raises ValueError for an id or camera that it cannot hold."""
    return f"{sample.pid:04d}_c{within(sample, 8) + 1}_f{sample.frame:07d}.jpg"


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the authors' tree."""
    return write_boxes(folder, samples, "", basename)


LAYOUT = Layout(
    name=NAME,
    task="image",
    tree="""DukeMTMC-reID/      (or a folder that holds it)
  bounding_box_train/ query/ bounding_box_test/     0001_c2_f0046182.jpg""",
    obtain="Withdrawn by its owners in 2019 over consent and privacy; only for those who hold it lawfully already.",
    expected={
        "train": {"ids": 702, "images": 16522, "cameras": 8},
        "query": {"ids": 702, "images": 2228, "cameras": 8},
        "gallery": {"ids": 1110, "images": 17661, "cameras": 8},
    },
    read=read,
    write=write,
)
