"""What frames bring: CLIMB on a synthetic video world where half of the people have a twin whom only gait and shoes tell
apart, and where most frames show one half of the person.

python -m tests.bench.bench_climb [seeds=3 | seed=N] [steps=250] [world.OPTION=value ...] [recipe.key=value ...]

Per seed one world and one training of `climb/synthetic_video` in one epoch; the trained model is scored on clips of eight
frames, on the first frame of each tracklet alone (eight times over), and untrained. One JSON line per seed. Synthetic scores
say nothing about published accuracy.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from tests.climb_frames import ONE_FRAME
from tests.learning import learn, scores

RECIPE, PROTOCOL = "climb/synthetic_video", "video"
WORLD: dict[str, Any] = {
    "num_train": 200, "num_test": 60, "num_distractors": 0, "difficulty": "mild", "twins": 0.5, "half_hidden": 0.7,
    "max_frames": 8,
}  # fmt: skip
STEPS, WARMUP = 250, 10


def one_seed(root: Path, seed: int, steps: int, world: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """{"untrained", "eight", "one": record, "seconds": of training}."""
    form = ("training.epochs=1", f"seed={seed}", f"model.iterations={steps}", f"schedule.warmup={WARMUP}", *words)
    run = learn(root, RECIPE, [PROTOCOL], form, seed=seed, **world)
    one = scores(run["recipe"], run["model"], [PROTOCOL], ONE_FRAME)[PROTOCOL]
    found = {"untrained": run["untrained"][PROTOCOL], "eight": run["trained"][PROTOCOL], "one": one}
    return {**found, "seconds": round(run["seconds"], 1)}


def summary(found: list[dict[str, Any]]) -> list[str]:
    """A line per score: means over the seeds, and what eight frames gained in each."""
    lines = []
    for key in ("rank1", "mAP"):
        eight, one, before, chance = (
            np.array([run[of][name] for run in found])
            for of, name in (("eight", key), ("one", key), ("untrained", key), ("eight", f"chance_{key}"))
        )
        gains = ", ".join(f"{gain:+.3f}" for gain in eight - one)
        lines.append(
            f"{key}: eight frames {eight.mean():.3f}, one frame {one.mean():.3f} (gain by seed {gains}), "
            f"untrained {before.mean():.3f}, chance {chance.mean():.3f}"
        )
    return lines


def main(words: list[str], root: Path) -> None:
    given = dict(word.split("=", 1) for word in words)
    own = {name: int(given.pop(name)) for name in ("seeds", "seed", "steps") if name in given}
    world = {key.removeprefix("world."): yaml.safe_load(given.pop(key)) for key in list(given) if key[:6] == "world."}
    rest = [f"{key}={value}" for key, value in given.items()]
    seeds = [own["seed"]] if "seed" in own else list(range(1, own.get("seeds", 3) + 1))
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for seed in seeds:
        found.append(one_seed(root / str(seed), seed, own.get("steps", STEPS), {**WORLD, **world}, rest))
        print(json.dumps({"seed": seed, **found[-1]}), flush=True)
    print("\n".join(summary(found)), flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1:], Path(folder))
