"""What all layouts share: the file list of a tree, housekeeping rules, count checks, and the contract of a layout.

Datasets specification, section 0. A layout reads keys relative to the dataset's own root, so nothing above the root
(a folder called x_2024_c3_cam, say) can be mistaken for an id or a camera. Files come sorted bytewise, whatever order
the place lists them in. Housekeeping files are counted and passed over before anything else is decided; whatever a
layout then does not claim is an error in strict mode and a warning otherwise.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from reid_dist.data.records import DatasetError, ParsedDataset, Record
from reid_dist.errors import UserError
from reid_dist.storage.base import Store

log = logging.getLogger(__name__)

IMAGE = r"(?i:\.(?:jpg|jpeg|png|bmp))"  # extensions count whatever their case; paths keep their spelling
COMPANION = re.compile(
    r"(?i:readme|licen[cs]e|copying|changelog)[^/]*"
)  # papers that come with a download, at the root
SYNTHETIC_MARKER = ".reid-dist-synthetic.json"  # says that a tree was drawn by us, and how; hidden, so no parser minds
_HOUSEKEEPING = re.compile(r"\..*|(?i:thumbs\.db|desktop\.ini)|__MACOSX")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image to be written in some layout. Ids and cameras are those that the layout's parser returns."""

    split: str
    pid: int
    image: bytes  # encoded; a layout of another format than JPEG converts it without loss
    camid: int | None = None
    frame: int = 0  # numbers the images of one (pid, camid), or of one tracklet
    captions: tuple[str, ...] = ()
    modality: str = "rgb"
    tracklet: int | None = None  # unique in the dataset
    trials: tuple[str, ...] = ()
    diversity: tuple[tuple[tuple[str, ...], ...], ...] = ()  # per caption: sub-sentences, each a list of paraphrases


@dataclass
class Tree:
    """The files of one dataset, and what has been understood of them."""

    store: Store
    strict: bool
    sizes: dict[str, int]  # {relative path: bytes}, sorted bytewise, without housekeeping
    ignored: tuple[str, ...]
    problems: list[str] | None = None  # collects what is wrong instead of stopping at the first (data/check.py)
    unclaimed: set[str] = field(init=False)
    warnings: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.unclaimed = set(self.sizes)

    def below(self, folder: str) -> list[str]:
        """Paths below `folder/`, sorted. Raises DatasetError when there is none."""
        found = [path for path in self.sizes if path.startswith(f"{folder}/")]
        if not found:
            raise DatasetError(f"{self.store.uri}: no files below {folder}/; {self._top()}")
        return found

    def inside(self, *folders: str) -> str:
        """The first of `folders` that is in the tree, with a slash, or "" when the root holds its content itself."""
        found = (f"{folder}/" for folder in folders if any(path.startswith(f"{folder}/") for path in self.sizes))
        return next(found, "")

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Around one file or entry: while checking, what is wrong with it is noted and the next one follows."""
        try:
            yield
        except DatasetError as error:
            if self.problems is None:
                raise
            self.problems.append(str(error))

    def matched(self, folder: str, pattern: re.Pattern[str], example: str) -> Iterator[tuple[str, re.Match[str]]]:
        """(path, match of the part below `folder/`) of every file there, sorted; the files are claimed.

        Raises DatasetError for a folder without files, an empty file and, in strict mode, another name; otherwise such
        files stay unclaimed.
        """
        inside: list[str] = []
        with self.noting():
            inside = self.below(folder)
        for path in inside:
            found = pattern.fullmatch(path[len(folder) + 1 :])
            with self.noting():
                if found is None and self.strict:
                    self.claim(path)  # what is wrong with it is said here
                    refuse_name(self, path, example)
                if found is not None:
                    yield self.image(path), found

    def one_of(self, *paths: str) -> str:
        """The one of `paths` that exists. Raises DatasetError when none does, or several do."""
        found = [path for path in paths if path in self.sizes]
        if len(found) == 1:
            self.claim(found[0])
            return found[0]
        wanted = " or ".join(paths)
        if found:
            raise DatasetError(f"{self.store.uri}: both {' and '.join(found)} exist; keep one of {wanted}")
        raise DatasetError(f"{self.store.uri}: {wanted} not found; {self._top()}")

    def need(self, *paths: str) -> None:
        """Raises DatasetError that names every one of `paths` that is not there."""
        missing = [path for path in paths if path not in self.sizes]
        if missing:
            raise DatasetError(f"{self.store.uri}: {', '.join(missing)} not found; {self._top()}")

    def claim(self, path: str) -> None:
        """The layout knows what this file is."""
        self.unclaimed.discard(path)

    def pass_over(self, pattern: re.Pattern[str], why: str) -> None:
        """Claim every file whose whole path matches, unread; noted by number."""
        found = [path for path in self.unclaimed if pattern.fullmatch(path)]
        self.unclaimed.difference_update(found)
        if found:
            self.notes[why] = f"{len(found)} files passed over"

    def image(self, path: str) -> str:
        """Claim an image and return its path. Raises DatasetError for an empty file."""
        self.claim(path)
        if self.sizes[path] == 0:
            raise DatasetError(f"{self.store.uri}: {path} is empty (0 bytes); fetch this image again")
        return path

    def read_lines(self, path: str) -> list[str]:
        """Non-empty lines of a UTF-8 text file, stripped, whatever its line ends. Claims it. Raises DatasetError."""
        self.one_of(path)
        try:
            lines = self.store.read(path).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DatasetError(f"{self.store.uri}: {path} is not UTF-8 text: {error}") from None
        return [line.strip() for line in lines if line.strip()]

    def entries(self, path: str) -> list[str]:
        """Lines of a list whose entries mean something alone: while checking, a list that is not there has none."""
        with self.noting():
            return self.read_lines(path)
        return []

    def read_mat(self, path: str, key: str, records: bool = False) -> np.ndarray:
        """One variable of a MATLAB file before 7.3; `records`: structures as objects, single values without their axes.

        Claims the file. Raises DatasetError.
        """
        from scipy.io import loadmat

        self.one_of(path)
        try:
            content = loadmat(
                io.BytesIO(self.store.read(path)), squeeze_me=records, struct_as_record=not records, appendmat=False
            )
        except Exception as error:  # SciPy raises many kinds: MatReadError, ValueError, TypeError, zlib.error, ...
            raise DatasetError(f"{self.store.uri}: {path} is not a MATLAB file of version 4 to 7.2: {error}") from None
        if key not in content:
            names = ", ".join(sorted(name for name in content if not name.startswith("__")))
            raise DatasetError(f"{self.store.uri}: {path} holds {names or 'nothing'}, not {key}")
        return np.asarray(content[key])

    def wrong(self, path: str, what: str) -> DatasetError:
        """The error that says what is wrong with a file."""
        return DatasetError(f"{self.store.uri}: {path} {what}")

    def read_json(self, path: str) -> Any:
        """A JSON file, UTF-8 with or without a byte-order mark. Raises DatasetError."""
        try:
            return json.loads(self.store.read(path).decode("utf-8-sig"))
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError alike
            raise DatasetError(f"{self.store.uri}: {path} is not UTF-8 JSON: {error}") from None

    def _top(self) -> str:
        names = sorted({path.split("/")[0] for path in self.sizes})
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        return f"the dataset's own folder is wanted, and this one holds {shown or 'nothing'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One dataset as its authors publish it."""

    name: str  # what users write: "cuhk-pedes"
    task: str  # "text" | "image" | "video" | "visible-infrared" | "any" (the files say)
    tree: str  # picture of the expected files
    obtain: str  # how a user gets the data; nothing is ever downloaded
    expected: Mapping[str, Mapping[str, int]]  # {split: {"ids" | "images" | "cameras" | "captions": published number}}
    read: Callable[..., Iterable[Record]]  # (tree, **options) -> records in the layout's order
    write: Callable[[Path, Iterable[Sample]], Sequence[str]]  # samples below a folder in exactly this layout -> paths

    def parse(self, store: Store, *, strict: bool = True, **options: Any) -> ParsedDataset:
        """Read the tree at the store's root, which is the dataset's own folder.

        `strict` refuses files that the layout does not know. Counts that differ from the published ones are warnings:
        a subset or a synthetic tree is a legitimate dataset. Raises DatasetError naming the file, UserError for an
        unknown option.
        """
        self.refuse_unknown(options)
        tree = open_tree(store, strict)
        records = tuple(self.read(tree, **options))
        _refuse_strays(tree, self)
        parsed = ParsedDataset(name=self.name, records=records, ignored=tree.ignored, notes=tree.notes)
        warnings = (*tree.warnings, *remarks(parsed, self.expected))
        for warning in warnings:
            log.warning("%s: %s", self.name, warning)
        return ParsedDataset(name=self.name, records=records, ignored=tree.ignored, warnings=warnings, notes=tree.notes)

    @property
    def options(self) -> dict[str, Any]:
        """What its parser can be told beside the tree, with the usual values."""
        parameters = list(inspect.signature(self.read).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}

    def refuse_unknown(self, options: Mapping[str, Any]) -> None:
        """Raises UserError for an option that the parser does not have."""
        known = list(self.options)
        if unknown := sorted(set(options) - set(known)):
            raise UserError(f"layout {self.name} has no option {unknown[0]!r}; it knows {', '.join(known) or 'none'}")


def open_tree(store: Store, strict: bool = True) -> Tree:
    """List a store, sorted bytewise, housekeeping set aside. Raises DatasetError when nothing is there."""
    entries = sorted(store.list(), key=lambda entry: entry.key.encode())
    ignored = tuple(entry.key for entry in entries if housekeeping(entry.key))
    sizes = {entry.key: entry.size for entry in entries if not housekeeping(entry.key)}
    if not sizes:
        raise DatasetError(f"{store.uri}: no files there; give the folder or bucket prefix that holds the dataset")
    return Tree(store=store, strict=strict, sizes=sizes, ignored=ignored)


def housekeeping(path: str) -> bool:
    """Whether a path is a desktop's or an archive's own (hidden, Thumbs.db, desktop.ini, __MACOSX, ._*)."""
    return any(_HOUSEKEEPING.fullmatch(part) for part in path.split("/"))


def refuse_name(tree: Tree, path: str, example: str) -> NoReturn:
    """Raise the DatasetError of a file whose name no pattern of its layout fits."""
    name = path.rsplit("/", 1)[-1]
    twice = re.search(r"(?i)(\.(?:jpg|jpeg|png|bmp))\1$", name)
    hint = "the extension stands twice; rename it" if twice else f"expected a name like {example}"
    raise DatasetError(f"{tree.store.uri}: {path} is no file of this layout: {hint} (or parse with strict off)")


def _refuse_strays(tree: Tree, layout: Layout) -> None:
    tree.pass_over(COMPANION, "companion papers")
    strays = sorted(tree.unclaimed, key=str.encode)
    if not strays:
        return
    text = f"{strays[0]}" + (f" and {len(strays) - 1} more files" if len(strays) > 1 else "")
    if tree.strict:
        raise DatasetError(
            f"{tree.store.uri}: {text} does not belong to {layout.name}; remove it or parse with strict off"
        )
    tree.warnings.append(f"passed over: {text}")


def remarks(parsed: ParsedDataset, expected: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What is unusual about a dataset and still legitimate: shared ids, counts that differ from the published ones."""
    return [*_shared_ids(parsed.records), *_other_counts(parsed, expected)]


def _shared_ids(records: Iterable[Record]) -> list[str]:
    """An id in two of train, val and test is a leak, or two people with one number."""
    ids: dict[str, set[int]] = {}
    for record in records:
        side = record.split if record.split in ("train", "val") else "test"
        ids.setdefault(side, set()).add(record.pid)
    sides = sorted(ids)
    return [
        f"{len(ids[a] & ids[b])} ids stand in {a} and in {b}, for example {min(ids[a] & ids[b])}"
        for i, a in enumerate(sides)
        for b in sides[i + 1 :]
        if ids[a] & ids[b]
    ]


def _other_counts(parsed: ParsedDataset, expected: Mapping[str, Mapping[str, int]]) -> list[str]:
    found = {"all": parsed.count_of(parsed.records), **parsed.counts()}
    wrong = []
    for split, numbers in expected.items():
        differ = [
            f"{found.get(split, {}).get(what, 0)} {what} (published: {number})"
            for what, number in numbers.items()
            if found.get(split, {}).get(what, 0) != number
        ]
        if differ:
            wrong.append(f"{split} has {', '.join(differ)}")
    return wrong
