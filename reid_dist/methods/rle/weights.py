"""Released RLE checkpoints: their names -> ours (methods/rle.md section 3).

A released file stores four complete ResNet-50s, of which one stem each for the modalities and one trunk are used;
the rest (70 M of 97 M weights) is dropped, and how much of what is said. `net` around the tensors is taken off by the
reader.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn

from reid_dist.models.adopt import adopt

logger = logging.getLogger(__name__)

_STEMS = {"visible_module.visible.": "visible_stem.", "thermal_module.thermal.": "infrared_stem."}
_TRUNK = "base_resnet.base."
_HEADS = {"bottleneck": "head.bnneck_", "classifier": "head.classifier_"}


def our_name(name: str) -> str | None:
    """Our name of a released tensor; None for what is never used."""
    for theirs, ours in _STEMS.items():
        rest = name.removeprefix(theirs)
        if rest != name:
            return ours + rest if rest.startswith(("conv1.", "bn1.")) else None
    if name.startswith(_TRUNK):
        rest = name.removeprefix(_TRUNK)
        return f"trunk.{rest}" if rest.startswith("layer") else None
    for theirs, ours in _HEADS.items():
        branch, dot, leaf = name.removeprefix(theirs).partition(".")
        if name.startswith(theirs) and dot and branch in ("1", "2", "3", "g"):
            return f"{ours}{'g' if branch == 'g' else 'p' + branch}.{leaf}"
    return None


def import_weights(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Released state -> {our name: tensor} for `model`. Raises UserError under 95 % of our parameters.

    Classifiers of another number of identities are left at random: they take no part in retrieval.
    """
    own = model.state_dict()
    renamed = {ours: tensor for name, tensor in state.items() if (ours := our_name(name)) is not None}
    for name in [name for name in renamed if "classifier_" in name]:
        if name in own and own[name].shape != renamed[name].shape:
            logger.warning(
                "%s of the file has %d identities, this model %d: left at random",
                name, len(renamed[name]), len(own[name]),
            )  # fmt: skip
            del renamed[name]
    dropped = {name: tensor for name, tensor in state.items() if our_name(name) not in own}
    parts = Counter[str]()
    for name, tensor in dropped.items():
        parts[".".join(name.split(".")[:2])] += tensor.numel()
    largest = ", ".join(f"{part} {count / 1e6:.1f} M" for part, count in parts.most_common(6))
    total = sum(tensor.numel() for tensor in state.values())
    logger.info("dropped %.1f of %.1f M released values: %s", sum(parts.values()) / 1e6, total / 1e6, largest or "none")
    return adopt(model, renamed, dropped)
