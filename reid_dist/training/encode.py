"""Encoding one side of a retrieval with a loaded model, batch by batch, decoding ahead in threads."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from reid_dist.data.store import TableView
from reid_dist.methods.spec import EvalSide
from reid_dist.training.context import to_device
from reid_dist.training.loaded import LoadedModel

logger = logging.getLogger(__name__)
SAY_EVERY_S = 30.0


def encode_side(loaded: LoadedModel, view: TableView, side: EvalSide) -> dict[str, Tensor]:
    """Named embeddings [N, D] (CPU, float32) of the side's items, in their order."""
    recipe, eval_batch, encode = loaded.recipe, loaded.spec.eval_batch, loaded.spec.encode
    assert eval_batch, f"{loaded.spec.name} encodes nothing (load_run refuses it)"
    assert encode
    size, ahead = recipe.evaluation.batch, max(1, recipe.data.prefetch)
    pieces = [np.arange(start, min(start + size, len(side.rows))) for start in range(0, len(side.rows), size)]
    outputs: list[dict[str, Tensor]] = []
    began = time.monotonic()
    with ThreadPoolExecutor(max_workers=recipe.data.loader_threads) as pool, torch.inference_mode():
        waiting = [pool.submit(eval_batch, recipe.model, view, side, index) for index in pieces[:ahead]]
        # disable=None: a bar in a terminal; in a log a line now and then
        bar, said = tqdm(range(len(pieces)), desc=f"encode {side.kind}s", unit="batch", disable=None), began
        for number in bar:
            batch = waiting.pop(0).result()
            if number + ahead < len(pieces):
                upcoming = pieces[number + ahead]
                waiting.append(pool.submit(eval_batch, recipe.model, view, side, upcoming))
            out = encode(loaded.model, to_device(batch, loaded.device))
            outputs.append({name: value.float().cpu() for name, value in out.items()})
            if bar.disable and time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                logger.info("encode %ss: %d of %d batches", side.kind, number + 1, len(pieces))
    logger.info("encoded %d %ss in %.1f s", len(side.rows), side.kind, time.monotonic() - began)
    return {name: torch.cat([out[name] for out in outputs]) for name in outputs[0]}
