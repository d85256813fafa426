"""Golden parameter names -> ours, for the tests of CLIP towers and CoMoE."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

TOWERS = {
    "visual_patch_weight": "image.embed.patches.weight",
    "visual_cls": "image.embed.class_token",
    "visual_pos": "image.embed.positions",
    "visual_proj": "image.project.weight",
    "text_token": "text.embed.tokens.weight",
    "text_pos": "text.embed.positions",
    "text_proj": "text.project.weight",
    "text_ln_final_weight": "text.ln_final.weight",
    "text_ln_final_bias": "text.ln_final.bias",
    **{f"visual_{ln}_{kind}": f"image.{ln}.{kind}" for ln in ("ln_pre", "ln_post") for kind in ("weight", "bias")},
}
STACKS = {
    "visual": "image.blocks",
    "text": "text.blocks",
    "head": "heads.shared.blocks",
    "head_image": "heads.image.blocks",
    "head_text": "heads.text.blocks",
    "": "blocks",
}
BLOCK = [
    (r"attn_in_(weight|bias)", r"attn.qkv_\1"),
    (r"attn_out_(weight|bias)", r"attn.out.\1"),
    (r"mlp_(fc|proj)_(weight|bias)", r"mlp.\1.\2"),
    (r"(ln\d)_(weight|bias)", r"\1.\2"),
    (r"aux_vector", r"aux_vector"),
    (r"mix", r"moe.router.mix"),
    (r"(gate_\w+)", r"moe.router.\1.weight"),
    (r"expert_(\w+)", r"moe.experts.\1"),
]


def inside(name: str) -> str:
    """A name inside a block."""
    for pattern, ours in BLOCK:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    raise KeyError(name)


def ours(name: str, towers: str = "towers.") -> str:
    """A golden name without its w_, grad_w_ or step_w_ -> the parameter of CoMoE (or of ClipTowers with towers='')."""
    if name in TOWERS:
        return towers + TOWERS[name]
    stack, index, rest = re.fullmatch(r"(?:(\w+?)_)?block(\d+)_(.+)", name).groups()  # type: ignore[union-attr]
    prefix = towers if stack in ("visual", "text") else ""
    return f"{prefix}{STACKS[stack or '']}.{index}.{inside(rest)}"


def tensors(case: dict[str, Any], kind: str, rename: Any = ours) -> dict[str, Tensor]:
    """{our name: float32 tensor} of all arrays whose key starts with `kind` (w_, grad_w_, step_w_)."""
    found = {rename(k.removeprefix(kind)): torch.as_tensor(v).float() for k, v in case.items() if k.startswith(kind)}
    return {name: tensor.reshape(1) if tensor.dim() == 0 else tensor for name, tensor in found.items()}


def fill(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Load all of `weights`, which must be all parameters of `module`, and switch to evaluation."""
    module.load_state_dict(weights)
    return module.eval()
