"""CLIP's two towers (Radford et al. 2021) with the geometry of re-identification: tall images, any stride, every
token out.

    grid = (size - patch) // stride + 1 in each direction, no padding
    image: [class, patches] + positions -> LN -> blocks -> LN -> projection      global = token 0
    text:  ids + positions -> causal blocks -> LN -> projection                  global = token at the end-of-text id

Final norm and projection act on all tokens (stock CLIP: on the global one only), because the methods here read
patches and words. The parts (`embed`, `blocks`, `ln_post`, `project`) are modules, so a method can put part tokens,
masks or prompts between them. Weights: models/clip_weights.py.

Shapes: n rows, L tokens, W width, D joint width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reid_dist.errors import UserError
from reid_dist.models.clip_blocks import BlockStack, WideLayerNorm


@dataclass(frozen=True, kw_only=True)
class ClipArchitecture:
    """Sizes of both towers. `vocab_size` counts CLIP's BPE entries that are used (data/text.py)."""

    image_size: tuple[int, int] = (384, 128)  # rows, columns
    patch: int = 16
    stride: int = 16
    image_width: int = 768
    image_layers: int = 12
    image_heads: int = 12
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    vocab_size: int = 49408
    context_length: int = 77
    joint_width: int = 512

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in each direction (rows, columns)."""
        rows, columns = ((size - self.patch) // self.stride + 1 for size in self.image_size)
        return rows, columns


ARCHITECTURES = {
    "ViT-B-16": ClipArchitecture(),
    # For learning from scratch on a laptop. 8192 BPE entries: the whole table would be 70 % of its parameters.
    "tiny": ClipArchitecture(
        image_size=(64, 32),
        patch=8,
        stride=8,
        image_width=128,
        image_layers=3,
        image_heads=4,
        text_width=128,
        text_layers=2,
        text_heads=4,
        vocab_size=8192,
        context_length=64,
        joint_width=128,
    ),
}


def architecture(name: str, **sizes: object) -> ClipArchitecture:
    """The named architecture with some sizes replaced (None keeps the default). Raises UserError."""
    if name not in ARCHITECTURES:
        raise UserError(f"CLIP architecture {name!r}: choose one of {', '.join(ARCHITECTURES)}")
    given = {key: value for key, value in sizes.items() if value is not None}
    arch = dataclasses.replace(ARCHITECTURES[name], **given)  # type: ignore[arg-type]
    if min(arch.image_size) < arch.patch or arch.stride < 1:
        raise UserError(f"image size {arch.image_size} with patch {arch.patch}, stride {arch.stride}: no patch fits")
    return arch


def resize_position_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """[1 + g*g, W] -> [1 + rows*columns, W]: the square grid bilinearly (half-pixel centres, no antialias), class row
    kept.

    Raises UserError if the table's grid is not square.
    """
    side = round((table.shape[0] - 1) ** 0.5)
    if side * side != table.shape[0] - 1:
        raise UserError(f"position table of {table.shape[0]} rows: expected one class row and a square grid")
    square = table[1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([table[:1], resized.flatten(2)[0].T.to(table.dtype)])


def resize_text_positions(table: Tensor, length: int) -> Tensor:
    """[77, W] -> [length, W], linear along the positions (half-pixel centres)."""
    resized = F.interpolate(table.float().T[None], size=length, mode="linear", align_corners=False)
    return resized[0].T.to(table.dtype)


class Projection(nn.Module):
    """x @ weight, weight [W, D]: CLIP stores its projections this way round and without bias."""

    half_weights = True

    def __init__(self, width: int, joint_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, joint_width))
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., D]."""
        return x @ self.weight


class ImageEmbedding(nn.Module):
    """Patches, class token and positions."""

    def __init__(self, arch: ClipArchitecture) -> None:
        super().__init__()
        width, (rows, columns) = arch.image_width, arch.grid
        self.patches = nn.Conv2d(3, width, arch.patch, stride=arch.stride, bias=False)
        self.class_token = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positions = nn.Parameter(width**-0.5 * torch.randn(1 + rows * columns, width))

    def forward(self, image: Tensor, extra: Tensor | None = None) -> Tensor:
        """image [n, 3, h, w] -> [n, 1 + P + L, W], tokens class, extra, patches (row-major).

        `extra` [P, W] are further global tokens; they wear the class token's position. Raises ValueError if the image
        does not fit the position table.
        """
        patches = self.patches(image.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2)
        if patches.shape[1] + 1 != self.positions.shape[0]:
            raise ValueError(f"image {tuple(image.shape)} gives {patches.shape[1]} patches, the table has others")
        head = self.class_token[None] if extra is None else torch.cat([self.class_token[None], extra])
        kind = patches.dtype  # that of the patches' weights; class token and positions may be wider (float16 weights)
        head = (head + self.positions[:1]).to(kind).expand(len(image), -1, -1)
        return torch.cat([head, patches + self.positions[1:].to(kind)], dim=1)


class TextEmbedding(nn.Module):
    """Token table and positions. Captions (ids) have the table's length; prompts (embeddings) may be cut short, because
    behind the last end token nothing matters to a causal tower."""

    def __init__(self, arch: ClipArchitecture) -> None:
        super().__init__()
        self.tokens = nn.Embedding(arch.vocab_size, arch.text_width)
        self.positions = nn.Parameter(0.01 * torch.randn(arch.context_length, arch.text_width))
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Ids [n, L], or embeddings [n, T <= L, W] in their place (prompts), -> [n, L, W]. Raises ValueError."""
        length, prompts = self.positions.shape[0], text.is_floating_point()
        if text.shape[1] != length and not (prompts and text.shape[1] < length):
            raise ValueError(f"text of {text.shape[1]} tokens for a position table of {length}")
        return (text if prompts else self.tokens(text)) + self.positions[: text.shape[1]]


class TowerOutput(NamedTuple):
    """What a tower gives for n rows."""

    tokens: Tensor  # [n, L, W] after the final norm
    projected: Tensor  # [n, L, D]
    weights: Tensor | None  # last block's attention weights, mean over heads: [n, S] of the global token, or the map


class ImageTower(nn.Module):
    """CLIP's vision transformer."""

    def __init__(self, arch: ClipArchitecture) -> None:
        super().__init__()
        self.embed = ImageEmbedding(arch)
        self.ln_pre = WideLayerNorm(arch.image_width)
        self.blocks = BlockStack(arch.image_width, arch.image_heads, arch.image_layers)
        self.ln_post = WideLayerNorm(arch.image_width)
        self.project = Projection(arch.image_width, arch.joint_width)
        self.blocks.reset_parameters()

    def forward(self, image: Tensor, weights: str = "") -> TowerOutput:
        """image [n, 3, h, w]; `weights`: "" | "row" (of the class token) | "map"."""
        return self.finish(self.embed(image), weights)

    def finish(self, embedded: Tensor, weights: str = "", mask: Tensor | None = None) -> TowerOutput:
        """Everything after the embedding [n, L, W]; `mask` additive, broadcastable to [n, H, L, L], for all blocks."""
        asked: str | Tensor = weights
        if weights == "row":
            asked = torch.zeros(len(embedded), dtype=torch.int64, device=embedded.device)
        x, seen = self.blocks(self.ln_pre(embedded), mask, False, asked)
        x = self.ln_post(x)
        return TowerOutput(x, self.project(x), seen)


class TextTower(nn.Module):
    """CLIP's causal text transformer."""

    def __init__(self, arch: ClipArchitecture) -> None:
        super().__init__()
        self.embed = TextEmbedding(arch)
        self.blocks = BlockStack(arch.text_width, arch.text_heads, arch.text_layers)
        self.ln_final = WideLayerNorm(arch.text_width)
        self.project = Projection(arch.text_width, arch.joint_width)
        self.blocks.reset_parameters()

    def forward(self, text: Tensor, weights: str = "", end: Tensor | None = None) -> TowerOutput:
        """Ids [n, L] or embeddings [n, L, W]; `weights`: "" | "row" (of token `end` [n]; None: the ids') | "map"."""
        asked: str | Tensor = weights
        if weights == "row":
            asked = end_of_text(text) if end is None else end
        kind = self.project.weight.dtype  # embeddings may be wider than the weights of the blocks (float16 weights)
        x, seen = self.blocks(self.embed(text).to(kind), None, True, asked)
        x = self.ln_final(x)
        return TowerOutput(x, self.project(x), seen)


def end_of_text(ids: Tensor) -> Tensor:
    """int64 [n]: first position of the largest id (the end token) in each row of ids [n, L]."""
    return ids.argmax(dim=-1)


def take_token(tokens: Tensor, index: Tensor) -> Tensor:
    """[n, L, D], int64 [n] -> [n, D]."""
    return tokens.gather(1, index[:, None, None].expand(-1, 1, tokens.shape[-1]))[:, 0]


class ClipTowers(nn.Module):
    """Both towers. CLIP's own logit scale is left out: every method here brings its temperature."""

    def __init__(self, arch: ClipArchitecture) -> None:
        super().__init__()
        self.arch = arch
        self.image = ImageTower(arch)
        self.text = TextTower(arch)
