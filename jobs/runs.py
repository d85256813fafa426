"""`python -m jobs.runs ls|show|gc [RUN] [runs=URI] [root=URI] [cache=FOLDER] [cache_gb=N] [--plan]`

ls    what lies under runs= (default: runs), root= (tables; default: data) and in the node's cache
show  the run card of one run: `python -m jobs.runs show runs/demo`
gc    remove what killed jobs left behind and nobody refers to, where it is older than a day: unfinished uploads,
      checkpoint files without a commit marker, data files that no table version names; and shrink the cache to cache_gb
      (default: 50). With --plan it only says what it would remove.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from jobs._job import refuse_unknown_flags, run_job, split_words
from reid_dist.config import parse_yaml
from reid_dist.data.store import read_facts
from reid_dist.data.tables import referenced_files
from reid_dist.errors import RunError, UserError
from reid_dist.runs import Run
from reid_dist.storage import lance_options, open_store
from reid_dist.storage.cache import DEFAULT_GB, NodeCache
from reid_dist.storage.publish import orphans

logger = logging.getLogger("reid_dist.jobs")
USAGE = __doc__ or ""
OLD_S = 86400.0  # younger leftovers may belong to a job that still runs
DEFAULTS = {"runs": "runs", "root": "data", "cache": "", "cache_gb": DEFAULT_GB}


def main(argv: list[str]) -> dict[str, Any]:
    """The job. Raises UserError, RunError."""
    words, values, flags = split_words(argv, USAGE)
    refuse_unknown_flags(flags, {"--plan"}, USAGE)
    options: dict[str, Any] = dict(DEFAULTS)
    for key, _, value in (word.partition("=") for word in values):
        if key not in options:
            raise UserError(f"unknown key {key!r}; known: {', '.join(options)}")
        options[key] = parse_yaml(value, key) if key == "cache_gb" else value
    if not isinstance(options["cache_gb"], (int, float)) or options["cache_gb"] < 0:
        raise UserError(f"cache_gb={options['cache_gb']!r}: a number of gigabytes")
    verbs: dict[str, Callable[[], dict[str, Any]]] = {
        "ls": lambda: listing(options),
        "gc": lambda: collect(options, "--plan" in flags),
    }
    if len(words) == 2 and words[0] == "show":
        return {"card": Run.read(words[1]).card()}
    if len(words) != 1 or words[0] not in verbs:
        raise UserError(f"expected ls, gc or show RUN, got {' '.join(words) or 'nothing'}")
    return verbs[words[0]]()


def listing(options: dict[str, Any]) -> dict[str, Any]:
    """{"runs": [...], "tables": [...], "cache": [...]}; also logged, one line each."""
    runs = [_run_line(f"{options['runs'].rstrip('/')}/{name}") for name in run_names(options["runs"])]
    tables = [_table_line(uri) for uri in table_uris(options["root"])]
    cache = NodeCache(options["cache"], options["cache_gb"]).entries()
    for run in runs:
        logger.info("run    %s  %s  step %d  %d attempts", run["uri"], run["status"], run["step"], run["attempts"])
    for table in tables:
        logger.info("table  %s  version %s  %s rows", table["uri"], table["version"], table["rows"])
    for entry in cache:
        logger.info("cache  %s  %.1f MB", entry["uri"], entry["size"] / 1e6)
    return {"runs": runs, "tables": tables, "cache": cache}


def run_names(uri: str) -> list[str]:
    """Names of the runs directly below a folder or prefix."""
    return [
        entry.key[: -len("/run.json")]
        for entry in open_store(uri).list()
        if entry.key.count("/") == 1 and entry.key.endswith("/run.json")
    ]


def table_uris(root: str) -> list[str]:
    """URIs of everything under <root>/tables that ends with .lance, finished or not."""
    store = open_store(f"{root.rstrip('/')}/tables")
    return [
        f"{store.uri}/{name}.lance"
        for name in sorted({e.key.split(".lance/")[0] for e in store.list() if ".lance/" in e.key})
    ]


def _run_line(uri: str) -> dict[str, Any]:
    run = Run.read(uri)
    try:
        card = run.card()
    except (KeyError, ValueError):
        return {"uri": run.uri, "status": "unreadable", "step": 0, "attempts": 0, "metrics": {}}
    step = run.latest_step()
    return {
        "uri": run.uri,
        "status": card["status"],
        "step": step,
        "attempts": len(card["attempts"]),
        "metrics": card["metrics"],
    }


def _table_line(uri: str) -> dict[str, Any]:
    import lance

    if not open_store(uri).list("_versions/"):
        return {"uri": uri, "version": None, "rows": None, "content": "no version was ever committed"}
    dataset = lance.dataset(uri, storage_options=lance_options(uri) or None)
    try:
        content = read_facts(dataset).content
    except UserError:  # a side table, or somebody else's
        content = ""
    return {"uri": uri, "version": int(dataset.version), "rows": dataset.count_rows(), "content": content}


def collect(options: dict[str, Any], plan: bool) -> dict[str, Any]:
    """Remove leftovers older than OLD_S (`plan`: name them only). Returns {"plan", "removed": [URI or description]}."""
    removed: list[str] = []
    for place in (options["runs"], f"{options['root'].rstrip('/')}/tables"):
        store = open_store(place)
        removed += [f"{store.uri}/{key}" for key in store.sweep(OLD_S, plan=plan)]
    for name in run_names(options["runs"]):
        removed += _collect_run(f"{options['runs'].rstrip('/')}/{name}", plan)
    for uri in table_uris(options["root"]):
        removed += _collect_table(uri, plan)
    removed += [f"cache: {uri}" for uri in NodeCache(options["cache"], options["cache_gb"]).evict(plan=plan)]
    for what in removed:
        logger.info("%s %s", "would remove" if plan else "removed", what)
    return {"plan": plan, "removed": removed}


def _collect_run(uri: str, plan: bool) -> list[str]:
    store = open_store(uri)
    old = time.time() - OLD_S
    try:
        found = orphans(store, "checkpoints", old)
    except RunError as error:
        logger.warning("%s is left alone: %s", uri, error)
        return []
    ray = store.list("ray/")
    if ray and max(entry.modified for entry in ray) < old:  # Ray Train's own state; ours needs none of it
        found.append("ray")
    for key in found if not plan else []:
        store.delete_tree(key)
    return [f"{store.uri}/{key}" for key in found]


def _collect_table(uri: str, plan: bool) -> list[str]:
    store = open_store(uri)
    kept, old = referenced_files(uri), time.time() - OLD_S
    found = [entry.key for entry in store.list("data/") if entry.key not in kept and entry.modified < old]
    for key in found if not plan else []:
        store.delete(key)
    return [f"{store.uri}/{key}" for key in found]


if __name__ == "__main__":
    run_job("runs", main)
