"""The importance-aware reorder Mamba head and its multi-temporal form (methods/climb.md sections 2.5 to 2.7).

    a_j = cos(class token, patch j);  patches in descending order of a;  s = BiMamba(LN(patches))        (no residual)
    u = sum_j w_j t_j,  t = LN([class token; s]),  w = softmax over tokens of Linear -> tanh -> Linear

The paper prepends the class token before the Mamba block and adds both directions to its input; the released code,
which is what is computed here, scans the patches alone and adds the class token afterwards.

MultiTemporalHead is ours: no video code was released. From the paper come the fragments of 1, 4 and 8 frames, their sum
and one linear layer; that a fragment's reference is the mean of its class tokens, that each scale has parameters of its
own and that fragments of one scale are averaged (which makes T, T/4 and 1 vectors equal in number) are our decisions.

Shapes: n rows, T frames, P patches, m width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reid_dist.models.mamba import BidirectionalMambaMixer


def importance(reference: Tensor, tokens: Tensor) -> Tensor:
    """Cosine of each token to the reference: [n, m], [n, P, m] -> [n, P]."""
    return (F.normalize(tokens, dim=-1, eps=1e-12) @ F.normalize(reference, dim=-1, eps=1e-12)[..., None])[..., 0]


def importance_order(reference: Tensor, tokens: Tensor) -> Tensor:
    """Tokens [n, P, m] by descending cosine to the reference [n, m]; ties keep their order (originally undefined)."""
    order = importance(reference, tokens).argsort(dim=1, descending=True, stable=True)
    return tokens.gather(1, order[..., None].expand_as(tokens))


class AttentionTokenPool(nn.Module):
    """Weighted sum of tokens; the weights come from a two-layer score, softmax over tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width // 4)
        self.score = nn.Linear(width // 4, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, L, m] -> [n, m]."""
        weights = self.score(torch.tanh(self.hidden(tokens))).softmax(dim=1)
        return (weights.mT @ tokens)[:, 0]


class ReorderMambaHead(nn.Module):
    """One image, or one fragment of a clip."""

    def __init__(self, width: int, states: int = 16, rank: int | None = None) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(width)
        self.mixer = BidirectionalMambaMixer(width, states, rank=rank)
        self.norm_out = nn.LayerNorm(width)
        self.pool = AttentionTokenPool(width)

    def forward(self, reference: Tensor, tokens: Tensor) -> Tensor:
        """reference [n, m], tokens [n, P, m] -> [n, m]."""
        scanned = self.mixer(self.norm_in(importance_order(reference, tokens)))
        return self.pool(self.norm_out(torch.cat([reference[:, None], scanned], dim=1)))


def fragments(tokens: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Clips [n, T, 1 + P, m] -> T / stride fragments: references [n T/stride, m], tokens [n T/stride, stride P, m].

    Tokens stand frame by frame. Raises ValueError when the stride does not divide T.
    """
    frames = tokens.shape[1]
    if frames % stride:
        raise ValueError(f"clips of {frames} frames cannot be cut into fragments of {stride}: it must divide")
    cut = tokens.unflatten(1, (frames // stride, stride)).flatten(0, 1)  # [n T/stride, stride, 1 + P, m]
    return cut[:, :, 0].mean(1), cut[:, :, 1:].flatten(1, 2)


class MultiTemporalHead(nn.Module):
    """Linear(sum over strides of the mean over fragments of a head's output). Ours, see above."""

    def __init__(self, width: int, strides: Sequence[int], states: int = 16, rank: int | None = None) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.scales = nn.ModuleList(ReorderMambaHead(width, states, rank) for _ in self.strides)
        self.fuse = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, T, 1 + P, m] -> [n, m]. Raises ValueError as `fragments`."""
        rows, frames, _, width = tokens.shape
        total = tokens.new_zeros(rows, width)
        for stride, head in zip(self.strides, self.scales, strict=True):
            total = total + head(*fragments(tokens, stride)).reshape(rows, frames // stride, width).mean(1)
        return self.fuse(total)
