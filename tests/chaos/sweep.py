"""MUVA's shipped sweep at tiny size, stopped, extended and struck; and ICL's side table of groups.

1. `muva_finetune` over two rates: the job that `side_tables` names makes the masks, stage 1 runs once, SIGTERM falls while a
   trial of stage 2 trains.
2. The same file with a third rate: nothing that is done runs again, the stopped trials continue, and the driver of one trial is
   killed, which Tune starts anew.
3. An ICL sweep whose caption groups are imported by the job that its `side_tables` names.

Each job has a private cluster of two CPUs.
"""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from reid_dist.errors import RunError, UserError
from reid_dist.runs import Run
from tests.chaos.struck import Row
from tests.e2e.job import Job, cmdline
from tests.worlds import SMALL, small_table
from tuning.state import SweepState
from tuning.sweep import FOLDER

logger = logging.getLogger(__name__)

SIZES = {**SMALL, "images_per_id": 10}  # so that a test person has more pictures than queries
WORLD = " ".join(f"{key}={value}" for key, value in SIZES.items())
MASKS = f"reid_dist.methods.muva draw-masks market-1501 name=drawn root={{root}} image_size=[64,32] patch=8 stride=8 {WORLD}"
GROUPS = "reid_dist.methods.icl import-groups {root}/raw-synthetic-cuhk-pedes/reid_raw.json layout=cuhk-pedes " \
         "table=synthetic-cuhk-pedes name=groups root={root}"  # fmt: skip
SHARES = {"num_workers": 1, "cpus_per_worker": 0.7, "driver": {"CPU": 0.1}}


def muva_sweep(place: Path, rates: list[float]) -> Path:
    """The shipped file on a table of 12 people."""
    return write(place, {
        "extends": str(FOLDER / "muva_finetune.yaml"), "name": "muva", "base": "muva/tiny", "output": str(place / "sweeps"),
        "set": {
            "data": {"root": str(place), "val_fraction": 0.25}, "model.masks": ["drawn"],
            "training": {"epochs": 20, "eval_every": 5, "checkpoint_every": 1, "log_every": 1},
        },
        "axes": {"optim.lr": rates, "model.mask_lr_factor": [1.0]}, "protocol": {"seeds": [1]},
        "side_tables": [{"name": "drawn", "make": MASKS}], "resources": SHARES,
    })  # fmt: skip


def icl_sweep(place: Path) -> Path:
    """One trial with reorganised captions."""
    return write(place, {
        "name": "icl", "base": "icl/tiny", "output": str(place / "sweeps"),
        "set": {"data.root": str(place), "model.groups": ["groups"], "training": {"max_steps": 4, "eval_every": 0}},
        "side_tables": [{"name": "groups", "make": GROUPS}], "resources": SHARES,
    })  # fmt: skip


def write(place: Path, sweep: dict[str, Any]) -> Path:
    path = place / f"{sweep['name']}.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def steps_of(state: SweepState) -> dict[str, int]:
    """Newest checkpoint of every trial that has begun, by name."""
    found = {}
    for name, facts in state.planned().items():
        try:
            found[name] = Run.read(facts["uri"]).latest_step()
        except (UserError, RunError, OSError):
            continue
    return found


def trains(state: SweepState) -> bool:
    """Whether a trial of stage 2 has a checkpoint and no outcome."""
    ended = state.outcomes() if state.exists else {}
    return state.exists and any(
        step and name not in ended and not name.startswith("prompts") for name, step in steps_of(state).items()
    )


def kill_a_driver(job: Job) -> None:
    """SIGKILL to the actor of one trial."""
    for process in psutil.Process(job.process.pid).children(recursive=True):
        title = " ".join(cmdline(process))
        if title.startswith("ray::") and ("ImplicitFunc" in title or "drive" in title):
            logger.info("killing %s", title)
            process.kill()
            return
    raise AssertionError("no driver of a trial was found")


def expect(true: bool, what: str, *facts: Any) -> None:
    if not true:
        raise AssertionError(f"{what}: {facts}")
    logger.info("seen: %s", what)


def muva(place: Path) -> list[Row]:
    """Steps 1 and 2."""
    state, began = SweepState(str(place / "sweeps" / "muva")), time.monotonic()
    first = Job("jobs.tune", str(muva_sweep(place, [1e-4, 2e-4])))
    first.wait_for(lambda: trains(state), timeout=600)
    first.process.send_signal(signal.SIGTERM)
    code, record, said = first.finish(200)
    expect(
        code == 1 and "the same command continues the sweep" in record["error"],
        "SIGTERM ends in order", code, record, said[-3000:],
    )  # fmt: skip
    stopped, ended = steps_of(state), state.outcomes()
    (stage,) = [name for name in state.planned() if name.startswith("prompts")]
    expect(stage in ended, "stage 1 was done before the stop", sorted(ended))
    made = (place / "tables" / "drawn.side.lance").stat().st_mtime_ns
    stopped_after = time.monotonic() - began

    second = Job("jobs.tune", str(muva_sweep(place, [1e-4, 2e-4, 4e-4])))
    second.wait_for(lambda: bool(second.workers()), timeout=300)
    kill_a_driver(second)
    code, record, said = second.finish(600)
    expect(code == 0, "the extended sweep ends well", record, said[-4000:])
    outcomes = state.outcomes()
    trials = {name: o for name, o in outcomes.items() if name != stage}
    expect(len(trials) == 3 and all(o["status"] == "done" for o in trials.values()), "three trials are done", trials)
    expect(outcomes[stage] == ended[stage] and Run.read(outcomes[stage]["uri"]).attempt == 1, "stage 1 ran once", stage)
    expect((place / "tables" / "drawn.side.lance").stat().st_mtime_ns == made, "the masks were made once")
    whole = {name: Run.read(o["uri"]).latest_step() for name, o in trials.items()}
    expect(len(set(whole.values())) == 1, "all trials have the same length", whole)
    attempts = {name: Run.read(o["uri"]).attempt for name, o in trials.items()}
    expect(max(attempts.values()) > 1, "stopped or struck trials continued", attempts)
    for name in trials:
        kinds = {key for m in Run.read(trials[name]["uri"]).metrics() if m["kind"] == "step" for key in m}
        expect("contrast" not in kinds, "a trial has no step of stage 1", name)
    note = f"stage 1 once, attempts {sorted(attempts.values())}, {record['started_now']} runs in the second job"
    return [
        Row(
            "SIGTERM to a sweep",
            True,
            note=f"stopped after {stopped_after:.0f} s, checkpoints at {sorted(stopped.values())}",
        ),
        Row("a sweep extended, a trial's driver killed", True, note=f"{note}, {time.monotonic() - began:.0f} s in all"),
    ]


def icl(place: Path) -> list[Row]:
    """Step 3."""
    began = time.monotonic()
    code, record, said = Job("jobs.tune", str(icl_sweep(place))).finish(400)
    expect(code == 0 and record["done"] == 1, "a trial with imported groups is done", record, said[-3000:])
    expect((place / "tables" / "groups.side.lance").is_dir(), "the groups were made")
    return [Row("a sweep without its side table", True, note=f"made, one trial, {time.monotonic() - began:.0f} s")]


def sweep(folder: Path, tables: Path) -> list[Row]:
    """All three, on tables of their own."""
    small_table(folder, "synthetic-market-1501", **SIZES)
    small_table(folder, "synthetic-cuhk-pedes", diversity=True)
    return [*muva(folder), *icl(folder)]
