"""Image-caption pairs of a view, and groups of interchangeable sub-sentences for them (RDA of ICL, CVPR 2025).

A caption's groups are one list per attribute sentence; each holds wordings that say the same. They come from the generation
job or from the authors' JSON, and lie in a side table (data/side.py) so that a new set never rewrites images:

    <root>/tables/<name>.side.lance
        image     string              hex SHA-256 of the encoded image (the table's column sha256)   key
        caption   string              hex SHA-256 of the caption's UTF-8 bytes, verbatim              key
        groups    list<list<string>>  one entry per attribute sentence, each at least one wording, none empty
        ...       any further columns (prompt version, model revision, raw answers) are carried and not read here
    facts: kind "caption groups", source (model, file or rule), content (digest of all rows), captions (their number)

Both digests are the key because groups merge what a caption says with what its image shows.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reid_dist.config import DataConfig
from reid_dist.errors import UserError

if TYPE_CHECKING:
    from reid_dist.data.store import TableView

logger = logging.getLogger(__name__)

Groups = tuple[tuple[str, ...], ...]  # of one caption: attribute sentences, each a tuple of interchangeable wordings
KIND = "caption groups"
LEAST_SHARE = 0.95  # of the training captions; below this the side table belongs to another version of the dataset


def caption_digest(text: str) -> str:
    """Hex SHA-256 of a caption as the dataset has it."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def caption_pairs(view: TableView) -> np.ndarray:
    """int64 [M, 2]: (row, caption number) of every caption of a view, in row order."""
    counts = [len(captions) for captions in view.captions]
    rows = np.repeat(np.arange(len(counts)), counts)
    numbers = np.concatenate([np.arange(count) for count in counts] or [np.zeros(0, dtype=np.int64)])
    return np.stack([rows, numbers], axis=1).astype(np.int64)


@dataclass(frozen=True, slots=True)
class CaptionGroups:
    """The groups of one caption of one image."""

    image: str  # hex SHA-256 of the encoded image
    caption: str  # hex SHA-256 of the caption
    groups: Groups


def write_caption_groups(root: str, name: str, rows: Iterable[CaptionGroups], source: str) -> int:
    """Publish groups as the next version of side table `name`; returns the version. `source`: model, file or rule.

    A caption that an image has twice may come twice, with the same groups. Raises UserError for no rows, an empty list or text,
    or two different sets of groups for one caption of one image.
    """
    import pyarrow as pa

    from reid_dist.data.side import write_side_table

    found: dict[tuple[str, str], Groups] = {}
    for row in rows:
        if not row.groups or not all(group and all(text.strip() for text in group) for group in row.groups):
            raise UserError(f"groups of image {row.image[:12]}, caption {row.caption[:12]}: a list or a text is empty")
        if found.setdefault((row.image, row.caption), row.groups) != row.groups:
            raise UserError(f"two different groups for image {row.image[:12]}, caption {row.caption[:12]}: keep one")
    if not found:
        raise UserError(f"side table {name}: there are no caption groups to write")
    table = pa.table(
        {
            "image": pa.array([image for image, _ in found], pa.string()),
            "caption": pa.array([caption for _, caption in found], pa.string()),
            "groups": pa.array(
                [[list(g) for g in groups] for groups in found.values()], pa.list_(pa.list_(pa.string()))
            ),
        }
    )
    content = hashlib.sha256(json.dumps(sorted([*key, groups] for key, groups in found.items())).encode()).hexdigest()
    facts = {"kind": KIND, "source": source, "content": content, "captions": len(found)}
    return write_side_table(root, name, table, ["image", "caption"], facts)


class GroupTable:
    """Groups of every pair of a view, read from the side tables when they are asked for. Thread-safe."""

    def __init__(self, datasets: Sequence[Any], place: np.ndarray, texts: Sequence[str], content: bytes) -> None:
        """`place` int64 [M, 2]: (number of the side table, its row) of each pair, -1 where no table has it; `texts` [M]."""
        self._datasets, self._place, self._texts = datasets, place, texts
        self.content = content  # 32 bytes: digest of what was opened
        self.missing = int((place[:, 0] < 0).sum())

    def of(self, pairs: np.ndarray) -> list[Groups]:
        """The groups of pairs int64 [n]; a caption without any is one group of itself. One take per side table."""
        place = self._place[pairs]
        result: list[Groups] = [((self._texts[pair],),) for pair in pairs.tolist()]
        for number, dataset in enumerate(self._datasets):
            wanted = np.flatnonzero(place[:, 0] == number)
            if not len(wanted):
                continue
            rows, inverse = np.unique(place[wanted, 1], return_inverse=True)
            taken = dataset.take(rows.tolist(), columns=["groups"])["groups"].to_pylist()
            for where, row in zip(wanted.tolist(), inverse.tolist(), strict=True):
                result[where] = tuple(tuple(group) for group in taken[row])
        return result


def open_caption_groups(data: DataConfig, names: Sequence[str], view: TableView, pairs: np.ndarray) -> GroupTable:
    """The groups of `pairs` (caption_pairs of `view`) from side tables `names`; the first that has a caption wins.

    Captions that none of them has (the generation job may have set some aside) are logged. Raises UserError when a table holds
    no caption groups, or under 95 % of the captions are found: the captions of another version of the dataset.
    """
    from reid_dist.data.side import open_side_table
    from reid_dist.storage.cache import NodeCache

    cache = NodeCache(data.cache, data.cache_gb)
    tables = [open_side_table(data.root, name, cache=cache) for name in names]
    for table in tables:
        if table.facts.get("kind") != KIND:
            raise UserError(
                f"side table {table.name} holds no caption groups: it is of kind {table.facts.get('kind')!r}"
            )
    images = view.digests(np.arange(len(view)))
    texts = [view.captions[row][number] for row, number in pairs.tolist()]
    place = np.full((len(pairs), 2), -1, dtype=np.int64)
    for pair, ((row, _), text) in enumerate(zip(pairs.tolist(), texts, strict=True)):
        key = (images[row], caption_digest(text))
        number = next((n for n, table in enumerate(tables) if key in table.index), None)
        if number is not None:
            place[pair] = number, tables[number].index[key]
    content = hashlib.sha256(" ".join(str(table.facts["content"]) for table in tables).encode()).digest()
    result = GroupTable([table.dataset for table in tables], place, texts, content)
    label = f"{result.missing} of {len(pairs)} captions have no groups in {', '.join(names)}"
    if result.missing > (1 - LEAST_SHARE) * len(pairs):
        first = int(np.flatnonzero(place[:, 0] < 0)[0])
        raise UserError(
            f"{label}, first that of {view.path(int(pairs[first, 0]))}: these groups were made for another version of the "
            "captions or images; generate or import them for this table, or train without them (model.groups=[])"
        )
    if result.missing:
        logger.warning("%s; these are used as they stand", label)
    return result
