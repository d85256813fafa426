"""ICL and RDE: what the one attention row saves, how well noisy pairs are found, and what reorganised captions bring.

python -m tests.bench.bench_icl [attention|learning] [key=value ...]     both by default
    attention   CPU time and peak memory of a training step: one row | last map | every map
    learning    synthetic world over 3 seeds: noise 50 % with and without division, clean captions with and without reorganised
                ones, each as it comes out. seeds=[1,2,3] epochs=6 people=100 (of the fine-tuned worlds), warm=FILE keeps the
                start weights, warm_epochs=6 warm_people=300 make them; only=WORD takes runs of that name,
                more=[key=value, ...] overrides all of them

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
    """Train icl/synthetic with overrides on this process; test scores before and after, divisions, weights and seconds."""
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
    evaluate = evaluator(recipe, prepared)
    assert evaluate is not None
    before = evaluate(prepared.build(), RunContext(seed=seed))
    began = time.process_time()
    worker.train()
    seconds = time.process_time() - began
    scores = evaluate(worker.model, RunContext(seed=seed))
    return {
        "scores": {key: round(scores[key], 4) for key in ("rank1", "mAP", "chance_mAP")},
        "before": round(before["mAP"], 4), "cpu_seconds": round(seconds, 1), "notes": notes, "steps": len(worker.losses),
        "weights": {name: t.detach().clone() for name, t in worker.model.state_dict().items()},
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


SIZES = ["training.global_batch=32"]
FINE_TUNE = [
    "model.loss=tal",
    "model.consensus=true",
    "optim.lr=3e-4",
    "optim.eps=1e-3",
    "schedule.warmup=5",
]  # the published form
RUNS = {
    "noise 50 %, divided": ["model.noise=half"],
    "noise 50 %, all trusted": ["model.noise=half", "model.consensus=false"],
    "clean captions": ["model.consensus=false"],
    "clean captions and reorganised ones": ["model.consensus=false", "model.groups=[groups]"],
}


def start_weights(folder: Path, file: str, people: int, epochs: int) -> dict[str, Tensor]:
    """Those that `file` keeps; else trained on clean captions of a world of its own, and kept there."""
    if file and Path(file).exists():
        weights: dict[str, Tensor] = torch.load(file, weights_only=True)
        return weights
    words = [*SIZES, f"training.epochs={epochs}", "model.consensus=false"]
    run = fit(world(folder, 100, people), 1, words, None)
    print(json.dumps({"start weights": run["scores"], "untrained": run["before"], "steps": run["steps"]}), flush=True)
    if file:
        torch.save(run["weights"], file)
    return dict(run["weights"])


def learning_bench(
    folder: Path, seeds: tuple[int, ...] = (1, 2, 3), epochs: int = 6, people: int = 100, warm: str = "",
    warm_epochs: int = 6, warm_people: int = 300, only: str = "", more: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Figures of each run as they come, then mean and range over seeds."""
    start = start_weights(folder, warm, warm_people, warm_epochs)
    scores: dict[str, list[float]] = {}
    for seed in seeds:
        root = world(folder, seed, people)
        for name, words in RUNS.items():
            if only not in name:
                continue
            run = fit(root, seed, [*SIZES, *FINE_TUNE, f"training.epochs={epochs}", *words, *more], start)
            line = {"seed": seed, "run": name, "mAP before": run["before"], **run["scores"], "steps": run["steps"],
                    "cpu_seconds": run["cpu_seconds"]}  # fmt: skip
            if run["notes"]:
                line["per epoch: trusted, precision, recall"] = [
                    [round(note[key], 3) for key in ("clean", "precision", "recall")] for note in run["notes"]
                ]
            print(json.dumps(line), flush=True)
            scores.setdefault("before", []).append(run["before"])
            scores.setdefault(name, []).append(run["scores"]["mAP"])
    for name, values in scores.items():
        print(f"{name}: mAP {sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})", flush=True)


def main(words: list[str]) -> None:
    from reid_dist.methods.command import words_and_options

    plain, options = words_and_options(words)
    if plain[:1] == ["measure"]:
        print(json.dumps(measure(plain[1])))
        return
    if plain in ([], ["attention"]):
        attention_bench()
    if plain in ([], ["learning"]):
        with tempfile.TemporaryDirectory() as place:
            learning_bench(Path(place), **options)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    main(sys.argv[1:])
