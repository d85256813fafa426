"""Pack a dataset tree as its authors publish it into one table, look what is wrong with a tree, or list the layouts.

See USAGE. Run twice, a pack does nothing the second time.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

from jobs._cluster import connect
from jobs._job import refuse_unknown_flags, run_job, split_words
from reid_dist.config import parse_yaml
from reid_dist.data import layouts
from reid_dist.data.check import check
from reid_dist.data.layouts.base import Layout
from reid_dist.data.pack import pack, plan
from reid_dist.errors import UserError
from reid_dist.storage import open_store

logger = logging.getLogger("reid_dist.jobs")
USAGE = """usage: python -m jobs.pack LAYOUT SOURCE root=URI [name=NAME] [on_error=stop|quarantine] [strict=true|false] [--plan]
       python -m jobs.pack --check LAYOUT SOURCE
       python -m jobs.pack --list [LAYOUT]
  LAYOUT      the dataset's name, as --list shows it; csv for a dataset of your own
  SOURCE      its folder or s3:// prefix, as its authors publish it
  root=       folder or s3:// prefix that holds (or will hold) tables/; the table is ROOT/tables/NAME.lance
  name=       the table's name (default: the layout's)
  on_error=   stop at an image that cannot be decoded (default), or quarantine: leave it out and say so
  strict=     false passes over files that the layout does not know
  other key=value words go to the layout's parser; --list shows which it has
  --plan      parse, print what would be packed, start nothing
  --check     say what is wrong with the tree, file by file, and decode every image; exit 2 if anything is
  --list      every dataset: its tree, how to obtain it, published counts, options"""

SHOWN = 200  # problems that are printed and stand in the record


def main(argv: list[str]) -> dict[str, Any]:
    """The job. Raises UserError, RunError."""
    words, values, flags = split_words(argv, USAGE)
    refuse_unknown_flags(flags, {"--plan", "--list", "--check"}, USAGE)
    if "--list" in flags:
        return list_layouts(words)
    if len(words) != 2:
        raise UserError(f"expected LAYOUT and SOURCE, got {len(words)} words. Layouts: {', '.join(layouts.names())}")
    options = {key: parse_yaml(value, key) for key, _, value in (word.partition("=") for word in values)}
    root, name, on_error = (
        str(options.pop(key, usual)) for key, usual in (("root", ""), ("name", ""), ("on_error", "stop"))
    )
    if "--check" in flags:
        return check_tree(words[0], words[1], options)
    if not root:
        raise UserError(
            "root= is missing: the folder or s3:// prefix that holds (or will hold) tables/, for example root=data"
        )
    todo = plan(words[0], words[1], root, name=name, on_error=on_error, **options)
    if "--plan" in flags:
        return {**todo.record(), "plan": True}
    if todo.present is not None:
        return pack(todo, on_error)
    # Lance warns about every child process; Ray's are started with exec, which is safe.
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    with connect():
        return pack(todo, on_error)


def check_tree(name: str, source: str, options: dict[str, Any]) -> dict[str, Any]:
    """Log everything that is wrong with a tree; the record has exit code 2 when anything is. Raises UserError."""
    layout, store = layouts.get(name), open_store(source)
    found = check(layout, store, progress=True, **options)
    for warning in found.warnings:
        logger.info("unusual: %s", warning)
    for problem in found.problems[:SHOWN]:
        logger.warning("%s", problem)
    count = len(found.problems)
    record: dict[str, Any] = {
        "layout": name,
        "source": store.uri,
        "images": len(found.parsed.records),
        "splits": found.parsed.counts(),
        "ignored": len(found.parsed.ignored),
        "notes": found.parsed.notes,
        "warnings": list(found.warnings),
        "num_problems": count,
        "problems": list(found.problems[:SHOWN]),
    }
    if not count:
        logger.info("%s: nothing is wrong, %d images", store.uri, len(found.parsed.records))
        return record
    more = f"; {count - SHOWN} more than are shown" if count > SHOWN else ""
    what = f"{count} problems, first: " if count > 1 else ""
    return record | {"exit_code": 2, "error": f"{what}{found.problems[0]}{more}"}


def list_layouts(words: list[str]) -> dict[str, Any]:
    """Log every layout, or those named, with tree, published counts and options; the record holds the same."""
    found = [layouts.get(name) for name in words or layouts.names()]
    for layout in found:
        logger.info("%s", "\n".join(_shown(layout)))
    return {
        "layouts": {
            layout.name: {
                "task": layout.task,
                "tree": layout.tree.strip("\n"),
                "obtain": layout.obtain.strip(),
                "published": {split: dict(numbers) for split, numbers in layout.expected.items()},
                "options": layout.options,
            }
            for layout in found
        }
    }


def _counted(number: int, what: str) -> str:
    """1 camera, 1,467 ids."""
    return f"{number:,} {what.removesuffix('s') if number == 1 else what}"


def _shown(layout: Layout) -> list[str]:
    counts = [
        f"{split}: {', '.join(_counted(number, what) for what, number in numbers.items())}"
        for split, numbers in layout.expected.items()
    ]
    options = [
        f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in layout.options.items()
    ]
    return [
        f"{layout.name} ({layout.task})",
        *(f"  {line}" for line in layout.tree.strip("\n").splitlines()),
        f"  obtain: {layout.obtain.strip()}",
        f"  published: {'; '.join(counts) or 'nothing, it is yours'}",
        *([f"  options: {', '.join(options)}"] if options else []),
    ]


if __name__ == "__main__":
    run_job("pack", main)
