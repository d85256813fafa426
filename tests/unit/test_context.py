"""A worker's context alone: passes over items, and what a stage notes."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reid_dist.training.context import RunContext


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


@pytest.mark.parametrize("threads", [1, 3])
def test_a_pass_returns_rows_in_order_and_loads_ahead(threads: int) -> None:
    model, ctx, loaded, seen = Scale().train(), RunContext(seed=1, threads=threads), [], []
    started = threading.Event()

    def load(items: np.ndarray) -> dict[str, Tensor]:
        loaded.append(items.tolist())
        if len(loaded) > 1:
            started.set()
        time.sleep(0.002 * (items[0] % 3))  # later parts may be ready sooner
        return {"x": torch.from_numpy(items).float()}

    def encode(module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        assert started.wait(5)  # while one batch is encoded, the next is being loaded
        seen.append(batch["x"].tolist())
        assert not module.training
        return {"y": module(batch["x"]).double()}

    out = ctx.extract(model, np.arange(7, 18), load, encode, batch=4)
    assert seen == [[7, 8, 9, 10], [11, 12, 13, 14], [15, 16, 17]]
    assert sorted(loaded) == seen
    assert out["y"].tolist() == [2.0 * value for value in range(7, 18)]
    assert out["y"].dtype == torch.float32
    assert not out["y"].requires_grad
    assert model.training


def test_an_error_while_loading_ends_the_pass() -> None:
    def load(items: np.ndarray) -> dict[str, Tensor]:
        raise OSError("no such image")

    model = Scale().train()
    with pytest.raises(OSError, match="no such image"):
        RunContext(seed=1).extract(model, np.arange(9), load, lambda module, batch: {}, batch=2)
    assert model.training


def test_notes_are_taken_once() -> None:
    ctx = RunContext(seed=1, epoch=3, step=12)
    ctx.note("division", clean=0.5, histogram=[1, 2])
    assert ctx.take_notes() == [{"kind": "division", "step": 12, "epoch": 3, "clean": 0.5, "histogram": [1, 2]}]
    assert ctx.take_notes() == []
