"""Part masks inside the image tower: predicted layer by layer, gated, and turned into an attention term.

Source: methods/muva.md sections 3.2 (attention rule), 3.3 (residual mask predictor), 3.4 (gating). What we changed: the
additive attention term is [n, 1, S, S] and broadcast over heads inside fused attention; the original repeats it per
head and asks for the attention weights, which forbids the fused kernels. Logits accumulate in float32 at least.

Shapes: n rows, R parts, L patches, S = 1 + R + L tokens, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reid_dist.models.clip_blocks import QuickGelu, WideLayerNorm


class PartCrossAttention(nn.Module):
    """Multi-head attention from part tokens to patches; query, key and value without bias, output with one."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"mask_heads={heads} does not divide the tower's width {width}")
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, part: Tensor, patch: Tensor) -> Tensor:
        """part [n, R, W], patch [n, L, W] -> [n, R, W]."""
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, part), (self.key, patch), (self.value, patch))
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out


class PartMaskBlock(nn.Module):
    """One layer's predictor: u = MLP(LN(attention(part, patch) + part)), one logit per patch; z = z_before + u."""

    def __init__(self, width: int, patches: int, heads: int, *, layer_norm: bool = True, shortcut: bool = True) -> None:
        """`layer_norm` and `shortcut` are on in every published setting; off only in some golden cases."""
        super().__init__()
        self.ln_part = WideLayerNorm(width) if layer_norm else nn.Identity()
        self.ln_patch = WideLayerNorm(width) if layer_norm else nn.Identity()
        self.attn = PartCrossAttention(width, heads)
        self.shortcut = shortcut
        self.ln_mlp = WideLayerNorm(width) if layer_norm else nn.Identity()
        self.fc1 = nn.Linear(width, patches)
        self.act = QuickGelu()
        self.fc2 = nn.Linear(patches, patches)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal 0.02 for attention and MLP, zero MLP biases; the attention's output bias stays uniform."""
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and "ln_" not in name:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name in ("fc1.bias", "fc2.bias"):
                nn.init.zeros_(parameter)

    def forward(self, part: Tensor, patch: Tensor, before: Tensor | None = None) -> Tensor:
        """Un-normalised tokens part [n, R, W] and patch [n, L, W] of a layer, logits before it -> logits [n, R, L]."""
        seen = self.attn(self.ln_part(part), self.ln_patch(patch))
        if self.shortcut:
            seen = seen + part
        logit: Tensor = self.fc2(self.act(self.fc1(self.ln_mlp(seen))))
        logit = logit.to(torch.promote_types(logit.dtype, torch.float32))
        return logit if before is None else before + logit


def gate(probability: Tensor, kind: str, threshold: float = 0.5, scale: float = 1.0) -> Tensor:
    """Visibility [n, R, L] -> additive attention term.

    "offline": 0 strictly above the threshold, else -inf, no gradient. "online": scale * (2 p - 1).
    """
    if kind == "online":
        return scale * (2 * probability - 1)
    return additive(probability.detach() > threshold)


def additive(visible: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """bool [...] -> 0 where True, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def part_attention_bias(part_mask: Tensor) -> Tensor:
    """Additive part mask [n, R, L] -> additive attention term [n, 1, S, S], the same for all heads.

    Class token and everything: free. Part and its own patches, both ways: the mask. Part and other part: blocked.
    Patch and patch: free. Every row sees the class token, so an empty part never gives NaN.
    """
    n, parts, patches = part_mask.shape
    others = part_mask.new_full((parts, parts), float("-inf")).fill_diagonal_(0).expand(n, -1, -1)
    first = part_mask.new_zeros(n, 1, 1 + parts + patches)
    of_parts = torch.cat([part_mask.new_zeros(n, parts, 1), others, part_mask], dim=2)
    free = part_mask.new_zeros(n, patches, 1), part_mask.new_zeros(n, patches, patches)
    of_patches = torch.cat([free[0], part_mask.transpose(1, 2), free[1]], dim=2)
    return torch.cat([first, of_parts, of_patches], dim=1)[:, None]
