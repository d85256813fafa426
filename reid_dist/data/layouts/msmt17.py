"""MSMT17: 15 cameras, in three trees of which two are called "V2" (datasets specification 1.3).

| ours | tree | names |
| list-v1 | `train/ test/` and four lists | `0000/0000_000_01_0303morning_0008_0.jpg`, camera in the third field |
| list-v2 | `mask_train_v2/ mask_test_v2/` and lists; faces blurred | the same |
| flat | `bounding_box_train/ query/ bounding_box_test/` | `0781_c11_0015.jpg`; two digits may name a camera |

The tree is chosen by its folders, never by its name. Test ids restart at 0 for other people, so they are shifted by
(greatest training id + 1). The val list belongs to training, as all five methods have it; `val_to_train=false` keeps it
apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from reid_dist.data.layouts._boxes import FOLDERS, read_boxes, within
from reid_dist.data.layouts._files import Folder
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.records import DatasetError, Record

NAME = "msmt17"
CAMERAS = 15
_TREES = {"flat": "bounding_box_train", "list-v2": "mask_train_v2", "list-v1": "train"}
_LISTS = {"train": "train", "val": "train", "query": "test", "gallery": "test"}  # list: folder of its images
_FLAT = re.compile(r"(\d{4})_c(0?[1-9]|1[0-5])_(\d{4})(?i:\.jpg)")
_LISTED = re.compile(r"\d{4}/\d{4}_\d{3}_(0[1-9]|1[0-5])_.+(?i:\.jpg)")
_LINE = re.compile(r"(\S+) (\d+)")


def read(tree: Tree, val_to_train: bool = True) -> list[Record]:
    """Records in list order (flat: by path). Raises DatasetError naming list, line and file."""
    root = tree.inside("MSMT17", "MSMT17_V1", "MSMT17_V2")
    found = [kind for kind, folder in _TREES.items() if any(p.startswith(f"{root}{folder}/") for p in tree.sizes)]
    if len(found) != 1:
        raise DatasetError(
            f"{tree.store.uri}: expected one of {', '.join(f'{f}/ ({k})' for k, f in _TREES.items())}; "
            f"found {' and '.join(found) or 'none of them'}"
        )
    tree.notes["tree"] = found[0]
    if found[0] == "flat":
        records = read_boxes(tree, NAME, root, _FLAT, "0781_c11_0015.jpg")
    else:
        records = _listed(tree, root, "mask_{}_v2" if found[0] == "list-v2" else "{}")
    shift = 1 + max((r.pid for r in records if r.split in ("train", "val")), default=-1)
    tree.notes["ids"] = f"test ids shifted by {shift}"
    records = [replace(r, pid=r.pid + shift) if r.split in ("query", "gallery") else r for r in records]
    return [replace(r, split="train") if val_to_train and r.split == "val" else r for r in records]


def _listed(tree: Tree, root: str, folders: str) -> list[Record]:
    records: dict[str, Record] = {}
    for split, side in _LISTS.items():
        source = f"{root}list_{split}.txt"
        for number, line in enumerate(tree.entries(source), 1):
            with tree.noting():
                record = _entry(tree, f"{root}{folders.format(side)}/", line, split, f"{source}, line {number},")
                if record.path in records:
                    raise tree.wrong(f"{source}, line {number},", f"lists {record.path} a second time")
                records[record.path] = record
    spare = {p for p in tree.unclaimed if p.endswith(".jpg") and p.startswith(root)}
    tree.unclaimed -= spare
    if spare:
        tree.warnings.append(f"{len(spare)} images in no list, for example {min(spare)}")
    return list(records.values())


def _entry(tree: Tree, folder: str, line: str, split: str, where: str) -> Record:
    fields = _LINE.fullmatch(line)
    if fields is None:
        raise tree.wrong(where, f"is {line!r:.80}; expected '<path> <id>'")
    found = _LISTED.fullmatch(fields[1])
    if found is None:
        raise tree.wrong(where, f"names {fields[1]!r:.80}; expected 0000/0000_000_01_0303morning_0008_0.jpg")
    path = folder + fields[1]
    if path not in tree.sizes:
        raise tree.wrong(where, f"names {path}, which is not there; fetch it, or remove the line")
    return Record(path=tree.image(path), split=split, pid=int(fields[2]), camid=int(found[1]) - 1, domain=NAME)


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the list-v1 tree, ids of the test side from 0 on. `val` samples go to list_val.txt."""
    tree, lists = Folder(folder), dict[str, list[str]]((split, []) for split in _LISTS)
    samples = list(samples)
    shift = 1 + max((s.pid for s in samples if s.split in ("train", "val")), default=-1)
    for sample in samples:
        pid = sample.pid - (shift if sample.split in ("query", "gallery") else 0)
        name = f"{pid:04d}/{pid:04d}_000_{within(sample, CAMERAS) + 1:02d}_0303morning_{sample.frame:04d}_0.jpg"
        tree.image(f"{_LISTS[sample.split]}/{name}", sample.image)
        lists[sample.split].append(f"{name} {pid}")
    for split, lines in lists.items():
        tree.lines(f"list_{split}.txt", lines)
    return tree.paths


def write_flat(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the flat tree."""
    tree, samples = Folder(folder), list(samples)
    shift = 1 + max((s.pid for s in samples if s.split == "train"), default=-1)
    for sample in samples:
        pid = sample.pid - (0 if sample.split == "train" else shift)
        name = f"{pid:04d}_c{within(sample, CAMERAS) + 1}_{sample.frame:04d}.jpg"
        tree.image(f"{FOLDERS[sample.split]}/{name}", sample.image)
    return tree.paths


LAYOUT = Layout(
    name=NAME,
    task="image",
    tree="""MSMT17/             one of three trees
  list_train.txt list_val.txt list_query.txt list_gallery.txt     0000/0000_000_01_0303morning_0008_0.jpg 0
  train/ test/                        list-v1
  mask_train_v2/ mask_test_v2/        list-v2, faces blurred
  bounding_box_train/ query/ bounding_box_test/                   flat, 0781_c11_0015.jpg, no lists""",
    obtain="Request it from its authors (Wei et al., CVPR 2018) with a signed agreement.",
    expected={
        "train": {"ids": 1041, "images": 32621, "cameras": 15},
        "query": {"ids": 3060, "images": 11659, "cameras": 15},
        "gallery": {"ids": 3060, "images": 82161, "cameras": 15},
    },
    read=read,
    write=write,
)
