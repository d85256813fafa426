"""Smallest trees of the video and the visible-infrared sets, with what a parser must say (specification 8.1)."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from tests.fixtures_trees import jpeg, png
from tests.fixtures_trees_sets import Row, SetCase, hdf5, images, mat, nasty


def _mars_name(person: str, camera: int, track: int, frame: int) -> str:
    return f"{person}C{camera}T{track:04d}F{frame:03d}.jpg"


def mars_cases() -> list[SetCase]:
    """Two train ids, three test ids, junk, a distractor, a tracklet of one frame, a query id without gallery."""
    train = [_mars_name("0001", 1, 1, f) for f in (1, 2)] + [_mars_name("0003", 6, 1, 9)]
    test_rows = [  # name, camera, track, frames
        ("00-1", 1, 1, (1, 2)), ("0000", 2, 1, (1,)), ("0002", 1, 1, (1, 2, 3)), ("0002", 2, 1, (5,)),
        ("0004", 3, 1, (1, 2)), ("0006", 3, 2, (1, 2)), ("0006", 4, 1, (7, 1000)),
    ]  # fmt: skip
    test = [_mars_name(n, c, t, f) for n, c, t, frames in test_rows for f in frames]
    ends = np.cumsum([len(frames) for *_, frames in test_rows])
    table = [
        [int(e) - len(r[3]) + 1, int(e), int(r[0].replace("00-1", "-1")), r[1]]
        for r, e in zip(test_rows, ends, strict=True)
    ]
    sides = {"train": train, "test": test}

    def info(tracks: list[list[int]] = table, queries: tuple[int, ...] = (3, 5, 6)) -> dict[str, bytes]:
        return {
            **{f"info/{side}_name.txt": "\n".join(names).encode() for side, names in sides.items()},
            "info/tracks_train_info.mat": mat(track_train_info=np.array([[1, 2, 1, 1], [3, 3, 3, 6]], np.uint16)),
            "info/tracks_test_info.mat": mat(track_test_info=np.array(tracks, float)),
            "info/query_IDX.mat": mat(query_IDX=np.array([queries], float)),
        }

    files = images(*(f"bbox_{side}/{name[:4]}/{name}" for side, names in sides.items() for name in names)) | info()
    rows: list[Row] = [
        (f"bbox_train/{n[:4]}/{n}", "train", int(n[:4]), int(n[5]) - 1, "rgb", int(n[:4] == "0003"), int(n[-7:-4]), ())
        for n in train
    ]
    for number, (person, camera, track, frames) in enumerate(test_rows):
        split = "query" if number + 1 in (3, 5, 6) else "gallery"
        rows += [
            (f"bbox_test/{person}/{_mars_name(person, camera, track, f)}", split, int(person), camera - 1, "rgb",
             2 + number, f, ())
            for f in frames
            if person != "00-1"
        ]  # fmt: skip
    good = SetCase("mars-good", "mars", files, tuple(rows))
    other_id = [[*row[:2], 9, row[3]] if row[2] == 2 else row for row in table]
    tracks = "info/tracks_test_info.mat"
    return [
        good,
        nasty(good, "beyond", info([*table, [14, 99, 6, 4]]), tracks, "row 8", "14 to 99"),
        nasty(good, "other-id", info(other_id), tracks, "row 3", "id 9", "0002C1T0001F001.jpg"),
        nasty(good, "query-row", info(queries=(3, 8)), "query_IDX.mat", "row 8"),
        nasty(good, "missing", {"bbox_test/0004/0004C3T0001F002.jpg": None}, "row 5", "0004C3T0001F002.jpg"),
        nasty(good, "columns", {tracks: mat(track_test_info=np.zeros((2, 3)))}, tracks, "(2, 3)"),
        nasty(good, "key", {tracks: mat(other=1)}, tracks, "holds other"),
        nasty(good, "stray", {"info/notes.txt": b"x"}, "info/notes.txt"),
    ]


def ls_vid_cases() -> list[SetCase]:
    """Prefixes that end in 1 and 10, a tracklet of one frame, junk, queries as HDF5 and .npy, both trees."""
    tracklets = (  # side, prefix, pid, camera, frames
        ("train", "tracklet_train/0001/0001_1_03_1", 1, 3, (1, 2)),
        ("train", "tracklet_train/0001/0001_1_03_10", 1, 3, (2, 11)),
        ("val", "tracklet_val/0002/0002_1_15_1", 2, 15, (1,)),
        ("test", "tracklet_test/0003/0003_1_01_1", 3, 1, (1, 2)),
        ("test", "tracklet_test/0003/0003_1_02_1", 3, 2, (1,)),
        ("test", "tracklet_test/-1/9999_1_02_1", -1, 2, (1,)),
    )  # fmt: skip
    frames = images(*(f"{prefix}_{n:05d}.jpg" for _, prefix, _, _, numbers in tracklets for n in numbers))

    def lists(folder: str) -> dict[str, bytes]:
        return {
            f"{folder}/list_seq_{side}.txt": "".join(
                f"{p} {pid}\r\n" for s, p, pid, *_ in tracklets if s == side
            ).encode()
            for side in ("train", "val", "test")
        }

    rows: tuple[Row, ...] = tuple(
        (f"{prefix}_{n:05d}.jpg", {"test": "query" if place == 4 else "gallery"}.get(side, side), pid, camera - 1,
         "rgb", place, n, ())
        for place, (side, prefix, pid, camera, numbers) in enumerate(tracklets)
        for n in numbers
        if pid >= 0
    )  # fmt: skip

    def query(file: Any) -> None:
        file["query"] = np.array([[2.0]])

    buffer = io.BytesIO()
    np.save(buffer, np.array([2]))
    good = SetCase(
        "ls-vid-good", "ls-vid", frames | lists("list_sequence") | {"test/data/info_test.mat": hdf5(query)}, rows
    )
    info = SetCase(
        "ls-vid-info", "ls-vid", frames | lists("info/list_sequence") | {"info/data/info_test.mat": hdf5(query)}, rows
    )
    plain = SetCase(
        "ls-vid-npy", "ls-vid", frames | lists("list_sequence") | {"test/query.npy": buffer.getvalue()}, rows
    )
    source = "list_sequence/list_seq_train.txt"
    odd = "tracklet_train/0001/0001_1_16_4_00001.jpg"
    return [
        good, info, plain,
        nasty(good, "no-frames", {source: b"tracklet_train/0001/0001_1_03_2 1"}, source, "line 1", "0001_1_03_2"),
        nasty(good, "grammar", {source: b"tracklet_train/0001/0001_1_03_1"}, source, "line 1", "'<prefix> <id>'"),
        nasty(good, "camera-16", {source: b"tracklet_train/0001/0001_1_16_4 1", odd: jpeg()}, odd, "1 to 15"),
        nasty(good, "no-query", {"test/data/info_test.mat": None}, "info_test.mat", "query.npy"),
        nasty(good, "query-key", {"test/data/info_test.mat": hdf5(lambda f: f.create_dataset("q", data=1))}, "holds q"),
        nasty(good, "query-row", {"list_sequence/list_seq_test.txt": b"tracklet_test/0003/0003_1_01_1 3"}, "row 2"),
    ]  # fmt: skip


def ilids_vid_cases() -> list[SetCase]:
    """Four ids with a gap in the numbers, ten rows of positions, frames that sort wrongly as text."""
    people, numbers = (1, 2, 5, 9), (9, 10, 100)
    table = np.array([np.roll([1, 2, 3, 4], k) for k in range(10)], float)
    files = images(*(
        f"i-LIDS-VID/sequences/cam{c}/person{p:03d}/cam{c}_person{p:03d}_{n}.png"
        for c in (1, 2) for p in people for n in numbers
    ))  # fmt: skip
    matrix = "train-test people splits/train_test_splits_ilidsvid.mat"
    files |= {matrix: mat(ls_set=table), "i-LIDS-VID/images/cam1/x.png": png(), "README.txt": b"x"}

    def rows(half: slice) -> tuple[Row, ...]:
        tests = [{people[int(i) - 1] for i in row[half]} for row in table]
        out: list[Row] = []
        for c in (1, 2):
            for place, p in enumerate(people):
                trials = tuple(("query", "gallery")[c - 1] if p in t else "train" for t in tests)
                out += [
                    (f"i-LIDS-VID/sequences/cam{c}/person{p:03d}/cam{c}_person{p:03d}_{n}.png", trials[0], p, c - 1,
                     "rgb", 4 * (c - 1) + place, n, trials)
                    for n in numbers
                ]  # fmt: skip
        return tuple(out)

    good = SetCase("ilids-vid-good", "ilids-vid", files, rows(slice(0, 2)))
    folder = "i-LIDS-VID/sequences/cam1/person001/"
    return [
        good,
        SetCase("ilids-vid-last", "ilids-vid", files, rows(slice(2, 4)), options={"test_half": "last"}),
        nasty(good, "half", {}, "test_half='tfclip'", "TF-CLIP", test_half="tfclip"),
        nasty(good, "one-camera", {"i-LIDS-VID/sequences/cam1/person007/cam1_person007_1.png": png()}, "person007"),
        nasty(good, "other-folder", {f"{folder}cam1_person002_1.png": png()}, "cam1_person002_1.png", "another person"),
        nasty(good, "positions", {matrix: mat(ls_set=np.array([[1, 2, 3, 9]]))}, matrix, "4 positions"),
    ]


def duke_video_cases() -> list[SetCase]:
    """Old and new names; frame numbers begin at 2 and have holes."""
    rows: tuple[Row, ...] = (
        ("train/0001/0001/0001C6F0002X30823.jpg", "train", 1, 5, "rgb", 0, 2, ()),
        ("train/0001/0001/0001C6F0099X30920.jpg", "train", 1, 5, "rgb", 0, 99, ()),
        ("query/0005/0001/0005_C1_F0001_X1.jpg", "query", 5, 0, "rgb", 1, 1, ()),
        ("gallery/0005/0002/0005_C2_F0001_X9.jpg", "gallery", 5, 1, "rgb", 2, 1, ()),
    )
    good = SetCase("duke-video", "dukemtmc-videoreid", images(*(r[0] for r in rows)), rows)
    nested = tuple((f"DukeMTMC-VideoReID/{r[0]}", *r[1:]) for r in rows)
    return [
        good,
        SetCase("duke-video-nested", "dukemtmc-videoreid", images(*(r[0] for r in nested)), nested),
        nasty(
            good, "person", {"query/0005/0001/0006_C1_F0002_X2.jpg": jpeg()}, "0006_C1_F0002_X2.jpg", "another person"
        ),
        nasty(good, "camera", {"query/0005/0001/0005_C2_F0002_X2.jpg": jpeg()}, "0005_C2_F0002_X2.jpg", "0005/0001"),
        nasty(good, "flat", {"query/0005_C2_F0002_X2.jpg": jpeg()}, "query/0005_C2_F0002_X2.jpg"),
    ]


def sysu_cases() -> list[SetCase]:
    """Six cameras, three test ids of which one is absent from cam2 and one is in cam3 alone, Thumbs.db in a folder."""
    seen = {1: (1, 2, 3, 4, 5, 6), 2: (1, 3), 4: (1, 2, 3), 5: (1, 3), 6: (3,), 9: (4,)}  # id 9 is in no list
    splits = {1: "train", 2: "val", 4: "test", 5: "test", 6: "test"}
    keeping = "cam1/0004/Thumbs.db"

    def rows(val: str) -> tuple[Row, ...]:
        found = []
        for camera in range(1, 7):
            for pid, cameras in seen.items():
                if camera in cameras and pid in splits:
                    split = val if splits[pid] == "val" else splits[pid]
                    found += [
                        (f"cam{camera}/{pid:04d}/{n:04d}.jpg", split, pid, camera, "ir" if camera in (3, 6) else "rgb")
                        for n in (1, 20)
                    ]
        return tuple(found)

    files = {
        f"cam{c}/{pid:04d}/{n:04d}.jpg": jpeg(n + pid, mode="L" if c in (3, 6) else "RGB")
        for pid, cameras in seen.items() for c in cameras for n in (1, 20)
    }  # fmt: skip
    files |= {keeping: b"x", "exp/train_id.txt": b"1\n", "exp/val_id.txt": b"2,\n", "exp/test_id.txt": b" 4,5, 6\r\n",
              "exp/available_id.mat": mat(id=1)}  # fmt: skip
    good = SetCase("sysu-good", "sysu-mm01", files, rows("train"), ignored=(keeping,))
    return [
        good,
        SetCase("sysu-val", "sysu-mm01", files, rows("val"), options={"val_to_train": False}, ignored=(keeping,)),
        nasty(good, "list", {"exp/test_id.txt": b"4;5"}, "exp/test_id.txt", "commas"),
        nasty(good, "two-lists", {"exp/val_id.txt": b"2,4"}, "exp/test_id.txt", "4", "exp/val_id.txt"),
        nasty(good, "name", {"cam1/0004/1.jpg": jpeg()}, "cam1/0004/1.jpg"),
        nasty(good, "no-camera", {p: None for p in files if p.startswith("cam6/")}, "cam6/"),
    ]


def regdb_cases() -> list[SetCase]:
    """Four people, two trials; labels are equal in train and test files and mean other people."""
    trials = ({"train": (3, 1), "test": (2, 10)}, {"train": (10, 2), "test": (1, 3)})
    kinds = (("Visible", "v"), ("Thermal", "t"))
    names = {
        (k, p): [f"{k}/{p}/male_front_{s}_{n:05d}_{n}.bmp" for n in (7, 12)] for k, s in kinds for p in (1, 2, 3, 10)
    }
    files = images(*(path for paths in names.values() for path in paths))
    for k, trial in enumerate(trials, 1):
        for split, people in trial.items():
            for kind, _ in kinds:
                lines = [f"{path} {label}" for label, p in enumerate(people) for path in names[kind, p]]
                files[f"idx/{split}_{kind.lower()}_{k}.txt"] = "\n".join(lines).encode()

    def split_of(person: int) -> tuple[str, ...]:
        return tuple("train" if person in trial["train"] else "test" for trial in trials)

    rows: tuple[Row, ...] = tuple(
        (path, split_of(p)[0], p, camid, ("rgb", "ir")[camid], None, None, split_of(p))
        for camid, (kind, _) in enumerate(kinds)
        for p in (1, 10, 2, 3)  # bytewise by path
        for path in names[kind, p]
    )
    good = SetCase("regdb-good", "regdb", files, rows)
    source = "idx/train_thermal_1.txt"
    line = files[source].decode().splitlines()

    def bad(name: str, text: str, *error: str) -> SetCase:
        return nasty(good, name, {source: text.encode()}, source, *error)

    return [
        good,
        bad("label", line[0].replace(" 0", " 1") + "\n" + "\n".join(line[1:]), "label 1", "person 3"),
        bad("ragged", "Thermal/1/x.bmp", "line 1", "'<path> <label>'"),
        bad("missing", "Thermal/1/x.bmp 0", "line 1", "Thermal/1/x.bmp"),
        bad("other-modality", files["idx/train_visible_1.txt"].decode(), "line 1", "Visible/3"),
        bad("twice", "\n".join([*line, line[0]]), "second time"),
        nasty(good, "in-both", {"idx/test_thermal_1.txt": files[source]}, "idx/test_thermal_1.txt", "second time"),
        nasty(
            good, "gap", {f"idx/{s}_{k}_1.txt": None for s in ("train", "test") for k in ("visible", "thermal")}, "[2]"
        ),
        nasty(good, "no-file", {"idx/test_visible_2.txt": None}, "idx/test_visible_2.txt"),
    ]


def llcm_cases() -> list[SetCase]:
    """A visible cam3 without an infrared one; training lists name folders that begin with `cam` and hold `camera`."""
    train = {
        "vis": [("my_camera/cam3/0007/a.jpg", 0), ("my_camera/cam9/0007/b.jpg", 0)],
        "nir": [("n/cam2/0007/c.jpg", 0)],
    }
    test = [
        "test_vis/cam3/0011/x.jpg",
        "test_vis/cam1/0011/y.jpg",
        "test_nir/cam1/0011/z.jpg",
        "test_nir/cam9/0500/u.jpg",
    ]
    files = images(*(path for lines in train.values() for path, _ in lines), *test)
    files |= {
        f"idx/train_{side}.txt": "\n".join(f"{p} {n}" for p, n in lines).encode() for side, lines in train.items()
    }
    files["idx/test_id.txt"] = b"11\n"
    rows: tuple[Row, ...] = (
        ("my_camera/cam3/0007/a.jpg", "train", 10000, 3), ("my_camera/cam9/0007/b.jpg", "train", 10000, 9),
        ("n/cam2/0007/c.jpg", "train", 10000, 2, "ir"), ("test_vis/cam1/0011/y.jpg", "test", 11, 1),
        ("test_vis/cam3/0011/x.jpg", "test", 11, 3), ("test_nir/cam1/0011/z.jpg", "test", 11, 1, "ir"),
    )  # fmt: skip
    good = SetCase("llcm-good", "llcm", files, rows)
    source = "idx/train_vis.txt"
    return [
        good,
        nasty(good, "nir-cam3", {"test_nir/cam3/0011/z.jpg": jpeg()}, "test_nir/cam3/0011/z.jpg", "camera 3"),
        nasty(good, "no-camera", {source: b"my_camera/0007/a.jpg 0"}, source, "line 1", "cam1 to cam9"),
        nasty(good, "missing", {source: b"v/cam1/0007/a.jpg 0"}, source, "line 1", "not there"),
        nasty(good, "twice", {source: files[source] + b"\n" + files[source]}, source, "line 3", "second time"),
        nasty(good, "leak", {source: b"test_vis/cam1/0011/y.jpg 0"}, "test_vis/cam1/0011/y.jpg", "training list"),
    ]
