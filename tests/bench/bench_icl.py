"""ICL and RDE: what the one attention row saves, how well noisy pairs are found, and what reorganised captions bring.

python -m tests.bench.bench_icl [attention|learning]   both by default; learning smoke: one seed, a few steps
    attention   CPU time and peak memory of a training step: one row | last map | every map
    learning    synthetic world over 3 seeds: noise 50 % with and without division, clean captions with and without reorganised
                ones, each as it comes out

Learning starts from a model trained without noise on a world of other people, as the published runs start from CLIP: fine-tuning
is where pairs can be told apart by their losses. The start weights are the shipped synthetic recipe's form, on fewer people.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROWS, LENGTH = 16, 77
WAYS = {
    "row": "fused, one row of the last block (ours)",
    "last": "fused, whole map of the last block",
    "every": "whole maps of every block, no fused attention (the original's way)",
}


# ---- attention


def _every_map(self: Any, x: Tensor, *args: Any, mask: Any = None, causal: bool = False, weights: Any = "") -> Any:
    """Attention that makes its map and multiplies by it, whatever is asked."""
    from reid_dist.models.clip_blocks import F

    query, key, value = (self._heads(part) for part in F.linear(x, self.qkv_weight, self.qkv_bias).chunk(3, dim=-1))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if causal:
        allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    seen = scores.softmax(dim=-1)
    return self.out((seen @ value).transpose(-2, -3).flatten(-2)), seen.mean(dim=1)


def measure(way: str) -> dict[str, float]:
    """Seconds of a training step and bytes that it grew by, in this process: half-depth towers of real token counts."""
    from reid_dist.methods.icl.config import Config
    from reid_dist.methods.icl.model import DualEncoder
    from reid_dist.models import clip_blocks
    from reid_dist.models.clip import ClipArchitecture, end_of_text, take_token
    from tests.bench.bench_scan import Peak

    torch.set_num_threads(1)
    torch.manual_seed(0)
    arch = ClipArchitecture(image_width=192, image_heads=3, image_layers=4, text_width=128, text_heads=2, text_layers=4,
                            joint_width=128)  # fmt: skip
    model = DualEncoder(Config(weights="", select_width=256), arch).train()
    if way == "every":
        clip_blocks.Attention.forward = _every_map  # type: ignore[method-assign]
    if way != "row":
        for tower in (model.towers.image, model.towers.text):
            tower.forward = _from_map(tower, end_of_text, take_token)  # type: ignore[method-assign]
    image, ids = torch.randn(ROWS, 3, 384, 128), torch.randint(1, 49000, (ROWS, LENGTH))
    ids[:, 0], ids[:, 40], ids[:, 41:] = 49406, 49407, 0

    def step() -> None:
        out = model(image=image, ids=ids, second_ids=ids)
        torch.stack([value.square().mean() for value in out.values()]).sum().backward()
        model.zero_grad()

    step()
    seconds = []
    with Peak() as peak:
        for _ in range(3):
            start = time.thread_time()
            step()
            seconds.append(time.thread_time() - start)
    return {"seconds": min(seconds), "peak_mb": (peak.peak - peak.start) / 2**20}


def _from_map(tower: Any, end_of_text: Any, take_token: Any) -> Any:
    """A tower's forward that reads the row out of the whole map."""
    plain = type(tower).forward

    def forward(given: Tensor, weights: str = "") -> Any:
        out = plain(tower, given, "map")
        place = end_of_text(given) if given.dim() == 2 else torch.zeros(len(given), dtype=torch.int64)
        return out._replace(weights=take_token(out.weights, place))

    return forward


def attention_bench() -> None:
    """Each way in its own process."""
    found = {}
    for way, what in WAYS.items():
        command = [sys.executable, "-m", "tests.bench.bench_icl", "measure", way]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        found[way] = json.loads(answer.stdout.strip().splitlines()[-1])
        ratio = {key: found[way][key] / found["row"][key] for key in ("seconds", "peak_mb")}
        print(
            f"{what}: {found[way]['seconds']:.2f} s CPU per step ({ratio['seconds']:.2f} x), peak {found[way]['peak_mb']:.0f} MB "
            f"({ratio['peak_mb']:.2f} x)",
            flush=True,
        )


# ---- learning


def fit(root: Path, seed: int, words: list[str], start: dict[str, Tensor] | None) -> dict[str, Any]:
    """Train icl/synthetic with overrides on this process; test scores, divisions, weights and seconds."""
    from reid_dist import methods
    from reid_dist.training.context import RunContext
    from reid_dist.training.loop import Hooks
    from reid_dist.training.selection import evaluator
    from reid_dist.training.worker import make_worker, prepare

    changes = ["training.num_workers=1", "training.checkpoint_every=0", "training.eval_every=1", "training.select_on=test",
               "training.max_steps=null", "data.prefetch=1"]  # fmt: skip
    recipe = methods.load_recipe("icl/synthetic", [f"data.root={root}", f"seed={seed}", *changes, *words])
    prepared = prepare(recipe, (lambda spec, model: model.load_state_dict(start)) if start else None)
    worker, notes = make_worker(recipe, prepared, None, Hooks()), []
    worker._write = lambda record: notes.append(record) if record["kind"] == "division" else None  # type: ignore[method-assign]
    began = time.perf_counter()
    worker.train()
    seconds = time.perf_counter() - began
    evaluate = evaluator(recipe, prepared)
    assert evaluate is not None
    scores = evaluate(worker.model, RunContext(seed=seed))
    return {
        "scores": {key: round(scores[key], 4) for key in ("rank1", "mAP")}, "seconds": round(seconds, 1), "notes": notes,
        "steps": len(worker.losses), "weights": {name: t.detach().clone() for name, t in worker.model.state_dict().items()},
    }  # fmt: skip


def world(folder: Path, seed: int, people: int) -> Path:
    """A packed world with groups and a permutation of half of its captions, seed's own."""
    from reid_dist.methods.icl.__main__ import import_groups, make_noise
    from tests.worlds import small_table

    root, name = folder / f"world-{seed}", "synthetic-cuhk-pedes"
    root.mkdir()
    small_table(
        root,
        name,
        seed=seed,
        num_train=people,
        num_val=0,
        num_test=60,
        images_per_id=3,
        diversity=True,
        visible_only=True,
    )
    make_noise(str(root), "half", name, 0.5, seed)
    import_groups(str(root), str(root / f"raw-{name}" / "reid_raw.json"), "cuhk-pedes", name, "groups")
    return root


RUNS = {
    "noise 50 %, divided": ["model.noise=half", "model.consensus_from=1"],
    "noise 50 %, all trusted": ["model.noise=half", "model.consensus=false"],
    "clean captions": ["model.consensus=false"],
    "clean captions and reorganised ones": ["model.consensus=false", "model.groups=[groups]"],
}


def learning_bench(
    folder: Path, seeds: tuple[int, ...] = (1, 2, 3), warm: tuple[int, int] = (300, 6), own: tuple[int, int] = (100, 3)
) -> None:
    """Figures of each run as they come. `warm`, `own`: training people and epochs of the start weights and of the runs."""
    root, fast = world(folder, 100, warm[0]), ["training.global_batch=32", "model.text_length=40"]
    words = [*fast, f"training.epochs={warm[1]}", "model.consensus=false"]
    before = fit(root, 1, words, None)
    print(
        json.dumps({"warm start": before["scores"], "steps": before["steps"], "seconds": before["seconds"]}), flush=True
    )
    for seed in seeds:
        root = world(folder, seed, own[0])
        for name, words in RUNS.items():
            run = fit(
                root,
                seed,
                [*fast, f"training.epochs={own[1]}", "optim.lr=3e-4", "model.loss=tal", *words],
                before["weights"],
            )
            line = {"seed": seed, "run": name, **run["scores"], "steps": run["steps"], "seconds": run["seconds"]}
            if run["notes"]:
                line["per epoch: trusted, precision, recall"] = [
                    [round(note[key], 3) for key in ("clean", "precision", "recall")] for note in run["notes"]
                ]
            print(json.dumps(line), flush=True)


def main(words: list[str]) -> None:
    if words[:1] == ["measure"]:
        print(json.dumps(measure(words[1])))
        return
    if words[:1] in ([], ["attention"]):
        attention_bench()
    if words[:1] in ([], ["learning"]):
        with tempfile.TemporaryDirectory() as place:
            learning_bench(Path(place), *([(1,), (20, 1), (20, 1)] if words[1:] == ["smoke"] else []))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    main(sys.argv[1:])
