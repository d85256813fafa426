"""Smallest trees of the four small sets and of a lab's own, with what a parser must say (specification 8.1)."""

from __future__ import annotations

import json

import numpy as np

from tests.fixtures_trees import jpeg, png
from tests.fixtures_trees_sets import Row, SetCase, cell, images, mat, nasty

BOTH = range(1, 7)


def prid_files() -> dict[str, bytes]:
    """Six people in both views, one of cam_a alone and two of cam_b alone."""
    names = [*(f"cam_{c}/person_{n:04d}.png" for c in "ab" for n in BOTH)]
    names += ["cam_a/person_0201.png", "cam_b/person_0201.png", "cam_b/person_0202.png"]
    return images(*(f"single_shot/{name}" for name in names), "multi_shot/cam_a/person_0001/0001.png")


def viper_files() -> dict[str, bytes]:
    """Six people whose view angles sort differently in the two views."""
    return images(*(f"cam_{c}/{n:03d}_{angle}.bmp" for c, angle in (("a", 0), ("b", 90)) for n in range(6)))


def ilids_files(folder: str = "Persons") -> dict[str, bytes]:
    """Seven people with two or three images."""
    return images(*(f"{folder}/{n:04d}{k:03d}.jpg" for n in range(1, 8) for k in range(1, 3 + (n == 2))))


def nested_entry(ids: list[int]) -> np.ndarray:
    """One entry of trainIdxAll, nested as MATLAB does it: a cell with a structure with a list."""
    record = np.empty((1, 1), dtype=[("p", object), ("idx", object)])
    record[0, 0] = (0.5, np.array([ids], float))
    return cell(record)


def grid_files(entries: int = 10) -> dict[str, bytes]:
    """Six people and two strangers; ten entries of three training ids."""
    names = [f"probe/{n:04d}_{n}_25004_107_32_106_221.jpeg" for n in BOTH]
    names += [f"gallery/{n:04d}_8_25008_107_32_106_221.jpeg" for n in BOTH]
    names += [f"gallery/0000_2_2500{k}_1_2_3_4.jpeg" for k in (1, 2)]
    lists = [nested_entry([1 + k % 4, 2 + k % 4, 3 + k % 4]) for k in range(entries)]
    return images(*names) | {"features_and_partitions.mat": mat(trainIdxAll=cell(*lists), features=np.zeros(3))}


def split_case() -> SetCase:
    """A split file in circulation: absolute paths of somebody's machine, ids that count anew. Taken verbatim."""
    views = (("a", 0), ("b", 90))
    trial = {
        "train": [[f"/home/somebody/data/VIPeR/cam_{c}/00{n}_{a}.bmp", n, 0] for c, a in views for n in (0, 5)],
        "query": [["/home/somebody/VIPeR/cam_a/001_0.bmp", 0, 0]],
        "gallery": [["/home/somebody/VIPeR/cam_b/001_90.bmp", 0, 1]],
    }  # fmt: skip
    other = {"train": ["cam_a/001_0.bmp"], "query": [], "gallery": []}
    splits = {("a", 0): ("train", ""), ("a", 5): ("train", ""), ("b", 0): ("train", ""), ("b", 5): ("train", "")}
    splits |= {("a", 1): ("query", "train"), ("b", 1): ("gallery", "")}
    rows: tuple[Row, ...] = tuple(
        (f"cam_{c}/00{n}_{a}.bmp", splits.get((c, n), ("", ""))[0] or "unused", n, int(c == "b"), "rgb", None, None,
         splits.get((c, n), ("", "")))
        for c, a in views
        for n in range(6)
    )  # fmt: skip
    files = viper_files() | {"splits.json": json.dumps([trial, other]).encode()}
    return SetCase("viper-splits", "viper", files, rows, options={"splits": "splits.json"})


def small_nasty() -> list[SetCase]:
    """What the four sets refuse."""
    prid, viper, ilids, grid = (
        SetCase(layout, layout, files)
        for layout, files in (("prid2011", prid_files()), ("viper", viper_files()), ("i-lids", ilids_files()),
                              ("grid", grid_files()))
    )  # fmt: skip
    given = split_case()
    lists = "features_and_partitions.mat"
    return [
        nasty(prid, "one-view", {"single_shot/cam_b/person_0003.png": None}, "person_0003", "one camera only"),
        nasty(prid, "name", {"single_shot/cam_a/person_12.png": png()}, "person_12.png"),
        nasty(viper, "mismatch", {"cam_b/005_90.bmp": None}, "005", "one of them only"),
        nasty(viper, "twice", {"cam_a/005_45.bmp": jpeg()}, "cam_a", "twice"),
        nasty(ilids, "lonely", {"Persons/0009001.jpg": jpeg()}, "0009001.jpg", "person 9"),
        nasty(ilids, "png", {"Persons/0001009.png": png()}, "0001009.png"),
        nasty(grid, "camera-9", {"probe/0001_9_1_1_2_3_4.jpeg": jpeg()}, "0001_9_1_1_2_3_4.jpeg"),
        nasty(grid, "stranger-probe", {"probe/0000_1_1_1_2_3_4.jpeg": jpeg()}, "probe/", "0000"),
        nasty(grid, "strange-ids", {lists: mat(trainIdxAll=cell(nested_entry([1, 2, 77])))}, lists, "entry 1", "77"),
        nasty(grid, "no-lists", {lists: None}, lists),
        nasty(grid, "broken", {lists: b"no MATLAB"}, lists, "not a MATLAB file"),
        nasty(given, "lost-name", {"cam_a/005_0.bmp": None, "cam_b/005_90.bmp": None}, "splits.json", "005_0.bmp",
              splits="splits.json"),
        nasty(given, "no-split-file", {"splits.json": b"[]"}, "splits.json", "split file", splits="splits.json"),
    ]  # fmt: skip


CSV_HEAD = "path,pid,camid,split"


def csv_cases() -> list[SetCase]:
    """A lab's table in its short and its full form."""
    files = images("a.jpg", "b c/d.png", "\u00e9.jpg")
    short = "\ufeff" + CSV_HEAD + "\r\na.jpg,7,0,train\r\nb c/d.png,8,,query\r\n\u00e9.jpg,8,2,gallery\r\n"
    rows: tuple[Row, ...] = (
        ("a.jpg", "train", 7, 0), ("b c/d.png", "query", 8, None), ("\u00e9.jpg", "gallery", 8, 2),
    )  # fmt: skip
    full = (
        "frame,tracklet,modality,caption,split,camid,pid,path\n"
        '3,0,ir,"two, with a comma",train|query,1,5,a.jpg\n'
        "3,0,ir,second,train|query,1,5,a.jpg\n"
        ",,,,|gallery,,5,b c/d.png\n"
    )
    full_rows: tuple[Row, ...] = (
        ("a.jpg", "train", 5, 1, "ir", 0, 3, ("train", "query")),
        ("b c/d.png", "unused", 5, None, "rgb", None, None, ("", "gallery")),
    )
    good = SetCase("csv-short", "csv", files | {"dataset.csv": short.encode()}, rows)
    tabs = SetCase("csv-tabs", "csv", files | {"dataset.tsv": short.replace(",", "\t").encode()}, rows)
    two = {path: data for path, data in files.items() if path != "\u00e9.jpg"}
    whole = SetCase("csv-full", "csv", two | {"dataset.csv": full.encode()}, full_rows)

    def bad(name: str, text: str, *error: str) -> SetCase:
        return nasty(good, name, {"dataset.csv": text.encode()}, "dataset.csv", *error)

    return [
        good, tabs, whole,
        bad("no-column", "path,pid,split\n", "'camid'"),
        bad("column", f"{CSV_HEAD},color\n", "'color'"),
        bad("missing", f"{CSV_HEAD}\nz.jpg,1,0,train\n", "line 2", "'z.jpg'"),
        bad("split", f"{CSV_HEAD}\na.jpg,1,0,probe\n", "line 2", "'probe'"),
        bad("pid", f"{CSV_HEAD}\na.jpg,x,0,train\n", "line 2", "pid='x'"),
        bad("no-pid", f"{CSV_HEAD}\na.jpg,,0,train\n", "line 2", "no pid"),
        bad("camid", f"{CSV_HEAD}\na.jpg,1,-1,train\n", "line 2", "camid='-1'"),
        bad("modality", f"{CSV_HEAD},modality\na.jpg,1,0,train,thermal\n", "modality='thermal'"),
        bad("twice", f"{CSV_HEAD}\na.jpg,1,0,train\na.jpg,1,0,train\n", "line 3", "repeats"),
        bad("contradiction", f"{CSV_HEAD},caption\na.jpg,1,0,train,x\na.jpg,2,0,train,y\n", "line 3", "contradicts"),
        bad("ragged", f"{CSV_HEAD}\na.jpg,1,0,train,more\n", "line 2", "more fields"),
        bad("quotes", f'{CSV_HEAD}\n"a.jpg,1,0,train\n', "cannot be read"),
        bad("trials", f"{CSV_HEAD}\na.jpg,1,0,train|test\nb c/d.png,1,0,train\n", "0 and with 2"),
        nasty(good, "latin", {"dataset.csv": "path\n\u00e9".encode("latin-1")}, "UTF-8"),
        nasty(good, "both", {"dataset.tsv": b"x"}, "dataset.csv", "dataset.tsv"),
    ]  # fmt: skip
