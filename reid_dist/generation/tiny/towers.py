"""The model's computations in batches: pictures of one size, and several questions about one picture in one sequence.

Both use the library's own parameters and modules and give what its forward gives for one picture and one question (a
test compares); batching is what makes training on a CPU take minutes.

Shapes: B pictures, P patches, T = P / 4 visual tokens, L = length of a packed sequence, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from reid_dist.generation.tiny.model import GRID, MERGE, PATCH, TEMPORAL, TOKENS

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FIRST = 1 + max(GRID) // MERGE  # position after the picture: it takes as many as its longer side has tokens
PREFIX = TOKENS + 2  # start mark, picture, end mark


def patches(pixels: Tensor) -> Tensor:
    """uint8 [B, *SIDE, 3] -> float32 [B, P, 3 * TEMPORAL * PATCH ** 2], rows in the order of the merged blocks."""
    mean, deviation = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD))
    x = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / deviation
    rows, columns = GRID[0] // MERGE, GRID[1] // MERGE
    x = x.reshape(len(x), 3, rows, MERGE, PATCH, columns, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.reshape(len(x), GRID[0] * GRID[1], 3, 1, PATCH, PATCH).expand(-1, -1, -1, TEMPORAL, -1, -1)
    return x.flatten(2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def see(visual: Any, pixels: Tensor) -> Tensor:
    """Visual tokens [B, T, D] of pictures uint8 [B, *SIDE, 3] by the library's vision tower."""
    x = patches(pixels)
    weight = visual.patch_embed.proj.weight
    x = functional.linear(x, weight.flatten(1))
    rows, columns = np.indices(GRID)
    blocks = [axis.reshape(GRID[0] // MERGE, MERGE, GRID[1] // MERGE, MERGE).transpose(0, 2, 1, 3).ravel()
              for axis in (rows, columns)]  # fmt: skip
    frequencies = visual.rotary_pos_emb.inv_freq
    angles = torch.cat([torch.tensor(axis, device=x.device)[:, None].float() * frequencies for axis in blocks], dim=1)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    for block in visual.blocks:
        heads = block.attn.num_heads
        qkv = block.attn.qkv(block.norm1(x)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = _rotated(qkv[0], cos, sin), _rotated(qkv[1], cos, sin)
        seen = functional.scaled_dot_product_attention(query, key, qkv[2])
        x = x + block.attn.proj(seen.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return visual.merger(x).unflatten(0, (len(pixels), TOKENS))


@dataclass(frozen=True, eq=False)
class Packed:
    """Questions about B pictures. `ids`, `targets` int64 [B, L] (-100: not learned; target of place i is said at i),
    `segment` int64 [B, L] (0: picture, -1: padding), `position` int64 [B, L] of the text.
    """

    ids: Tensor
    targets: Tensor
    segment: Tensor
    position: Tensor

    def to(self, device: torch.device) -> Packed:
        """The same on a device."""
        return Packed(*(getattr(self, field.name).to(device) for field in fields(self)))


def parted(lessons: Sequence[tuple[list[int], list[int]]], length: int) -> list[list[tuple[list[int], list[int]]]]:
    """Questions about one picture as several sequences of at most `length` tokens, in their order; a longer one stands
    alone.
    """
    found: list[list[tuple[list[int], list[int]]]] = []
    room = 0
    for lesson in lessons:
        if not found or len(lesson[0]) > room:
            found.append([])
            room = length
        found[-1].append(lesson)
        room -= len(lesson[0])
    return found


def pack(questions: Sequence[Sequence[tuple[list[int], list[int]]]], pad: int) -> Packed:
    """questions[b] = [(ids, targets of the same length), ...] about picture b, without the picture's own tokens."""
    length = max(sum(len(ids) for ids, _ in row) for row in questions)
    shape = (len(questions), length)
    ids, targets = np.full(shape, pad, np.int64), np.full(shape, -100, np.int64)
    segment, position = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
    for b, row in enumerate(questions):
        start = 0
        for number, (words, wanted) in enumerate(row, start=1):
            here = slice(start, start + len(words))
            ids[b, here], targets[b, here], segment[b, here] = words, wanted, number
            position[b, here] = FIRST + 1 + np.arange(len(words))
            start += len(words)
    return Packed(*(torch.from_numpy(values) for values in (ids, targets, segment, position)))


def picture_positions() -> Tensor:
    """int64 [3, PREFIX]: time, row, column of start mark, visual tokens and end mark."""
    rows, columns = np.indices((GRID[0] // MERGE, GRID[1] // MERGE))
    picture = np.stack([np.zeros(TOKENS, np.int64), rows.ravel(), columns.ravel()]) + 1
    return torch.from_numpy(np.concatenate([np.zeros((3, 1), np.int64), picture, np.full((3, 1), FIRST)], axis=1))


def say(model: Any, seen: Tensor, packed: Packed) -> Tensor:
    """Logits [B, L, vocabulary] after every token of the questions; a question sees its picture and itself."""
    text, config = model.model.language_model, model.config
    packed, device = packed.to(seen.device), seen.device
    marks = text.embed_tokens(torch.tensor([config.vision_start_token_id, config.vision_end_token_id], device=device))
    start, end = (mark.expand(len(seen), 1, -1) for mark in marks)
    embedded = torch.cat([start, seen, end, text.embed_tokens(packed.ids)], dim=1)
    prefix = picture_positions().to(device)[:, None].expand(3, len(seen), -1)
    positions = torch.cat([prefix, packed.position.expand(3, -1, -1)], dim=2)
    segment = torch.cat([torch.zeros(len(seen), PREFIX, dtype=torch.int64, device=device), packed.segment], dim=1)
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    allowed = causal & ((segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0))
    mask = torch.zeros(allowed.shape, device=device).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]
    out = text(
        inputs_embeds=embedded, attention_mask={"full_attention": mask}, position_ids=positions, use_cache=False
    ).last_hidden_state
    return functional.linear(out[:, PREFIX:], text.embed_tokens.weight)
