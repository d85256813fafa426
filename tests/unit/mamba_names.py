"""Upstream's parameter names of Mamba mixers -> ours, for the golden vectors (dots are underscores there)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SUFFIXES = ("", "_b", "_s")  # forward, reversed or strided, frame-interleaved


def mixer_names(paths: int) -> dict[str, str]:
    """{upstream name: our name}; A_log carries its suffix in the middle."""
    names = {"in_proj_weight": "in_proj.weight", "out_proj_weight": "out_proj.weight"}
    for i, suffix in enumerate(SUFFIXES[:paths]):
        names |= {
            f"conv1d{suffix}_weight": f"paths.{i}.conv_weight",
            f"conv1d{suffix}_bias": f"paths.{i}.conv_bias",
            f"x_proj{suffix}_weight": f"paths.{i}.x_weight",
            f"dt_proj{suffix}_weight": f"paths.{i}.dt_weight",
            f"dt_proj{suffix}_bias": f"paths.{i}.dt_bias",
            f"A{suffix}_log": f"paths.{i}.A_log",
            f"D{suffix}": f"paths.{i}.D",
        }
    return names


def tensor(value: np.ndarray, dtype: torch.dtype = torch.float64) -> Tensor:
    """A copy as a tensor; integers keep their type."""
    made = torch.from_numpy(np.array(value))
    return made.to(dtype) if made.is_floating_point() else made


def fill(module: nn.Module, c: dict[str, Any], names: dict[str, str], prefix: str = "w_") -> None:
    """Load the case's weights; every one of them must have a place, and every parameter a weight."""
    state = module.state_dict()
    assert set(names.values()) <= set(state)
    for theirs, ours in names.items():
        state[ours] = tensor(c[prefix + theirs]).reshape(state[ours].shape)
    module.load_state_dict(state)


def close(actual: Tensor, expected: np.ndarray, tolerance: float, what: str = "") -> None:
    """Equal up to `tolerance` times the expected array's largest entry."""
    wanted = tensor(expected, actual.dtype).reshape(actual.shape)
    scale = float(wanted.abs().max()) or 1.0
    worst = float((actual.detach() - wanted).abs().max()) / scale
    assert worst <= tolerance, f"{what}: {worst:.2e} of the largest entry, allowed {tolerance:.0e}"
