"""Where a run's scalars go besides its own metrics: TensorBoard always, MLflow and Weights & Biases where the recipe asks.

A tracker is anything with `log(step, scalars)` and `close()`. A tracker that fails is dropped with a warning: it must never
end a run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from reid_dist.config import Recipe, flatten, to_mapping
from reid_dist.errors import UserError
from reid_dist.runs.scratch import Scratch

if TYPE_CHECKING:
    from reid_dist.runs import Run

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """One destination of scalars."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files, written locally and copied into the run at every flush of its metrics."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run = run
        self._scratch = Scratch("tensorboard")
        self._writer = SummaryWriter(str(self._scratch.path))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
        for path in sorted(self._scratch.path.iterdir()):
            self.run.store.upload(f"tensorboard/attempt-{self.run.attempt:04d}/{path.name}", str(path))
        self._scratch.close()


class MLflow:
    """MLflow's client, where `tracking.mlflow` names a tracking URI."""

    def __init__(self, recipe: Recipe) -> None:
        try:
            import mlflow
        except ImportError:
            raise UserError("tracking.mlflow is set but mlflow is not installed here: pip install mlflow") from None
        mlflow.set_tracking_uri(recipe.tracking.mlflow)
        mlflow.set_experiment(recipe.method)
        self._mlflow, self._run = mlflow, mlflow.start_run(run_name=recipe.name)
        mlflow.log_params({key: str(value)[:250] for key, value in flatten(to_mapping(recipe)).items()})

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(scalars), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class WandB:
    """Weights & Biases, where `tracking.wandb` names a project."""

    def __init__(self, recipe: Recipe) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("tracking.wandb is set but wandb is not installed here: pip install wandb") from None
        self._run = wandb.init(project=recipe.tracking.wandb, name=recipe.name, config=to_mapping(recipe))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


def trackers(recipe: Recipe, run: Run) -> list[Tracker]:
    """The trackers of a run. Raises UserError when a wanted one is not installed."""
    result: list[Tracker] = [Guarded(TensorBoard(run))]
    if recipe.tracking.mlflow:
        result.append(Guarded(MLflow(recipe)))
    if recipe.tracking.wandb:
        result.append(Guarded(WandB(recipe)))
    return result


class Guarded:
    """A tracker whose failures are logged once and end it alone."""

    def __init__(self, inner: Tracker) -> None:
        self._inner: Tracker | None = inner

    def _call(self, name: str, *args: Any) -> None:
        if self._inner is None:
            return
        try:
            getattr(self._inner, name)(*args)
        except Exception as error:
            logger.warning("tracker %s failed and is dropped: %s", type(self._inner).__name__, error)
            self._inner = None

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._call("log", step, scalars)

    def close(self) -> None:
        self._call("close")
