"""CLIP weights by OpenAI's parameter names: from open_clip by tag, from a local file, from s3://.

The square position grid is resized bilinearly without antialias, as the methods' authors did (open_clip itself would
do it bicubically with antialias), and text positions linearly. A file is read with `weights_only=True` or as
safetensors.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from torch import Tensor

from reid_dist.errors import UserError
from reid_dist.models.clip import ClipTowers, resize_position_table, resize_text_positions
from reid_dist.models.published import read_published

logger = logging.getLogger(__name__)

OPEN_CLIP_MODEL = "ViT-B-16-quickgelu"  # the plain ViT-B-16 with openai weights only warns and keeps the wrong GELU
OPEN_CLIP_TAGS = ("openai",)

_BLOCK = {
    "ln_1": "ln1",
    "ln_2": "ln2",
    "attn.in_proj_": "attn.qkv_",
    "attn.out_proj": "attn.out",
    "mlp.c_fc": "mlp.fc",
    "mlp.c_proj": "mlp.proj",
}
_PLAIN = {
    "visual.class_embedding": "image.embed.class_token",
    "visual.positional_embedding": "image.embed.positions",
    "visual.conv1.weight": "image.embed.patches.weight",
    "visual.ln_pre.weight": "image.ln_pre.weight",
    "visual.ln_pre.bias": "image.ln_pre.bias",
    "visual.ln_post.weight": "image.ln_post.weight",
    "visual.ln_post.bias": "image.ln_post.bias",
    "visual.proj": "image.project.weight",
    "token_embedding.weight": "text.embed.tokens.weight",
    "positional_embedding": "text.embed.positions",
    "ln_final.weight": "text.ln_final.weight",
    "ln_final.bias": "text.ln_final.bias",
    "text_projection": "text.project.weight",
}


def block_name(name: str) -> str:
    """A parameter name inside OpenAI's residual block -> ours."""
    for theirs, ours in _BLOCK.items():
        name = name.replace(theirs, ours)
    return name


def our_name(name: str) -> str | None:
    """OpenAI's parameter name -> that of `ClipTowers`; None for what we leave out (logit_scale, sizes)."""
    if name in _PLAIN:
        return _PLAIN[name]
    inside = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name)
    if inside:
        tower = "image" if inside[1] else "text"
        return f"{tower}.blocks.{inside[2]}.{block_name(inside[3])}"
    return None


def fit(towers: ClipTowers, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI-named tensors -> a complete state for `towers`, position tables resized, in the towers' types.

    Raises UserError naming missing parameters or a shape that does not fit.
    """
    ours = {name: tensor for theirs, tensor in state.items() if (name := our_name(theirs)) is not None}
    expected = towers.state_dict()
    missing = sorted(set(expected) - set(ours))
    if missing:
        raise UserError(
            f"CLIP weights lack {len(missing)} of {len(expected)} parameters, first {missing[0]}: another model?"
        )
    table, positions = "image.embed.positions", "text.embed.positions"
    if ours[table].shape[0] != expected[table].shape[0] or towers.arch.grid[0] != towers.arch.grid[1]:
        ours[table] = resize_position_table(ours[table], towers.arch.grid)
    if ours[positions].shape[0] != expected[positions].shape[0]:
        ours[positions] = resize_text_positions(ours[positions], expected[positions].shape[0])
    for name, tensor in expected.items():
        if ours[name].shape != tensor.shape:
            raise UserError(f"CLIP weights: {name} is {tuple(ours[name].shape)}, the model has {tuple(tensor.shape)}")
    return {name: ours[name].to(tensor.dtype) for name, tensor in expected.items()}


def load_clip(towers: ClipTowers, source: str) -> None:
    """Fill `towers` from `source`: an open_clip tag ("openai"), a local path or s3://. Raises UserError."""
    if source in OPEN_CLIP_TAGS:
        import open_clip

        state = open_clip.create_model(OPEN_CLIP_MODEL, pretrained=source).state_dict()
    else:
        state = read_published(source)
    towers.load_state_dict(fit(towers, state))
    logger.info("CLIP weights loaded from %s", source)
