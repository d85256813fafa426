"""What recipes of ICL and RDE name, made or converted: `python -m reid_dist.methods.icl VERB key=value ...`.

    make-noise      name= table= rate= [seed=123]      a permutation of captions for the training pairs of a packed table
    import-noise    FILE name= [table=]                a published index file (.npy); with table= its length is checked
    import-groups   FILE layout= table= name=          the authors' JSON with diversity_captions (or a synthetic tree's) into
                                                       the side table of caption groups, for the images of a packed table

All take root= (the folder or prefix with tables/) and, for make-noise and import-noise, splits=[train]. The record is the last
line of stdout; exit 2 for bad input.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from reid_dist.config import DataConfig
from reid_dist.data.captions import CaptionGroups, Groups, caption_digest, caption_pairs, write_caption_groups
from reid_dist.errors import UserError
from reid_dist.methods.command import content_of, run_command, words_and_options

if TYPE_CHECKING:
    from reid_dist.data.store import TableView

USAGE = (
    "usage: python -m reid_dist.methods.icl make-noise name=NAME table=TABLE rate=0.5 root=URI, or import-noise FILE name=NAME "
    "root=URI, or import-groups FILE layout=LAYOUT table=TABLE name=NAME root=URI"
)
KEYS = {  # required, optional
    "make-noise": ({"name", "table", "rate"}, {"seed", "splits"}),
    "import-noise": ({"name"}, {"table", "splits"}),
    "import-groups": ({"layout", "table", "name"}, set()),
}


def _view(root: str, table: str, splits: tuple[str, ...] = ()) -> TableView:
    from reid_dist.data.store import open_view

    return open_view(DataConfig(root=root), (table,), splits)


def make_noise(
    root: str, name: str, table: str, rate: float, seed: int = 123, splits: Any = ("train",)
) -> dict[str, Any]:
    """Draw and store a permutation; returns the record. Raises UserError."""
    from reid_dist.methods.icl.noise import checked, draw_permutation, store_permutation

    count = len(caption_pairs(_view(root, table, tuple(splits))))
    noise = checked(draw_permutation(count, rate, seed), count, name)
    key = store_permutation(root, name, noise)
    return {"file": key, "pairs": count, "moved": noise.rate, "sha256": noise.digest.hex(), "seed": seed}


def import_noise(root: str, path: str, name: str, table: str = "", splits: Any = ("train",)) -> dict[str, Any]:
    """Check and store a published index file; returns the record. Raises UserError."""
    from reid_dist.methods.icl.noise import parse, store_permutation

    count = len(caption_pairs(_view(root, table, tuple(splits)))) if table else None
    noise = parse(content_of(path), count, path)
    key = store_permutation(root, name, noise)
    return {"file": key, "pairs": len(noise.index), "moved": noise.rate, "sha256": noise.digest.hex()}


def import_groups(root: str, path: str, layout: str, table: str, name: str) -> dict[str, Any]:
    """Convert groups from a JSON file of a text layout; returns the record. Raises UserError."""
    view, found = _view(root, table), _groups_of(path, layout)
    rows = list(_joined(view, found, path))
    version = write_caption_groups(root, name, rows, f"file {path.rpartition('/')[2]}")
    return {"side_table": name, "version": version, "captions": len(rows), "images": len(found)}


def _groups_of(path: str, layout: str) -> dict[str, list[tuple[str, Groups]]]:
    """{image path: [(caption, its groups)]} of the entries that have groups."""
    from reid_dist.data.layouts import caption_set

    try:
        entries = json.loads(content_of(path).decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path} is not UTF-8 JSON: {error}") from None
    return caption_set(layout).grouped(entries, path)


def _joined(view: TableView, found: dict[str, list[tuple[str, Groups]]], where: str) -> Iterator[CaptionGroups]:
    """Rows of the side table. Raises UserError when the file speaks of captions that the table does not have."""
    images = view.digests(np.arange(len(view)))
    place = {view.path(row): row for row in range(len(view))}
    known = {row: set(view.captions[row]) for row in place.values()}
    wrong = [path for path in found if path not in place]
    wrong += [
        path for path, entry in found.items() if path in place and not {c for c, _ in entry} <= known[place[path]]
    ]
    if wrong:
        raise UserError(
            f"{where}: {len(wrong)} of {len(found)} entries fit no image and caption of {view.describe()}, first {wrong[0]}: it "
            "was made for another version of the dataset"
        )
    for path, entry in found.items():
        for caption, groups in dict(reversed(entry)).items():  # of a caption that an image has twice, the first groups
            yield CaptionGroups(images[place[path]], caption_digest(caption), groups)


def main(argv: list[str]) -> dict[str, Any]:
    """The command. Raises UserError."""
    words, options = words_and_options(argv)
    verb = words[0] if words else ""
    if verb not in KEYS or len(words) != (1 if verb == "make-noise" else 2):
        raise UserError(USAGE)
    needed, more = KEYS[verb][0] | {"root"}, KEYS[verb][1]
    if not needed <= set(options) <= needed | more:
        raise UserError(
            f"{verb} takes {', '.join(sorted(needed))}{'; ' * bool(more)}{', '.join(sorted(more))}. {USAGE}"
        )
    root = str(options.pop("root"))
    if verb == "make-noise":
        return make_noise(root, **options)
    return (import_noise if verb == "import-noise" else import_groups)(root, words[1], **options)


if __name__ == "__main__":
    run_command(main)
