"""Searching a feature file: the nearest gallery items of each query, as a record and as a page with pictures.

A query is a path or a row of the file, another feature file, or something that a run encodes: an image file, or for
methods that compare text with images a sentence.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs._words import SearchOptions
from reid_dist.errors import UserError
from reid_dist.evaluation.featurefile import read_columns
from reid_dist.evaluation.neighbours import nearest
from reid_dist.evaluation.similarity import EvaluationError

logger = logging.getLogger("reid_dist.jobs.search")
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
FILES = (".npz", ".parquet", ".pq")
Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Query:
    """What is looked for."""

    name: str
    feat: np.ndarray  # float32 [D]
    row: int | None = None  # in the searched file; it is not among its own results
    pid: int = -1
    picture: bytes | None = None  # None: taken from the gallery's pictures, where the query has a path there
    path: str = ""
    text: str = ""


def search(path: str, asked: list[str], options: SearchOptions) -> dict[str, Any]:
    """Search FEATURES for each of `asked`; returns the record. Raises UserError."""
    columns = read(path, ["feat", "path"], "a search")
    encode = Encoder(options)
    queries = [query for word in asked for query in queries_of(word, columns, encode)]
    gallery = gallery_rows(path, columns)
    try:
        results = [found(query, columns, gallery, options) for query in queries]
    except EvaluationError as error:
        raise UserError(f"{path}: {error}") from None
    record = {"features": path, "gallery": len(gallery), "metric": options.metric, "results": results}
    if not (options.images or options.table):
        logger.info("no page is written: say where the pictures lie, images=FOLDER or table=NAME root=URI")
        return record
    place = write_page(path, queries, results, options)
    logger.info("page: %s", place)
    return record | {"page": place}


def read(path: str, needed: list[str], reader: str) -> Columns:
    """A feature file's columns, local or s3://. Raises UserError."""
    from reid_dist.storage import cached_file

    try:
        return read_columns(cached_file(path) if "://" in path else path, needed, reader)
    except EvaluationError as error:
        raise UserError(str(error)) from None


def gallery_rows(path: str, columns: Columns) -> np.ndarray:
    """int64: rows that are searched: those of split gallery or test; all, where splits are unknown. Raises UserError."""
    if "split" not in columns:
        return np.arange(len(columns["feat"]))
    rows = np.flatnonzero(np.isin(columns["split"], ("gallery", "test")))
    if not len(rows):
        raise UserError(
            f"{path}: no row of split gallery or test to search, only {sorted(set(columns['split'].tolist()))}"
        )
    return rows


def queries_of(word: str, columns: Columns, encode: Encoder) -> list[Query]:
    """What a --query names: see the module. Raises UserError."""
    if word.startswith("row:") and word[4:].isdigit():
        row = int(word[4:])
        if row >= len(columns["feat"]):
            raise UserError(f"--query {word}: the file has rows 0 to {len(columns['feat']) - 1}")
        return [in_file(columns, row)]
    rows = np.flatnonzero(columns["path"] == word)
    if len(rows):
        return [in_file(columns, int(rows[0]))]
    if word.lower().endswith(FILES):
        other = read(word, ["feat"], "--query")
        return [in_file(other, row, foreign=True) for row in range(len(other["feat"]))]
    if not encode.options.run:
        raise UserError(
            f"--query {word!r} is no path in the searched file, no row:N and no feature file; "
            "to encode an image or a sentence, say run=RUN"
        )
    if word.lower().endswith(PICTURES):
        if not Path(word).is_file():
            raise UserError(f"--query {word}: no such file, and no such path in the searched file")
        picture = Path(word).read_bytes()
        return [Query(Path(word).name, encode.image(picture, word), picture=picture)]
    return [Query(word, encode.text(word), text=word)]


def in_file(columns: Columns, row: int, foreign: bool = False) -> Query:
    """A row of the searched file, or of a `foreign` one."""
    path = str(columns["path"][row]) if "path" in columns else ""
    pid = int(columns["pid"][row]) if "pid" in columns else -1
    return Query(
        path or f"row {row}", columns["feat"][row], None if foreign else row, pid, path="" if foreign else path
    )


def found(query: Query, columns: Columns, gallery: np.ndarray, options: SearchOptions) -> dict[str, Any]:
    """The best items of one query: {"query", "top": [{row, path, score, pid, correct}]}. Raises EvaluationError."""
    rows = gallery if query.row is None else gallery[gallery != query.row]
    best = nearest(query.feat[None], columns["feat"][rows], min(options.top, len(rows)), metric=options.metric)
    top = []
    for place, score in zip(best.index[0].tolist(), best.score[0].tolist(), strict=True):
        row = int(rows[place])
        pid = int(columns["pid"][row]) if "pid" in columns else -1
        known = pid >= 0 and query.pid >= 0
        item = {"row": row, "path": str(columns["path"][row]), "score": score}
        top.append(item | ({"pid": pid} if pid >= 0 else {}) | ({"correct": pid == query.pid} if known else {}))
    return {"query": query.name, "top": top}


class Encoder:
    """The run that turns a query into a feature, loaded when it is first needed."""

    def __init__(self, options: SearchOptions) -> None:
        self.options = options
        self._loaded: Any = None

    def image(self, picture: bytes, name: str) -> np.ndarray:
        """float32 [D] of an encoded picture. Raises UserError."""
        from reid_dist.data.decode import decode

        return self._encode("image", images=[decode(picture, name)])

    def text(self, sentence: str) -> np.ndarray:
        """float32 [D] of a sentence. Raises UserError where the run's method knows images alone."""
        if self.loaded.spec.task != "text":
            raise UserError(
                f"--query {sentence!r} is no image file, and method {self.loaded.spec.name} cannot encode a sentence"
            )
        return self._encode("text", captions=(sentence,))

    @property
    def loaded(self) -> Any:
        """The model."""
        from reid_dist.training.loaded import load_run

        if self._loaded is None:
            self._loaded = load_run(self.options.run, self.options.checkpoint)
        return self._loaded

    def _encode(self, kind: str, images: list[np.ndarray] | None = None, captions: tuple[str, ...] = ()) -> np.ndarray:
        from reid_dist.evaluation.similarity import combine, host
        from reid_dist.methods.spec import EvalSide
        from reid_dist.training.encode import encode_side

        view: Any = QueryView(images or [], captions, self.options.modality)
        one = np.zeros(1, np.int64)
        features = encode_side(self.loaded, view, EvalSide(kind, one, one))
        feature: np.ndarray = host(combine(features, "query", weights=self.loaded.spec.similarity))[0]
        return feature


class QueryView:
    """One image or sentence with the columns of a table's view that methods encode from."""

    def __init__(self, images: list[np.ndarray], captions: tuple[str, ...], modality: str) -> None:
        self._images = images
        self.captions = [captions]
        self.pid = self.camid = self.tracklet = self.frame = np.full(1, -1, np.int64)
        self.domain, self.label = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self.modality, self.split = np.array([modality]), np.array(["query"])

    def __len__(self) -> int:
        return 1

    def path(self, row: int) -> str:
        """The query has none below a dataset."""
        return "query"

    def images(self, rows: Any) -> list[np.ndarray]:
        """The decoded image, once per row asked for."""
        return [self._images[int(row)] for row in rows]


def write_page(path: str, queries: list[Query], results: list[dict[str, Any]], options: SearchOptions) -> str:
    """Write the page; returns its place. Raises UserError for a picture that is not there."""
    from reid_dist.reporting import RankedItem, RankList, render_search
    from reid_dist.storage import open_store

    picture = pictures(options)
    lists = []
    for query, result in zip(queries, results, strict=True):
        items = [
            RankedItem(
                correct=item.get("correct"),
                image=picture(item["path"]),
                label=f"{item['path']}" + (f", id {item['pid']}" if "pid" in item else ""),
                score=item["score"],
            )
            for item in result["top"]
        ]
        shown = query.picture if query.picture is not None else picture(query.path) if query.path else None
        lists.append(RankList(items, caption=query.text, image=shown, label="" if query.text else query.name))
    page = render_search(
        summary=f"The {options.top} nearest items of {path}, by {options.metric}.",
        rank_lists=lists,
        provenance={"features": path, "pictures": options.images or f"table {options.table} of {options.root}"},
        command="python -m jobs.evaluate " + " ".join(shlex.quote(word) for word in sys.argv[1:]),
        note="Best first, with the similarity below each picture.",
    )
    folder, _, name = options.out.rpartition("/")
    open_store(folder or ".").write(name, page.encode())
    return options.out


def pictures(options: SearchOptions) -> Callable[[str], bytes]:
    """path -> encoded picture, from a folder or a packed table. Raises UserError for a path that is not there."""
    if options.images:
        from reid_dist.storage import open_store

        store = open_store(options.images)

        def from_folder(path: str) -> bytes:
            try:
                return store.read(path)
            except FileNotFoundError:
                raise UserError(
                    f"{options.images} holds no picture {path}: say images= as the paths are relative to"
                ) from None

        return from_folder
    from reid_dist.config import DataConfig
    from reid_dist.data.store import open_view

    view = open_view(DataConfig(root=options.root), (options.table,))
    row_of = {view.path(row): row for row in range(len(view))}

    def from_table(path: str) -> bytes:
        if path not in row_of:
            raise UserError(f"table {options.table} of {options.root} has no picture {path}")
        return view.encoded([row_of[path]])[0]

    return from_table
