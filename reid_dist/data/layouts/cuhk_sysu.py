"""CUHK-SYSU: people cut out of the scenes of a person search set; training data only (datasets specification 1.6).

`Person.mat` names every person with a box [x, y, width, height] per scene, `Train.mat` the training people,
`TestG50.mat` a query and a gallery of scenes per test person (an empty box: not in this scene). A record's path is
`Image/SSM/s<N>.jpg#xywh=x,y,w,h`; packing cuts the box. There are no cameras: camid is None, and whoever needs a camera
for sampling makes one up per dataset. The folder of ready crops that others make (`00001_s123_0000001_0.jpg` under
train, query, gallery, combine) is read as well.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reid_dist.data.layouts._files import Folder, cells, pixels
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.records import Record

NAME = "cuhk-sysu"
_SCENES, _NOTES = "Image/SSM/", "annotation/"
_PERSON, _TRAIN, _TEST = (
    f"{_NOTES}{name}.mat" for name in ("Person", "test/train_test/Train", "test/train_test/TestG50")
)
_ID = re.compile(r"p(\d+)")
_CROP = re.compile(r"(\d{5})_s(\d+)_(\d{7})_([01])(?i:\.jpg)")
_OTHER = re.compile(rf"{_NOTES}(?!Person\.mat|test/train_test/Train\.mat|test/train_test/TestG50\.mat).+")


def read(tree: Tree) -> list[Record]:
    """Records by person and scene (crops: by path). Raises DatasetError naming file and person."""
    if not any(path.startswith(_NOTES) for path in tree.sizes):
        return _crops(tree)
    sides = {key: split for split in ("gallery", "query") for key in _listed(tree, split)}
    tested = {pid for pid, _ in sides}
    trained = {_pid(tree, _TRAIN, person) for person in _rows(tree, _TRAIN, "Train")}
    if tested & trained:
        raise tree.wrong(_TEST, f"asks for p{min(tested & trained)}, who is in Train.mat")
    records: dict[str, Record] = {}
    for person in _rows(tree, _PERSON, "Person"):
        with tree.noting():
            pid = _pid(tree, _PERSON, person)
            for scene in np.atleast_1d(person.scene):
                path = _path(tree, scene, pid)
                split = sides.get((pid, str(scene.imname)), "gallery" if pid in tested else "train")
                if path is not None:
                    records[path] = Record(path=path, split=split, pid=pid, domain=NAME)
    tree.pass_over(_OTHER, "other annotations")
    tree.pass_over(re.compile(rf"{_SCENES}.+\.jpg"), "scenes without a named person")
    return list(records.values())


def _rows(tree: Tree, file: str, key: str) -> Iterator[Any]:
    yield from np.atleast_1d(tree.read_mat(file, key, records=True))


def _listed(tree: Tree, split: str) -> Iterator[tuple[int, str]]:
    """(pid, scene) of the queries, or of the gallery boxes that are not empty."""
    for row in _rows(tree, _TEST, "TestG50"):
        pid = _pid(tree, _TEST, row.Query)
        for scene in np.atleast_1d(row.Query if split == "query" else row.Gallery):
            if np.size(scene.idlocate):
                yield pid, str(scene.imname)


def _pid(tree: Tree, file: str, person: Any) -> int:
    found = _ID.fullmatch(str(person.idname))
    if found is None:
        raise tree.wrong(file, f"has a person called {person.idname!r}; expected a name like p123")
    return int(found[1])


def _path(tree: Tree, scene: Any, pid: int) -> str | None:
    """Path of one box; None when it is empty. Raises DatasetError for a scene that is not there."""
    file = f"{_SCENES}{scene.imname}"
    if file not in tree.sizes:
        raise tree.wrong(_PERSON, f"places p{pid} in {file}, which is not there")
    box = np.round(np.asarray(scene.idlocate, dtype=float)).astype(int).ravel()
    if box.size not in (0, 4):
        raise tree.wrong(_PERSON, f"has a box of {box.size} numbers for p{pid} in {scene.imname}; expected x, y, w, h")
    if not box.size:
        return None
    left, top = max(box[0], 0), max(box[1], 0)
    width, height = box[0] + box[2] - left, box[1] + box[3] - top
    return f"{tree.image(file)}#xywh={left},{top},{width},{height}" if min(width, height) > 0 else None


def _crops(tree: Tree) -> list[Record]:
    root = tree.inside("cropped_images", "cropped_image")
    sides = [s for s in ("train", "query", "gallery") if any(p.startswith(f"{root}{s}/") for p in tree.sizes)]
    tree.notes["tree"] = "crops"
    if sides:
        tree.pass_over(re.compile(rf"{root}combine/.+"), "combine (the other three again)")
    return [
        Record(path=path, split=split, pid=int(found[1]), domain=NAME)
        for split, folder in ([(s, s) for s in sides] or [("train", "combine")])
        for path, found in tree.matched(root + folder, _CROP, "00001_s123_0000001_0.jpg")
    ]


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write scenes of one person each (near-lossless JPEG) and the three annotation files."""
    tree, people = Folder(folder), dict[int, list[tuple[str, dict[str, Any]]]]()
    for number, sample in enumerate(samples, 1):
        image = pixels(sample.image)
        height, width = image.shape[:2]
        left, top = 8 + number % 5 * 8, 16
        scene = np.full((height + 32, width + 64, 3), 90 + number % 80, np.uint8)
        scene[top : top + height, left : left + width] = image
        buffer = io.BytesIO()
        Image.fromarray(scene).save(buffer, "JPEG", quality=97, subsampling=0)
        tree.file(f"{_SCENES}s{number}.jpg", buffer.getvalue())
        box = {"imname": f"s{number}.jpg", "idlocate": np.array([left, top, width, height], float), "ishard": 0}
        people.setdefault(sample.pid, []).append((sample.split, box))
        tree.paths.append(f"{_SCENES}s{number}.jpg#xywh={left},{top},{width},{height}")
    named = {
        pid: {"idname": f"p{pid}", "nAppear": len(b), "scene": _structs([x for _, x in b])} for pid, b in people.items()
    }
    tests = []
    for pid, boxes in people.items():
        gallery = [box for split, box in boxes if split == "gallery"]
        absent = {"imname": "s1.jpg", "idlocate": np.zeros((0, 0)), "ishard": 0}
        tests += [
            {"Query": {**box, "idname": f"p{pid}"}, "Gallery": _structs([*gallery, absent])}
            for split, box in boxes
            if split == "query"
        ]
    trained = [named[pid] for pid, boxes in people.items() if boxes[0][0] == "train"]
    tree.mat(_PERSON, {"Person": _structs(list(named.values()))})
    tree.mat(_TRAIN, {"Train": cells(trained)})
    tree.mat(_TEST, {"TestG50": _structs(tests)})
    return tree.paths


def _structs(rows: list[dict[str, Any]]) -> np.ndarray:
    """A MATLAB structure array [1, n]."""
    array = np.empty((1, len(rows)), dtype=[(name, object) for name in (rows[0] if rows else ("Query", "Gallery"))])
    for i, row in enumerate(rows):
        array[0, i] = tuple(row.values())
    return array


LAYOUT = Layout(
    name=NAME,
    task="image",
    tree="""CUHK-SYSU/
  Image/SSM/s<N>.jpg
  annotation/Person.mat  annotation/test/train_test/Train.mat  annotation/test/train_test/TestG50.mat
  or ready crops: train/ query/ gallery/ [combine/]     00001_s123_0000001_0.jpg""",
    obtain="Request it from its authors (Xiao et al., CVPR 2017).",
    expected={"all": {"ids": 11934, "images": 34574}},
    read=read,
    write=write,
)
