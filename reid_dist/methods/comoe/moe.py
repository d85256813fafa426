"""CoMoE's collaborative head: a small transformer on projected tokens with a sparse mixture of adapter experts per
block.

Source: SJJ0916/CoMoE (methods/comoe.md section 2). One pool of experts serves both modalities; a token's choice mixes
a gate of its modality with an auxiliary gate on a learned vector (CoA):

    g(z) = (1 - alpha) G_m z + alpha A a;   T = top-k of g;   w = softmax over T;   y = sum_{e in T} w_e Expert_e(z)
    Expert(z) = z + drop(U drop(GELU(V LN(z) + b_V)) + b_U)

What we changed and why: all experts run densely with weight 0 for those not chosen. They are tiny (1 % of the head's
work), so dispatch by index is launch-bound (one CPU thread, forward + backward, dense against indexed: 64 x 32 tokens
of width 128 10 against 24 ms, 16 x 192 of width 512 98 against 122 ms), and every rank touches every expert, so no
gradient is ever None (reductions would wait). Attention runs along the tokens of a row by default; the released code
runs it across the batch ("batch", for parity only).

Shapes: n rows, L tokens, D width, E experts, k chosen, R = D / reduction.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reid_dist.losses import share
from reid_dist.models.clip_blocks import Attention, Mlp, WideLayerNorm
from reid_dist.models.dropout import RowDropout

Modality = Literal["image", "text"]
AttentionAxis = Literal["sequence", "batch"]


class AdapterExperts(nn.Module):
    """E bottleneck adapters, weights stacked on axis 0."""

    def __init__(
        self, experts: int, width: int, reduction: int, dropout: float, salt: int, out_width: int | None = None
    ):
        super().__init__()
        hidden, out_width = width // reduction, out_width or width
        self.residual = out_width == width
        self.ln_weight = nn.Parameter(torch.ones(experts, width))
        self.ln_bias = nn.Parameter(torch.zeros(experts, width))
        self.down_weight = nn.Parameter(torch.empty(experts, hidden, width))
        self.down_bias = nn.Parameter(torch.zeros(experts, hidden))
        self.up_weight = nn.Parameter(torch.zeros(experts, out_width, hidden))
        self.up_bias = nn.Parameter(torch.zeros(experts, out_width))
        for weight in self.down_weight:  # drawn one by one: experts start different
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.drop_hidden = RowDropout(dropout, 2 * salt)
        self.drop_out = RowDropout(dropout, 2 * salt + 1)

    def forward(self, z: Tensor, weight: Tensor, seeds: Tensor | None = None) -> Tensor:
        """sum_e weight_e Expert_e(z): z [n, ..., D], weight [n, ..., E] -> [n, ..., D_out]. seeds int64 [n]."""
        experts, hidden, width = self.down_weight.shape
        # The experts' norms differ only by scale and shift, so they fold into the down projection: one product for all.
        wide = torch.promote_types(z.dtype, torch.float32)
        normed = F.layer_norm(z.to(wide), (width,)).to(z.dtype)
        down = (self.down_weight * self.ln_weight[:, None]).flatten(0, 1)
        shift = self.down_bias + (self.down_weight @ self.ln_bias[:, :, None])[..., 0]
        h = F.gelu(F.linear(normed, down, shift.flatten()))
        h = self.drop_hidden(h, seeds).unflatten(-1, (experts, hidden))
        if self.drop_out.active:
            y = self.drop_out(torch.einsum("...er,edr->...ed", h, self.up_weight) + self.up_bias, seeds)
            y = (weight[..., None] * y).sum(dim=-2)
        else:
            up = self.up_weight.transpose(1, 2).flatten(0, 1)  # [E * R, D_out]
            y = (weight[..., None] * h).flatten(-2) @ up + weight @ self.up_bias
        return y + weight.sum(dim=-1, keepdim=True) * z if self.residual else y


class Routing(NamedTuple):
    """Where tokens [n, ..., D] go."""

    logits: Tensor  # [n, ..., E] gate values g
    selected: Tensor  # int64 [n, ..., k] chosen experts, best first
    combine: Tensor  # [n, ..., k] softmax over the chosen logits
    dense: Tensor  # [n, ..., E] the same, zero elsewhere

    def row_means(self) -> tuple[Tensor, Tensor]:
        """(P, C) [n, E] float32 per row: mean softmax of the gate, share of tokens that chose the expert."""
        between = tuple(range(1, self.logits.dim() - 1))
        probability = self.logits.float().softmax(dim=-1)
        chosen = torch.zeros_like(probability).scatter(-1, self.selected, 1.0)
        return (probability.mean(between), chosen.mean(between)) if between else (probability, chosen)


def route(logits: Tensor, top_k: int, dtype: torch.dtype) -> Routing:
    """Top-k routing of gate values [..., E]; combine weights in `dtype`, computed in float32. No noise, no capacity."""
    best, selected = logits.float().topk(top_k, dim=-1)
    combine = best.softmax(dim=-1).to(dtype)
    dense = torch.zeros(logits.shape, dtype=dtype, device=logits.device).scatter(-1, selected, combine)
    return Routing(logits, selected, combine, dense)


class DualGateRouter(nn.Module):
    """Modality gate plus auxiliary gate (CoA). `mix` is alpha, unconstrained, start 0.5; shape [1] for ZeRO-3."""

    def __init__(self, width: int, experts: int, top_k: int) -> None:
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k={top_k} of {experts} experts")
        self.top_k = top_k
        self.gate_image = nn.Linear(width, experts, bias=False)
        self.gate_text = nn.Linear(width, experts, bias=False)
        self.gate_aux = nn.Linear(width, experts, bias=False)
        self.mix = nn.Parameter(torch.tensor([0.5]))

    def forward(self, z: Tensor, aux: Tensor, modality: Modality) -> Routing:
        """z [n, ..., D], aux [D] or broadcastable -> Routing."""
        gate = self.gate_image if modality == "image" else self.gate_text
        return route((1 - self.mix) * gate(z) + self.mix * self.gate_aux(aux), self.top_k, z.dtype)


class SharedExpertLayer(nn.Module):
    """Router and experts."""

    def __init__(self, width: int, experts: int, top_k: int, reduction: int, dropout: float, salt: int) -> None:
        super().__init__()
        self.router = DualGateRouter(width, experts, top_k)
        self.experts = AdapterExperts(experts, width, reduction, dropout, salt)

    def forward(
        self, z: Tensor, aux: Tensor, modality: Modality, seeds: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """z [n, ..., D] -> ([n, ..., D], Routing)."""
        routing = self.router(z, aux, modality)
        return self.experts(z, routing.dense, seeds), routing


class HeadBlock(nn.Module):
    """x += MHA(LN1 x); y = MoE(LN3 x); x += MLP(LN2 x) + y."""

    def __init__(self, width: int, heads: int, layer: SharedExpertLayer, attention_axis: AttentionAxis) -> None:
        super().__init__()
        self.attention_axis = attention_axis
        self.ln1, self.ln2, self.ln3 = WideLayerNorm(width), WideLayerNorm(width), WideLayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width)
        self.moe = layer
        self.aux_vector = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor, modality: Modality, seeds: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[n, L, D] -> ([n, L, D], P [n, E], C [n, E])."""
        normed = self.ln1(x)
        if self.attention_axis == "batch":
            x = x + self.attn(normed.transpose(0, 1))[0].transpose(0, 1)
        else:
            x = x + self.attn(normed)[0]
        mixed, routing = self.moe(self.ln3(x), self.aux_vector, modality, seeds)
        return x + self.mlp(self.ln2(x)) + mixed, *routing.row_means()


class HeadOutput(NamedTuple):
    """What the head gives for n rows."""

    tokens: Tensor  # [n, L, D]
    probability: Tensor  # [n, blocks, E] P of every row
    chosen: Tensor  # [n, blocks, E] C of every row

    @property
    def pooled(self) -> Tensor:
        """[n, D] mean over tokens."""
        return self.tokens.mean(dim=1)


class CollaborativeHead(nn.Module):
    """The stack of blocks. `first_salt` tells the dropout of two heads apart; text draws other masks than images."""

    def __init__(
        self,
        width: int,
        heads: int,
        blocks: int,
        experts: int,
        top_k: int,
        reduction: int,
        dropout: float,
        attention_axis: AttentionAxis = "sequence",
        first_salt: int = 0,
    ) -> None:
        super().__init__()
        layers = (SharedExpertLayer(width, experts, top_k, reduction, dropout, first_salt + i) for i in range(blocks))
        self.blocks = nn.ModuleList(HeadBlock(width, heads, layer, attention_axis) for layer in layers)
        self.activation_checkpointing = False

    def forward(self, tokens: Tensor, modality: Modality, seeds: Tensor | None = None) -> HeadOutput:
        """[n, L, D] -> HeadOutput. seeds int64 [n] for dropout."""
        if seeds is not None and modality == "text":
            seeds = ~seeds  # the same row's words and patches draw apart
        probability, chosen = [], []
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                outputs = checkpoint(block, tokens, modality, seeds, use_reentrant=False, preserve_rng_state=False)
            else:
                outputs = block(tokens, modality, seeds)
            tokens, p, c = outputs
            probability.append(p)
            chosen.append(c)
        return HeadOutput(tokens, torch.stack(probability, dim=1), torch.stack(chosen, dim=1))


def balance_loss(probability: Tensor, chosen: Tensor, *, rows: slice | None = None, world_size: int = 1) -> Tensor:
    """CoAR of one modality: sum over blocks of sum_e mean(P)_e mean(C)_e.

    `probability`, `chosen` [B, blocks, E] of the whole global batch, every row with the same number of tokens;
    `rows`, ours. A product of means: C is global, each rank's share carries its own rows' P. No gradient through C.
    Uniform routing gives k / E per block. Scalar share (losses/sharding.py).
    """
    ours = slice(0, len(probability)) if rows is None else rows
    load = chosen.detach().mean(dim=0)
    return share((probability[ours] * load).sum(dim=(1, 2)), len(probability), world_size)


def joint_balance_loss(
    image: tuple[Tensor, Tensor], text: tuple[Tensor, Tensor], *, rows: slice | None = None, world_size: int = 1
) -> Tensor:
    """Ours: the same term on the usage of both modalities together, P and C averaged over the two before the product.

    The paper presents CoAR as cross-modal balance while its code adds two separate terms; this is the literal reading.
    """
    probability, chosen = ((a + b) / 2 for a, b in zip(image, text, strict=True))
    return balance_loss(probability, chosen, rows=rows, world_size=world_size)
