"""LS-VID: video retrieval over fifteen cameras (datasets specification 2.2).

A list line is `<prefix> <id>`: the frames of a tracklet are the files that begin with `<prefix>_` (without the
underscore, prefix 1 would swallow those of prefix 10). Their third field is the camera, the last one orders them. The
test list's queries are rows, from 1, in `info_test.mat` (HDF5) or `query.npy`. Two trees are in use, lists and info at
the root or under `info/`. The gallery must contain the queries (protocol `video`), else 140 of them have nothing to
find. Id -1 is junk and dropped.
"""

from __future__ import annotations

import io
import re
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from reid_dist.data.layouts._files import Folder
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.members import open_hdf5
from reid_dist.data.records import DatasetError, Record

NAME = "ls-vid"
JUNK = -1
CAMERAS = 15
_LINE = re.compile(r"(\S+) (-?\d+)")
_FRAME = re.compile(r"[^_/]+_[^_/]+_(0?[1-9]|1[0-5])_(?:.*_)?0*(\d+)(?i:\.(?:jpg|png))")
_OTHER = re.compile(r"(?:info/|test/|train/|val/)?(?:list_sequence|data)/.+|(?:test|train|val)/[^/]+\.npy")
_IMAGE = re.compile(r"(?i).+\.(?:jpg|png)")


def read(tree: Tree) -> list[Record]:
    """Records by list line and frame: train, val, test. Raises DatasetError naming list and line."""
    paths = sorted(tree.sizes)
    folder = "info/list_sequence" if any(p.startswith("info/list_sequence/") for p in paths) else "list_sequence"
    lists = {side: f"{folder}/list_seq_{side}.txt" for side in ("train", "val", "test")}
    queries = _queries(tree)
    records: list[Record] = []
    junk = number = 0
    for side, source in lists.items():
        if side == "val" and source not in tree.sizes:
            continue
        lines = tree.read_lines(source)
        if side == "test" and queries and max(queries) >= len(lines):
            raise tree.wrong(source, f"has {len(lines)} lines, but row {max(queries) + 1} asks")
        for row, line in enumerate(lines):
            fields = _LINE.fullmatch(line)
            with tree.noting():
                if fields is None:
                    raise tree.wrong(f"{source}, line {row + 1},", f"is {line!r:.80}; expected '<prefix> <id>'")
                split = side if side != "test" else "query" if row in queries else "gallery"
                found = _tracklet(tree, paths, fields[1], int(fields[2]), split, number, f"{source}, line {row + 1},")
                junk += int(fields[2]) == JUNK
                records += found if int(fields[2]) != JUNK else []
            number += 1
    tree.notes["junk"] = f"{junk} tracklets with id -1 dropped"
    tree.pass_over(_OTHER, "other lists")
    spare = {path for path in tree.unclaimed if path.startswith("tracklet_") and _IMAGE.fullmatch(path)}
    tree.unclaimed -= spare
    if spare:
        tree.warnings.append(f"{len(spare)} frames in no tracklet, for example {min(spare)}")
    return records


def _queries(tree: Tree) -> set[int]:
    """Rows of the test list that ask, from 0."""
    found = [p for p in ("test/data/info_test.mat", "info/data/info_test.mat", "test/query.npy") if p in tree.sizes]
    if not found:
        raise DatasetError(
            f"{tree.store.uri}: neither test/data/ nor info/data/info_test.mat nor test/query.npy is there"
        )
    tree.claim(found[0])
    if found[0].endswith(".npy"):
        try:
            rows = np.load(io.BytesIO(tree.store.read(found[0])), allow_pickle=False)
        except ValueError as error:
            raise tree.wrong(found[0], f"is not an array of numbers: {error}") from None
    else:
        file = open_hdf5(tree.store, found[0])
        if "query" not in file:
            raise tree.wrong(found[0], f"holds {', '.join(file)}, not query")
        rows = np.asarray(file["query"])
    return {int(row) - 1 for row in rows.ravel()}


def _tracklet(tree: Tree, paths: list[str], prefix: str, pid: int, split: str, number: int, where: str) -> list[Record]:
    start = f"{prefix}_"
    frames = []
    for place in range(bisect_left(paths, start), len(paths)):
        if not paths[place].startswith(start):
            break
        frames.append(paths[place])
    if not frames:
        raise tree.wrong(where, f"names {prefix}, and no file begins with {start}")
    records = []
    for path in frames:
        found = _FRAME.fullmatch(path.rpartition("/")[2])
        with tree.noting():
            if found is None:
                tree.claim(path)  # what is wrong with it is said here
                raise tree.wrong(
                    path, "is no frame: expected <id>_<n>_<camera>_..._<frame>.jpg with a camera from 1 to 15"
                )
            records.append(
                Record(path=tree.image(path), split=split, pid=pid, camid=int(found[1]) - 1, tracklet=number,
                       frame=int(found[2]), domain=NAME)
            )  # fmt: skip
    return sorted(records, key=lambda record: record.frame or 0)


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the tree with `list_sequence/` at the root and an HDF5 query list. Tracklets in the order train, val,
    test.
    """
    import h5py

    tree, lists = Folder(folder), {side: dict[str, int]() for side in ("train", "val", "test")}
    queries: dict[str, int] = {}
    for sample in samples:
        if sample.camid is None or not 0 <= sample.camid < CAMERAS or sample.tracklet is None:
            raise ValueError(f"ls-vid has tracklets and cameras 0..14, not {sample.tracklet}, {sample.camid}")
        side = "test" if sample.split in ("query", "gallery") else sample.split
        prefix = f"tracklet_{side}/{sample.pid:04d}/{sample.pid:04d}_1_{sample.camid + 1:02d}_{sample.tracklet}"
        tree.image(f"{prefix}_{sample.frame:05d}.jpg", sample.image)
        lists[side].setdefault(prefix, sample.pid)
        if sample.split == "query":
            queries.setdefault(prefix, len(lists[side]))
    for side, rows in lists.items():
        if rows or side != "val":
            tree.lines(f"list_sequence/list_seq_{side}.txt", [f"{prefix} {pid}" for prefix, pid in rows.items()])
    (folder / "test/data").mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "test/data/info_test.mat", "w") as file:
        file.create_dataset("query", data=np.array([list(queries.values())], float))
    return tree.paths


LAYOUT = Layout(
    name=NAME,
    task="video",
    tree="""LS-VID/
  tracklet_train/ tracklet_val/ tracklet_test/      <id>_<n>_<camera>_..._<frame>.jpg
  list_sequence/list_seq_train.txt [list_seq_val.txt] list_seq_test.txt       <prefix> <id>
  test/data/info_test.mat             query rows, HDF5; or test/query.npy
  or the last two as info/list_sequence/ and info/data/""",
    obtain="Request it from its authors (Li et al., ICCV 2019) with a signed agreement.",
    expected={
        "train": {"ids": 842, "tracklets": 2831, "cameras": 15},
        "query": {"tracklets": 3504},
        "gallery": {"tracklets": 7829},
    },
    read=read,
    write=write,
)
