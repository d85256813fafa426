"""iLIDS-VID: 300 people, one tracklet in each of two cameras (datasets specification 2.3).

`ls_set` of the split file has ten rows of 300 positions, from 1, in the sorted list of person folders (numbers have
gaps: positions are not ids). Sources disagree on which half tests: the dataset's authors, torchreid and we take the
first (`test_half=first`); TF-CLIP takes the last (`test_half=last`). Camera 1 asks, camera 2 is searched. The half
stands in the notes. Frames are sorted by number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from reid_dist.data.layouts._files import Folder
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.records import Record, first_split
from reid_dist.errors import UserError

NAME = "ilids-vid"
_FRAMES = "i-LIDS-VID/sequences"
_SPLITS = "train-test people splits/train_test_splits_ilidsvid.mat"
_NAME = re.compile(r"person(\d{3})/cam([12])_person(\d{3})_(\d+)(?i:\.png)")
_OTHER = re.compile(
    r"i-LIDS-VID/(?!sequences/).+|train-test people splits/(?!train_test_splits_ilidsvid\.mat).+|[^/]+\.txt"
)


def read(tree: Tree, test_half: str = "first") -> list[Record]:
    """Records by camera, person and frame. Raises DatasetError naming file and number."""
    if test_half not in ("first", "last"):
        raise UserError(f"test_half={test_half!r}: choose first (the authors, torchreid) or last (TF-CLIP)")
    found: list[tuple[int, int, int, str]] = []
    for camid in (0, 1):
        for path, name in tree.matched(f"{_FRAMES}/cam{camid + 1}", _NAME, "person001/cam1_person001_00001.png"):
            with tree.noting():
                if name[1] != name[3] or int(name[2]) != camid + 1:
                    raise tree.wrong(path, "lies in the folder of another person or camera")
                found.append((camid, int(name[1]), int(name[4]), path))
    people = [sorted({pid for c, pid, _, _ in found if c == camid}) for camid in (0, 1)]
    for pid in sorted(set(people[0]) ^ set(people[1])):
        with tree.noting():
            raise tree.wrong(f"{_FRAMES}/", f"has person{pid:03d} in one camera only")
    positions = tree.read_mat(_SPLITS, "ls_set").astype(np.int64)
    if positions.ndim != 2 or {tuple(sorted(row)) for row in positions.tolist()} != {
        tuple(range(1, len(people[0]) + 1))
    }:
        raise tree.wrong(_SPLITS, f"has rows that do not name each of {len(people[0])} positions once")
    half = positions.shape[1] // 2
    tests = [{people[0][i - 1] for i in (row[:half] if test_half == "first" else row[half:])} for row in positions]
    tree.notes["test_half"] = test_half
    tree.pass_over(_OTHER, "images, papers and lists that are not used")
    tracklets = {key: number for number, key in enumerate(sorted({key[:2] for key in found}))}
    records = []
    for camid, pid, frame, path in sorted(found):
        trials = tuple(("query", "gallery")[camid] if pid in test else "train" for test in tests)
        record = Record(path=path, split=first_split(trials), pid=pid, camid=camid, frame=frame, domain=NAME)
        records.append(replace(record, tracklet=tracklets[camid, pid], trials=trials))
    return records


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the authors' tree; a trial's half that asks or is searched comes first in `ls_set`."""
    tree, trials = Folder(folder), dict[int, tuple[str, ...]]()
    for sample in samples:
        if sample.camid not in (0, 1):
            raise ValueError(f"ilids-vid has cameras 0 and 1, not {sample.camid}")
        person = f"person{sample.pid:03d}"
        name = f"cam{sample.camid + 1}_{person}_{sample.frame:05d}.png"
        tree.image(f"{_FRAMES}/cam{sample.camid + 1}/{person}/{name}", sample.image)
        trials[sample.pid] = sample.trials
    people = sorted(trials)
    rows = []
    for k in range(len(trials[people[0]])):
        places: list[list[int]] = [[], []]  # who tests, who trains
        for place, pid in enumerate(people, 1):
            places[trials[pid][k] == "train"].append(place)
        rows.append(places[0] + places[1])
    tree.mat(_SPLITS, {"ls_set": np.array(rows, float)})
    return tree.paths


LAYOUT = Layout(
    name=NAME,
    task="video",
    tree="""ilids-vid/
  i-LIDS-VID/sequences/cam1/ cam2/            person001/cam1_person001_00001.png
  train-test people splits/train_test_splits_ilidsvid.mat     ls_set, ten rows""",
    obtain="From its authors' page (Wang et al., ECCV 2014, QMUL); the imagery is under the i-LIDS terms.",
    expected={"all": {"ids": 300, "tracklets": 600, "cameras": 2}},
    read=read,
    write=write,
)
