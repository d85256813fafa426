"""Learning-rate schedule and optimizer against the golden vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from reid_dist.config import OptimConfig, ScheduleConfig
from reid_dist.methods.spec import ParamGroup
from reid_dist.training.optim import build_optimizer, freeze_others
from reid_dist.training.schedule import lr_at
from tests.golden import cases, load


@cases("comoe", "lr_schedule")
def test_learning_rates(case: Path) -> None:
    golden = load(case)
    config = ScheduleConfig(
        mode=golden["const_mode"],
        warmup=golden["const_warmup_epochs"],
        warmup_factor=golden["const_warmup_factor"],
        warmup_method=golden["const_warmup_method"],
        target_lr=golden["const_target_lr"],
        power=golden["const_power"],
        milestones=tuple(golden["const_milestones"].tolist()),
        gamma=golden["const_gamma"],
    )
    total = golden["const_total_epochs"]
    ours = [[lr_at(base, t, total, config) for base in golden["const_base_lr"].tolist()] for t in range(total)]
    np.testing.assert_allclose(ours, golden["out_lr"], rtol=1e-9)


class OneParameter(nn.Module):
    def __init__(self, value: np.ndarray) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.from_numpy(value))


@cases("comoe", "adam_steps")
def test_adam_steps(case: Path) -> None:
    golden = load(case)
    model = OneParameter(golden["in_param"])
    optim = OptimConfig(
        lr=golden["const_lr"], betas=(golden["const_beta1"], golden["const_beta2"]), eps=golden["const_eps"]
    )
    group = ParamGroup(("value",), golden["const_lr"], golden["const_weight_decay"])
    optimizer = build_optimizer(model, [group], optim)
    for gradient, expected in zip(golden["in_grad"], golden["out_param"], strict=True):
        model.value.grad = torch.from_numpy(gradient)
        optimizer.step()
        np.testing.assert_allclose(model.value.detach().numpy(), expected, rtol=1e-9)


def test_decoupled_decay_is_adamw() -> None:
    model = OneParameter(np.ones(2))
    optimizer = build_optimizer(model, [ParamGroup(("value",), 0.1, 0.5)], OptimConfig(decoupled=True))
    model.value.grad = torch.zeros(2, dtype=torch.float64)
    optimizer.step()
    np.testing.assert_allclose(model.value.detach().numpy(), 1 - 0.1 * 0.5)


def test_parameters_in_no_group_are_frozen_and_unknown_names_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    freeze_others(model, [ParamGroup(("1.weight",), 1.0, 0.0)])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["1.weight"]
    with pytest.raises(ValueError, match="lacks"):
        freeze_others(model, [ParamGroup(("2.weight",), 1.0, 0.0)])
    with pytest.raises(ValueError, match="twice"):
        freeze_others(model, [ParamGroup(("1.weight", "1.weight"), 1.0, 0.0)])
