"""Token selection: an embedding made of the tokens that the global token attends to most (RDE, methods/icl.md section 1).

    score of a token = its weight in the global token's attention row of the last block, mean over heads
    k = floor(ratio * patches), floor(ratio * (L - 2)) for a text;  the k best tokens, by falling score
    y = W2 relu(BN(W1 x + b1)) + b2 + W3 x + b3 of each unit token x;  embedding = max over tokens

A text takes the maximum over its first min(words, k) tokens alone. Ours: a text without words (corruption may delete all) takes
its end-of-text token, where the original turns it and every later text of the batch to NaN. No gradient flows through the choice.

Shapes: n rows, S tokens, k selected, D token width, E embedding width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from reid_dist.models.batchnorm import BatchNorm1d
from reid_dist.models.clip import end_of_text

EPSILON = 1e-8  # added to a token's norm, outside the root


def count_words(ids: Tensor) -> Tensor:
    """int64 [n]: ids [n, L] that are not padding, without start and end."""
    return (ids != 0).sum(dim=1) - 2


def pick_patches(weights: Tensor, ratio: float) -> Tensor:
    """int64 [n, k]: token numbers of the chosen patches, best first. `weights` [n, S]: the class token's attention row."""
    k = int(ratio * (weights.shape[1] - 1))
    return 1 + weights[:, 1:].argsort(dim=1, descending=True, stable=True)[:, :k]


def pick_words(weights: Tensor, ids: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """(int64 [n, k] token numbers, best first; int64 [n] how many of them count, at least 1).

    `weights` [n, L]: the end token's attention row. Padding comes after all words; a text without words has its end token.
    """
    k, end, words = int(ratio * (ids.shape[1] - 2)), end_of_text(ids), count_words(ids)
    scores = (weights * (ids != 0)).scatter(1, end[:, None], -1.0)  # a copy: the row itself stays as it is
    scores[:, 0] = -1.0
    index = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    first = torch.where(words > 0, index[:, 0], end)
    return torch.cat([first[:, None], index[:, 1:]], dim=1), words.clamp(1, k)


def unit_token(x: Tensor) -> Tensor:
    """x / (|x| + 1e-8), [..., D]."""
    return x / (x.norm(dim=-1, keepdim=True) + EPSILON)


def masked_max(tokens: Tensor, count: Tensor) -> Tensor:
    """Maximum over the first `count` int64 [n] of tokens [n, k, E] -> [n, E]; each row by its own count, 0 counts as 1."""
    inside = torch.arange(tokens.shape[1], device=tokens.device)[None, :] < count.clamp(min=1)[:, None]
    return tokens.masked_fill(~inside[..., None], -torch.inf).amax(dim=1)


class SelectedEmbedding(nn.Module):
    """The head of one modality. `norm` "frozen": batch norm keeps its statistics (its scale and shift train)."""

    def __init__(self, width: int, embed: int, norm: Literal["frozen", "batch"]) -> None:
        super().__init__()
        self.frozen = norm == "frozen"
        self.hidden = nn.Linear(width, embed // 2)
        self.norm = BatchNorm1d(embed // 2)
        self.out = nn.Linear(embed // 2, embed)
        self.skip = nn.Linear(width, embed)
        self.train(self.training)

    def train(self, mode: bool = True) -> SelectedEmbedding:
        """As ever, but a frozen norm never leaves evaluation."""
        super().train(mode)
        if self.frozen:
            self.norm.eval()
        return self

    def forward(self, tokens: Tensor, index: Tensor, count: Tensor | None = None) -> Tensor:
        """tokens [n, S, D], index int64 [n, k], count int64 [n] (default: all k) -> [n, E]."""
        taken = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
        wide = torch.promote_types(tokens.dtype, torch.float32)
        x = unit_token(taken.to(wide)).to(self.skip.weight.dtype).flatten(0, 1)  # [n k, D]
        hidden = self.norm(self.hidden(x).to(self.norm.running_mean.dtype)).relu().to(x.dtype)
        y = (self.out(hidden) + self.skip(x)).unflatten(0, index.shape)
        return masked_max(y, torch.full_like(index[:, 0], index.shape[1]) if count is None else count)
