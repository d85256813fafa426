"""`python -m jobs.pack LAYOUT SOURCE root=URI [name=NAME] [on_error=stop|quarantine] [strict=true|false] [--plan]
[--list]`

Packs a dataset tree as its authors publish it (a folder or s3:// prefix) into the Lance table
<root>/tables/<name>.lance. Other key=value words go to the layout's parser. Run twice, the second time does nothing.
--list names the layouts, their trees and where to obtain the data; --plan parses, prints what would be packed and
starts nothing.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

from jobs._cluster import connect
from jobs._job import refuse_unknown_flags, run_job, split_words
from reid_dist.config import parse_yaml
from reid_dist.data import layouts
from reid_dist.data.pack import pack, plan
from reid_dist.errors import UserError

logger = logging.getLogger("reid_dist.jobs")
USAGE = __doc__ or ""


def main(argv: list[str]) -> dict[str, Any]:
    """The job. Raises UserError, RunError."""
    words, values, flags = split_words(argv, USAGE)
    refuse_unknown_flags(flags, {"--plan", "--list"}, USAGE)
    if "--list" in flags:
        return list_layouts()
    if len(words) != 2:
        raise UserError(f"expected LAYOUT and SOURCE, got {len(words)} words. Layouts: {', '.join(layouts.names())}")
    options = {key: parse_yaml(value, key) for key, _, value in (word.partition("=") for word in values)}
    root, name, on_error = (
        str(options.pop(key, usual)) for key, usual in (("root", ""), ("name", ""), ("on_error", "stop"))
    )
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


def list_layouts() -> dict[str, Any]:
    """Log every layout with its tree; the record holds names, tasks and how to obtain the data."""
    found = [layouts.get(name) for name in layouts.names()]
    for layout in found:
        logger.info("%s (%s)\n%s\n%s", layout.name, layout.task, layout.tree.strip("\n"), layout.obtain.strip())
    return {"layouts": {layout.name: {"task": layout.task, "obtain": layout.obtain.strip()} for layout in found}}


if __name__ == "__main__":
    run_job("pack", main)
