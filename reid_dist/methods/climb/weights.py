"""Published weights: CLIP's image tower to start from, and the authors' released checkpoints (methods/climb.md 2.8).

Their names: prefix `module.`; `image_encoder.*` (CLIP's visual names), `bottleneck`, `bottleneck_proj`,
`bottleneck_proj_sp`, `classifier`, `classifier2`, `cv_embed`, `sp_mamba_bi.0` (norm), `sp_mamba_bi.1.*` (mixer),
`norm2_mamba`, `sp_attention.0/.2`. An unused plain mixer and norm of theirs (`sp_mamba_raw.*`, `norm3_mamba.*`, 27
tensors) have no counterpart here and are listed as unused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from reid_dist.methods.climb.head import ReorderMambaHead
from reid_dist.methods.climb.model import arch_of
from reid_dist.models.adopt import adopt
from reid_dist.models.clip import ClipTowers
from reid_dist.models.clip_weights import load_clip, our_name

if TYPE_CHECKING:
    from reid_dist.methods.climb.config import Config

logger = logging.getLogger(__name__)

_PLAIN = {
    "cv_embed": "camera.table",
    "classifier.weight": "classifier.weight",
    "classifier2.weight": "classifier_head.weight",
}
_PARTS = {
    "bottleneck_proj_sp": "neck_head",
    "bottleneck_proj": "neck_projected",
    "bottleneck": "neck",
    "sp_mamba_bi.0": "head.norm_in",
    "norm2_mamba": "head.norm_out",
    "sp_attention.0": "head.pool.hidden",
    "sp_attention.2": "head.pool.score",
}
_MIXER = {
    "conv1d{}.weight": "conv_weight",
    "conv1d{}.bias": "conv_bias",
    "x_proj{}.weight": "x_weight",
    "dt_proj{}.weight": "dt_weight",
    "dt_proj{}.bias": "dt_bias",
    "A{}_log": "A_log",
    "D{}": "D",
}
_BLOCK = re.compile(r"sp_mamba_bi\.1\.(.+)")


def our_mixer_name(name: str) -> str | None:
    """A name inside their bidirectional mixer -> ours; the reversed pass wears the suffix _b."""
    if name in ("in_proj.weight", "out_proj.weight"):
        return name
    for path, suffix in enumerate(("", "_b")):
        for theirs, ours in _MIXER.items():
            if name == theirs.format(suffix):
                return f"paths.{path}.{ours}"
    return None


def our_parameter(name: str) -> str | None:
    """Their parameter or buffer -> ours; None for the tensors that have no counterpart."""
    name = name.removeprefix("module.")
    if name in _PLAIN:
        return _PLAIN[name]
    if name.startswith("image_encoder."):
        clip = our_name("visual." + name.removeprefix("image_encoder."))
        return clip.replace("image.", "tower.", 1) if clip else None
    if block := _BLOCK.fullmatch(name):
        inside = our_mixer_name(block[1])
        return f"head.mixer.{inside}" if inside else None
    part, _, leaf = name.rpartition(".")
    return f"{_PARTS[part]}.{leaf}" if part in _PARTS else None


def import_weights(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Released state -> {our name: tensor} for `model`. Raises UserError under 95 % of our parameters.

    Classifiers of another number of identities are left out: evaluation needs none, and new data brings its own. For a
    video model (whose scales are ours) each scale starts from the released head.
    """
    ours: dict[str, Tensor] = {}
    unused: list[str] = []
    expected = model.state_dict()
    scales = len(model.head.scales) if not isinstance(model.head, ReorderMambaHead) else 0
    for theirs, tensor in state.items():
        name = our_parameter(theirs)
        if name is None:
            unused.append(theirs)
        elif name.startswith("classifier") and name in expected and expected[name].shape != tensor.shape:
            logger.info("%s is for %d identities, the model has %d: left out", theirs, len(tensor), len(expected[name]))
            unused.append(theirs)
        elif scales and name.startswith("head."):
            ours |= {name.replace("head.", f"head.scales.{i}.", 1): tensor for i in range(scales)}
        else:
            ours[name] = tensor
    return adopt(model, ours, unused)


def start(model: nn.Module, config: Any) -> None:
    """Fill the image tower with published CLIP weights where the config names some; the text tower is dropped."""
    settings: Config = config
    if settings.weights:
        towers = ClipTowers(arch_of(settings))
        load_clip(towers, settings.weights)
        model.tower.load_state_dict(towers.image.state_dict())
