"""What frames bring: CLIMB on a synthetic video world where half of the people have a twin whom only gait and shoes tell
apart, and the shoes are hidden in most frames.

python -m tests.bench.bench_climb [seeds=3] [steps=360] [train=120] [test=30]

Per seed one world and one training of `climb/synthetic_video`, as many steps as the recipe's in one epoch; the trained model is
scored on clips of eight frames, on the first frame of each tracklet alone (eight times over), and untrained. Some eight
minutes of CPU time a seed. Synthetic scores say nothing about published accuracy.
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

from tests.climb_frames import ONE_FRAME
from tests.learning import learn, scores

RECIPE, PROTOCOL = "climb/synthetic_video", "video"
FORM = ("training.epochs=1",)


def one_seed(root: Path, seed: int, steps: int, train: int, test: int) -> dict[str, dict[str, float]]:
    """{"untrained", "eight", "one": record}."""
    world: dict[str, Any] = {"num_train": train, "num_test": test, "num_distractors": 0, "max_frames": 12, "twins": 0.5}
    words = (*FORM, f"seed={seed}", f"model.iterations={steps}")
    run = learn(root, RECIPE, [PROTOCOL], words, seed=seed, **world)
    one = scores(run["recipe"], run["model"], [PROTOCOL], ONE_FRAME)[PROTOCOL]
    return {"untrained": run["untrained"][PROTOCOL], "eight": run["trained"][PROTOCOL], "one": one}


def main(words: list[str], root: Path) -> None:
    options = {"seeds": 3, "steps": 360, "train": 120, "test": 30} | {
        k: int(v) for k, v in (word.split("=") for word in words)
    }
    torch.set_num_threads(1)
    found: list[dict[str, dict[str, float]]] = []
    for seed in range(1, options["seeds"] + 1):
        found.append(one_seed(root / str(seed), seed, options["steps"], options["train"], options["test"]))
        print(json.dumps({"seed": seed, **found[-1]}), flush=True)
    for key in ("rank1", "mAP"):
        eight, one, before, chance = (
            np.array([run[of][name] for run in found])
            for of, name in (("eight", key), ("one", key), ("untrained", key), ("eight", f"chance_{key}"))
        )
        gains = ", ".join(f"{gain:+.3f}" for gain in eight - one)
        print(
            f"{key}: eight frames {eight.mean():.3f}, one frame {one.mean():.3f} (gain by seed {gains}), "
            f"untrained {before.mean():.3f}, chance {chance.mean():.3f}"
        )


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1:], Path(folder))
