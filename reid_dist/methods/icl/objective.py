"""The training objective on gathered features (methods/icl.md section 2).

    L = L_global + L_selected + w(e) (L_global' + L_selected'),   w(e) = max(0.1, 1 - 0.03 e), e = 1, 2, ...

each a sum over pairs of trust x loss; the primed terms pair the same images with the reorganised captions. All features of the
global batch travel in one gather; a rank computes rows and columns of its own pairs and returns its share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reid_dist.losses import pair_losses, trusted
from reid_dist.methods.icl.config import Config
from reid_dist.methods.spec import Context, Outputs, Terms

BRANCHES = ("global", "selected")
TEXTS = ("text", "second")


def loss_settings(config: Config) -> dict[str, Any]:
    """Constants of the pair losses."""
    return {"temperature": config.temperature, "margin": config.margin, "logit_scale": config.logit_scale}


def second_weight(config: Config, number: int) -> float:
    """Weight of the second caption's terms in epoch `number`, from 1."""
    return max(config.second_weight_least, 1.0 - config.second_weight_step * number)


def objective(
    config: Config, out: Outputs, pid: Tensor, trust: Tensor, usable: Mapping[str, Tensor], number: int, ctx: Context
) -> Terms:
    """This rank's shares of the weighted terms "global", "selected" and, with a second caption, "global_second",
    "selected_second".

    Args:
        out: own embeddings `<image|text|second>_<global|selected>` [n, D].
        pid, trust: int64 [n]; usable: {"text", "second"}: bool [n], captions that have words.
        number: the epoch's, from 1.
    """
    names, texts = sorted(out), [text for text in TEXTS if f"{text}_global" in out]
    gathered = ctx.gather(torch.cat([out[name] for name in names], dim=1))
    every = dict(zip(names, gathered.split([out[name].shape[1] for name in names], dim=1), strict=True))
    marks = ctx.gather(torch.stack([pid, trust, *(usable[text].to(torch.int64) for text in texts)], dim=1))
    rows, kind = ctx.slice(), config.pair_loss
    terms: Terms = {}
    for place, text in enumerate(texts):
        has_words = marks[:, 2 + place].bool()
        weight = marks[:, 1] * has_words
        factor = config.loss_scale * (second_weight(config, number) if text == "second" else 1.0)
        for branch in BRANCHES:
            losses = pair_losses(
                kind, every[f"image_{branch}"], every[f"{text}_{branch}"], marks[:, 0], rows=rows, usable=has_words,
                **loss_settings(config),
            )  # fmt: skip
            value = trusted(kind, losses, weight[rows], weight.sum(), ctx.world_size)
            terms[branch if text == "text" else f"{branch}_second"] = factor * value
    return terms
