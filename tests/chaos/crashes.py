"""Deaths of workers on one machine: in mid-epoch, twice in a row, while a checkpoint is published, in a pass over the data set,
by silence; and a bug that comes again. Every strike is planned beforehand and done by the process that dies."""

from __future__ import annotations

import os
import time
from pathlib import Path
from unittest import mock

import pytest

from jobs.postmortem import postmortem
from reid_dist.runs import Run
from tests.chaos.struck import Row, attempt, clean_environment, judged, left_behind, rows_of, uninterrupted, warm, words
from tests.dist.cells import train_recipe
from tests.e2e.job import Job
from tests.injection import Faults
from tests.pool import Pool

LONG = ("training.max_steps=24", "training.epochs=40", "training.max_failures=8", "training.hang_timeout_s=8")


def _run(folder: Path, tables: Path, recipe: str, faults: Faults, *more: str) -> tuple[Run, dict]:
    command = words(recipe, tables, str(folder / "runs"), recipe.replace("/", "-"), *more)
    _, record, _ = Job(*command, environment=clean_environment(**faults.environment)).finish(900)
    return Run.read(f"{folder}/runs/{recipe.replace('/', '-')}"), record


def workers(folder: Path, tables: Path) -> list[Row]:
    """Four deaths of one run: mid-epoch, again at the same step, in mid-publish, by silence."""
    faults = Faults(folder / "faults")
    faults.add("worker", "step", 3, "kill", rank=1)
    faults.add("again", "step", 3, "kill", rank=1)
    faults.add("publish", "commit", 8, "kill", rank=0)
    faults.add("hang", "step", 13, "hang", rank=1)
    run, record = _run(folder, tables, "comoe/tiny", faults, *LONG)
    assert (record["exit_code"], record.get("restarts")) == (0, 4), record
    names = ["worker killed (-9) in mid-epoch", "the same again before a new checkpoint (two in a row)",
             "worker killed while it publishes a checkpoint", "rank stops answering (limit 8 s)"]  # fmt: skip
    rows = judged(rows_of(faults, names, {}), run, uninterrupted("comoe/tiny", tables, *LONG[:2]))
    reason = run.card()["restarts"][-1]["reason"]
    assert "rank 1 stopped answering in _do (sitecustomize.py" in reason, reason
    stacks = [entry.key for entry in run.store.list("logs/") if "stacks" in entry.key]
    assert len(stacks) == 2, stacks
    rows[-1].note = f"stacks of both ranks saved; {reason.partition(':')[0]}"
    return rows


def repeated_bug(folder: Path, tables: Path) -> list[Row]:
    """The same traceback at the same step twice ends the run with a sentence, long before its failures are used up."""
    faults = Faults(folder / "faults")
    faults.add("bug", "step", 5, "raise", rank=1, always=True)
    run, record = _run(folder, tables, "comoe/tiny", faults, *LONG)
    assert record["exit_code"] == 1, record
    said = "the same traceback came twice at the same step" in record["error"]
    assert len(faults.starts()) == 2
    first = postmortem(run)["first_failing"]
    assert first is not None
    note = f'"{record["error"][:90]}..."; postmortem names {first["who"]}: {first["cause"][:60]}'
    return [Row("the same traceback at the same step twice", said, None, None, None, len(left_behind(run)), note)]


def _pass(folder: Path, tables: Path, recipe: str, epoch: int, what: str) -> list[Row]:
    """Rank 1 dies in mid-pass of that epoch, the other of its absence; the next attempt continues. Without Ray."""
    faults = Faults(folder / "faults")
    faults.add("pass", "extract", epoch, "kill", rank=1)
    run, mapping = attempt(recipe, str(tables), str(folder / "runs"))
    with mock.patch.dict(os.environ, faults.environment):
        pool = Pool()
        try:
            with pytest.raises(AssertionError, match="its process died"):
                pool.run(train_recipe, 2, mapping, run.uri, None, None, run.attempt)
        finally:
            pool.close()
    struck = time.time()
    assert faults.struck("pass") == [1]
    done = faults.starts()[-1].last + 1
    run, mapping = attempt(recipe, str(tables), str(folder / "runs"))
    losses = warm().run(train_recipe, 2, mapping, run.uri, None, None, run.attempt)[0]["losses"]
    run.write_record({"exit_code": 0})
    lost = done - int(losses[0]["step"]) + 1
    row = Row(what, True, lost, round(time.time() - struck, 1), note="seconds to the end; two processes without Ray")
    return judged([row], run, uninterrupted(recipe, tables))


def muva_memory(folder: Path, tables: Path) -> list[Row]:
    """A worker dies while the memory is built from the whole training set."""
    return _pass(folder, tables, "muva/tiny", 2, "worker killed in the memory rebuild of MUVA")


def climb_memory(folder: Path, tables: Path) -> list[Row]:
    """The same for CLIMB-ReID, whose memory is rebuilt every epoch."""
    return _pass(folder, tables, "climb/tiny", 1, "worker killed in the memory rebuild of CLIMB-ReID")


def icl_consensus(folder: Path, tables: Path) -> list[Row]:
    """A worker dies in the loss pass of the consensus division (CCD)."""
    return _pass(folder, tables, "icl/tiny", 2, "worker killed in the CCD pass of ICL")
