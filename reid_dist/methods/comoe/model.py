"""CoMoE: CLIP towers, a collaborative head shared by both modalities, fusion by addition.

    f = global + mean over tokens of head(tokens)        image tokens: patches (class token excluded); text: all
    positions

Source: methods/comoe.md section 2. Variants: `unshared` has one whole head per modality, `base` none. The optional
branch for masked words is IRRA's. Features leave in float32; nothing here looks at another row (with the sequence
axis).

Shapes: n rows, L tokens, D joint width, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from reid_dist.losses import masked_lm_nll
from reid_dist.methods.comoe.config import Config
from reid_dist.methods.comoe.moe import CollaborativeHead, HeadOutput, Modality
from reid_dist.methods.spec import Outputs
from reid_dist.models.clip import ClipTowers, architecture, end_of_text, take_token
from reid_dist.models.clip_blocks import Attention, BlockStack, QuickGelu, WideLayerNorm


class Encoded(NamedTuple):
    """One modality of n rows."""

    feat: Tensor  # [n, D] fused, float32
    base: Tensor  # [n, D] CLIP's global feature
    tokens: Tensor  # [n, L, D] all projected tokens of the tower
    head: HeadOutput | None  # None for `base`


class MaskedTokenBranch(nn.Module):
    """IRRA's implicit reasoning: masked words attend to the image, then predict themselves (optional, `mlm`).

    Cross-attention (text queries image, separate pre-norms, no residual) -> blocks -> norm -> dense, quick GELU,
    norm, words. Parameter names keep `cross_` and `mlm_head`, which the learning-rate rules go by.
    """

    def __init__(self, width: int, heads: int, depth: int, vocab_size: int) -> None:
        super().__init__()
        self.ln_text, self.ln_image = WideLayerNorm(width), WideLayerNorm(width)
        self.cross_attn = Attention(width, heads)
        self.cross_blocks = BlockStack(width, heads, depth)
        self.ln_post = WideLayerNorm(width)
        self.mlm_head = nn.Sequential(
            nn.Linear(width, width), QuickGelu(), WideLayerNorm(width), nn.Linear(width, vocab_size)
        )
        self.cross_blocks.reset_parameters()
        nn.init.normal_(self.cross_attn.qkv_weight, std=width**-0.5)
        nn.init.normal_(self.cross_attn.out.weight, std=width**-0.5 * (2 * depth) ** -0.5)
        nn.init.normal_(self.mlm_head[0].weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.mlm_head[3].weight, std=width**-0.5)

    def fuse(self, text: Tensor, image: Tensor) -> Tensor:
        """text [n, L, D], image [n, S, D] -> [n, L, D]."""
        crossed, _ = self.cross_attn(self.ln_text(text), self.ln_image(image))
        return self.ln_post(self.cross_blocks(crossed)[0])

    def forward(self, text: Tensor, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """label int64 [n, L], 0: not asked -> (summed cross-entropy [n], number of asked words [n]), float32.

        Only asked positions reach the word layer: scores of all would be [n, L, vocabulary].
        """
        fused = self.fuse(text, image)
        row, position = (label != 0).nonzero(as_tuple=True)
        nll = masked_lm_nll(self.mlm_head(fused[row, position]).float(), label[row, position])
        per_row = torch.zeros(len(label), dtype=nll.dtype, device=nll.device)
        return per_row.index_add(0, row, nll), (label != 0).sum(dim=1).to(nll.dtype)


def _head(config: Config, width: int, first_salt: int) -> CollaborativeHead:
    return CollaborativeHead(
        width,
        config.head_heads,
        config.head_blocks,
        config.experts,
        config.top_k,
        config.reduction,
        config.dropout,
        config.attention_axis,
        first_salt,
    )


class CoMoE(nn.Module):
    """The whole model. `num_classes` sizes the identity classifier where the recipe asks for the `id` loss."""

    def __init__(self, config: Config, num_classes: int = 0) -> None:
        super().__init__()
        arch = architecture(
            config.arch, image_size=config.image_size, stride=config.stride, context_length=config.text_length
        )
        self.towers = ClipTowers(arch)
        width = arch.joint_width
        kinds = {"shared": ("shared",), "unshared": ("image", "text"), "base": ()}[config.head]
        self.heads = nn.ModuleDict({kind: _head(config, width, i * config.head_blocks) for i, kind in enumerate(kinds)})
        for kind, other in (("image", "gate_text"), ("text", "gate_image")):
            if kind in self.heads:  # an unshared head never sees the other modality: its gate there has no gradient
                for block in self.heads[kind].blocks:
                    getattr(block.moe.router, other).weight.requires_grad_(False)
        self.classifier: nn.Linear | None = None
        self.masked_token: MaskedTokenBranch | None = None
        if "id" in config.losses:
            self.classifier = nn.Linear(width, num_classes)
            nn.init.normal_(self.classifier.weight, std=0.001)
            nn.init.zeros_(self.classifier.bias)
        if "mlm" in config.losses:
            heads = max(1, width // 64)
            self.masked_token = MaskedTokenBranch(width, heads, config.mlm_depth, arch.vocab_size)

    def _fused(self, base: Tensor, tokens: Tensor, body: Tensor, modality: Modality, seeds: Tensor | None) -> Encoded:
        if not self.heads:
            return Encoded(base.float(), base, tokens, None)
        head = self.heads["shared" if "shared" in self.heads else modality](body, modality, seeds)
        return Encoded(base.float() + head.pooled.float(), base, tokens, head)

    def encode_image(self, image: Tensor, seeds: Tensor | None = None) -> Encoded:
        """image [n, 3, h, w]; seeds int64 [n] for dropout in training."""
        tokens = self.towers.image(image).projected
        return self._fused(tokens[:, 0], tokens, tokens[:, 1:], "image", seeds)

    def encode_text(self, ids: Tensor, seeds: Tensor | None = None) -> Encoded:
        """ids int64 [n, text_length]."""
        tokens = self.towers.text(ids).projected
        return self._fused(take_token(tokens, end_of_text(ids)), tokens, tokens, "text", seeds)

    def forward(
        self,
        image: Tensor | None = None,
        ids: Tensor | None = None,
        masked_ids: Tensor | None = None,
        masked_label: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Outputs:
        """Row-wise outputs of what is given: `image_feat`, `text_feat` [n, D]; `*_probability`, `*_chosen`
        [n, blocks, E] of the head; `*_logits` [n, classes]; `masked_nll`, `masked_count` [n]."""
        out: Outputs = {}
        encoded: dict[str, Encoded] = {}
        if image is not None:
            encoded["image"] = self.encode_image(image, seeds)
        if ids is not None:
            encoded["text"] = self.encode_text(ids, seeds)
        for name, side in encoded.items():
            out[f"{name}_feat"] = side.feat
            if side.head is not None:
                out[f"{name}_probability"], out[f"{name}_chosen"] = side.head.probability, side.head.chosen
            if self.classifier is not None:
                out[f"{name}_logits"] = self.classifier(side.feat.to(self.classifier.weight.dtype)).float()
        if self.masked_token is not None and masked_ids is not None and masked_label is not None:
            words = self.towers.text(masked_ids).projected
            nll, count = self.masked_token(words, encoded["image"].tokens, masked_label)
            out["masked_nll"], out["masked_count"] = nll, count
        return out
