"""MUVA in figures: `python -m tests.bench.bench_muva [part=all|prompts|domains] [seeds=1,2,3] [epochs=8] [people=90]`.

prompts   the prompt stage as we compute it (distinct identities, only tokens that can matter) beside the literal form (every row
          of the batch, all 77 positions), forward and backward, in the same process; CLIP's text width, fewer layers.
domains   synthetic domain generalisation: trained in A, tested in A and in B, whole method, without prompts, without parts and
          masks, several seeds; IoU of predicted masks with the exact ones on A's and B's test images. Printed as it comes out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reid_dist import methods
from reid_dist.config import DataConfig, Recipe
from reid_dist.data import layouts
from reid_dist.data.store import TableView, open_view
from reid_dist.data.synthetic import world_for
from reid_dist.data.synthetic.parts import part_mask
from reid_dist.data.synthetic.write import plan_synthetic
from reid_dist.evaluation.ranking import Labels, Scoring, rank_features
from reid_dist.methods.muva import METHOD, losses
from reid_dist.methods.muva.__main__ import LAYOUT, PAIR, draw_pair
from reid_dist.methods.muva.config import Config
from reid_dist.methods.muva.figures import mask_iou, predict
from reid_dist.methods.muva.model import Muva
from reid_dist.methods.spec import EvalSide, ModelFacts
from reid_dist.models.clip import ARCHITECTURES, ClipArchitecture
from reid_dist.storage import open_store
from reid_dist.training.loop import Hooks
from reid_dist.training.worker import make_worker, prepare
from tests.tables import write_table

GRID = (8, 4)
VARIANTS: dict[str, dict[str, Any]] = {
    "whole method": {},
    "without prompts": {"weight_i2t": 0.0, "stages": ("finetune",)},
    "without parts and masks": {"parts": ()},
}
ARCHITECTURES["bench-text"] = ClipArchitecture(
    image_size=(32, 16), image_width=16, image_heads=1, image_layers=1, text_layers=3
)


def report(text: str) -> None:
    print(text, flush=True)


def prompts(identities: int = 16, instances: int = 4) -> None:
    """Time of one prompt step's forward and backward, ours and literal, and that both give the same loss and gradient."""
    config = Config(arch="bench-text", image_size=(32, 16), mask_heads=1)
    torch.manual_seed(0)
    model = METHOD.build(config, ModelFacts(num_classes=64))
    assert isinstance(model, Muva)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "prompts.context")
    labels = torch.arange(identities).repeat_interleave(instances)
    centroids = losses.unit(torch.randn(64, model.neck.num_features))

    def step(encode: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor, float]:
        model.zero_grad()
        started = time.perf_counter()
        loss = losses.smoothed_ce(losses.unit(encode()) @ centroids.T, labels, 0.0).mean()
        loss.backward()
        assert model.prompts.context.grad is not None
        return loss.item(), model.prompts.context.grad.clone(), time.perf_counter() - started

    forms: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: model.text_features(labels),
        "literal": lambda: model.encode_prompts(labels, model.arch.context_length),
    }
    step(forms["ours"])  # warm up
    found = {name: [step(form) for _ in range(2)] for name, form in forms.items()}
    seconds = {name: min(run[2] for run in runs) for name, runs in found.items()}
    gap = (found["ours"][0][1] - found["literal"][0][1]).abs().max() / found["literal"][0][1].abs().max()
    report(
        f"prompt step, {identities} x {instances} rows, 3 text layers: literal {seconds['literal']:.2f} s, "
        f"ours {seconds['ours']:.3f} s, ratio {seconds['literal'] / seconds['ours']:.1f} "
        f"(token ratio {instances * 77 / model.templates.length:.1f}); loss {found['literal'][0][0]:.6f} / "
        f"{found['ours'][0][0]:.6f}, largest gradient difference {gap:.1e} of the largest gradient"
    )


def make_tables(root: Path, **world: Any) -> None:
    """Both domains: drawn, written in Market's layout, parsed, packed (without Ray), masks beside them."""
    draw_pair(str(root), GRID, **world)
    for domain in PAIR:
        raw = root / f"raw-{domain}"
        parsed = layouts.get(LAYOUT).parse(open_store(str(raw)))
        images = [(raw / record.path).read_bytes() for record in parsed.records]
        write_table(str(root), f"synthetic-{domain}", parsed.records, images, raw, chunk=4096)


def exact_of_tests(domain: str, **world: Any) -> dict[str, np.ndarray]:
    """{image digest: bool [3, L]} of a domain's query and gallery people."""
    drawn = world_for(LAYOUT, **{"domain": domain, **PAIR[domain], **world})
    found = {}
    for shot in plan_synthetic(drawn, LAYOUT):
        if shot.split in ("query", "gallery") and shot.pid > 0:
            sample, drawing = drawn.sample(shot)
            found[hashlib.sha256(sample.image).hexdigest()] = part_mask(drawing, GRID)
    return found


def score(model: torch.nn.Module, config: Config, view: TableView) -> dict[str, Any]:
    """Market protocol on a view's query and gallery."""
    rows = np.arange(len(view))
    side = EvalSide("image", rows, 0 * rows)
    with torch.no_grad():
        feat = torch.cat(
            [
                METHOD.encode(model, METHOD.eval_batch(config, view, side, part))["global"]
                for part in np.array_split(rows, 16)
            ]
        ).numpy()
    sides = [view.split == name for name in ("query", "gallery")]
    labels = [Labels(view.pid[rows], view.camid[rows]) for rows in sides]
    record: dict[str, Any] = rank_features(feat[sides[0]], feat[sides[1]], *labels, Scoring(same_camera=True)).record()
    return record


def iou(model: torch.nn.Module, config: Config, view: TableView, exact: dict[str, np.ndarray]) -> np.ndarray:
    """IoU per part with the exact masks, over the images that have one."""
    from reid_dist.methods.muva.images import transform_of

    assert isinstance(model, Muva)
    rows = np.array([row for row, digest in enumerate(view.digests(np.arange(len(view)))) if digest in exact])[:256]
    transform = transform_of(config, train=False)
    shown = [predict(model, transform.apply_all(view.images(part)))[0] for part in np.array_split(rows, 4)]
    return mask_iou(np.concatenate(shown), np.stack([exact[digest] for digest in view.digests(rows)]))


def train(recipe: Recipe) -> tuple[torch.nn.Module, torch.nn.Module, int]:
    """(untrained, trained, steps): one worker, in this process."""
    prepared = prepare(recipe)
    worker = make_worker(recipe, prepared, None, Hooks(bar=_silent))
    worker.train()
    assert worker.snapshot is not None
    model = prepared.build()
    model.load_state_dict(worker.snapshot.model, strict=False)
    return prepared.build().eval(), model.eval(), worker.snapshot.progress.step


def _silent(**options: Any) -> Any:
    from tqdm import tqdm

    return tqdm(**{**options, "disable": True})


def domains(seeds: list[int], epochs: int, people: int) -> None:
    """Every variant with every seed; all figures, then means and deviations over the seeds."""
    world = {"num_train": people}
    with tempfile.TemporaryDirectory(prefix="bench-muva-") as folder:
        make_tables(Path(folder), **world)
        data = DataConfig(root=folder)
        views = {d: open_view(data, (f"synthetic-{d}",), ("query", "gallery")) for d in PAIR}
        exact = {d: exact_of_tests(d, **world) for d in PAIR}
        for name, model in VARIANTS.items():
            rows = []
            for seed in seeds:
                recipe = methods.load_recipe(
                    "muva/synthetic", [f"data.root={folder}", f"seed={seed}", f"training.epochs={epochs}"]
                )
                recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **model))
                started = time.time()
                untrained, trained, steps = train(recipe)
                records = {d: score(trained, recipe.model, views[d]) for d in PAIR}
                start = {d: score(untrained, recipe.model, views[d]) for d in PAIR}
                rows.append([records[d][key] for d in PAIR for key in ("rank1", "mAP")])
                text = "; ".join(
                    f"A->{d.upper()}: rank-1 {records[d]['rank1']:.3f}, mAP {records[d]['mAP']:.3f} "
                    f"({records[d]['mAP'] / records[d]['chance_mAP']:.1f} x chance; untrained {start[d]['mAP']:.3f})"
                    for d in PAIR
                )
                if recipe.model.parts:
                    for d in PAIR:
                        values = " ".join(f"{x:.2f}" for x in iou(trained, recipe.model, views[d], exact[d]))
                        text += f"; IoU on {d.upper()} (head, upper, legs) {values}"
                report(f"{name}, seed {seed}, {steps} steps, {time.time() - started:.0f} s: {text}")
            mean, spread = np.mean(rows, axis=0), np.std(rows, axis=0)
            columns = ("A->A rank-1", "A->A mAP", "A->B rank-1", "A->B mAP")
            means = ", ".join(f"{c} {m:.3f} +- {s:.3f}" for c, m, s in zip(columns, mean, spread, strict=True))
            report(f"== {name}, {len(seeds)} seeds: {means}")


if __name__ == "__main__":
    options = dict(word.split("=", 1) for word in sys.argv[1:])
    part = options.get("part", "all")
    if part in ("all", "prompts"):
        prompts()
    if part in ("all", "domains"):
        chosen = [int(seed) for seed in options.get("seeds", "1,2,3").split(",")]
        domains(chosen, int(options.get("epochs", 8)), int(options.get("people", 90)))
