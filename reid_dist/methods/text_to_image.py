"""What text-to-image methods with CLIP's towers share: the batches of their evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from reid_dist.data.text import clip_tokenizer
from reid_dist.data.transforms import person_transform
from reid_dist.errors import UserError
from reid_dist.methods.spec import Batch, EvalSide
from reid_dist.models.clip import ClipArchitecture

if TYPE_CHECKING:
    from reid_dist.data.store import TableView


def text_image_batch(arch: ClipArchitecture, view: TableView, side: EvalSide, index: np.ndarray) -> Batch:
    """image [n, 3, h, w] for images, ids [n, L] for captions. Raises UserError for another kind of item."""
    rows = side.rows[index]
    if side.kind == "image":
        return {"image": person_transform(arch.image_size, train=False).apply_all(view.images(rows))}
    if side.kind == "text":
        texts = [view.captions[row][part] for row, part in zip(rows.tolist(), side.part[index].tolist(), strict=True)]
        return {"ids": torch.from_numpy(clip_tokenizer(arch.vocab_size).encode_all(texts, arch.context_length))}
    raise UserError(
        f"this method encodes images and captions, not {side.kind}s: choose a protocol between texts and images, such as "
        "text-to-image"
    )
