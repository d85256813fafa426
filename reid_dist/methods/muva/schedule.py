"""Learning rates of the two stages, pure functions of the epoch. Source: methods/muva.md section 6.

Epochs count from 1 and the rate is set at an epoch's start. Neither is the framework's own schedule: the prompt
stage's cosine is not shifted by its warm-up, and in the second stage warm-up and milestones multiply.
"""

from __future__ import annotations

import math

from reid_dist.config import ScheduleConfig


def prompt_lr(base: float, e: int, epochs: int, config: ScheduleConfig) -> float:
    """Rate in epoch `e` of `epochs`: linear from warmup_factor * base, then a cosine to target_lr, then target_lr."""
    if e < config.warmup:
        start = config.warmup_factor * base
        return start + e * (base - start) / config.warmup
    if e >= epochs:
        return config.target_lr
    return config.target_lr + 0.5 * (base - config.target_lr) * (1 + math.cos(math.pi * e / epochs))


def finetune_lr(base: float, e: int, config: ScheduleConfig) -> float:
    """base * warm-up(e) * gamma^(milestones <= e)."""
    warm = 1.0
    if e < config.warmup:
        share = e / config.warmup if config.warmup_method == "linear" else 0.0
        warm = config.warmup_factor * (1 - share) + share
    return base * warm * config.gamma ** sum(milestone <= e for milestone in config.milestones)
