"""`python -m tests.bench.bench_training`: training through the whole framework beside a plain PyTorch loop.

Same model, batches, optimizer and threads; one worker. Also the input path alone, the cost of a checkpoint, and where the
seconds from the command to the first step go. Ratios are within this run; other load on the machine moves both sides.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reid_dist import methods
from reid_dist.config import Recipe
from reid_dist.data.draws import row_rng
from reid_dist.data.transforms import person_transform
from reid_dist.training.context import RunContext
from reid_dist.training.loader import batches
from reid_dist.training.optim import build_optimizer, freeze_others
from reid_dist.training.schedule import lr_at
from reid_dist.training.worker import prepare
from tests.worlds import small_table

STEPS, WARM = 90, 30


def recipe_in(folder: Path) -> Recipe:
    """The demo's recipe on a smaller world: 60 steps of 64 rows, one worker."""
    small_table(folder, "synthetic-cuhk-pedes", num_train=160, images_per_id=3)
    overrides = [
        f"data.root={folder}",
        f"output={folder}/runs",
        "training.num_workers=1",
        f"training.max_steps={STEPS}",
    ]
    more = ["training.eval_every=0", "training.checkpoint_every=0", "training.log_every=10", "training.epochs=20"]
    return methods.load_recipe("comoe/synthetic", [*overrides, *more])


def plain(recipe: Recipe) -> float:
    """Rows per second of a loop without Ray, DeepSpeed, meters or checkpoints."""
    torch.set_num_threads(1)
    prepared = prepare(recipe)
    stage, model = prepared.spec.stages(recipe, prepared.data)[0], prepared.build()
    groups = stage.param_groups(model)
    freeze_others(model, groups)
    optimizer = build_optimizer(model, groups, stage.optim())
    ctx, step, rows, began = RunContext(seed=recipe.seed, rank=0, world_size=1), 0, 0, 0.0
    for epoch in range(stage.epochs):
        stream = batches(
            stage, seed=recipe.seed, epoch=epoch, start=0, rank=0, world_size=1,
            threads=recipe.data.loader_threads, prefetch=recipe.data.prefetch,
        )  # fmt: skip
        for _, count, batch in stream:
            if step == WARM:
                rows, began = 0, time.perf_counter()
            for group, base in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = lr_at(base.lr, step, STEPS, stage.schedule())
            ctx.begin_step(count)
            out = stage.forward(model, batch, ctx)
            loss = torch.stack(list(stage.losses(model, out, batch, ctx).values())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step, rows = step + 1, rows + count
            if step == STEPS:
                return rows / (time.perf_counter() - began)
    raise RuntimeError("too few steps")


def framework(recipe: Recipe, folder: Path, name: str) -> tuple[float, dict[str, Any]]:
    """Rows per second through jobs.train (Ray Train, DeepSpeed ZeRO-1), and the job's record."""
    words = [f"data.root={folder}", f"output={folder}/runs", f"name={name}", f"training.max_steps={STEPS}"]
    more = ["training.num_workers=1", "training.eval_every=0", "training.checkpoint_every=0", "training.epochs=20"]
    command = [sys.executable, "-m", "jobs.train", "comoe/synthetic", *words, *more, "training.log_every=10"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    record = json.loads(done.stdout.strip().splitlines()[-1])
    from reid_dist.runs import Run

    steps = [m for m in Run.read(record["run"]).metrics() if m["kind"] == "step" and m["step"] > WARM]
    seconds = sum(m["rows"] / m["rows_per_s"] for m in steps)
    return sum(m["rows"] for m in steps) / seconds, record


def input_path(size: tuple[int, int]) -> dict[str, float]:
    """Images per second and core of decode + augment, on JPEGs of about that size."""
    from reid_dist.data.decode import decode
    from tests.tables import jpeg

    encoded = [jpeg(i, height=size[0], width=size[1]) for i in range(64)]
    transform = person_transform(size, train=True, augment=True)
    draws = [transform.draw(row_rng(1, 0, i, i, "image")) for i in range(64)]
    best: dict[str, float] = {}
    for _ in range(3):
        began = time.process_time()
        images = [decode(data, "bench") for data in encoded]
        middle = time.process_time()
        transform.apply_all(images, draws)
        end = time.process_time()
        for key, seconds in (("decode", middle - began), ("augment", end - middle), ("both", end - began)):
            best[key] = max(best.get(key, 0.0), 64 / seconds)
    return best


def take(recipe: Recipe) -> float:
    """Milliseconds to take 64 random encoded rows of a local table."""
    from reid_dist.data.store import open_view

    view = open_view(recipe.data, recipe.data.train, ("train",))
    rng = np.random.default_rng(0)
    times = []
    for _ in range(20):
        rows = rng.integers(0, len(view), 64)
        began = time.perf_counter()
        view.encoded(rows)
        times.append(time.perf_counter() - began)
    return 1000 * float(np.median(times))


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="reid-bench-") as place:
        folder = Path(place)
        recipe = recipe_in(folder)
        baseline = max(plain(recipe) for _ in range(2))
        runs = [framework(recipe, folder, f"run-{i}") for i in range(2)]
        ours, record = max(runs, key=lambda pair: pair[0])
        print(
            f"training, one worker: plain loop {baseline:.1f} rows/s, framework {ours:.1f} rows/s, ratio {ours / baseline:.3f}"
        )
        print("command to first step, seconds:", json.dumps(record["startup_s"]))
        print(f"take of 64 rows from a local table: {take(recipe):.2f} ms")
        for size in ((64, 32), (384, 128)):
            speed = {key: round(value) for key, value in input_path(size).items()}
            print(f"input path at {size[0]} x {size[1]}, images per second and core: {speed}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"peak memory of the plain loop's process: {peak:.0f} MB")


if __name__ == "__main__":
    main()
