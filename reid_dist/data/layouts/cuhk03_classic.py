"""CUHK03 as first released: images inside a MATLAB 7.3 file, 20 test lists (datasets specification 1.4).

`detected` and `labeled` hold one table per camera pair: a row per person, columns 1-5 from the pair's first view and
6-10 from its second, some cells empty. A `testsets` list names (pair, person); everybody else trains in that trial.
Query and gallery are the same test list, scored by drawing one gallery image per person (protocol cuhk03-classic). Ids
are ours: pair * 100000 + person; cameras 0 to 9, two per pair. Image paths are
`cuhk-03.mat#<variant>/<pair>_<person>_<view>_<column>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from reid_dist.data.layouts._files import Folder, pixels
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.layouts.cuhk02 import PAIR
from reid_dist.data.members import open_hdf5
from reid_dist.data.records import DatasetError, Record, first_split
from reid_dist.errors import UserError

NAME = "cuhk03-classic"
VARIANTS = ("detected", "labeled")
FILE = "cuhk-03.mat"
COLUMNS = 10  # images of one person, five per view
_NEW_PROTOCOL = re.compile(r"(?:.*/)?cuhk03_new_protocol_config_(?:detected|labeled)\.mat")


def read(tree: Tree, variant: str = "detected") -> list[Record]:
    """Records by pair, person, column. Raises DatasetError when the file is not CUHK03's."""
    if variant not in VARIANTS:
        raise UserError(f"variant={variant!r}: choose detected or labeled")
    path = tree.one_of(FILE, f"cuhk03_release/{FILE}")
    tree.pass_over(_NEW_PROTOCOL, "lists of the new protocol")
    tree.pass_over(re.compile(r"cuhk03_release/README[^/]*"), "companion papers")
    tree.notes["variant"] = variant
    file = open_hdf5(tree.store, path)
    try:
        tests = [{(int(p), int(n)) for p, n in np.asarray(file[ref]).T} for ref in file["testsets"][0]]
        people = [np.asarray(file[ref]) for ref in file[variant][0]]
    except (KeyError, ValueError, TypeError) as error:
        raise DatasetError(
            f"{tree.store.uri}: {path} lacks detected, labeled or testsets as CUHK03 has: {error}"
        ) from None
    records = []
    for pair, table in enumerate(people, 1):
        if table.shape[0] != COLUMNS:
            raise tree.wrong(path, f"has {table.shape[0]} images per person in pair {pair}; expected {COLUMNS}")
        for person in range(1, table.shape[1] + 1):
            trials = tuple("test" if (pair, person) in listed else "train" for listed in tests)
            cells = ((column, file[table[column - 1][person - 1]]) for column in range(1, COLUMNS + 1))
            records += [
                _record(path, variant, pair, person, column, trials)
                for column, cell in cells
                if cell.ndim == 3  # an empty cell is a vector of two zeros
            ]
    present = {(r.pid // PAIR, r.pid % PAIR) for r in records}
    for trial, listed in enumerate(tests):
        with tree.noting():
            if lost := sorted(listed - present):
                raise tree.wrong(path, f"test list {trial + 1} names pair, person {lost[0]}, who has no image")
    return records


def _record(path: str, variant: str, pair: int, person: int, column: int, trials: tuple[str, ...]) -> Record:
    view = 1 + (column > COLUMNS // 2)
    return Record(
        path=f"{path}#{variant}/{pair}_{person:03d}_{view}_{column:02d}.png",
        split=first_split(trials),
        pid=pair * PAIR + person,
        camid=2 * (pair - 1) + view - 1,
        domain=NAME,
        trials=trials,
    )


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the .mat file, the same images as `detected` and `labeled`; paths are those of `detected`.

    Raises ValueError for samples that its tables cannot hold.
    """
    import h5py

    images: dict[tuple[int, int, int], np.ndarray] = {}
    tests: list[set[tuple[int, int]]] = []
    tree = Folder(folder)
    for sample in samples:
        pair, person = divmod(sample.pid, PAIR)
        if sample.camid is None or sample.camid // 2 != pair - 1 or not 0 <= sample.frame < COLUMNS // 2:
            raise ValueError(f"cuhk03-classic holds five images per view of a pair, not {sample}")
        column = sample.camid % 2 * (COLUMNS // 2) + sample.frame + 1
        images[pair, person, column] = pixels(sample.image)
        tests = tests or [set() for _ in sample.trials]
        for listed, split in zip(tests, sample.trials, strict=True):
            listed |= {(pair, person)} if split == "test" else set()
        tree.paths.append(_record(FILE, "detected", pair, person, column, ("test",)).path)
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / FILE, "w") as file:
        for variant in VARIANTS:
            _write_tables(file, variant, images)
        lists = [file.create_dataset(f"#refs#/t{i}", data=np.array(sorted(t), float).T) for i, t in enumerate(tests)]
        file.create_dataset("testsets", data=np.array([[d.ref for d in lists]], dtype=h5py.ref_dtype))
    return tree.paths


def _write_tables(file: Any, variant: str, images: dict[tuple[int, int, int], np.ndarray]) -> None:
    import h5py

    empty = file.create_dataset(f"#refs#/{variant}-empty", data=np.zeros(2, np.uint64))
    tables = []
    for pair in range(1, 1 + max(pair for pair, _, _ in images)):
        people = max((person for p, person, _ in images if p == pair), default=1)
        table = np.empty((COLUMNS, people), dtype=h5py.ref_dtype)
        for column in range(COLUMNS):
            for person in range(people):
                image = images.get((pair, person + 1, column + 1))
                name = f"#refs#/{variant}-{pair}-{person}-{column}"
                stored = empty if image is None else file.create_dataset(name, data=image.transpose(2, 1, 0))
                table[column, person] = stored.ref
        tables.append(file.create_dataset(f"#refs#/{variant}-{pair}", data=table).ref)
    file.create_dataset(variant, data=np.array([tables], dtype=h5py.ref_dtype))


LAYOUT = Layout(
    name=NAME,
    task="image",
    tree="""cuhk03_release/
  cuhk-03.mat         HDF5; cells detected, labeled (option variant=labeled), testsets (20 lists)""",
    obtain="Request it from its authors (CUHK, Li et al., CVPR 2014).",
    expected={"all": {"ids": 1360, "images": 13164}},
    read=read,
    write=write,
)
