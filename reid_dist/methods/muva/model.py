"""MUVA's model: CLIP's image tower with part tokens and predicted part masks, its text tower with learnable prompts,
heads.

Source: methods/muva.md section 3. Sequence of the image tower: [class, R part tokens, L patches]; the part tokens
begin with the class token's position, each in a row of its own. Feature of an image or of an identity's text: 1 + R
projected vectors in the order whole person, head, upper body, legs, flattened to F = (1 + R) E.

Every parameter is read inside the forward of the module that owns it, because ZeRO-3 gathers weights per module call.

Shapes: n rows, R parts, L patches, S = 1 + R + L tokens, W width, E joint width, N identities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reid_dist.errors import UserError
from reid_dist.methods.muva.config import Config
from reid_dist.methods.muva.predictor import PartMaskBlock, additive, gate, part_attention_bias
from reid_dist.methods.muva.prompts import IdentityPrompts, PromptTemplates
from reid_dist.models.batchnorm import BatchNorm1d
from reid_dist.models.clip import ClipArchitecture, ClipTowers, ImageEmbedding, ImageTower, TextTower


def insert_part_positions(table: Tensor, parts: int) -> Tensor:
    """Position table [1 + L, W] -> [1 + R + L, W]: the class row once more for each part."""
    return torch.cat([table[:1].expand(1 + parts, -1), table[1:]])


class PartEmbedding(ImageEmbedding):
    """Patches, class token, part tokens, and a position of its own for each."""

    def __init__(self, arch: ClipArchitecture, parts: int, kind: str) -> None:
        super().__init__(arch)
        self.parts, self.kind, self.grid = parts, kind, arch.grid
        if kind == "patches" and parts and arch.grid[0] % parts:
            raise UserError(
                f"model.part_tokens=patches: {arch.grid[0]} rows of patches cannot be cut into {parts} bands"
            )
        self.positions = nn.Parameter(insert_part_positions(self.positions.detach(), parts).clone())
        if kind == "learned" and parts:
            self.part_tokens = nn.Parameter(torch.empty(parts, arch.image_width))
            nn.init.trunc_normal_(self.part_tokens, std=0.02, a=-2, b=2)

    def forward(self, image: Tensor, extra: Tensor | None = None) -> Tensor:
        """image [n, 3, h, w] -> [n, S, W]. Raises ValueError if the image does not fit the position table."""
        if extra is not None:
            raise ValueError("the part tokens are this module's own")
        patches = self.patches(image.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2)
        if 1 + self.parts + patches.shape[1] != self.positions.shape[0]:
            raise ValueError(f"image {tuple(image.shape)} gives {patches.shape[1]} patches, the table has others")
        first = self.class_token.expand(len(image), 1, -1)
        return torch.cat([first, self._part_tokens(first, patches), patches], dim=1) + self.positions

    def _part_tokens(self, first: Tensor, patches: Tensor) -> Tensor:
        if not self.parts or self.kind == "class":
            return first.expand(-1, self.parts, -1)
        if self.kind == "patches":
            bands = patches.unflatten(1, (self.parts, -1))
            return bands.mean(dim=2)
        return self.part_tokens.expand(len(first), -1, -1)


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """What the image tower gives for n rows."""

    feat: Tensor  # [n, F] before the batch-norm neck
    logits: Tensor | None  # [n, layers, R, L] mask logits; None with given masks or without parts
    attention: Tensor | None = None  # [n, R, L] last layer's weights from part tokens to patches, mean over heads


class PartTower(ImageTower):
    """CLIP's vision transformer with part tokens; before each layer a predictor says which patches a part sees."""

    def __init__(self, arch: ClipArchitecture, config: Config) -> None:
        super().__init__(arch)
        self.config, self.parts = config, len(config.parts)
        rows, columns = arch.grid
        self.embed = PartEmbedding(arch, self.parts, config.part_tokens)
        self.predictors = nn.ModuleList(
            PartMaskBlock(arch.image_width, rows * columns, config.mask_heads)
            for _ in range(arch.image_layers if self.parts else 0)
        )

    def features(self, image: Tensor, visible: Tensor | None = None, attention: bool = False) -> ImageFeatures:
        """image [n, 3, h, w] -> features. `visible` bool [n, R, L]: these masks in all layers, nothing is predicted."""
        x = self.ln_pre(self.embed(image))
        given = None
        if visible is not None and self.parts:
            given = part_attention_bias(additive(visible))
        logits: list[Tensor] = []
        logit: Tensor | None = None
        weights: Tensor | None = None
        for index in range(len(self.blocks)):
            last = attention and index + 1 == len(self.blocks)
            x, logit, weights = self._run(index, x, logit, given, "map" if last else "")
            if logit is not None:
                logits.append(logit)
        top = self.project(self.ln_post(x[:, : 1 + self.parts])).flatten(1)
        if weights is not None:
            weights = weights[:, 1 : 1 + self.parts, 1 + self.parts :]
        wide = top.to(torch.promote_types(top.dtype, torch.float32))
        return ImageFeatures(wide, torch.stack(logits, dim=1) if logits else None, weights)

    def _run(self, index: int, *args: object) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.blocks.activation_checkpointing and torch.is_grad_enabled():
            done: tuple[Tensor, Tensor | None, Tensor | None] = checkpoint(
                self._layer, index, *args, use_reentrant=False, preserve_rng_state=False
            )
            return done
        return self._layer(index, *args)  # type: ignore[arg-type]

    def _layer(
        self, index: int, x: Tensor, before: Tensor | None, given: Tensor | None, weights: str
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One layer: predict, gate, attend -> (tokens, accumulated logits or None, attention weights or None)."""
        bias, logit = given, None
        if given is None and self.parts:
            config, split = self.config, 1 + self.parts
            logit = self.predictors[index](x[:, 1:split], x[:, split:], before)
            shown = (logit / config.mask_temperature).sigmoid()
            bias = part_attention_bias(gate(shown, config.gating, config.threshold, config.gate_scale))
        x, seen = self.blocks[index](x, bias, False, weights)
        return x, logit, seen


class Muva(nn.Module):
    """Both towers, the prompts of the training identities, the neck and the classifier."""

    template_ids: Tensor
    template_end: Tensor

    def __init__(self, arch: ClipArchitecture, config: Config, classes: int, templates: PromptTemplates) -> None:
        super().__init__()
        self.arch, self.config = arch, config
        self.templates = templates
        width = config.grains * arch.joint_width
        self.image = PartTower(arch, config)
        self.text = TextTower(arch)
        self.prompts = IdentityPrompts(classes, config.grains, templates.words, arch.text_width)
        self.neck = BatchNorm1d(width, momentum=config.neck_momentum)
        self.classifier = nn.Linear(width, classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)
        self.register_buffer("template_ids", torch.from_numpy(templates.ids), persistent=False)
        self.register_buffer("template_end", torch.from_numpy(templates.end), persistent=False)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and row of the image."""
        return self.arch.grid

    def text_features(self, labels: Tensor, length: int | None = None) -> Tensor:
        """labels int64 [n] -> [n, F] of these identities' prompts.

        Each distinct label is computed once, on `length` tokens (None: as many as can matter).
        """
        unique, inverse = labels.unique(return_inverse=True)
        return self.encode_prompts(unique, length or self.templates.length)[inverse]

    def encode_prompts(self, labels: Tensor, length: int) -> Tensor:
        """labels int64 [n] -> [n, F], row by row, the first `length` tokens of each prompt."""
        template = self.text.embed.tokens(self.template_ids[:, :length])
        prompts = self.prompts(labels, template, self.templates.start)
        grains = prompts.shape[1]
        x, _ = self.text.blocks(self.text.embed(prompts.flatten(0, 1)), None, True)
        end = self.template_end.repeat(len(labels))
        x = x[torch.arange(len(x), device=x.device), end]
        projected = self.text.project(self.text.ln_final(x)).unflatten(0, (len(labels), grains))
        return projected.flatten(1).to(torch.promote_types(projected.dtype, torch.float32))

    def embed_images(self, image: Tensor, visible: Tensor | None = None) -> Tensor:
        """image [n, 3, h, w] -> the feature that is compared, [n, F]: behind the neck."""
        out: Tensor = self.neck(self.image.features(image, visible).feat)
        return out

    def forward(self, image: Tensor) -> Tensor:
        """As `embed_images` with predicted masks."""
        return self.embed_images(image)

    def take_towers(self, towers: ClipTowers) -> None:
        """Start from CLIP: the part tokens' positions are copies of the class token's."""
        state = {f"image.{name}": value for name, value in towers.image.state_dict().items()}
        state |= {f"text.{name}": value for name, value in towers.text.state_dict().items()}
        state["image.embed.positions"] = insert_part_positions(state["image.embed.positions"], len(self.config.parts))
        missing, unexpected = self.load_state_dict(state, strict=False)
        left = [name for name in missing if name.startswith(("image.", "text."))]
        ours = ("image.predictors", "image.embed.part_tokens")
        if unexpected or [name for name in left if not name.startswith(ours)]:
            raise UserError(f"CLIP weights do not fit MUVA's towers: missing {left[:3]}, unexpected {unexpected[:3]}")
