"""Checkpoints that any number of workers can continue from.

A checkpoint is a folder `checkpoints/step-00000120/` published atomically (files, then manifest with sizes and hashes, then
the commit marker):

    model.safetensors      every parameter by name (trainable ones in fp32) and every buffer; without the frozen parameters of a
                           model that says they are rebuilt
    optimizer.safetensors  "exp_avg/<name>", "exp_avg_sq/<name>", "step/<name>", ... of the trainable parameters
    method.safetensors     the stage's own tensors (memories, labels)
    progress.json          where the run stands: stage, epoch, step in epoch, steps in all, metrics

There is no RNG state in it because there is none to save: every draw is a function of (seed, epoch, position, row), so those
integers are the whole state. Rank 0 writes; the upload runs beside training and is waited for before the next one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from reid_dist.errors import RunError
from reid_dist.runs.scratch import Scratch
from reid_dist.storage import CorruptionError, StorageError
from reid_dist.storage.publish import committed, fetch, orphans, publish_folder, unpublish
from reid_dist.training.deepspeed import EngineState, whole_parameters

if TYPE_CHECKING:
    from reid_dist.runs import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a run stands, counted so that it means the same for every number of workers."""

    stage: int = 0  # index of the stage
    epoch: int = 0  # within the stage
    step_in_epoch: int = 0  # optimizer steps of that epoch already done
    step: int = 0  # optimizer steps of the run
    stage_start: int = 0  # value of `step` when the stage began
    stage_done: bool = False  # the stage ended here; its optimizer is not continued
    metrics: dict[str, float] = field(default_factory=dict)  # latest evaluation on the selection split


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory, on the CPU."""

    progress: Progress
    model: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    method: dict[str, Tensor]


def take(model: nn.Module, engine_state: EngineState, method: Mapping[str, Tensor], progress: Progress) -> Snapshot:
    """Join an exported engine state with what no optimizer holds: frozen parameters and buffers. Collective at stage 3."""
    frozen = [] if _rebuilt(model) else [name for name, p in model.named_parameters() if not p.requires_grad]
    weights = dict(engine_state["param"])
    weights.update(whole_parameters(model, frozen))
    saved = set(model.state_dict(keep_vars=True))
    weights.update({name: b.detach().cpu().clone() for name, b in model.named_buffers() if name in saved})
    optimizer = {key: value for key, value in engine_state.items() if key != "param" and value}
    return Snapshot(progress, weights, optimizer, {k: v.detach().cpu().clone() for k, v in method.items()})


def folder_name(step: int) -> str:
    return f"checkpoints/step-{step:08d}"


class Writer:
    """Rank 0's side: publishes snapshots in the background, one at a time, and keeps the last and the best.

    Begins by removing what killed predecessors left half published: whoever still publishes for an older attempt is fenced
    out before its commit.
    """

    def __init__(self, run: Run, keep_last: int, keep_best: int, score: str) -> None:
        self.run, self.keep_last, self.keep_best, self.score = run, keep_last, keep_best, score
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._clear()

    def _clear(self) -> None:
        try:
            for place in orphans(self.run.store, "checkpoints", float("inf")):
                logger.info("%s was never committed and is removed", place)
                self.run.store.delete_tree(place)
            self.run.store.sub("checkpoints").sweep(float("-inf"))
        except StorageError as error:  # `jobs.runs gc` finds it again
            logger.warning("leftovers of killed processes could not be removed: %s", error)

    def save(self, snapshot: Snapshot) -> None:
        """Start publishing. Raises what the previous publish raised."""
        self.wait()
        self._pending = self._pool.submit(self._publish, snapshot)

    def wait(self) -> None:
        """Until the pending publish is committed. Raises StorageError, FencedOut."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _publish(self, snapshot: Snapshot) -> None:
        name = folder_name(snapshot.progress.step)
        with Scratch("checkpoint") as folder:
            write_folder(folder, snapshot)
            facts = {"attempt": self.run.attempt}
            manifest = publish_folder(self.run.store, name, folder, facts=facts, guard=self.run.check_fence)
        self.run.note_checkpoint(name, snapshot.progress.step, snapshot.progress.metrics, manifest.size)
        logger.info("checkpoint %s published (%.1f MB)", name, manifest.size / 1e6)
        self._retire()

    def _retire(self) -> None:
        """Remove what neither keep_last nor keep_best holds; the newest is never removed."""
        names = committed(self.run.store, "checkpoints")
        scores = {c["name"]: c["metrics"].get(self.score) for c in self.run.checkpoints()}
        ranked = sorted((n for n in names if scores.get(n) is not None), key=lambda n: -scores[n])  # type: ignore[operator]
        keep = {*names[: max(1, self.keep_last)], *ranked[: self.keep_best]}
        for name in names:
            if name not in keep:
                unpublish(self.run.store, name)


def write_folder(folder: Path, snapshot: Snapshot) -> None:
    """The files of a checkpoint."""
    from safetensors.torch import save_file

    def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.contiguous() for name, value in tensors.items()}

    save_file(contiguous(snapshot.model), folder / "model.safetensors")
    flat = {f"{key}/{name}": value for key, values in snapshot.optimizer.items() for name, value in values.items()}
    save_file(contiguous(flat), folder / "optimizer.safetensors")
    save_file(contiguous(snapshot.method), folder / "method.safetensors")
    (folder / "progress.json").write_text(json.dumps(asdict(snapshot.progress), indent=1))


def read_folder(folder: Path) -> Snapshot:
    """Inverse of `write_folder`."""
    from safetensors.torch import load_file

    optimizer: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        kind, _, name = key.partition("/")
        optimizer.setdefault(kind, {})[name] = value
    progress = Progress(**json.loads((folder / "progress.json").read_text()))
    return Snapshot(
        progress, load_file(folder / "model.safetensors"), optimizer, load_file(folder / "method.safetensors")
    )


def newest(run: Run) -> Snapshot | None:
    """The newest checkpoint whose every file verifies; torn or corrupted ones are passed over, loudly.

    A place that cannot be read now, or a full disk here, says nothing about a checkpoint: that StorageError is raised, or
    the run would quietly go back to an older one, at the worst to its beginning.
    """
    for name in committed(run.store, "checkpoints"):
        try:
            return read(run, name)
        except CorruptionError as error:
            logger.warning("checkpoint %s does not verify and is passed over: %s", name, error)
    return None


def read(run: Run, name: str) -> Snapshot:
    """One checkpoint, verified. Raises CorruptionError."""
    with Scratch("checkpoint") as folder:
        fetch(run.store, name, folder)
        return read_folder(folder)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's weights into a whole (unsharded) model. Raises RunError naming what does not fit."""
    missing, unexpected = model.load_state_dict(dict(weights), strict=False)
    if _rebuilt(model):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        missing = [name for name in missing if name in trained]
    if missing or unexpected:
        raise RunError(f"checkpoint does not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}")


def _rebuilt(model: nn.Module) -> bool:
    """Whether building the model fills its frozen weights (methods/spec.py)."""
    return bool(getattr(model, "frozen_is_rebuilt", False))


def restored(snapshot: Snapshot) -> dict[str, Any]:
    """The engine state of a snapshot, in the form the adapters restore."""
    return {"param": snapshot.model, **snapshot.optimizer}
