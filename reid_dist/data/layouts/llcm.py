"""LLCM: nine visible and eight near-infrared cameras at night (datasets specification 3.3).

Camera numbers stay 1 to 9 (there is no near-infrared camera 3): the protocol removes same id and same number across
modalities. Training images come from lists `<path> <label>`, test images from the folders of the listed ids. Test pids
are the folders' numbers, training pids 10000 + label, since labels and numbers are different counts of people.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from reid_dist.data.layouts._files import Folder
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.layouts.sysu_mm01 import id_list
from reid_dist.data.records import Record

NAME = "llcm"
TRAINING = 10_000  # first training pid
CAMERAS = {"rgb": tuple(range(1, 10)), "ir": (1, 2, 4, 5, 6, 7, 8, 9)}
_SIDES = {"vis": "rgb", "nir": "ir"}
_LINE = re.compile(r"(\S+) (\d+)")
_CAMERA = re.compile(r"(?:.+/)?cam([1-9])/.+(?i:\.(?:jpg|jpeg|png|bmp))")  # a whole path component, not the letters
_TEST = re.compile(r"cam([1-9])/(\d{4})/[^/]+(?i:\.(?:jpg|jpeg|png|bmp))")
_IMAGE = re.compile(r"(?i).+\.(?:jpg|jpeg|png|bmp)")


def read(tree: Tree) -> list[Record]:
    """Records: training lists in their order, then test folders by path. Raises DatasetError naming file and line."""
    records: dict[str, Record] = {}
    for side, modality in _SIDES.items():
        source = f"idx/train_{side}.txt"
        for number, line in enumerate(tree.entries(source), 1):
            with tree.noting():
                record = _listed(tree, line, modality, f"{source}, line {number},")
                if record.path in records:
                    raise tree.wrong(f"{source}, line {number},", f"lists {record.path} a second time")
                records[record.path] = record
    wanted, unlisted = set(id_list(tree, "idx/test_id.txt")), 0
    for side, modality in _SIDES.items():
        for path, found in tree.matched(f"test_{side}", _TEST, "cam1/0001/0001_c01_s1.jpg"):
            camera, pid = int(found[1]), int(found[2])
            with tree.noting():
                if camera not in CAMERAS[modality]:
                    raise tree.wrong(path, f"is of camera {camera}, which has no {modality} images")
                if path in records:
                    raise tree.wrong(path, "is a test image, and a training list names it")
                if pid in wanted:
                    records[path] = Record(
                        path=path, split="test", pid=pid, camid=camera, modality=modality, domain=NAME
                    )
                unlisted += pid not in wanted
    if unlisted:
        tree.notes["unlisted"] = f"{unlisted} test images of ids that idx/test_id.txt does not list passed over"
    spare = {path for path in tree.unclaimed if _IMAGE.fullmatch(path)}
    tree.unclaimed -= spare
    if spare:
        tree.warnings.append(f"{len(spare)} images in no list, for example {min(spare)}")
    return list(records.values())


def _listed(tree: Tree, line: str, modality: str, where: str) -> Record:
    fields = _LINE.fullmatch(line)
    if fields is None:
        raise tree.wrong(where, f"is {line!r:.80}; expected '<path> <label>'")
    found = _CAMERA.fullmatch(fields[1])
    if found is None:
        raise tree.wrong(where, f"names {fields[1]!r:.80}; expected an image below a folder cam1 to cam9")
    if fields[1] not in tree.sizes:
        raise tree.wrong(where, f"names {fields[1]}, which is not there")
    pid = TRAINING + int(fields[2])
    return Record(
        path=tree.image(fields[1]), split="train", pid=pid, camid=int(found[1]), modality=modality, domain=NAME
    )


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write the authors' tree; cameras of samples are 1 to 9, training pids from 10000 on."""
    tree, lists, tested = Folder(folder), {side: list[str]() for side in _SIDES}, set[int]()
    for sample in samples:
        side = {modality: name for name, modality in _SIDES.items()}[sample.modality]
        training = sample.split == "train"
        pid = sample.pid - (TRAINING if training else 0)
        if sample.camid not in CAMERAS[sample.modality] or not 0 <= pid < TRAINING:
            raise ValueError(f"llcm has no camera {sample.camid} in {sample.modality}, or no id {sample.pid}")
        name = f"{'train' if training else 'test'}_{side}/cam{sample.camid}/{pid:04d}/{pid:04d}_{sample.frame:04d}.jpg"
        tree.image(name, sample.image)
        if training:
            lists[side].append(f"{name} {pid}")
        else:
            tested.add(pid)
    for side, lines in lists.items():
        tree.lines(f"idx/train_{side}.txt", lines)
    tree.lines("idx/test_id.txt", [",".join(map(str, sorted(tested)))])
    return tree.paths


LAYOUT = Layout(
    name=NAME,
    task="visible-infrared",
    tree="""LLCM/
  idx/train_vis.txt train_nir.txt     <path> <label>; a folder cam1 .. cam9 in each path
  idx/test_id.txt                     1,2,3,...
  test_vis/cam1..9/ test_nir/cam1,2,4..9/             <id4>/<image>""",
    obtain="Signed agreement with its authors (ZYK100/LLCM).",
    expected={
        "train": {"ids": 713, "images": 30921, "cameras": 9},
        "test": {"ids": 351, "images": 15846, "cameras": 9},
        "all": {"images": 46767},
    },
    read=read,
    write=write,
)
