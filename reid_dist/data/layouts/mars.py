"""MARS: video retrieval over six cameras (datasets specification 2.1).

Frames are listed in `info/*_name.txt`; a tracklet is a row (first line, last line, id, camera) of a .mat table, lines
counted from 1 and both included. `query_IDX` holds row numbers of the test table, from 1; the other rows are gallery.
Id -1 (`00-1` in names) is junk and dropped, id 0 a distractor that stays in the gallery. A record's tracklet is its
row, counted through the training table and then the test table; its frame is the number in the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from reid_dist.data.layouts._files import Folder
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.records import Record

NAME = "mars"
JUNK = -1
_BASENAME = re.compile(r"(00-1|\d{4})C([1-6])T(\d{4})F(\d{3,4})(?i:\.jpg)")
_SIDES = {"train": "bbox_train", "test": "bbox_test"}
_LISTS = [f"info/{name}" for name in ("train_name.txt", "test_name.txt", "tracks_train_info.mat", "tracks_test_info.mat",
                                      "query_IDX.mat")]  # fmt: skip


def read(tree: Tree) -> list[Record]:
    """Records by table row and frame. Raises DatasetError naming file and row."""
    tree.need(*_LISTS)
    names = {side: tree.read_lines(f"info/{side}_name.txt") for side in _SIDES}
    tables = {
        side: tree.read_mat(f"info/tracks_{side}_info.mat", f"track_{side}_info").astype(np.int64) for side in _SIDES
    }
    for side, table in tables.items():
        if table.ndim != 2 or table.shape[1] != 4:
            raise tree.wrong(f"info/tracks_{side}_info.mat", f"has the shape {table.shape}; expected rows of 4")
    asked = tree.read_mat("info/query_IDX.mat", "query_IDX").astype(np.int64).ravel() - 1
    rows = len(tables["test"])
    if asked.size and not (asked.min() >= 0 and asked.max() < rows):
        raise tree.wrong("info/query_IDX.mat", f"names row {asked.max() + 1}; the test table has {rows}")
    queries, records, first, junk = set(asked.tolist()), list[Record](), 0, 0
    for side, table in tables.items():
        for row, facts in enumerate(table.tolist()):
            split = "train" if side == "train" else "query" if row in queries else "gallery"
            junk += facts[2] == JUNK
            with tree.noting():
                records += _tracklet(tree, side, row, facts, names[side], split, first + row)
        first += len(table)
    tree.notes["junk"] = f"{junk} tracklets with id -1 dropped"
    spare = {path for path in tree.unclaimed if path.startswith(tuple(_SIDES.values())) and path.endswith(".jpg")}
    tree.unclaimed -= spare
    if spare:
        tree.warnings.append(f"{len(spare)} frames in no tracklet, for example {min(spare)}")
    return records


def _tracklet(
    tree: Tree, side: str, row: int, facts: list[int], names: list[str], split: str, number: int
) -> list[Record]:
    """Frames of one row; none for junk, whose files are claimed."""
    start, end, pid, camera = facts
    where = f"info/tracks_{side}_info.mat, row {row + 1},"
    if not 1 <= start <= end <= len(names):
        raise tree.wrong(where, f"spans lines {start} to {end} of the {len(names)} in info/{side}_name.txt")
    records = []
    for name in names[start - 1 : end]:
        with tree.noting():
            path, frame = _frame(tree, side, name, pid, camera, where)
            records.append(
                Record(path=tree.image(path), split=split, pid=pid, camid=camera - 1, tracklet=number, frame=frame,
                       domain=NAME)
            )  # fmt: skip
    return records if pid != JUNK else []


def _frame(tree: Tree, side: str, name: str, pid: int, camera: int, where: str) -> tuple[str, int]:
    """Path and number of a listed frame of a tracklet."""
    found = _BASENAME.fullmatch(name)
    if found is None:
        raise tree.wrong(f"info/{side}_name.txt", f"lists {name!r:.80}; expected a name like 0001C1T0001F001.jpg")
    if (int(found[1].replace("00-1", "-1")), int(found[2])) != (pid, camera):
        raise tree.wrong(where, f"says id {pid}, camera {camera}, its frame {name} does not")
    path = f"{_SIDES[side]}/{name[:4]}/{name}"
    if path not in tree.sizes:
        raise tree.wrong(where, f"needs {path}, which is not there")
    return path, int(found[4])


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the authors' tree. Samples of a tracklet follow each other, training first; frames count from 1 on disk."""
    tree = Folder(folder)
    names: dict[str, list[str]] = {side: [] for side in _SIDES}
    rows: dict[str, dict[int, list[int]]] = {side: {} for side in _SIDES}
    queries = []
    for sample in samples:
        if sample.camid is None or not 0 <= sample.camid < 6 or sample.tracklet is None:
            raise ValueError(f"mars has tracklets and cameras 0..5, not {sample.tracklet}, {sample.camid}")
        side = "train" if sample.split == "train" else "test"
        person = "00-1" if sample.pid == JUNK else f"{sample.pid:04d}"
        name = f"{person}C{sample.camid + 1}T{sample.tracklet % 10000:04d}F{sample.frame:03d}.jpg"
        tree.image(f"{_SIDES[side]}/{name[:4]}/{name}", sample.image)
        names[side].append(name)
        line = len(names[side])
        if sample.tracklet not in rows[side]:
            rows[side][sample.tracklet] = [line, line, sample.pid, sample.camid + 1]
            if sample.split == "query":
                queries.append(len(rows[side]))
        rows[side][sample.tracklet][1] = line
    for side in _SIDES:
        tree.lines(f"info/{side}_name.txt", names[side])
        table = np.array(list(rows[side].values()), float).reshape(-1, 4)
        tree.mat(f"info/tracks_{side}_info.mat", {f"track_{side}_info": table})
    tree.mat("info/query_IDX.mat", {"query_IDX": np.array([queries], float)})
    return tree.paths


LAYOUT = Layout(
    name=NAME,
    task="video",
    tree="""mars/
  bbox_train/<id>/ bbox_test/<id|00-1|0000>/      0001C1T0001F001.jpg: person, camera, tracklet, frame
  info/train_name.txt test_name.txt tracks_train_info.mat tracks_test_info.mat query_IDX.mat""",
    obtain="From its authors' page (Zheng et al., ECCV 2016; liangzheng06/MARS-evaluation holds info/); research use.",
    expected={
        "train": {"ids": 625, "tracklets": 8298, "images": 509914, "cameras": 6},
        "query": {"ids": 626, "tracklets": 1980},
        "gallery": {"tracklets": 9330},
    },
    read=read,
    write=write,
)
