"""What is wrong with a dataset tree, file by file, before anybody packs it.

Packing stops at the first fault. Here the layout's own parser goes on behind each (`Tree.noting`), every image is
decoded, and all findings come at once. Nothing is written, and no Ray is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from reid_dist.data.decode import inspect
from reid_dist.data.layouts.base import COMPANION, IMAGE, Layout, Tree, open_tree, remarks
from reid_dist.data.members import load_image
from reid_dist.data.records import DatasetError, ParsedDataset, Record
from reid_dist.storage.base import Store

READERS = 8  # threads that fetch and decode images
FOLDER = 20  # files of one unknown folder from which it is named as a whole
_IMAGE = re.compile(rf".*{IMAGE}")


@dataclass(frozen=True, slots=True)
class Findings:
    """What a look at a tree says."""

    problems: tuple[str, ...]  # each names the tree and the file; none: the tree packs
    warnings: tuple[str, ...]  # legitimate, but unusual: counts that differ from the published ones, shared ids
    parsed: ParsedDataset  # what could be read


def check(layout: Layout, store: Store, *, strict: bool = True, progress: bool = False, **options: Any) -> Findings:
    """Look through the tree at the store's root as `layout.parse` would. `options` go to the layout's parser.

    Raises UserError for an unknown option, StorageError.
    """
    layout.refuse_unknown(options)
    problems: list[str] = []
    records: list[Record] = []
    try:
        tree = open_tree(store, strict)
    except DatasetError as error:
        return Findings((str(error),), (), ParsedDataset(name=layout.name, records=()))
    tree.problems = problems
    try:
        records.extend(layout.read(tree, **options))
        (problems if strict else tree.warnings).extend(_strays(tree, layout, records))
    except DatasetError as error:  # the layout cannot go on behind this one
        problems.append(str(error))
    paths = [record.path for record in records] or [path for path in tree.sizes if _IMAGE.fullmatch(path)]
    problems += _damaged(store, paths, progress)
    parsed = ParsedDataset(name=layout.name, records=tuple(records), ignored=tree.ignored, notes=tree.notes)
    return Findings(tuple(problems), (*tree.warnings, *remarks(parsed, layout.expected)), parsed)


def _strays(tree: Tree, layout: Layout, records: Iterable[Record]) -> list[str]:
    """Files that the layout does not know; many in one folder that it does not know at all are one finding."""
    tree.pass_over(COMPANION, "companion papers")
    strays = tree.unclaimed - {record.path.partition("#")[0] for record in records}
    folders: dict[str, list[str]] = {}
    for path in sorted(strays, key=str.encode):
        folders.setdefault(path.split("/")[0] + "/" if "/" in path else path, []).append(path)
    found = []
    for folder, paths in folders.items():
        whole = len(paths) >= FOLDER and len(paths) == sum(path.startswith(folder) for path in tree.sizes)
        names = [f"{folder} (with {len(paths)} files)"] if whole else paths
        found += [f"{tree.store.uri}: {name} does not belong to {layout.name}" for name in names]
    return found


def _damaged(store: Store, paths: list[str], progress: bool) -> Iterator[str]:
    from tqdm import tqdm

    def look(path: str) -> str:
        try:
            inspect(load_image(store, path), path)
        except (DatasetError, FileNotFoundError) as error:
            return f"{store.uri}: {error}"
        return ""

    bar = tqdm(total=len(paths), desc="decode", unit="image", disable=not progress, mininterval=0.5)
    with bar, ThreadPoolExecutor(max_workers=READERS, thread_name_prefix="check") as pool:
        for start in range(0, len(paths), 64 * READERS):
            for found in pool.map(look, paths[start : start + 64 * READERS]):
                bar.update()
                if found:
                    yield found
