"""What ranks of the warm pool run for MUVA: golden trainers, and a tiny training on an in-memory view."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reid_dist.config import DataConfig, OptimConfig, Recipe, ScheduleConfig, TrainingConfig
from reid_dist.methods.muva.config import Config, PromptStageConfig
from reid_dist.methods.muva.method import METHOD
from reid_dist.methods.muva.model import Muva
from reid_dist.methods.spec import EvalSide, MethodSpec, ModelFacts, Stage, TrainingData
from reid_dist.models.clip import ARCHITECTURES, ClipArchitecture
from reid_dist.training import context, loader
from reid_dist.training.checkpoint import Snapshot
from reid_dist.training.loop import Hooks, Stopped, Worker
from tests.golden import load
from tests.unit.muva_names import ArrayView, golden_model, parts_of


class FixedPlan:
    """Recorded batches: rows [steps, B], the same number of steps in every epoch."""

    def __init__(self, rows: np.ndarray, epochs: int) -> None:
        self.rows = rows.reshape(epochs, -1, rows.shape[-1])

    def steps(self, epoch: int) -> int:
        return self.rows.shape[1]

    def batch(self, epoch: int, step: int) -> tuple[np.ndarray, int]:
        return self.rows[epoch, step].astype(np.int64), step * self.rows.shape[2]


def worker_of(recipe: Recipe, spec: MethodSpec, build: Any, view: Any, initial: Snapshot | None = None) -> Worker:
    data = TrainingData(train=view, val=None)
    return Worker(recipe, spec, build, data, None, Hooks(), torch.device("cpu"), initial=initial)


def golden_recipe(c: dict[str, Any], root: str, kind: str, zero_stage: int, micro_batches: int = 1) -> Recipe:
    """The recipe of a golden trainer case; masks come from the side table `golden` under `root`."""
    base = c["in_base_lr"]
    optim = OptimConfig(lr=base, weight_decay=c["in_weight_decay"])
    model: dict[str, Any] = {
        "image_size": tuple(c["in_image_u8"].shape[2:]), "parts": parts_of(c), "masks": ("golden",), "flip": 0.0,
        "weights": "", "stride": c["in_stride"], "instances": 1, "mask_heads": c.get("in_mask_heads", 1),
        "stages": ("prompts",) if kind == "prompt" else ("finetune",),
    }  # fmt: skip
    schedule = ScheduleConfig()
    if kind == "prompt":
        warm = {"warmup": c["in_warmup_epochs"], "warmup_factor": c["in_warmup_start_lr"] / base}
        cosine = ScheduleConfig(mode="cosine", target_lr=c["in_min_lr"], **warm)
        model |= {
            "prompts": PromptStageConfig(epochs=c["in_epochs"], optim=optim, schedule=cosine),
            "contrast_temperature": c["in_nce_temperature"],
        }
    else:
        schedule = ScheduleConfig(
            mode="step", warmup=c["in_warmup_epochs"], warmup_factor=c["in_warmup_factor"],
            milestones=tuple(c["in_milestones"].tolist()), gamma=c["in_gamma"],
        )  # fmt: skip
        model |= {
            "threshold": c["in_threshold"], "mask_lr_factor": c["in_mask_lr_mult"],
            "memory_temperature": c["in_memory_temperature"], "memory_momentum": c["in_memory_momentum"],
            "memory_update": "hard" if c["in_memory_hard"] else "all", "i2t_normalise": c["in_i2t_normalise"],
            "i2t_temperature": c["in_i2t_temperature"], "mask_loss": c["in_mask_loss_kind"],
            **{f"weight_{name}": c[f"in_weight_{name}"] for name in ("id", "memory", "i2t", "mask")},
        }  # fmt: skip
    training = TrainingConfig(
        global_batch=1, epochs=c["in_epochs"], zero_stage=zero_stage, micro_batches=micro_batches, log_every=1
    )
    return Recipe(
        name="golden", method="muva", model=Config(**model), data=DataConfig(root=root), optim=optim, schedule=schedule,
        training=training,
    )  # fmt: skip


def golden_view(c: dict[str, Any]) -> ArrayView:
    return ArrayView(c["in_image_u8"], c["in_labels"])


@contextmanager
def skewed_slices() -> Iterator[None]:
    """The first rank takes one row more than its share and the last one less: slices are uneven even where B/W is whole."""

    def skewed(total: int, rank: int, world_size: int) -> slice:
        edges = [min(total, total * r // world_size + (0 < r < world_size)) for r in range(world_size + 1)]
        return slice(edges[rank], edges[rank + 1])

    usual = context.rank_slice
    context.rank_slice = loader.rank_slice = skewed  # type: ignore[attr-defined]
    try:
        yield
    finally:
        context.rank_slice = loader.rank_slice = usual  # type: ignore[attr-defined]


def train_golden_skewed(*args: Any) -> dict[str, Any]:
    """`train_golden` with uneven slices."""
    with skewed_slices():
        return train_golden(*args)


def train_golden(path: Path, root: str, kind: str, zero_stage: int, micro_batches: int = 1) -> dict[str, Any]:
    """Train a golden trainer case through the real loop; its records, tables and weights."""
    c = load(path)
    recipe, view = golden_recipe(c, root, kind, zero_stage, micro_batches), golden_view(c)
    classes = int(c["in_labels"].max()) + 1
    made: list[Any] = []

    def stages(recipe: Recipe, data: TrainingData) -> list[Stage]:
        (stage,) = METHOD_STAGES(recipe, data)
        if kind == "prompt":  # one image of each label stands for it
            first = np.array([np.flatnonzero(view.label == k)[0] for k in range(classes)])
            stage._plan = FixedPlan(first[c["in_step_labels"]], c["in_epochs"])  # type: ignore[assignment]
        else:
            stage._plan = FixedPlan(c["in_step_index"], c["in_epochs"])  # type: ignore[assignment]
            remember, update = stage._remember, stage.after_step
            stage.starts, stage.ends = [], []  # type: ignore[attr-defined]

            def kept(rows: torch.Tensor) -> None:
                remember(rows)
                stage.starts.append(rows.clone())  # type: ignore[attr-defined]

            def moved(*args: Any) -> None:
                update(*args)
                stage.ends.append(stage.memory.rows.clone())  # type: ignore[attr-defined]

            stage._remember, stage.after_step = kept, moved  # type: ignore[assignment]
        made.append(stage)
        return [stage]

    def build() -> torch.nn.Module:
        model = golden_model(c, recipe.model, classes)
        if kind != "prompt":
            model.prompts.sign(made[0].people, made[0].settings)
        return model

    worker = worker_of(recipe, dataclasses.replace(METHOD, stages=stages), build, view)
    worker.train()
    assert worker.snapshot is not None
    stage = made[0]
    rows = worker.ctx.counts
    result = {"rows": rows, "losses": worker.losses, "weights": worker.snapshot.model, "state": worker.snapshot.method}
    if kind != "prompt":
        steps = stage.plan().steps(0)
        result |= {"starts": stage.starts, "ends": stage.ends[steps - 1 :: steps]}
    return result


METHOD_STAGES = METHOD.stages


def encode_golden(c: dict[str, Any], recipe: Recipe, weights: dict[str, Any]) -> np.ndarray:
    """Test features of the trained weights through the method's own evaluation path, float32 [N, F]."""
    model = golden_model(c, recipe.model, int(c["in_labels"].max()) + 1)
    model.load_state_dict(weights)
    view = ArrayView(c["in_eval_image_u8"], c["in_eval_pid"], c["in_eval_cam"])
    rows = np.arange(len(view))
    batch = METHOD.eval_batch(recipe.model, view, EvalSide("image", rows, 0 * rows), rows)  # type: ignore[arg-type]
    with torch.no_grad():
        return METHOD.encode(model.eval(), batch)["global"].numpy()


LAW_ARCH = ClipArchitecture(
    image_size=(32, 16), patch=8, stride=8, image_width=16, image_layers=2, image_heads=2, text_width=16, text_layers=2,
    text_heads=2, vocab_size=600, context_length=64, joint_width=8,
)  # fmt: skip
ARCHITECTURES["muva-law"] = LAW_ARCH  # ranks import this module too
PEOPLE, IMAGES_PER_PERSON = 5, 4


def law_view(domain: str = "d") -> ArrayView:
    """20 images of 5 people."""
    rng = np.random.default_rng(11)
    pid = np.repeat(10 + np.arange(PEOPLE), IMAGES_PER_PERSON)
    tint = rng.integers(0, 200, (PEOPLE, 3))[pid - 10][:, :, None, None]
    return ArrayView((tint + rng.integers(0, 56, (len(pid), 3, 40, 20))).astype(np.uint8), pid, domain=domain)


def law_recipe(root: str, training: dict[str, Any] | None = None, **model: Any) -> Recipe:
    """Both stages on the tiny towers: batches of 6 rows, 3 people with 2 images each."""
    config = {
        "arch": "muva-law", "weights": "", "image_size": (32, 16), "masks": ("law",), "instances": 2, "prompt_words": 2,
        "memory_temperature": 0.05,  # the released 0.01 (in the golden trainers) multiplies rounding by 100
        "prompts": PromptStageConfig(
            epochs=3, optim=OptimConfig(lr=1e-2, weight_decay=1e-4, eps=1e-4),
            schedule=ScheduleConfig(mode="cosine", warmup=1, target_lr=1e-4),
        ),
    }  # fmt: skip
    run = {"global_batch": 6, "epochs": 3, "zero_stage": 0, "log_every": 1, **(training or {})}
    return Recipe(
        name="law", method="muva", model=Config(**{**config, **model}), data=DataConfig(root=root),
        optim=OptimConfig(lr=1e-3, weight_decay=1e-4, eps=1e-4),
        schedule=ScheduleConfig(mode="step", warmup=2, milestones=(3,)), training=TrainingConfig(**run),
    )  # fmt: skip


def law_model(recipe: Recipe) -> Muva:
    torch.manual_seed(7)
    model = METHOD.build(recipe.model, ModelFacts(num_classes=PEOPLE))
    assert isinstance(model, Muva)
    with (
        torch.no_grad()
    ):  # fresh predictors sit on the gate's threshold; move them off it, so that rounding decides nothing
        for predictor in model.image.predictors:
            predictor.fc1.weight.mul_(20)
            predictor.fc2.weight.mul_(20)
    return model


def train_law(
    root: str,
    training: dict[str, Any],
    model: dict[str, Any] | None = None,
    initial: Snapshot | None = None,
    stop_at: int | None = None,
) -> dict[str, Any]:
    """Train both stages; records, final snapshot. `stop_at`: ask for a stop at that step."""
    recipe = law_recipe(root, training, **(model or {}))
    worker = worker_of(recipe, METHOD, lambda: law_model(recipe), law_view(), initial)
    if stop_at is not None:
        worker.hooks.should_stop = lambda: worker.losses[-1]["step"] >= stop_at
    finished = True
    try:
        worker.train()
    except Stopped:
        finished = False
    losses = [{k: v for k, v in record.items() if k != "rows_per_s"} for record in worker.losses]
    return {"losses": losses, "snapshot": worker.snapshot, "finished": finished}


def train_until_killed_between_stages(mapping: dict[str, Any], uri: str) -> None:
    """A stored training whose process is killed once stage 1's checkpoint is committed, before stage 2 begins."""
    from reid_dist.config import build_recipe
    from reid_dist.methods import get
    from reid_dist.runs import Run
    from reid_dist.training.worker import make_worker, prepare

    recipe = build_recipe(mapping, lambda name: get(name).Config)

    def end_of_epoch(metrics: dict[str, Any]) -> None:
        if (metrics["stage"], metrics["epoch"]) == (0, recipe.model.prompts.epochs):
            assert worker.writer is not None
            worker.writer.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    worker = make_worker(recipe, prepare(recipe), Run.attach(uri, 1), Hooks(report=end_of_epoch))
    worker.train()
