"""Ray Train: the only training file that imports Ray.

A run is one `TorchTrainer` per try. Ray starts and watches the workers; what a failure means is decided here, because Ray's
own restart loop cannot tell a bad recipe from a dead node: errors that the user can mend and diverged losses end the run at
once, the same traceback at the same step twice ends it with a sentence, everything else (deaths, hangs that the watchdog
found) continues from the newest verified checkpoint, `training.max_failures` times. Announced preemptions have Ray's own,
unlimited budget.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from reid_dist.config import Recipe, build_recipe, to_mapping
from reid_dist.errors import RunError
from reid_dist.methods import get
from reid_dist.runs import Run, ship_logs
from reid_dist.runs.failures import Failure, explain, signature
from reid_dist.storage import StorageError, ray_storage
from reid_dist.training.causes import cause_of, end_if_final, shortened, text_of
from reid_dist.training.loop import Hooks, Stopped, Worker, out_of_memory
from reid_dist.training.stopping import stop_watch, stoppable
from reid_dist.training.watchdog import watched

logger = logging.getLogger(__name__)

# Rank 0's scalars that Ray exports to Prometheus (cluster/monitoring), as ray_reid_training_NAME{run}.
GAUGES = {
    "step": "Optimizer steps done",
    "loss": "Training loss",
    "rows_per_s": "Training rows per second over all workers",
}


def resources(recipe: Recipe) -> dict[str, float]:
    """Resources of one worker. Asks the connected cluster whether it has GPUs where the recipe leaves it open."""
    import ray

    training = recipe.training
    use_gpu = training.use_gpu
    if use_gpu is None:
        use_gpu = any("GPU" in node["Resources"] for node in ray.nodes() if node["Alive"])
    needs = {"CPU": training.cpus_per_worker}
    if use_gpu:
        needs["GPU"] = training.gpus_per_worker
    return needs


def fit(recipe: Recipe, run: Run, callbacks: Sequence[Any] = (), bar: bool = True) -> dict[str, Any]:
    """Train `recipe` in `run` until done, or until somebody asks it to stop. Returns rank 0's summary.

    `callbacks`: Ray Train's, told of every report (a sweep passes them on to Ray Tune). `bar`: whether the steps are shown by a
    progress bar; those of several runs at once would make the driver's log unreadable.
    An interrupt in the main thread asks the workers to stop with a checkpoint; a second one ends at once.
    Raises UserError (the user can mend it) or RunError (budget used up, repeating bug, diverged).
    """
    from ray.train import WorkerGroupError
    from ray.train.v2.api.exceptions import TrainingFailedError

    failures: list[Failure] = []
    while True:
        try:
            return _one_try(recipe, run, len(failures), callbacks, bar)
        except WorkerGroupError as error:
            cause, text = cause_of(error)
        except TrainingFailedError as error:
            cause, text = error, str(error)
        end_if_final(cause)
        where = run.latest_step()
        told = [
            note for note in run.notes() if note.get("start") == len(failures) + 1 and note["attempt"] == run.attempt
        ]
        failure = explain(told, shortened(text), where)
        run.note_restart(reason=failure.text, step=where)
        if failure.repeats(failures[-1] if failures else None):
            raise RunError(
                f"the same traceback came twice at the same step, so another try would not help: {failure.text}"
            )
        failures.append(failure)
        if len(failures) > recipe.training.max_failures:
            raise RunError(
                f"training failed {len(failures)} times (training.max_failures={recipe.training.max_failures}); "
                f"last: {failure.text}"
            )
        logger.warning("failure %d, continuing from step %d: %s", len(failures), where, failure.text)


def _one_try(recipe: Recipe, run: Run, number: int, callbacks: Sequence[Any], bar: bool) -> dict[str, Any]:
    from ray.train import FailureConfig, LoggingConfig, RunConfig
    from ray.train.torch import TorchConfig

    needs = resources(recipe)
    path, filesystem = ray_storage(f"{run.uri}/ray")
    trainer = _trainer()(
        _worker,
        train_loop_config={
            "recipe": to_mapping(recipe),
            "run": run.uri,
            "attempt": run.attempt,
            "start": number + 1,
            "bar": bar,
        },
        scaling_config=_scaling(recipe, needs),
        run_config=RunConfig(
            # A fresh name per try: Ray would silently continue a run of the same name.
            name=f"attempt-{run.attempt:04d}-{number}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=0),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=list(callbacks),
        ),
        torch_config=TorchConfig(
            backend="nccl" if "GPU" in needs else "gloo", timeout_s=recipe.training.collective_timeout_s
        ),
    )
    try:
        return stoppable(trainer.fit, run).return_value
    finally:
        run.store.delete_tree("ray")


def _private_cluster() -> bool:
    """Whether the cluster is this job's own and ends with it: jobs/_cluster.py says so to every process by this variable."""
    return os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") == "0"


def _trainer() -> type[Any]:
    """Ray's TorchTrainer without what nobody here uses, for each is an actor that imports Ray Train, 4 s of CPU per start.

    The manager of Ray Data's data sets: our workers read tables. In a private cluster also the cleaner of placement groups,
    which asks a dashboard that is not there: groups end with the job, in a sweep by tuning/groups.py.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    unused = (DatasetsCallback, PlacementGroupCleanerCallback) if _private_cluster() else (DatasetsCallback,)

    class Lean(TorchTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            return [made for made in super()._create_default_callbacks() if not isinstance(made, unused)]

    return Lean


def _scaling(recipe: Recipe, needs: dict[str, float]) -> Any:
    """Ray Train's scaling: a fixed number of workers, or a range within which it starts them anew as nodes go and come."""
    from ray.train import ScalingConfig

    training = recipe.training
    least = training.min_workers
    if least is not None:
        # Ray Train may count a node that just went as still there, and then waits for room that will not come: not for long.
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = f"{training.resize_every_s:g}"
    return ScalingConfig(
        num_workers=training.num_workers if least is None else (least, training.num_workers),
        use_gpu="GPU" in needs,
        resources_per_worker=needs,
        elastic_resize_monitor_interval_s=training.resize_every_s,
    )


def _worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """One Ray Train worker: everything it needs comes from `config` and storage."""
    marks = {"worker": time.time()}
    import ray.train
    from ray.train.v2._internal.execution import context as reporting

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    for name in ("ray.train", reporting.__file__):  # they repeat every reported metric; the second is named by its path
        logging.getLogger(name).setLevel(logging.WARNING)

    from reid_dist.training.selection import evaluator
    from reid_dist.training.start import init_weights
    from reid_dist.training.tracking import Guarded, trackers
    from reid_dist.training.worker import make_worker, prepare

    marks["imports"] = time.time()
    recipe = build_recipe(config["recipe"], lambda name: get(name).Config)
    context = ray.train.get_context()
    run = Run.attach(config["run"], config["attempt"])
    rank, start = context.get_world_rank(), config["start"]
    if rank == 0:
        run.note("workers", count=context.get_world_size())
    worker: Worker | None = None
    with (
        ship_logs(run, f"rank-{rank}"),
        stop_watch(run, rank) as wanted,
        watched(run, rank, start, recipe.training.hang_timeout_s) as beat,
    ):
        try:
            prepared = prepare(recipe, init_weights(recipe))
            marks["data"] = time.time()
            hooks = Hooks(
                should_stop=wanted.is_set,
                preempted=_preempted,
                report=lambda metrics: ray.train.report(metrics),
                evaluate=evaluator(recipe, prepared),
                bar=_bar if config["bar"] else _no_bar,
                beat=beat,
                marks=marks,
            )
            worker = make_worker(recipe, prepared, run, hooks)
            worker.sinks = [*trackers(recipe, run), Guarded(Gauges(recipe.name))] if worker.ctx.rank == 0 else []
            progress = worker.train()
        except Stopped as stopped:
            return {"stopped": str(stopped)}
        except Exception as error:
            readable = out_of_memory(error, recipe)
            _note_failure(run, rank, start, worker.ctx.step if worker else 0, readable or error)
            if readable:
                raise readable from error
            raise
    return _summary(worker, progress.step, marks) if rank == 0 else None


def _summary(worker: Worker, steps: int, marks: dict[str, float]) -> dict[str, Any]:
    """What rank 0 tells the driver at the end."""
    import torch

    return {
        "steps": steps,
        "num_workers": worker.ctx.world_size,
        "metrics": worker.metrics,
        "last": worker.losses[-1] if worker.losses else {},
        "device": str(worker.device),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if worker.device.type == "cuda" else 0,
        "marks": marks,
    }


def _note_failure(run: Run, rank: int, start: int, step: int, error: BaseException) -> None:
    """What this rank knows of its end, for the driver and for the postmortem; a failure to store it hides nothing."""
    with contextlib.suppress(StorageError):
        run.note("failure", rank=rank, start=start, step=step, error=shortened(text_of(error)), trace=signature(error))


def _preempted() -> bool:
    """Whether a node of this run was announced to be taken away. Asks all workers at once, which costs some milliseconds, so a
    private cluster, which nobody drains and which has no watcher, is not asked."""
    import ray.train

    if _private_cluster():
        return False
    return ray.train.get_preemption_info() is not None


class Gauges:
    """A tracker: GAUGES of the run `name` among Ray's own metrics."""

    def __init__(self, name: str) -> None:
        from ray.util.metrics import Gauge

        self._tags = {"run": name}
        self._gauges = {key: Gauge(f"reid_training_{key}", text, ("run",)) for key, text in GAUGES.items()}

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Set what is there: the step, and of scalars `step/loss` and `step/rows_per_s`."""
        for key, value in {**scalars, "step/step": step}.items():
            gauge = self._gauges.get(key.removeprefix("step/"))
            if gauge is not None:
                gauge.set(value, self._tags)

    def close(self) -> None:
        """Nothing to do: the gauges end with the process."""


def _bar(**options: Any) -> Any:
    """A progress bar that Ray carries from the worker to the driver's terminal."""
    from ray.experimental import tqdm_ray

    initial = options.pop("initial", 0)
    if options.pop("disable", False):
        return _no_bar()
    bar = tqdm_ray.tqdm(**options)
    bar.update(initial)
    return contextlib.closing(bar)


def _no_bar(**options: Any) -> Any:
    return contextlib.nullcontext(_NoBar())


class _NoBar:
    def update(self, n: int = 1) -> None: ...
