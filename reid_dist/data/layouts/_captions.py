"""Caption sets share one shape: a JSON list of images with `split`, `id`, an image path and `captions` (datasets
specification 4).

Records keep the file's order, on which noise indices and image numbers rest. Captions stay verbatim: cleaning is the
tokenizer's business. An unknown split is refused (the published code sends it to val), as are empty captions, images
that are not on disk, and training ids that do not run from 0 after the set's shift. Ids are shifted by the set's base
in *every* split; the published code shifts training ids alone, which names two people alike across splits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reid_dist.data.captions import Groups
from reid_dist.data.layouts._files import Folder
from reid_dist.data.layouts.base import Sample, Tree
from reid_dist.data.records import DatasetError, Record

SPLITS = ("train", "val", "test")
DIVERSITY = ("diversity_captions", "val_diversity_captions")
_USED = {"split", "id", "captions"}
_IMAGE = re.compile(r"(?i).+\.(?:jpg|jpeg|png|bmp)")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionSet:
    """How one caption set differs from the others."""

    name: str
    files: tuple[str, ...]  # accepted names of the annotation file; the first is written
    image_key: str
    folder: str = "imgs/"  # where image paths start, below the root
    first_id: int = 0  # smallest id in the file; subtracted in all splits
    splits: tuple[str, ...] = SPLITS
    stem: str = ""  # what the annotation file's name begins with, when it goes on in several ways

    def records(self, tree: Tree) -> list[Record]:
        """Parse the annotation file against the tree. Raises DatasetError naming file, entry and value."""
        path = tree.one_of(*self._names(tree))
        entries = tree.read_json(path)
        where = f"{tree.store.uri}: {path}"
        if not isinstance(entries, list) or not entries:
            raise DatasetError(f"{where}: expected a list of images, found {type(entries).__name__} without any")
        records: dict[str, Record] = {}
        for number, entry in enumerate(entries):
            with tree.noting():
                record = self._record(tree, entry, f"{where}, entry {number}")
                if record.path in records:
                    raise DatasetError(
                        f"{where}, entry {number}: {record.path} is listed twice; keep one entry per image"
                    )
                records[record.path] = record
        with tree.noting():
            self._check_train_ids(where, records.values())
        self._pass_over_rest(tree)
        tree.notes["annotation"] = path
        if self.first_id:
            tree.notes["ids"] = f"the file's ids minus {self.first_id}, in every split"
        extra = sorted({key for entry in entries for key in entry} - _USED - {self.image_key})
        if extra:
            tree.notes["unread keys"] = ", ".join(extra)
        return list(records.values())

    def diversity(self, tree: Tree) -> dict[str, tuple[Groups, ...]]:
        """{image path: per caption its groups of interchangeable sub-sentences} of the entries that have them (RDA).

        Raises DatasetError naming the entry when lengths or kinds are wrong.
        """
        path = tree.one_of(*self._names(tree))
        found = self.grouped(tree.read_json(path), f"{tree.store.uri}: {path}")
        return {image: tuple(groups for _, groups in entry) for image, entry in found.items()}

    def grouped(self, entries: Any, where: str) -> dict[str, list[tuple[str, Groups]]]:
        """{image path: [(caption, its groups)]} of an annotation file's entries that have groups (RDA).

        They hold, parallel to `captions`, a text (one group of one) or a list of groups (what is left over at the end
        counts for nothing, as with the authors); test entries may call it `val_diversity_captions`. Raises DatasetError
        naming the entry when lengths or kinds are wrong.
        """
        if not isinstance(entries, list):
            raise DatasetError(f"{where}: expected a list of images, found {type(entries).__name__}")
        found: dict[str, list[tuple[str, Groups]]] = {}
        for number, entry in enumerate(entries):
            key = next((key for key in DIVERSITY if key in entry), None)
            if key is None:
                continue
            here = f"{where}, entry {number}"
            captions, image = self._field(entry, "captions", here), self._field(entry, self.image_key, here)
            if not isinstance(entry[key], list) or len(entry[key]) < len(captions):
                raise DatasetError(f"{here}: {key} must be a list of {len(captions)}, one for each caption")
            groups = [_groups(item, f"{here}: {key}") for item in entry[key][: len(captions)]]
            found[self.folder + image] = list(zip(captions, groups, strict=True))
        return found

    def _names(self, tree: Tree) -> tuple[str, ...]:
        found = [
            path for path in tree.sizes if "/" not in path and path.endswith(".json") and path.startswith(self.stem)
        ]
        return tuple(found) if self.stem and found else self.files

    def _record(self, tree: Tree, entry: Any, where: str) -> Record:
        if not isinstance(entry, dict):
            raise DatasetError(
                f"{where}: expected an object with split, id, {self.image_key}, captions; found {entry!r:.80}"
            )
        split, pid, image, captions = (
            self._field(entry, key, where) for key in ("split", "id", self.image_key, "captions")
        )
        if split not in self.splits:
            raise DatasetError(f"{where}: split={split!r}; {self.name} has {', '.join(self.splits)}")
        if type(pid) is not int or pid < self.first_id:
            raise DatasetError(f"{where}: id={pid!r}; ids are whole numbers from {self.first_id} on")
        if (
            not isinstance(image, str)
            or not _IMAGE.fullmatch(image)
            or image.startswith("/")
            or ".." in image.split("/")
        ):
            raise DatasetError(
                f"{where}: {self.image_key}={image!r}; expected an image path below {self.folder or 'the root'}"
            )
        if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
            raise DatasetError(f"{where}: captions={captions!r:.80}; expected a list of one or more texts")
        if not all(text.strip() for text in captions):
            raise DatasetError(f"{where}: {image} has an empty caption; remove the caption or write one")
        path = self.folder + image
        if path not in tree.sizes:
            raise DatasetError(f"{where}: image {path} is not there; fetch it, or remove the entry")
        return Record(
            path=tree.image(path), split=split, pid=pid - self.first_id, domain=self.name, captions=tuple(captions)
        )

    def _field(self, entry: dict[str, Any], key: str, where: str) -> Any:
        if key not in entry:
            raise DatasetError(f"{where}: key {key!r} is missing; found {', '.join(sorted(entry))}")
        return entry[key]

    def _check_train_ids(self, where: str, records: Iterable[Record]) -> None:
        pids = sorted({record.pid for record in records if record.split == "train"})
        gap = next((want for want, pid in enumerate(pids) if pid != want), None)
        if gap is not None:
            raise DatasetError(f"{where}: training ids must run without gaps; id {gap + self.first_id} is missing")

    def _pass_over_rest(self, tree: Tree) -> None:
        """Images that no entry names are no error, since the archives hold some; they are counted."""
        spare = {path for path in tree.unclaimed if path.startswith(self.folder) and _IMAGE.fullmatch(path)}
        tree.unclaimed -= spare
        if spare:
            tree.warnings.append(f"{len(spare)} images without an entry, for example {min(spare)}")

    def write(self, folder: Path, samples: Iterable[Sample], place: Any) -> list[str]:
        """Write `samples` below `folder`; `place(sample)` names an image below the image folder. One entry per
        sample, in order. Returns the images' paths.
        """
        entries, tree = [], Folder(folder)
        for sample in samples:
            if sample.split not in self.splits:
                raise ValueError(f"{self.name} has no split {sample.split!r}")
            image = place(sample)
            tree.image(self.folder + image, sample.image)
            entry = {"split": sample.split, "id": sample.pid + self.first_id, self.image_key: image}
            entry["captions"] = list(sample.captions)
            if sample.diversity:
                entry[DIVERSITY[sample.split != "train"]] = [[list(g) for g in groups] for groups in sample.diversity]
            entries.append(entry)
        tree.json(self.files[0], entries)
        return tree.paths


def _groups(item: Any, where: str) -> Groups:
    if isinstance(item, str):
        item = [[item]]
    whole = isinstance(item, list) and item and all(isinstance(g, list) and g for g in item)
    if not whole or not all(isinstance(text, str) and text.strip() for group in item for text in group):
        raise DatasetError(f"{where}: expected a text, or a list of groups of texts, found {item!r:.80}")
    return tuple(tuple(group) for group in item)
