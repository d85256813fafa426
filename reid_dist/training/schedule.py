"""Learning rate over time.

Source: the solver shared by IRRA and CoMoE (methods/comoe specification, section 5; five modes pinned by golden vectors). Its
`poly` is power**(1 - r), rising from `power` to 1, and `exp` is power**r: odd, but what the published recipes ran.
"""

from __future__ import annotations

import math
from bisect import bisect_right

from reid_dist.config import ScheduleConfig


def lr_at(base_lr: float, t: int, total: int, config: ScheduleConfig) -> float:
    """Learning rate of a group with rate `base_lr` at time `t` of `total` (epochs or steps, as `config.unit` says)."""
    if t < config.warmup:
        return base_lr * _warmup_factor(t, config)
    if config.mode == "constant":
        return base_lr
    if config.mode == "step":
        return base_lr * config.gamma ** bisect_right(config.milestones, t)
    ratio = (t - config.warmup) / max(1, total - config.warmup)
    factor = {
        "cosine": lambda: 0.5 * (1 + math.cos(math.pi * ratio)),
        "linear": lambda: 1 - ratio,
        "poly": lambda: config.power ** (1 - ratio),
        "exp": lambda: config.power**ratio,
    }[config.mode]()
    return config.target_lr + (base_lr - config.target_lr) * factor


def _warmup_factor(t: int, config: ScheduleConfig) -> float:
    if config.warmup_method == "constant":
        return config.warmup_factor
    return config.warmup_factor + (1 - config.warmup_factor) * t / config.warmup
