"""RLE: speed of the augmentation chain, and what enhancement brings on the synthetic world.

python -m tests.bench.bench_rle            chain: images per second on one core at 384 x 192, beside the textbook chain
python -m tests.bench.bench_rle learning   synthetic-regdb, with and without enhancement over 3 seeds (some 10 minutes)
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reid_dist.data.draws import row_rng
from reid_dist.methods.rle.transforms import Chain
from tests.bench import rle_textbook

SIZE = (384, 192)
DIRECTIONS = ("regdb-visible-to-thermal", "regdb-thermal-to-visible")
OFF = ("model.augment.moderate=0", "model.augment.radical=0")


def rate(work: Callable[[int], Any], images: int, rounds: int = 5) -> float:
    """Best images per second of `rounds`; `work(i)` makes image i."""
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        for i in range(images):
            work(i)
        best = max(best, images / (time.perf_counter() - start))
    return best


def chain_bench(images: int = 200) -> None:
    """Both chains from stored 384 x 192 uint8 images to normalised tensors."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8) for _ in range(16)]
    chain = Chain(SIZE)
    ours = rate(lambda i: chain.apply_all([pictures[i % 16]], [row_rng(0, 0, i, i, "bench")]), images)
    plain = rate(lambda i: rle_textbook.chain(pictures[i % 16], SIZE, row_rng(0, 0, i, i, "bench")), images)
    print(f"chain 384x192, one core: {ours:.0f} images/s, textbook {plain:.0f} images/s, ratio {ours / plain:.2f}")


def train_and_score(root: Path, seed: int, enhanced: bool, epochs: int | None = None) -> dict[str, Any]:
    """{direction: {"trained", "untrained"}: record} of one synthetic run on this process."""
    from reid_dist import methods
    from reid_dist.training.loop import Hooks
    from reid_dist.training.worker import make_worker, prepare
    from tests.worlds import small_table

    small_table(root, "synthetic-regdb", num_train=0, num_test=200, images_per_id=10)
    changes = [f"data.root={root}", f"seed={seed}", "training.num_workers=1", "training.checkpoint_every=0"]
    recipe = methods.load_recipe(
        "rle/synthetic", changes + ([] if enhanced else list(OFF)) + ([f"training.epochs={epochs}"] if epochs else [])
    )
    prepared = prepare(recipe)
    worker = make_worker(recipe, prepared, None, Hooks())
    scores = {"untrained": score(recipe, prepared.build())}
    start = time.perf_counter()
    worker.train()
    seconds = time.perf_counter() - start
    scores["trained"] = score(recipe, worker.model)
    return {"seconds": seconds, "steps": len(worker.losses), "scores": scores, "loss": worker.losses[-1]["loss"]}


def score(recipe: Any, model: torch.nn.Module) -> dict[str, dict[str, float]]:
    """{direction: {rank1, mAP, chance}} on the test half."""
    from reid_dist.data.store import open_view
    from reid_dist.evaluation import protocols
    from reid_dist.evaluation.ranking import rank_features
    from reid_dist.methods.rle.method import encode, eval_batch
    from reid_dist.methods.spec import EvalSide

    view = open_view(recipe.data, recipe.data.test, ("test", "query", "gallery"))
    side = EvalSide("image", np.arange(len(view)), np.zeros(len(view), dtype=np.int64))
    model.eval()
    with torch.inference_mode():
        parts = [encode(model, eval_batch(recipe.model, view, side, index))["fused"]
                 for index in np.array_split(np.arange(len(view)), max(1, len(view) // 128))]  # fmt: skip
    features = torch.cat(parts)
    items = protocols.Items(split=np.asarray(view.split), pid=np.asarray(view.pid), camid=np.asarray(view.camid),
                            modality=np.asarray(view.modality))  # fmt: skip
    result = {}
    for name in DIRECTIONS:
        chosen = protocols.select(protocols.get(name), items)
        record = rank_features(
            features[chosen.query], features[chosen.gallery], items.labels(chosen.query), items.labels(chosen.gallery),
            protocols.get(name).scoring,
        ).record()  # fmt: skip
        result[name] = {key: record[key] for key in ("rank1", "mAP")}
    return result


def learning_bench(root: Path, seeds: tuple[int, ...] = (1, 2, 3)) -> None:
    """Rank-1 and mAP of both directions, with and without moderate and radical enhancement."""
    for seed in seeds:
        for enhanced in (True, False):
            run = train_and_score(root, seed, enhanced)
            line = {"seed": seed, "enhanced": enhanced, "steps": run["steps"], "seconds": round(run["seconds"], 1)}
            for when, scores in run["scores"].items():
                line |= {f"{when} {name.removeprefix('regdb-')}": scores[name] for name in DIRECTIONS}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    if sys.argv[1:2] == ["learning"]:
        with tempfile.TemporaryDirectory() as folder:
            learning_bench(Path(sys.argv[2]) if len(sys.argv) > 2 else Path(folder))
    else:
        chain_bench()
