"""Two pieces of the sibling paper PHP (Tedysu0916/php_V1), not part of CoMoE's recipe: methods/comoe.md section 9.

SingleGateMoE: one input gate for both modalities. QueryTokenPooling: T learned queries summarise the tokens before
the head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reid_dist.methods.comoe.moe import AdapterExperts, Routing, route
from reid_dist.models.clip_blocks import WideLayerNorm
from reid_dist.models.dropout import RowDropout


class SingleGateMoE(nn.Module):
    """As SharedExpertLayer, with one gate whatever the modality."""

    def __init__(
        self, width: int, experts: int, top_k: int, reduction: int, dropout: float = 0.1, salt: int = 0
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate_input = nn.Linear(width, experts, bias=False)
        self.gate_aux = nn.Linear(width, experts, bias=False)
        self.mix = nn.Parameter(torch.tensor([0.5]))
        self.experts = AdapterExperts(experts, width, reduction, dropout, salt)

    def forward(self, z: Tensor, aux: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Routing]:
        """z [n, ..., D], aux [D] -> ([n, ..., D], Routing)."""
        logits = (1 - self.mix) * self.gate_input(z) + self.mix * self.gate_aux(aux)
        routing = route(logits, self.top_k, z.dtype)
        return self.experts(z, routing.dense, seeds), routing


class QueryTokenPooling(nn.Module):
    """softmax(Q x^T) without scaling, times x, over sqrt(D); then LN -> 4D -> GELU -> dropout -> D, no residual."""

    def __init__(self, width: int, queries: int = 9, dropout: float = 0.3, salt: int = 0) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, width))
        self.ln = WideLayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.drop = RowDropout(dropout, salt)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor, seeds: Tensor | None = None) -> Tensor:
        """[n, L, D] -> [n, T, D]."""
        weights = (self.query @ tokens.transpose(1, 2)).softmax(dim=-1)
        slots = weights @ tokens / tokens.shape[-1] ** 0.5
        return self.fc2(self.drop(self.act(self.fc1(self.ln(slots))), seeds))
