"""What CoMoE adds to a report: how evenly each modality uses the shared experts (methods/comoe.md section 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from reid_dist.config import Recipe
from reid_dist.data.store import TableView
from reid_dist.methods.comoe.method import eval_batch
from reid_dist.methods.spec import EvalSide, device_of

SAMPLE = 512  # items per modality that the figure counts


def expert_usage(
    model: nn.Module, recipe: Recipe, view: TableView, sides: Mapping[str, EvalSide]
) -> dict[str, Any] | None:
    """Routed (token, slot) pairs per block, modality and expert, over up to SAMPLE test items of each modality.

    None where the head has no experts.
    """
    if recipe.model.head == "base":
        return None
    usage: dict[str, dict[str, list[float]]] = {}
    with torch.inference_mode():
        for kind, side in sides.items():
            index = np.arange(min(SAMPLE, len(side.rows)))
            total: torch.Tensor | None = None
            for part in np.array_split(index, max(1, len(index) // 64)):
                batch = eval_batch(recipe.model, view, side, part)
                out = model(**{key: value.to(device_of(model)) for key, value in batch.items()})
                chosen = out[f"{kind}_chosen"].double().sum(0).cpu()  # [blocks, E]
                total = chosen if total is None else total + chosen
            assert total is not None
            for block, counts in enumerate(total.tolist()):
                usage.setdefault(f"block {block + 1}", {})[kind] = counts
    return {
        "kind": "expert_usage",
        "title": "Expert usage by modality",
        "text": "Each token chooses its experts from one pool shared by images and captions. Even use of all experts "
        "gives the entropy log E; the balance term rewards it.",
        "data": usage,
    }
