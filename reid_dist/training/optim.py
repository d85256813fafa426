"""Optimizers built from parameter groups by name.

torch's own Adam is used, also under DeepSpeed: its fused one compiles an extension at start. DeepSpeed's Adam would default
to decoupled decay; here coupled L2 is the default because the papers' recipes say Adam (`decoupled: true` gives AdamW).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from reid_dist.config import OptimConfig
from reid_dist.methods.spec import ParamGroup


def freeze_others(model: nn.Module, groups: Sequence[ParamGroup]) -> None:
    """Parameters in no group get requires_grad False. Raises ValueError for an unknown or doubled name."""
    named = [name for group in groups for name in group.names]
    parameters = dict(model.named_parameters())
    doubled = sorted({name for name in named if named.count(name) > 1}) if len(set(named)) != len(named) else []
    unknown = sorted(set(named) - set(parameters))
    if doubled or unknown:
        raise ValueError(
            f"parameter groups name {doubled or unknown} {'twice' if doubled else 'which the model lacks'}"
        )
    trainable = set(named)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trainable)


def build_optimizer(model: nn.Module, groups: Sequence[ParamGroup], config: OptimConfig) -> torch.optim.Optimizer:
    """torch optimizer over `groups`, in their order; each keeps its own lr and decay."""
    parameters = dict(model.named_parameters())
    dicts = [
        {"params": [parameters[n] for n in group.names], "lr": group.lr, "weight_decay": group.weight_decay}
        for group in groups
        if group.names
    ]
    if config.name == "sgd":
        return torch.optim.SGD(dicts, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
    kind = torch.optim.AdamW if config.decoupled else torch.optim.Adam
    return kind(dicts, lr=config.lr, betas=config.betas, eps=config.eps)
