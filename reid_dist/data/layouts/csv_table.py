"""A lab's own dataset, described by one file: `dataset.csv` (or `.tsv`) beside the images. No code is needed.

Columns, named in the first line, in any order: `path` (below the root), `pid`, `camid` (empty: none), `split` (train,
val, query, gallery, test), and if wanted `modality` (rgb or ir), `tracklet`, `frame`, `caption`. An image with several
captions has one line for each; lines of one image must agree in everything else. Several divisions of the data stand
in `split` as `train|query|...`, one word per division, empty for none. UTF-8, with or without a byte-order mark.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from reid_dist.data.layouts._files import Folder
from reid_dist.data.layouts.base import Layout, Sample, Tree
from reid_dist.data.records import DatasetError, Record, first_split

NAME = "csv"
COLUMNS = ("path", "pid", "camid", "split", "modality", "tracklet", "frame", "caption")
REQUIRED = COLUMNS[:4]
SPLITS = ("train", "val", "query", "gallery", "test")
FILES = {"dataset.csv": ",", "dataset.tsv": "\t"}


def read(tree: Tree, domain: str = "") -> list[Record]:
    """Records in the order of first appearance. `domain` is the dataset's name in records, within which a pid is one
    person; packing gives the table's name, so that two datasets of this form are two. Raises DatasetError.
    """
    domain = domain or NAME
    source = tree.one_of(*FILES)
    try:
        text = tree.store.read(source).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise tree.wrong(source, f"is not UTF-8: {error}") from None
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=FILES[source], strict=True)
    names = [name.strip() for name in rows.fieldnames or ()]
    rows.fieldnames = names
    missing = [name for name in REQUIRED if name not in names]
    unknown = [name for name in names if name not in COLUMNS]
    if missing or unknown or len(set(names)) != len(names):
        what = (
            f"lacks the column {missing[0]!r}"
            if missing
            else f"has the unknown or doubled column {(unknown or names)[0]!r}"
        )
        raise tree.wrong(source, f"{what}; columns are {', '.join(COLUMNS)}")
    records: dict[str, Record] = {}
    try:
        for row in rows:
            with tree.noting():
                record = _record(tree, {k: (v or "").strip() for k, v in row.items() if k}, domain,
                                 f"{source}, line {rows.line_num},", None in row)  # fmt: skip
                known = records.get(record.path)
                if known and replace(known, captions=record.captions) != record:
                    raise tree.wrong(
                        f"{source}, line {rows.line_num},", f"contradicts an earlier line of {record.path}"
                    )
                if known and not record.captions:
                    raise tree.wrong(f"{source}, line {rows.line_num},", f"repeats {record.path}")
                captions = (*(known.captions if known else ()), *record.captions)
                records[record.path] = replace(record, captions=captions)
    except csv.Error as error:
        raise tree.wrong(f"{source}, line {rows.line_num},", f"cannot be read: {error}") from None
    _check_trials(tree, source, records.values())
    return list(records.values())


def _record(tree: Tree, row: dict[str, str], domain: str, where: str, ragged: bool) -> Record:
    if ragged:
        raise tree.wrong(where, "has more fields than the first line")
    path = row["path"]
    if path not in tree.sizes:
        raise tree.wrong(where, f"names {path!r:.200}, which is not there")
    tree.claim(path)
    trials = tuple(row["split"].split("|")) if "|" in row["split"] else ()
    if any(split not in SPLITS for split in ([t for t in trials if t] if trials else [row["split"]])):
        raise tree.wrong(where, f"split={row['split']!r:.80}; choose {', '.join(SPLITS)}")
    modality = row.get("modality") or "rgb"
    if modality not in ("rgb", "ir"):
        raise tree.wrong(where, f"modality={modality!r:.40}; choose rgb or ir")
    numbers = {name: _number(tree, row.get(name, ""), name, where) for name in ("pid", "camid", "tracklet", "frame")}
    pid = numbers.pop("pid")
    if pid is None:
        raise tree.wrong(where, "has no pid")
    captions = (row["caption"],) if row.get("caption") else ()
    return Record(
        path=tree.image(path), split=first_split(trials) if trials else row["split"], pid=pid, modality=modality,
        domain=domain, captions=captions, trials=trials, **numbers,
    )  # fmt: skip


def _number(tree: Tree, text: str, name: str, where: str) -> int | None:
    if not text:
        return None
    least = -1 if name == "pid" else 0
    if not text.removeprefix("-").isdecimal() or int(text) < least:
        raise tree.wrong(where, f"{name}={text!r:.40}; expected a whole number from {least} on, or nothing")
    return int(text)


def _check_trials(tree: Tree, source: str, records: Iterable[Record]) -> None:
    lengths = {len(record.trials) for record in records}
    if len(lengths) > 1:
        raise DatasetError(
            f"{tree.store.uri}: {source} has lines with {min(lengths)} and with {max(lengths)} divisions"
        )


def write(folder: Path, samples: Iterable[Sample]) -> list[str]:
    """Write `images/` and dataset.csv."""
    tree, text = Folder(folder), io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(COLUMNS)

    def shown(number: int | None) -> str:
        return "" if number is None else str(number)

    for sample in samples:
        name = f"{sample.modality}_{sample.pid}_{shown(sample.camid)}_{shown(sample.tracklet)}_{sample.frame}.jpg"
        path = tree.image(f"images/{name}", sample.image)
        split = "|".join(sample.trials) or sample.split
        for caption in sample.captions or ("",):
            table.writerow([path, sample.pid, shown(sample.camid), split, sample.modality, shown(sample.tracklet),
                            sample.frame, caption])  # fmt: skip
    tree.file("dataset.csv", text.getvalue().encode())
    return tree.paths


LAYOUT = Layout(
    name=NAME,
    task="any",
    tree="""my-dataset/
  dataset.csv         path,pid,camid,split[,modality][,tracklet][,frame][,caption]   (or dataset.tsv)
  ...                 the images, anywhere below""",
    obtain="Your own: write one line per image (one per caption where there are several).",
    expected={},
    read=read,
    write=write,
)
