"""Pre-norm transformer blocks of CLIP (Radford et al. 2021), open where re-identification methods reach in.

    x <- x + MHA(LN1 x);  x <- x + MLP(LN2 x)        MLP: D -> 4D -> D with x * sigmoid(1.702 x)

What differs from a stock encoder: an additive mask may be given per call (part tokens), the attention weights of a
block can be asked for (token selection) without giving up fused attention for its output, and every parameter is read
inside the forward of the module that owns it, because ZeRO-3 gathers weights per module call.

Shapes: n rows, L tokens, W width, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class WideLayerNorm(nn.LayerNorm):
    """LayerNorm computed in at least float32 and cast back to the input's type (CLIP's rule, eps 1e-5)."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head attention; packed weight rows are query, key, value; biases; scale 1/sqrt(W/H)."""

    half_weights = True

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.qkv_weight = nn.Parameter(torch.empty(3 * width, width))
        self.qkv_bias = nn.Parameter(torch.zeros(3 * width))
        self.out = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.qkv_weight)
        nn.init.zeros_(self.out.bias)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)  # [n, L, W] -> [n, H, L, W/H]

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        weights: str | Tensor = "",
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from x [n, L, W] to `context` [n, S, W] (default x).

        `mask` is additive, broadcastable to [n, H, L, S]. `weights` asks for attention weights averaged over heads:
        "map" gives [n, L, S], an int64 tensor [n] gives those of one query token per row, [n, S]. The output always
        comes from fused attention.
        """
        if context is None:
            query, key, value = F.linear(x, self.qkv_weight, self.qkv_bias).chunk(3, dim=-1)
        else:
            wq, wkv = self.qkv_weight.split((x.shape[-1], 2 * x.shape[-1]))
            bq, bkv = self.qkv_bias.split((x.shape[-1], 2 * x.shape[-1]))
            query = F.linear(x, wq, bq)
            key, value = F.linear(context, wkv, bkv).chunk(2, dim=-1)
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        mask = mask if mask is None else mask.to(query.dtype)
        fused = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        out = self.out(fused.transpose(-2, -3).flatten(-2))
        if isinstance(weights, str) and not weights:
            return out, None
        return out, _weights(query, key, mask, causal, weights)


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, which: str | Tensor) -> Tensor:
    """Softmax weights [n, L, S] or, for one query token per row, [n, S], in float32, averaged over heads."""
    length, span = query.shape[-2], key.shape[-2]
    if causal:
        allowed = torch.ones(length, span, dtype=torch.bool, device=query.device).tril()
        blocked = torch.zeros(length, span, device=query.device).masked_fill(~allowed, float("-inf"))
        mask = blocked[None, None] if mask is None else mask + blocked
    if isinstance(which, Tensor):
        pick = which[:, None, None, None]
        query = query.gather(2, pick.expand(-1, query.shape[1], 1, query.shape[3]))
        if mask is not None:
            mask = mask.expand(query.shape[0], -1, length, span)
            mask = mask.gather(2, pick.expand(-1, mask.shape[1], 1, span))
    scores = (query @ key.transpose(-1, -2)).float() / query.shape[-1] ** 0.5
    weights = (scores if mask is None else scores + mask).softmax(dim=-1).mean(dim=1)
    return weights[:, 0] if isinstance(which, Tensor) else weights


class Mlp(nn.Module):
    """W -> 4W -> W with quick GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 4 * width)
        self.act = QuickGelu()
        self.proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        return self.proj(self.act(self.fc(x)))


class Block(nn.Module):
    """One pre-norm residual block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln1 = WideLayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln2 = WideLayerNorm(width)
        self.mlp = Mlp(width)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, causal: bool = False, weights: str | Tensor = ""
    ) -> tuple[Tensor, Tensor | None]:
        """[n, L, W] -> ([n, L, W], attention weights as in `Attention.forward` or None)."""
        attended, seen = self.attn(self.ln1(x), mask=mask, causal=causal, weights=weights)
        x = x + attended
        return x + self.mlp(self.ln2(x)), seen


class BlockStack(nn.ModuleList):
    """A stack of blocks; `activation_checkpointing` recomputes each one in the backward pass."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__(Block(width, heads) for _ in range(layers))
        self.activation_checkpointing = False

    def reset_parameters(self) -> None:
        """CLIP's start values: spreads shrink with width and depth."""
        width, depth = self[0].mlp.proj.out_features, len(self)
        for block in self:
            nn.init.normal_(block.attn.qkv_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out.weight, std=width**-0.5 * (2 * depth) ** -0.5)
            nn.init.normal_(block.mlp.fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, causal: bool = False, weights: str | Tensor = ""
    ) -> tuple[Tensor, Tensor | None]:
        """[n, L, W] -> ([n, L, W], attention weights of the last block where `weights` asks for them)."""
        seen: Tensor | None = None
        for index, block in enumerate(self):
            asked = weights if index + 1 == len(self) else ""
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, seen = checkpoint(block, x, mask, causal, asked, use_reentrant=False, preserve_rng_state=False)
            else:
                x, seen = block(x, mask, causal, asked)
        return x, seen
