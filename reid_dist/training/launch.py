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
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from reid_dist.config import Recipe, build_recipe, to_mapping
from reid_dist.errors import RunError, UserError
from reid_dist.methods import get
from reid_dist.runs import Run, ship_logs
from reid_dist.runs.failures import Failure, collateral, explain, signature
from reid_dist.storage import StorageError, ray_storage
from reid_dist.training.loop import Hooks, Stopped, Worker, out_of_memory
from reid_dist.training.watchdog import watched

logger = logging.getLogger(__name__)

# Rank 0's scalars that Ray exports to Prometheus (cluster/monitoring), as ray_reid_training_NAME{run}.
GAUGES = {
    "step": "Optimizer steps done",
    "loss": "Training loss",
    "rows_per_s": "Training rows per second over all workers",
}
STOP_POLL_S = 2.0  # how often rank 0 looks for a request to stop


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


def fit(recipe: Recipe, run: Run, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train `recipe` in `run` until done, or until somebody asks it to stop. Returns rank 0's summary.

    `callbacks`: Ray Train's, told of every report (a sweep passes them on to Ray Tune).
    An interrupt in the main thread asks the workers to stop with a checkpoint; a second one ends at once.
    Raises UserError (the user can mend it) or RunError (budget used up, repeating bug, diverged).
    """
    from ray.train import WorkerGroupError
    from ray.train.v2.api.exceptions import TrainingFailedError

    failures: list[Failure] = []
    while True:
        try:
            return _one_try(recipe, run, len(failures), callbacks)
        except WorkerGroupError as error:
            cause, text = _cause(error)
        except TrainingFailedError as error:
            cause, text = error, str(error)
        _end_if_final(cause)
        where = run.latest_step()
        told = [
            note for note in run.notes() if note.get("start") == len(failures) + 1 and note["attempt"] == run.attempt
        ]
        failure = explain(told, _short(text), where)
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


def _one_try(recipe: Recipe, run: Run, number: int, callbacks: Sequence[Any]) -> dict[str, Any]:
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
        return _in_thread(trainer.fit, run).return_value
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


def _in_thread(call: Callable[[], Any], run: Run) -> Any:
    """Run Ray's fit beside the main thread, which stays free for signals (Ray's own Ctrl-C handler would kill the workers)."""
    box: dict[str, Any] = {}
    done = threading.Event()

    def target() -> None:
        try:
            box["value"] = call()
        except BaseException as error:
            box["error"] = error
        finally:
            done.set()

    threading.Thread(target=target, name="ray-train-fit", daemon=True).start()
    asked = False
    while not done.is_set():
        try:
            time.sleep(0.5)  # not Thread.join: interrupted by a signal it may take the thread for ended
        except (KeyboardInterrupt, RunError) as interrupt:
            if asked:
                raise
            asked = True
            logger.warning("%s: asking the workers to checkpoint and stop", str(interrupt) or "interrupted")
            run.request_stop(str(interrupt) or "interrupted")
    if "error" in box:
        raise box["error"]
    return box["value"]


def _cause(error: Any) -> tuple[BaseException, str]:
    """(root cause, its text) of the first failing worker that says something of its own."""
    failures = list(error.worker_failures.values()) or [error]

    def unwrap(failure: BaseException) -> BaseException:
        for name in ("_base_exc", "cause", "__cause__"):
            inner = getattr(failure, name, None)
            if isinstance(inner, BaseException):
                return unwrap(inner)
        return failure

    def order(cause: BaseException) -> int:
        return 0 if isinstance(cause, (UserError, RunError)) else 1 + collateral(_text(cause))

    first = min(map(unwrap, failures), key=order)
    return first, _text(first)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _end_if_final(cause: BaseException) -> None:
    if isinstance(cause, UserError):
        raise cause
    if isinstance(cause, RunError) and not cause.retryable:
        raise cause


def _short(text: str) -> str:
    """The telling lines of a failure on one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines)[:400] if len(lines) < 4 else f"{lines[0]} ... {lines[-1]}"[:400]


def _worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """One Ray Train worker: everything it needs comes from `config` and storage."""
    marks = {"worker": time.time()}
    import ray.train

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it repeats every reported metric

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
        _stop_watch(run, rank) as wanted,
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
                bar=_bar,
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
        run.note("failure", rank=rank, start=start, step=step, error=_short(_text(error)), trace=signature(error))


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

    disable = options.pop("disable", False)
    initial = options.pop("initial", 0)
    if disable:
        return contextlib.nullcontext(_NoBar())
    bar = tqdm_ray.tqdm(**options)
    bar.update(initial)
    return contextlib.closing(bar)


class _NoBar:
    def update(self, n: int = 1) -> None: ...


@contextlib.contextmanager
def _stop_watch(run: Run, rank: int) -> Iterator[threading.Event]:
    """On rank 0: an event that is set once somebody asked this attempt to stop (`Run.request_stop`)."""
    wanted, closing = threading.Event(), threading.Event()

    def watch() -> None:
        while not closing.wait(STOP_POLL_S):
            with contextlib.suppress(RunError):
                if run.stop_requested():
                    wanted.set()
                    return

    thread = threading.Thread(target=watch, name="stop-watch", daemon=True)
    if rank == 0:
        thread.start()
    try:
        yield wanted
    finally:
        closing.set()
        if thread.is_alive():
            thread.join(timeout=5)
