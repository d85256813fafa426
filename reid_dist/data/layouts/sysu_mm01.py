"""SYSU-MM01: visible cameras 1, 2, 4, 5 and infrared cameras 3, 6 (datasets specification 3.1).

Camera numbers stay as in the folder names, 1 to 6: the protocol is written on them (camera 3 looks into camera 2's
room). Identity lists are one line of numbers with commas. Validation identities train (`val_to_train=false` keeps them
apart), as everywhere in the literature. Test rows have the split "test"; the protocol says who asks and draws the
gallery.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from reid_dist.data.layouts._files import Folder
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.records import Record

NAME = "sysu-mm01"
INFRARED = (3, 6)
SPLITS = ("train", "val", "test")
_NAME = re.compile(r"(\d{4})/(\d{4})(?i:\.jpg)")
_OTHER = re.compile(r"exp/(?!(?:train|val|test)_id\.txt).+")


def read(tree: Tree, val_to_train: bool = True) -> list[Record]:
    """Records by camera, person and number. Raises DatasetError naming file and value."""
    listed: dict[int, str] = {}
    for side in SPLITS:
        with tree.noting():
            for pid in id_list(tree, f"exp/{side}_id.txt"):
                if listed.setdefault(pid, side) != side:
                    raise tree.wrong(f"exp/{side}_id.txt", f"lists {pid}, which exp/{listed[pid]}_id.txt lists too")
    splits = {pid: "train" if side == "val" and val_to_train else side for pid, side in listed.items()}
    records, unlisted = [], 0
    for camera in range(1, 7):
        for path, found in tree.matched(f"cam{camera}", _NAME, "0001/0001.jpg"):
            split = splits.get(int(found[1]), "")
            modality = "ir" if camera in INFRARED else "rgb"
            record = Record(path=path, split=split, pid=int(found[1]), camid=camera, modality=modality, domain=NAME)
            unlisted += not split
            records += [record] if split else []
    tree.pass_over(_OTHER, "lists in other formats")
    if unlisted:
        tree.notes["unlisted"] = f"{unlisted} images of ids in no list passed over"
    if lost := sorted(set(splits) - {r.pid for r in records}):
        tree.warnings.append(f"{len(lost)} listed ids have no image, for example {lost[0]}")
    return records


def id_list(tree: Tree, path: str) -> list[int]:
    """Numbers on the first line of a file, separated by commas. Raises DatasetError."""
    lines = tree.read_lines(path)
    fields = [field.strip() for field in lines[0].split(",") if field.strip()] if lines else []
    if not fields or not all(field.isdigit() for field in fields):
        raise tree.wrong(path, "must hold ids on its first line, separated by commas")
    return [int(field) for field in fields]


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the authors' tree; cameras of samples are 1 to 6."""
    tree, ids = Folder(folder), {split: set[int]() for split in SPLITS}
    for sample in samples:
        if sample.camid not in range(1, 7) or (sample.modality == "ir") != (sample.camid in INFRARED):
            raise ValueError(f"sysu-mm01 has cameras 1..6, infrared 3 and 6, not {sample.camid} {sample.modality}")
        tree.image(f"cam{sample.camid}/{sample.pid:04d}/{sample.frame + 1:04d}.jpg", sample.image)
        ids[sample.split].add(sample.pid)
    for split, people in ids.items():
        tree.lines(f"exp/{split}_id.txt", [",".join(map(str, sorted(people)))])
    return tree.paths


LAYOUT = Layout(
    name=NAME,
    task="visible-infrared",
    tree="""SYSU-MM01/
  cam1/ .. cam6/                      0001/0001.jpg: person, number; 3 and 6 are infrared
  exp/train_id.txt val_id.txt test_id.txt       1,2,3,...
  [exp/rand_perm_cam.mat]             published gallery selection""",
    obtain="Signed agreement by e-mail to its authors (wuancong/SYSU-MM01).",
    expected={
        "train": {"ids": 395, "images": 34167, "cameras": 6},
        "test": {"ids": 96},
        "all": {"ids": 491, "images": 45863, "cameras": 6},
    },
    read=read,
    write=write,
)
