"""RLE: speed of the augmentation chain, and what enhancement brings on the synthetic world.

python -m tests.bench.bench_rle            both parts
python -m tests.bench.bench_rle chain      images per second on one core at 384 x 192, beside the straightforward chain
python -m tests.bench.bench_rle learning   synthetic-regdb over 3 seeds, with and without enhancement (some 6 CPU minutes)
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
from tests.rle_learning import DIRECTIONS, learn

SIZE = (384, 192)
SHORT = ("training.epochs=12",)  # of the recipe's 24, so that six runs take some minutes
FORMS = {
    "with": ("model.augment.moderate=0.5", "model.augment.radical=0.2"),
    "without": ("model.augment.moderate=0", "model.augment.radical=0"),
}


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
    """Both chains from stored 384 x 192 uint8 images to normalised tensors, with draws of the same laws."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8) for _ in range(16)]
    chain = Chain(SIZE)
    ours = rate(lambda i: chain.apply_all([pictures[i % 16]], [row_rng(0, 0, i, i, "bench")]), images)
    plain = rate(lambda i: rle_textbook.chain(pictures[i % 16], SIZE, row_rng(0, 0, i, i, "bench")), images)
    print(
        f"chain 384x192, one core: {ours:.0f} images/s, straightforward {plain:.0f} images/s, ratio {ours / plain:.2f}"
    )


def learning_bench(root: Path, seeds: tuple[int, ...] = (1, 2, 3)) -> None:
    """Rank-1 and mAP of both directions before and after training, with and without moderate and radical enhancement."""
    torch.set_num_threads(1)
    runs: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
    for seed in seeds:
        for form, words in FORMS.items():
            run = learn(root, f"seed={seed}", *SHORT, *words)
            runs[form].append(run)
            print(json.dumps({"seed": seed, "enhancement": form, **run}), flush=True)
    for name in DIRECTIONS:
        chance = runs["with"][0]["trained"][name]
        for key in ("rank1", "mAP"):
            values = {form: np.array([run["trained"][name][key] for run in some]) for form, some in runs.items()}
            before = np.array([run["untrained"][name][key] for some in runs.values() for run in some])
            gain = values["with"] - values["without"]
            print(
                f"{name} {key}: with {values['with'].mean():.3f}, without {values['without'].mean():.3f}, "
                f"difference {gain.mean():+.3f} (by seed {', '.join(f'{g:+.3f}' for g in gain)}), "
                f"untrained {before.mean():.3f}, chance {chance[f'chance_{key}']:.3f}"
            )


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    asked = sys.argv[1:2] or ["chain", "learning"]
    if "chain" in asked:
        chain_bench()
    if "learning" in asked:
        with tempfile.TemporaryDirectory() as folder:
            learning_bench(Path(folder))
