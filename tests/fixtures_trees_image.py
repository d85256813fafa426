"""Smallest trees of the image sets in boxes, lists, pairs, scenes, with what a parser must say (specification 8.1)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.fixtures_trees import jpeg, png
from tests.fixtures_trees_sets import Row, SetCase, cell, hdf5, images, mat, nasty


def box_cases() -> list[SetCase]:
    """DukeMTMC-reID and Occluded-Duke, in both nestings."""
    rows: tuple[Row, ...] = (
        ("bounding_box_train/0001_c2_f0046182.jpg", "train", 1, 1),
        ("bounding_box_train/0001_c8_f0046302.JPG", "train", 1, 7),
        ("query/0005_c1_f0000001.jpg", "query", 5, 0),
        ("query/0009_c1_f0000001.jpg", "query", 9, 0),  # nobody to find
        ("bounding_box_test/0005_c2_f0000100.jpg", "gallery", 5, 1),
        ("bounding_box_test/7000_c3_f0000100.jpg", "gallery", 7000, 2),  # a person of the gallery alone
    )
    cases = []
    for layout, inner in (("dukemtmc-reid", "DukeMTMC-reID/"), ("occluded-duke", "Occluded_Duke/")):
        keeping = "query/Thumbs.db"
        good = SetCase(
            f"{layout}-good", layout, images(*(r[0] for r in rows)) | {keeping: b"x"}, rows, ignored=(keeping,)
        )
        nested = tuple((inner + r[0], *r[1:]) for r in rows)
        cases += [
            good,
            SetCase(f"{layout}-nested", layout, images(*(r[0] for r in nested)), nested),
            nasty(
                good, "market-name", {"query/0005_c1s1_000001_00.jpg": jpeg()}, "0005_c1s1_000001_00.jpg", "0001_c2_f"
            ),
            nasty(good, "camera-9", {"query/0005_c9_f0000001.jpg": jpeg()}, "0005_c9_f0000001.jpg"),
            nasty(good, "junk", {"query/-1_c1_f0000001.jpg": jpeg()}, "-1_c1_f0000001.jpg"),
            nasty(good, "twice", {"query/0005_c1_f0000002.jpg.jpg": jpeg()}, "twice"),
            nasty(good, "empty", {"query/0005_c1_f0000002.jpg": b""}, "0 bytes"),
        ]
    return cases


_MS = "0303morning_0008_0"


def msmt_cases() -> list[SetCase]:
    """Both list trees with CRLF, the flat one with two-digit cameras; test ids restart at 0."""
    names = {
        "train": [f"0000/0000_000_01_{_MS}.jpg 0", f"0001/0001_000_15_{_MS}_ex.jpg 1"],
        "val": [f"0001/0001_001_11_{_MS}.jpg 1"],
        "query": [f"0000/0000_000_11_{_MS}.jpg 0"],
        "gallery": [f"0000/0000_001_01_{_MS}.jpg 0", "0003/0003_000_02_anything_at_all.jpg 3"],
    }
    labels = [("train", 0, 0), ("train", 1, 14), ("val", 1, 10), ("query", 2, 10), ("gallery", 2, 0), ("gallery", 5, 1)]

    def listed(name: str, train: str, test: str, val: str = "train", **options: Any) -> SetCase:
        files: dict[str, bytes] = {
            f"list_{key}.txt": "\r\n".join([*lines, ""]).encode() for key, lines in names.items()
        }
        paths = [
            f"{test if key in ('query', 'gallery') else train}/{line.split()[0]}"
            for key in names
            for line in names[key]
        ]
        rows = tuple((p, val if s == "val" else s, i, c) for p, (s, i, c) in zip(paths, labels, strict=True))
        return SetCase(f"msmt17-{name}", "msmt17", files | images(*paths), rows, options=options)

    good = listed("list-v1", "train", "test")
    flat_rows: tuple[Row, ...] = (
        ("bounding_box_train/0000_c1_0001.jpg", "train", 0, 0),
        ("bounding_box_train/0001_c11_0015.jpg", "train", 1, 10),
        ("query/0000_c15_0001.jpg", "query", 2, 14),
        ("bounding_box_test/0000_c1_0002.jpg", "gallery", 2, 0),
    )
    flat = SetCase("msmt17-flat", "msmt17", images(*(r[0] for r in flat_rows)), flat_rows)
    line = "list_query.txt"
    return [
        good, listed("list-v2", "mask_train_v2", "mask_test_v2"),
        listed("val", "train", "test", "val", val_to_train=False),
        flat,
        nasty(good, "both-trees", {"bounding_box_train/0000_c1_0001.jpg": jpeg()}, "flat and list-v1"),
        nasty(good, "missing", {line: f"0009/0009_000_01_{_MS}.jpg 9".encode()}, line, "0009_000_01", "there"),
        nasty(good, "grammar", {line: b"0000/0000_000_01.jpg"}, line, "line 1", "'<path> <id>'"),
        nasty(good, "camera-16", {line: f"0000/0000_000_16_{_MS}.jpg 0".encode()}, line, "line 1", "000_16"),
        nasty(good, "listed-twice", {line: good.files[line] * 2}, "line 2", "second time"),
        nasty(good, "no-list", {"list_val.txt": None}, "list_val.txt"),
        nasty(flat, "camera-16", {"query/0000_c16_0001.jpg": jpeg()}, "0000_c16_0001.jpg"),
        nasty(flat, "no-tree", dict.fromkeys(flat.files) | {"a.txt": b"x"}, "list-v2", "none of them"),
    ]  # fmt: skip


def cuhk03_np_cases() -> list[SetCase]:
    """Two variants of different sizes."""
    rows: tuple[Row, ...] = (
        ("detected/bounding_box_train/0001_c1_1.png", "train", 1, 0),
        ("detected/bounding_box_train/0001_c2_10.png", "train", 1, 1),
        ("detected/query/0003_c1_1.png", "query", 3, 0),
        ("detected/bounding_box_test/0003_c2_6.png", "gallery", 3, 1),
    )
    labeled: tuple[Row, ...] = tuple((r[0].replace("detected", "labeled"), *r[1:]) for r in rows)
    labeled += (("labeled/bounding_box_test/0004_c2_7.png", "gallery", 4, 1),)
    files = images(*(r[0] for r in (*rows, *labeled)))
    good = SetCase("cuhk03-np-detected", "cuhk03-np", files, rows)
    return [
        good,
        SetCase("cuhk03-np-labeled", "cuhk03-np", files, labeled, options={"variant": "labeled"}),
        nasty(good, "jpg", {"detected/query/0003_c2_1.jpg": jpeg()}, "0003_c2_1.jpg"),
        nasty(good, "variant", {}, "variant='both'", "labeled", variant="both"),
    ]


def classic_mat(
    first: str = "detected", tests: tuple[tuple[tuple[int, int], ...], ...] = (((1, 2),), ((2, 1),))
) -> bytes:
    """Pair 1 with two people, pair 2 with one; an empty cell; two test lists."""

    def write(file: Any) -> None:
        empty = file.create_dataset("#refs#/empty", data=np.zeros(2, np.uint64))
        for key in (first, "labeled"):
            tables = []
            for pair, people in ((1, 2), (2, 1)):
                table = np.empty((10, people), dtype="O")
                table[:] = empty.ref
                for person in range(people):
                    for column in (0, 1, 5) if key == "labeled" else (0, 5):
                        pixels = np.full(
                            (3, 8, 16), 40 * pair + 20 * person + column, np.uint8
                        )  # colour, width, height
                        name = f"#refs#/{key}{pair}{person}{column}"
                        table[column, person] = file.create_dataset(name, data=pixels).ref
                kind = file.create_dataset(f"#refs#/{key}{pair}", table.shape, dtype=_reference())
                kind[...] = table
                tables.append(kind.ref)
            file.create_dataset(key, (1, 2), dtype=_reference())[0] = tables
        lists = [file.create_dataset(f"#refs#/t{i}", data=np.array(t, float).T).ref for i, t in enumerate(tests)]
        file.create_dataset("testsets", (1, len(lists)), dtype=_reference())[0] = lists

    return hdf5(write)


def _reference() -> Any:
    import h5py

    return h5py.ref_dtype


def classic_cases() -> list[SetCase]:
    """CUHK03's .mat."""
    people = ((1, 1, ("train", "train")), (1, 2, ("test", "train")), (2, 1, ("train", "test")))

    def rows(file: str, variant: str, columns: tuple[int, ...]) -> tuple[Row, ...]:
        return tuple(
            (f"{file}#{variant}/{pair}_{n:03d}_{1 + (c > 5)}_{c:02d}.png", t[0], pair * 100000 + n,
             2 * (pair - 1) + (c > 5), "rgb", None, None, t)
            for pair, n, t in people
            for c in columns
        )  # fmt: skip

    good = SetCase(
        "classic-good", "cuhk03-classic", {"cuhk-03.mat": classic_mat()}, rows("cuhk-03.mat", "detected", (1, 6))
    )
    inner = "cuhk03_release/cuhk-03.mat"
    return [
        good,
        SetCase("classic-labeled", "cuhk03-classic", {inner: classic_mat()}, rows(inner, "labeled", (1, 2, 6)),
                options={"variant": "labeled"}),
        nasty(good, "lost", {"cuhk-03.mat": classic_mat(tests=(((1, 3),),))}, "cuhk-03.mat", "test list 1", "(1, 3)"),
        nasty(good, "other", {"cuhk-03.mat": classic_mat(first="found")}, "cuhk-03.mat", "lacks detected"),
        nasty(good, "old-mat", {"cuhk-03.mat": mat(a=1)}, "cuhk-03.mat", "HDF5"),
    ]  # fmt: skip


def cuhk02_cases() -> list[SetCase]:
    """The same local id in P1 and P5; both nestings."""
    rows: tuple[Row, ...] = tuple(
        (f"P{pair}/cam{view}/007_{pair}{view}.png", "train" if pair < 5 else ("query", "gallery")[view - 1],
         pair * 100000 + 7, 2 * (pair - 1) + view - 1)
        for pair in range(1, 6)
        for view in (1, 2)
    )  # fmt: skip
    nested = tuple((f"Dataset/{r[0]}", *r[1:]) for r in rows)
    good = SetCase("cuhk02-good", "cuhk02", images(*(r[0] for r in rows)), rows)
    return [
        good,
        SetCase("cuhk02-nested", "cuhk02", images(*(r[0] for r in nested)), nested),
        nasty(good, "name", {"P1/cam1/x7.png": png()}, "P1/cam1/x7.png"),
        nasty(good, "no-pair", {"P3/cam2/007_32.png": None}, "P3/cam2/"),
    ]


def _struct(**fields: Any) -> np.ndarray:
    record = np.empty((1, 1), dtype=[(name, object) for name in fields])
    record[0, 0] = tuple(fields.values())
    return record


def _box(scene: str, *box: float) -> np.ndarray:
    return _struct(imname=scene, idlocate=np.array(box, float).reshape(1, -1), ishard=0)


def _person(name: str, *boxes: np.ndarray) -> np.ndarray:
    return _struct(idname=name, nAppear=len(boxes), scene=np.concatenate(boxes, axis=1))


def cuhk_sysu_cases() -> list[SetCase]:
    """Three scenes; one empty gallery box, one box past the edge (scenes are 20 x 40 pixels)."""
    scenes = {f"Image/SSM/s{n}.jpg": jpeg(n, (20, 40)) for n in (1, 2, 3)}
    asked = _struct(imname="s2.jpg", idlocate=np.array([[2.0, 3, 8, 16]]), ishard=0, idname="p11")
    gallery = np.concatenate([_box("s3.jpg", 15, 30, 10, 16), _box("s1.jpg")], axis=1)

    def notes(query: np.ndarray = asked, trained: str = "p10", person: str = "s1.jpg") -> dict[str, bytes]:
        first = _person(trained, _box(person, -2, 1, 8, 16), _box("s3.jpg", 5, 6, 0, 16))
        second = _person("p11", _box("s2.jpg", 2, 3, 8, 16), _box("s3.jpg", 15, 30, 10, 16))
        return {
            "annotation/Person.mat": mat(Person=np.concatenate([first, second], axis=1)),
            "annotation/test/train_test/Train.mat": mat(Train=cell(first)),
            "annotation/test/train_test/TestG50.mat": mat(TestG50=_struct(Query=query, Gallery=gallery)),
            "annotation/pool.mat": mat(pool=1),
        }

    rows: tuple[Row, ...] = (
        ("Image/SSM/s1.jpg#xywh=0,1,6,16", "train", 10, None),
        ("Image/SSM/s2.jpg#xywh=2,3,8,16", "query", 11, None),
        ("Image/SSM/s3.jpg#xywh=15,30,10,16", "gallery", 11, None),
    )
    crops: tuple[Row, ...] = (
        ("train/00010_s1_0000001_0.jpg", "train", 10, None),
        ("query/00011_s2_0000002_1.jpg", "query", 11, None),
        ("gallery/00011_s3_0000003_0.jpg", "gallery", 11, None),
    )
    ready = SetCase("cuhk-sysu-crops", "cuhk-sysu",
                    images(*(r[0] for r in crops)) | {"combine/00010_s1_0000001_0.jpg": jpeg()}, crops)  # fmt: skip
    good = SetCase("cuhk-sysu-good", "cuhk-sysu", scenes | notes(), rows)
    wrong = _struct(imname="s2.jpg", idlocate=np.array([[2.0, 3, 8, 16]]), ishard=0, idname="eleven")
    return [
        good,
        ready,
        nasty(good, "leak", notes(trained="p11"), "TestG50.mat", "p11"),
        nasty(good, "name", notes(wrong), "TestG50.mat", "eleven"),
        nasty(good, "no-scene", notes(person="s9.jpg"), "Person.mat", "Image/SSM/s9.jpg"),
        nasty(good, "key", {"annotation/Person.mat": mat(People=1)}, "Person.mat", "holds People"),
        nasty(ready, "name", {"query/11_s2_1_1.jpg": jpeg()}, "query/11_s2_1_1.jpg"),
    ]
