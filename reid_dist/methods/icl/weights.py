"""Published weights -> ours: released ICL and RDE checkpoints, and towers pre-trained for re-identification.

Released names: `base_model.*` is CLIP under OpenAI's names, `visul_emb_layer.*` and `texual_emb_layer.*` (so spelt in the files)
are the token-selection heads, in which one linear layer of the image side and the second batch norm of both are never used.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from reid_dist.methods.icl.config import Config
from reid_dist.models.adopt import adopt
from reid_dist.models.clip import ClipTowers, resize_position_table, resize_text_positions
from reid_dist.models.clip_weights import load_clip, our_name
from reid_dist.models.published import read_published

logger = logging.getLogger(__name__)

CLIP_LENGTH = 77  # text positions of CLIP's own weights
POSITION_SPREAD = 0.01  # of text positions that start at random, as CLIP's own did
_MLP = {"mlp.layers.0.": "hidden.", "mlp.layers.1.": "out.", "mlp.bns.0.": "norm."}
_HEADS = {
    "visul_emb_layer.": ("image_selection.", {"fc.": "skip.", **_MLP}),
    "texual_emb_layer.": ("text_selection.", {"linear.": "skip.", **_MLP}),
}


def our_parameter(name: str) -> str | None:
    """A released name -> ours; None for what we leave out."""
    if name.startswith("base_model."):
        clip = our_name(name.removeprefix("base_model."))
        return None if clip is None else f"towers.{clip}"
    for theirs, (head, parts) in _HEADS.items():
        for part, ours in parts.items():
            if name.startswith(theirs + part):
                return head + ours + name.removeprefix(theirs + part)
    return None


def _renamed(state: Mapping[str, Tensor], rename: Mapping[str, str | None]) -> tuple[dict[str, Tensor], list[str]]:
    found = {ours: state[theirs] for theirs, ours in rename.items() if ours is not None}
    return found, [theirs for theirs, ours in rename.items() if ours is None]


def import_weights(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A released ICL or RDE checkpoint -> {our name: tensor} for `model`. Raises UserError under 95 % of our parameters."""
    plain = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return adopt(model, *_renamed(plain, {name: our_parameter(name) for name in plain}))


def load_pretrained(towers: ClipTowers, source: str, interpolate: bool) -> None:
    """Fill the towers with weights pre-trained for re-identification: OpenAI's names, with or without `module.`, `base_model.`.

    Text positions of another length are interpolated, or left as they are. Raises UserError under 95 % of the towers.
    """
    state = {name.removeprefix("base_model."): tensor for name, tensor in read_published(source).items()}
    ours, unused = _renamed(state, {name: our_name(name) for name in state})
    table, positions, own = "image.embed.positions", "text.embed.positions", towers.state_dict()
    if table in ours and ours[table].shape != own[table].shape:
        ours[table] = resize_position_table(ours[table], towers.arch.grid)
    if positions in ours and ours[positions].shape != own[positions].shape:
        given = ours.pop(positions)
        if interpolate:
            ours[positions] = resize_text_positions(given, own[positions].shape[0])
    towers.load_state_dict(adopt(towers, ours, unused), strict=False)
    logger.info("towers start from %s", source)


def start(model: nn.Module, config: Config) -> None:
    """Published start weights where the config names some. Raises UserError."""
    towers = model.towers
    assert isinstance(towers, ClipTowers)
    if config.weights:
        load_clip(towers, config.weights)
    positions = towers.text.embed.positions
    if config.weights and config.text_positions == "random" and len(positions) != CLIP_LENGTH:
        nn.init.normal_(positions, std=POSITION_SPREAD, generator=torch.Generator().manual_seed(len(positions)))
    if config.pretrained:
        load_pretrained(towers, config.pretrained, config.text_positions == "interpolate")
