"""RegDB: 412 people, ten visible and ten thermal images each, ten divisions (datasets specification 3.2).

`idx/{train,test}_{visible,thermal}_<trial>.txt` have lines `<path> <label>`. A label means something inside its pair of
files only, so our pid is the folder's number, and the labels are checked to pair the same people in both modalities.
Every row has its split in each of the trials ("train" or "test"); each trial needs its own model. Cameras are two that
never coincide: visible 0, thermal 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from reid_dist.data.layouts._files import Folder
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.records import DatasetError, Record, first_split

NAME = "regdb"
TRIALS = 10
_SIDES = {"Visible": "rgb", "Thermal": "ir"}
_NAME = re.compile(r"(\d+)/[^/]+(?i:\.bmp)")
_LINE = re.compile(r"(\S+) (\d+)")
_TRIAL = re.compile(r"idx/train_visible_(\d+)\.txt")


def read(tree: Tree) -> list[Record]:
    """Records by modality, then path. Raises DatasetError naming file and line."""
    numbers = sorted(int(found[1]) for path in tree.sizes if (found := _TRIAL.fullmatch(path)))
    if numbers != list(range(1, len(numbers) + 1)) or not numbers:
        raise DatasetError(
            f"{tree.store.uri}: idx/ must hold train_visible_1.txt on without gaps; found {numbers or 'none'}"
        )
    records = {
        path: Record(path=path, split="", pid=int(found[1]), camid=camid, modality=modality, domain=NAME)
        for camid, (folder, modality) in enumerate(_SIDES.items())
        for path, found in tree.matched(folder, _NAME, "1/male_front_v_00007_1.bmp")
    }
    splits: dict[str, list[str]] = {path: [] for path in records}
    for trial in numbers:
        chosen: dict[str, str] = {}
        for split in ("train", "test"):
            chosen |= _trial(tree, records, trial, split, chosen)
        for path, row in splits.items():
            row.append(chosen.get(path, ""))
    unused = [path for path, row in splits.items() if not any(row)]
    if unused:
        tree.warnings.append(f"{len(unused)} images in no trial, for example {unused[0]}")
    return [
        Record(path=r.path, split=first_split(splits[r.path]), pid=r.pid, camid=r.camid, modality=r.modality,
               domain=NAME, trials=tuple(splits[r.path]))
        for r in records.values()
    ]  # fmt: skip


def _trial(tree: Tree, records: dict[str, Record], trial: int, split: str, taken: dict[str, str]) -> dict[str, str]:
    """{path: split} of the two files of one side. Raises DatasetError."""
    chosen: dict[str, str] = {}
    people: dict[str, int] = {}
    for folder in _SIDES:
        source = f"idx/{split}_{folder.lower()}_{trial}.txt"
        for number, line in enumerate(tree.entries(source), 1):
            with tree.noting():
                fields = _LINE.fullmatch(line)
                if fields is None:
                    raise tree.wrong(f"{source}, line {number},", f"is {line!r:.80}; expected '<path> <label>'")
                record = records.get(fields[1])
                if record is None or not fields[1].startswith(f"{folder}/"):
                    raise tree.wrong(f"{source}, line {number},", f"names {fields[1]}, which is not there")
                if fields[1] in chosen or fields[1] in taken:
                    raise tree.wrong(f"{source}, line {number},", f"names {fields[1]} a second time in trial {trial}")
                if people.setdefault(fields[2], record.pid) != record.pid:
                    raise tree.wrong(
                        f"{source}, line {number},",
                        f"gives label {fields[2]} to person {record.pid}, it was person {people[fields[2]]}'s",
                    )
                chosen[fields[1]] = split
    return chosen


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the authors' tree: labels count from 0 in every file, over the sorted ids of its side."""
    tree, rows = Folder(folder), list[tuple[str, Sample]]()
    for sample in samples:
        side = {modality: name for name, modality in _SIDES.items()}[sample.modality]
        name = f"male_front_{side[0].lower()}_{sample.pid:05d}_{sample.frame + 1}.bmp"
        rows.append((tree.image(f"{side}/{sample.pid}/{name}", sample.image), sample))
    for trial in range(len(rows[0][1].trials) if rows else 0):
        for split in ("train", "test"):
            people = sorted({sample.pid for _, sample in rows if sample.trials[trial] == split})
            for side, modality in _SIDES.items():
                lines = [
                    f"{path} {people.index(sample.pid)}"
                    for path, sample in rows
                    if sample.modality == modality and sample.trials[trial] == split
                ]
                tree.lines(f"idx/{split}_{side.lower()}_{trial + 1}.txt", lines)
    return tree.paths


LAYOUT = Layout(
    name=NAME,
    task="visible-infrared",
    tree="""RegDB/
  Visible/ Thermal/         1/male_front_v_00007_1.bmp
  idx/{train,test}_{visible,thermal}_{1..10}.txt          <path> <label>, ten divisions""",
    obtain="Request form of its authors (Nguyen et al., Dongguk University).",
    expected={
        "train": {"ids": 206, "images": 4120, "cameras": 2},
        "test": {"ids": 206, "images": 4120, "cameras": 2},
    },
    read=read,
    write=write,
)
