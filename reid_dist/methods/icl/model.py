"""The dual encoder of RDE and ICL: CLIP's towers, and one token-selection head for each (methods/icl.md section 1).

Both embeddings of a modality come from one pass. Attention is fused everywhere; of the last block alone, the one row that
selection reads is computed besides (models/clip_blocks.py). Embeddings leave in float32.

Left out: a linear layer and a batch norm that the released checkpoints hold and never use.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reid_dist.errors import UserError
from reid_dist.methods.icl.config import Config
from reid_dist.methods.icl.selection import SelectedEmbedding, pick_patches, pick_words
from reid_dist.methods.spec import Outputs
from reid_dist.models.clip import ClipArchitecture, ClipTowers, architecture, end_of_text, take_token


def arch_of(config: Config) -> ClipArchitecture:
    """The towers' sizes that a config asks for. Raises UserError when token selection would select nothing."""
    arch = architecture(
        config.arch, image_size=config.image_size, stride=config.stride, context_length=config.text_length
    )
    patches = arch.grid[0] * arch.grid[1]
    if int(config.select_ratio * min(patches, arch.context_length - 2)) < 1:
        raise UserError(
            f"model.select_ratio={config.select_ratio} of {patches} patches or {arch.context_length - 2} words selects no "
            "token: raise it, or model.text_length"
        )
    return arch


def widened(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class DualEncoder(nn.Module):
    """The whole model."""

    def __init__(self, config: Config, arch: ClipArchitecture | None = None) -> None:
        super().__init__()
        self.ratio = config.select_ratio
        self.towers = ClipTowers(arch_of(config) if arch is None else arch)
        width = self.towers.arch.joint_width
        self.image_selection = SelectedEmbedding(width, config.select_width, config.select_norm)
        self.text_selection = SelectedEmbedding(width, config.select_width, config.select_norm)

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """image [n, 3, h, w] -> (global [n, D], selected [n, E], numbers of the selected tokens int64 [n, k])."""
        out = self.towers.image(image, "row")
        assert out.weights is not None
        index = pick_patches(out.weights.detach(), self.ratio)
        return widened(out.projected[:, 0]), widened(self.image_selection(out.projected, index)), index

    def encode_text(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids int64 [n, L] -> (global, selected, numbers of the selected tokens int64 [n, k], how many count int64 [n])."""
        out = self.towers.text(ids, "row")
        assert out.weights is not None
        index, count = pick_words(out.weights.detach(), ids, self.ratio)
        whole = widened(take_token(out.projected, end_of_text(ids)))
        return whole, widened(self.text_selection(out.projected, index, count)), index, count

    def forward(
        self, image: Tensor | None = None, ids: Tensor | None = None, second_ids: Tensor | None = None
    ) -> Outputs:
        """Row-wise embeddings of what is given: `image_global` [n, D], `image_selected` [n, E], likewise `text_*` of `ids` and
        `second_*` of `second_ids`."""
        out: Outputs = {}
        if image is not None:
            out["image_global"], out["image_selected"], _ = self.encode_image(image)
        for name, given in (("text", ids), ("second", second_ids)):
            if given is not None:
                out[f"{name}_global"], out[f"{name}_selected"], _, _ = self.encode_text(given)
        return out
