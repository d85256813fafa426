"""Released CoMoE checkpoints: their names -> ours.

Known names come from the golden vectors' parameter lists: `base_model.*` is CLIP under OpenAI's names,
`STransformer.resblocks.N` the head, in it `comb_param` (auxiliary vector) and `feed_forward.{alpha, experts.E.*}`.
The names of the three gates and of the experts' norms are not recorded; they are recognised by what such names
contain, and a gate that cannot be told apart is left out and listed as missing, never guessed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from reid_dist.models.adopt import adopt
from reid_dist.models.clip_weights import block_name, our_name

_GATES = {
    "gate_image": re.compile(r"im(g|age)|vis"),
    "gate_text": re.compile(r"te?xt"),
    "gate_aux": re.compile(r"aux|comb|common|shared|prompt"),
}
_HEAD = re.compile(r"STransformer\.resblocks\.(\d+)\.(.+)")
_EXPERT = re.compile(r"feed_forward\.experts\.(\d+)\.(.+)\.(weight|bias)")


def rename(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Their tensors -> ({our name: tensor}, names of theirs without a counterpart). Experts are stacked on axis 0."""
    ours: dict[str, Tensor] = {}
    unused: list[str] = []
    experts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        head = _HEAD.fullmatch(name)
        clip = our_name(name.removeprefix("base_model.")) if name.startswith("base_model.") else None
        if clip is not None:
            ours[f"towers.{clip}"] = tensor
        elif name.startswith("classifier."):
            ours[name] = tensor
        elif head and (expert := _EXPERT.fullmatch(head[2])) and (part := _expert_part(expert[2])):
            experts[f"heads.shared.blocks.{head[1]}.moe.experts.{part}_{expert[3]}"][int(expert[1])] = tensor
        elif head and (inside := _head_part(head[2])):
            ours[f"heads.shared.blocks.{head[1]}.{inside}"] = tensor
        else:
            unused.append(name)
    for name, parts in experts.items():
        ours[name] = torch.stack([parts[index] for index in sorted(parts)])
    return ours, unused


def _expert_part(name: str) -> str | None:
    if name.startswith(("down", "up")):
        return "down" if name.startswith("down") else "up"
    return "ln" if "norm" in name or name.startswith("ln") else None


def _head_part(name: str) -> str | None:
    if name == "comb_param":
        return "aux_vector"
    if not name.startswith("feed_forward."):
        return block_name(name).replace("ln_3", "ln3")
    inside = name.removeprefix("feed_forward.")
    if inside == "alpha":
        return "moe.router.mix"
    kinds = [ours for ours, pattern in _GATES.items() if pattern.search(inside.lower())]
    return f"moe.router.{kinds[0]}.weight" if len(kinds) == 1 and inside.endswith("weight") else None


def import_weights(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Released state -> {our name: tensor} for `model`. Raises UserError under 95 % of our parameters."""
    return adopt(model, *rename(state))
