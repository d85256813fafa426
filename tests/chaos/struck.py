"""A run that is struck by one fault after another, driven as a user drives it, and what is measured of it."""

from __future__ import annotations

import atexit
import functools
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from reid_dist import methods
from reid_dist.config import to_mapping
from reid_dist.runs import Run, identity_of
from reid_dist.training import checkpoint as checkpoints
from reid_dist.training.worker import open_data
from tests.dist.cells import train_recipe
from tests.e2e.job import Job
from tests.injection import Faults, wait_until
from tests.pool import Pool


@dataclass
class Row:
    """One line of the survival table."""

    fault: str
    survived: bool
    steps_lost: int | None = None  # None: nothing was running, or nothing had to be repeated by design
    seconds: float | None = None  # from the strike to the first new step
    weights_equal: bool | None = None  # bitwise, to the run that nothing struck
    left_behind: int | None = None  # objects below the run that its card does not list
    note: str = ""


def words(recipe: str, root: Path | str, output: str, name: str, *more: str) -> list[str]:
    """A training command with two workers that writes a checkpoint every second step."""
    return [
        "jobs.train", recipe, f"data.root={root}", f"output={output}", f"name={name}", "training.num_workers=2",
        "training.log_every=1", "training.eval_every=0", "training.checkpoint_every_steps=2", *more,
    ]  # fmt: skip


@functools.cache
def warm() -> Pool:
    """Plain gloo processes without Ray, for what nothing kills; they end with the program."""
    pool = Pool()
    atexit.register(pool.close)
    return pool


def uninterrupted(recipe: str, root: Path, *more: str) -> dict[str, torch.Tensor]:
    """Final weights of `quiet`."""
    weights: dict[str, torch.Tensor] = quiet(recipe, root, *more)["weights"]
    return weights


@functools.cache
def quiet(recipe: str, root: Path, *more: str) -> dict[str, Any]:
    """The same training with two workers that nothing strikes, without Ray and without storage."""
    overrides = [word for word in words(recipe, root, "unused", "quiet", *more)[2:] if "checkpoint" not in word]
    mapping: dict[str, Any] = to_mapping(methods.load_recipe(recipe, overrides))
    trained: dict[str, Any] = warm().run(train_recipe, 2, mapping)[0]
    return trained


def attempt(recipe: str, root: str, output: str, *more: str) -> tuple[Run, dict[str, Any]]:
    """One more attempt of a run without Ray: (the run, the arguments by which two processes of a pool train it)."""
    built = methods.load_recipe(recipe, words(recipe, root, output, "struck", *more)[2:])
    run = Run.open(built.uri, identity_of(built, open_data(built).train.versions), built)
    return run, to_mapping(built)


def judged(rows: list[Row], run: Run, weights: dict[str, torch.Tensor]) -> list[Row]:
    """The rows, with what became of the weights and of the place."""
    equal, left = same_weights(run, weights), left_behind(run)
    for row in rows:
        row.weights_equal, row.left_behind = equal, len(left)
    return rows


def same_weights(run: Run, weights: dict[str, torch.Tensor]) -> bool:
    """Whether the newest checkpoint holds exactly these, bit for bit."""
    newest = checkpoints.newest(run)
    assert newest is not None
    return newest.model.keys() == weights.keys() and all(torch.equal(newest.model[k], weights[k]) for k in weights)


def left_behind(run: Run, *known_too: str) -> list[str]:
    """Keys below the run that neither its card accounts for nor `known_too` names."""
    card = run.card()
    kept = {checkpoint["name"] for checkpoint in card["checkpoints"] if checkpoint["kept"]}
    attempts = {attempt["number"] for attempt in card["attempts"]}
    places: dict[str, int] = {}  # folders of files below each kept checkpoint: one
    found = []
    for entry in run.store.list():
        top, _, rest = entry.key.partition("/")
        number = rest.removeprefix("attempt-")[:4]
        known = entry.key in ("run.json", "card.json", "record.json", *known_too) or (
            top in ("attempts", "notes", "metrics", "logs", "tensorboard")
            and number.isdigit()
            and int(number) in attempts
        )
        if top == "checkpoints" and "/".join(entry.key.split("/")[:2]) in kept:
            places.setdefault("/".join(entry.key.split("/")[:3]), 0)
            known = True
        if not known:
            found.append(entry.key)
    folders = [place for place in places if not place.endswith("/COMMITTED")]
    return found + folders[len(kept) :] + run.store.sweep(float("-inf"), plan=True)


def rows_of(faults: Faults, names: list[str], strikes: dict[str, float]) -> list[Row]:
    """A row per fault, from what rank 0 did: each fault ended one of its processes. `strikes`: moments known better than by the
    last step."""
    starts = faults.starts()
    assert len(starts) == len(names) + 1, f"{len(names)} faults, but rank 0 started {len(starts)} times: {starts}"
    rows = []
    for name, before, after in zip(names, starts, starts[1:], strict=False):
        seconds = after.first_time - strikes.get(name, before.last_time)
        lost = max(
            0, before.last - after.first
        )  # the last step begun was not finished, but where the run ended in order
        rows.append(Row(name, True, lost, round(seconds, 1)))
    return rows


def markdown(rows: list[Row]) -> str:
    """The survival table."""
    lines = [
        "| fault | survived | steps lost | seconds | weights equal | left behind | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = ["-" if value is None else {True: "yes", False: "NO"}.get(value, value) if isinstance(value, bool) else value
                 for value in asdict(row).values()]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def clean_environment(**more: str) -> dict[str, str]:
    return {**{key: value for key, value in os.environ.items() if not key.startswith("RAY_")}, **more}


def gate(faults: Faults, name: str, step: int, job: Job, timeout: float = 400) -> None:
    """Both ranks stop before this step; returns when they stand."""
    faults.add(name, "step", step, "wait")
    wait_until(lambda: faults.reached(name), f"{name} at step {step}", timeout, job.ended)
    time.sleep(0.5)
