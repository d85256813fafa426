"""The one training loop. It knows stages, not methods; it runs the same on one process or under any launcher.

    for stage: engine -> for epoch: begin_epoch -> for step: lr, forward, backward, update, after_step
                                                -> evaluation, checkpoint

What it leaves to its caller (a Ray worker, a gloo process of a test) is in `Hooks`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from reid_dist.config import Recipe
from reid_dist.errors import UserError
from reid_dist.methods.spec import MethodSpec, Stage, TrainingData
from reid_dist.training import checkpoint as checkpoints
from reid_dist.training.checkpoint import Progress, Snapshot
from reid_dist.training.context import RunContext, to_device
from reid_dist.training.deepspeed import adapter, build_engine, ensure_process_group
from reid_dist.training.loader import batches
from reid_dist.training.meter import Meter
from reid_dist.training.precision import cast_pure
from reid_dist.training.schedule import lr_at
from reid_dist.training.step import StepModule, run_step
from reid_dist.training.tracking import Tracker

if TYPE_CHECKING:
    from reid_dist.runs import Run

logger = logging.getLogger(__name__)


@dataclass
class Hooks:
    """What the surroundings of the loop may do. All are called on every rank at the same points."""

    should_stop: Callable[[], bool] = lambda: False  # asked on rank 0; True ends the run with a checkpoint
    preempted: Callable[[], bool] = lambda: False  # asked on every rank; True: a node will be taken away soon
    report: Callable[[dict[str, Any]], None] = lambda metrics: None  # after each epoch
    evaluate: Callable[[nn.Module, RunContext], dict[str, float]] | None = None  # on the selection split
    beat: Callable[[int], None] = lambda step: None  # a sign of life, with the steps done
    bar: Callable[..., Any] = tqdm  # progress bar of rank 0; gets tqdm's keywords
    marks: dict[str, float] = field(default_factory=dict)  # seconds since the epoch of named moments


class Stopped(Exception):
    """The run ended early on request, after a checkpoint."""


@dataclass
class Worker:
    """One rank of a run."""

    recipe: Recipe
    spec: MethodSpec
    build: Callable[[], nn.Module]  # same start weights on every rank
    data: TrainingData
    run: Run | None  # None: nothing is stored (tests, benches)
    hooks: Hooks
    device: torch.device
    losses: list[dict[str, float]] = field(default_factory=list)  # one record per step, on every rank
    metrics: dict[str, float] = field(default_factory=dict)  # latest evaluation
    initial: Snapshot | None = None  # continue from here instead of from storage
    sinks: list[Tracker] = field(default_factory=list)  # rank 0's trackers
    snapshot: Snapshot | None = None  # the latest state

    def __post_init__(self) -> None:
        self._drained = False
        ensure_process_group()
        self.ctx = RunContext(seed=self.recipe.seed, threads=self.recipe.data.loader_threads, beat=self.hooks.beat)
        self.meter = Meter(self.ctx, self.recipe.training.log_every, self._record)
        training = self.recipe.training
        self.writer: checkpoints.Writer | None = None
        if self.run is not None and self.ctx.rank == 0:
            self.writer = checkpoints.Writer(self.run, training.keep_last, training.keep_best, self._score_name())

    def train(self) -> Progress:
        """Run all stages from the newest verified checkpoint on. Raises Stopped, UserError, RunError."""
        stages = list(self.spec.stages(self.recipe, self.data))
        snapshot = self.initial
        if snapshot is None and self.run is not None:
            snapshot = checkpoints.newest(self.run)
        progress = snapshot.progress if snapshot else Progress()
        self.metrics = dict(progress.metrics)
        if snapshot:
            logger.info("continuing at stage %d, epoch %d, step %d", progress.stage, progress.epoch, progress.step)
        try:
            while progress.stage < len(stages) and not self._ended(progress):
                progress, snapshot = self._run_stage(stages, progress, snapshot)
        finally:
            self.meter.close()
            for sink in self.sinks:
                sink.close()
            if self.writer:
                self.writer.close()
        if dist.is_initialized():
            dist.barrier()
        return progress

    def _run_stage(
        self, stages: Sequence[Stage], progress: Progress, snapshot: Snapshot | None
    ) -> tuple[Progress, Snapshot | None]:
        stage = stages[progress.stage]
        if progress.stage_done:  # weights go on to the next stage, the optimizer does not
            step = progress.step
            progress = Progress(stage=progress.stage + 1, step=step, stage_start=step, metrics=progress.metrics)
            if snapshot:
                snapshot = replace(snapshot, progress=progress, optimizer={}, method={})
            return progress, snapshot
        if self.recipe.training.micro_batches > 1 and not stage.row_wise:
            raise UserError(
                f"training.micro_batches={self.recipe.training.micro_batches}: stage {stage.name} of {self.spec.name} has batch "
                "norm inside its model, whose statistics need the whole batch; use 1 and more workers instead"
            )
        self.model = self._fresh_model(snapshot)
        self.ctx.epoch, self.ctx.step, self.stage_start = progress.epoch, progress.step, progress.stage_start
        module = StepModule(self.model, stage, self.ctx, self.recipe.training.micro_batches)
        groups = stage.param_groups(self.model)
        stage.begin_stage(self.model, self.ctx)
        engine = build_engine(module, self.model, groups, stage.optim(), self.recipe.training)
        self.hooks.marks.setdefault("engine", time.time())
        state = adapter(engine, self.model)
        if snapshot is not None and snapshot.optimizer:
            state.restore(checkpoints.restored(snapshot))
        if snapshot is not None and snapshot.method:
            stage.load_state({name: value.to(self.device) for name, value in snapshot.method.items()})
        rates = [group.lr for group in groups if group.names]
        with self._progress_bar(stage, progress) as self.bar:
            for epoch in range(progress.epoch, stage.epochs):
                progress = replace(progress, epoch=epoch)
                progress = self._run_epoch(stage, engine, module, rates, state, progress)
                last = epoch + 1 == stage.epochs or self._ended(progress)
                progress = replace(progress, epoch=epoch + 1, step_in_epoch=0, stage_done=last)
                progress = self._end_epoch(stage, state, progress, last)
                if last:
                    break
        engine.destroy()
        return progress, self.snapshot

    def _progress_bar(self, stage: Stage, progress: Progress) -> Any:
        plan = stage.plan()
        total = sum(plan.steps(epoch) for epoch in range(stage.epochs))
        limit = self.recipe.training.max_steps
        return self.hooks.bar(
            total=total if limit is None else min(total, limit - progress.stage_start),
            initial=progress.step - progress.stage_start,
            desc=f"{self.recipe.method} {stage.name}",
            unit="step",
            disable=self.ctx.rank != 0,
        )

    def _fresh_model(self, snapshot: Snapshot | None) -> nn.Module:
        """A whole model on the device: an engine leaves behind one that is sharded or rounded."""
        model = self.build()
        if snapshot:
            checkpoints.load_weights(model, snapshot.model)
        for block in model.modules():
            if hasattr(block, "reducer"):  # synchronised batch norm (models/batchnorm.py)
                block.reducer = self.ctx.reduce if self.ctx.world_size > 1 else None  # alone: torch's faster kernel
            if self.recipe.training.activation_checkpointing and hasattr(block, "activation_checkpointing"):
                block.activation_checkpointing = True
        if self.recipe.training.precision == "fp16_pure":
            cast_pure(model)
        return model.to(self.device)

    def _run_epoch(
        self, stage: Stage, engine: Any, module: StepModule, rates: list[float], state: Any, progress: Progress
    ) -> Progress:
        training = self.recipe.training
        plan_steps = stage.plan().steps(progress.epoch)
        self.ctx.epoch, self.ctx.step = progress.epoch, progress.step
        self.model.train()
        if progress.step_in_epoch == 0:
            stage.begin_epoch(self.model, self.ctx)
            for note in self.ctx.take_notes():
                self._write(note)
        stream = batches(
            stage,
            seed=self.recipe.seed,
            epoch=progress.epoch,
            start=progress.step_in_epoch,
            rank=self.ctx.rank,
            world_size=self.ctx.world_size,
            threads=self.recipe.data.loader_threads,
            prefetch=self.recipe.data.prefetch,
        )
        for step_in_epoch, total_rows, batch in stream:
            rate = self._set_lr(engine, stage, rates, progress.step, plan_steps)
            self.ctx.begin_step(total_rows)
            self.ctx.step = progress.step
            batch = to_device(batch, self.device)
            terms, outputs = run_step(engine, module, batch)
            stage.after_step(self.model, outputs, batch, self.ctx)
            progress = replace(progress, step=progress.step + 1, step_in_epoch=step_in_epoch + 1)
            self.hooks.beat(progress.step)
            self.hooks.marks.setdefault("first_step", time.time())
            self.meter.add(progress.step, progress.stage, progress.epoch, rate, total_rows, terms)
            self.bar.update()
            if self.meter.due and self._stop_wanted():
                self._checkpoint(stage, state, progress)
                raise Stopped(f"stopped on request at step {progress.step}; the same command continues")
            if self.meter.due and not self._drained and self.hooks.preempted():
                self._drained = True
                self._checkpoint(stage, state, progress)
                self._await_checkpoint()
            every = training.checkpoint_every_steps
            if every and progress.step % every == 0 and progress.step_in_epoch < plan_steps:
                self._checkpoint(stage, state, progress)
            if self._ended(progress):
                break
        return progress

    def _set_lr(self, engine: Any, stage: Stage, rates: list[float], step: int, plan_steps: int) -> float:
        schedule = stage.schedule()
        if schedule.unit == "step":
            total = stage.epochs * plan_steps
            t, total = step - self.stage_start, min(total, self.recipe.training.max_steps or total)
        else:
            t, total = self.ctx.epoch, stage.epochs
        for group, base in zip(engine.optimizer.param_groups, rates, strict=True):
            own = stage.rate(base, t, total)
            group["lr"] = lr_at(base, t, total, schedule) if own is None else own
        return float(engine.optimizer.param_groups[0]["lr"])

    def _end_epoch(self, stage: Stage, state: Any, progress: Progress, last: bool) -> Progress:
        training = self.recipe.training
        self.meter.flush()
        if self.hooks.evaluate and training.eval_every and (progress.epoch % training.eval_every == 0 or last):
            self.metrics = self.hooks.evaluate(self.model, self.ctx)
            self.model.train()
            self._write({"kind": "eval", "step": progress.step, "epoch": progress.epoch, **self.metrics})
        progress = replace(progress, metrics=dict(self.metrics))
        epochs, steps = training.checkpoint_every, training.checkpoint_every_steps
        if last or (epochs and progress.epoch % epochs == 0) or (steps and progress.step % steps == 0):
            self._checkpoint(stage, state, progress)
        latest = dict(self.losses[-1]) if self.losses else {}
        self.hooks.report({**latest, **self.metrics, "stage": progress.stage, "epoch": progress.epoch})
        return progress

    def _checkpoint(self, stage: Stage, state: Any, progress: Progress) -> None:
        """Take a snapshot (collective) and, on rank 0 of a stored run, start publishing it."""
        self.meter.flush()
        self.snapshot = checkpoints.take(self.model, state.export(), stage.state(), progress)
        if self.run is not None and self.writer is not None:
            self.run.flush_metrics()
            self.writer.save(self.snapshot)

    def _await_checkpoint(self) -> None:
        """A node goes soon: no step is taken before the checkpoint is committed, or it might go half uploaded."""
        if self.run is not None and self.writer is not None:
            self.writer.wait()
            self.run.note("drain", step=self.snapshot.progress.step if self.snapshot else 0)
        if dist.is_initialized():
            dist.barrier()

    def _stop_wanted(self) -> bool:
        flag = torch.tensor([float(self.ctx.rank == 0 and self.hooks.should_stop())], device=self.device)
        if self.ctx.world_size > 1:
            dist.all_reduce(flag)
        return bool(flag.item() > 0)

    def _ended(self, progress: Progress) -> bool:
        limit = self.recipe.training.max_steps
        return limit is not None and progress.step >= limit

    def _record(self, record: dict[str, float]) -> None:
        self.losses.append(record)
        self._write({"kind": "step", **record})

    def _write(self, record: dict[str, Any]) -> None:
        if self.run and self.ctx.rank == 0:
            self.run.write_metrics(record)
        scalars = {f"{record['kind']}/{k}": v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        for sink in self.sinks:
            sink.log(int(record["step"]), scalars)

    def _score_name(self) -> str:
        return "rank1"


def out_of_memory(error: BaseException, recipe: Recipe) -> UserError | None:
    """A readable form of an out-of-memory error, naming the knobs; None for any other error."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in text:
        return None
    t = recipe.training
    return UserError(
        f"out of memory with {t.global_batch} rows on {t.num_workers} workers: raise training.micro_batches (now "
        f"{t.micro_batches}; losses stay exact), then set training.activation_checkpointing=true (now "
        f"{str(t.activation_checkpointing).lower()}), then training.zero_stage=3 (now {t.zero_stage}), or add workers"
    )
