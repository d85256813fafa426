"""CLIMB as a method."""

from __future__ import annotations

from reid_dist.config import OptimConfig
from reid_dist.methods.climb.config import Config
from reid_dist.methods.climb.method import ClimbStage


def bare_stage(config: Config, optim: OptimConfig) -> ClimbStage:
    """A stage without data, for steps on given batches."""
    from reid_dist.config import Recipe

    stage = ClimbStage.__new__(ClimbStage)
    stage.config, stage.recipe = config, Recipe(name="t", method="climb", model=config, optim=optim)
    return stage
