"""`python -m tests.chaos [NAME ...] [out=FOLDER]`: strikes runs with every fault there is and prints what became of them.

Without names all of them, in this order; each is a file of its own in FOLDER (default work/chaos) and the table is made of all
that lie there, so it can be run in pieces. Exit 1 when something was not survived.
"""

from __future__ import annotations

import atexit
import functools
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from reid_dist import methods
from tests.chaos import chain, crashes, elastic, generation, machine, sweep, trials
from tests.chaos.struck import Row, markdown
from tests.worlds import small_tables

SCENARIOS: dict[str, Callable[[Path, Path], list[Row]]] = {
    "workers": crashes.workers,
    "repeated-bug": crashes.repeated_bug,
    "cluster": chain.cluster,
    "stops": chain.stops,
    "elastic": elastic.four_two_three,
    "muva-memory": crashes.muva_memory,
    "climb-memory": crashes.climb_memory,
    "icl-consensus": crashes.icl_consensus,
    "full-disk": machine.full_disk,
    "damaged-cache": machine.damaged_cache,
    "skewed-clock": machine.skewed_clock,
    "storm": machine.storm,
    "sweep": sweep.sweep,
    "trials": trials.trials,
    "generation": generation.killed,
}


@functools.cache
def tables_of(recipe: str) -> Path:
    """The tables of a recipe, made once and removed at the end of the program."""
    folder = tempfile.TemporaryDirectory(prefix="reid-chaos-tables-")
    atexit.register(folder.cleanup)
    small_tables(Path(folder.name), methods.load_recipe(recipe))
    return Path(folder.name)


def strike(name: str, place: Path) -> list[Row]:
    """The rows of one scenario, also when it failed."""
    recipe = f"{name.partition('-')[0]}/tiny"
    with tempfile.TemporaryDirectory(prefix="reid-chaos-") as folder:
        tables = tables_of(recipe if recipe in methods.recipes() else "comoe/tiny")
        try:
            rows = SCENARIOS[name](Path(folder), tables)
        except Exception as error:
            traceback.print_exc()
            rows = [Row(name, False, note=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")]
    (place / f"{name}.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return rows


def main(argv: list[str]) -> int:
    named = [word for word in argv if "=" not in word]
    place = Path(dict(word.split("=", 1) for word in argv if "=" in word).get("out", "work/chaos"))
    unknown = set(named) - set(SCENARIOS)
    if unknown:
        print(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(SCENARIOS)}", file=sys.stderr)
        return 2
    place.mkdir(parents=True, exist_ok=True)
    for name in named or SCENARIOS:
        began = time.time()
        rows = strike(name, place)
        print(f"{name}: {time.time() - began:.0f} s\n{markdown(rows)}\n", file=sys.stderr, flush=True)
    stored = [place / f"{name}.json" for name in SCENARIOS if (place / f"{name}.json").exists()]
    rows = [Row(**row) for path in stored for row in json.loads(path.read_text())]
    (place / "table.md").write_text(markdown(rows) + "\n")
    (place / "table.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(markdown(rows))
    good = all(row.survived and row.weights_equal is not False and not row.left_behind for row in rows)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
