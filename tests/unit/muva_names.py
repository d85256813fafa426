"""Golden parameter names -> ours, and models, views and masks for the tests of MUVA."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reid_dist.methods.muva.config import PARTS, Config
from reid_dist.methods.muva.model import Muva
from reid_dist.methods.muva.prompts import PromptTemplates
from reid_dist.models.clip import ClipArchitecture

PLAIN = {
    "part_tokens": "image.embed.part_tokens",
    "img_cls_token": "image.embed.class_token",
    "img_pos_embed": "image.embed.positions",
    "img_proj": "image.project.weight",
    "img_patch_embed_weight": "image.embed.patches.weight",
    "prompt_ctx": "prompts.context",
    "txt_pos_embed": "text.embed.positions",
    "txt_proj": "text.project.weight",
    "classifier_weight": "classifier.weight",
}
RULES = [
    (r"img_norm_(pre|post)_(\w+)", r"image.ln_\1.\2"),
    (r"txt_norm_final_(\w+)", r"text.ln_final.\1"),
    (r"bnneck_(\w+)", r"neck.\1"),
]
BLOCK = [
    (r"attn_qkv_(\w+)", r"attn.qkv_\1"),
    (r"attn_out_(\w+)", r"attn.out.\1"),
    (r"norm(\d)_(\w+)", r"ln\1.\2"),
    (r"mlp_fc1_(\w+)", r"mlp.fc.\1"),
    (r"mlp_fc2_(\w+)", r"mlp.proj.\1"),
]
MASK = [
    (r"attn_q_weight", r"attn.query.weight"),
    (r"attn_k_weight", r"attn.key.weight"),
    (r"attn_v_weight", r"attn.value.weight"),
    (r"attn_out_(\w+)", r"attn.out.\1"),
    (r"norm_(part|patch|mlp)_(\w+)", r"ln_\1.\2"),
    (r"mlp_fc(\d)_(\w+)", r"fc\1.\2"),
]


def by_rules(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, ours in rules:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    raise KeyError(name)


def our_name(name: str) -> str:
    """A golden parameter name (without w_, grad_, out_) -> Muva's."""
    if name in PLAIN:
        return PLAIN[name]
    if match := re.fullmatch(r"(img|txt)_block(\d+)_(\w+)", name):
        return f"{'image' if match[1] == 'img' else 'text'}.blocks.{match[2]}.{by_rules(match[3], BLOCK)}"
    if match := re.fullmatch(r"rmp(\d+)_(\w+)", name):
        return f"image.predictors.{match[1]}.{by_rules(match[2], MASK)}"
    return by_rules(name, RULES)


def tensors(case: Mapping[str, Any], prefix: str = "w_") -> dict[str, Tensor]:
    return {key.removeprefix(prefix): torch.as_tensor(v) for key, v in case.items() if key.startswith(prefix)}


def fill(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Load {our name: tensor}; every name must exist and fit."""
    own = module.state_dict()
    assert set(values) <= set(own), sorted(set(values) - set(own))
    module.load_state_dict({**own, **values})


def layers(case: Mapping[str, Any], tower: str) -> int:
    return len([key for key in case if re.fullmatch(rf"w_{tower}_block\d+_norm1_weight", key)])


def golden_arch(case: Mapping[str, Any], size: tuple[int, int], tokens: int) -> ClipArchitecture:
    """The toy towers of a case; a case with one tower only gets a small other one."""
    image, text = "w_img_proj" in case, "w_txt_proj" in case
    return ClipArchitecture(
        image_size=size, patch=case["w_img_patch_embed_weight"].shape[-1] if image else 16,
        stride=case.get("in_stride", 16), image_width=len(case["w_img_proj"]) if image else 8,
        image_layers=layers(case, "img") if image else 1, image_heads=case["in_heads"] if image else 1,
        text_width=len(case["w_txt_proj"]) if text else 8, text_layers=layers(case, "txt") if text else 1,
        text_heads=case.get("in_text_heads", case["in_heads"]) if text else 1, vocab_size=tokens,
        context_length=len(case["w_txt_pos_embed"]) if text else 77,
        joint_width=(case["w_img_proj"] if image else case["w_txt_proj"]).shape[1],
    )  # fmt: skip


def golden_templates(case: Mapping[str, Any], grains: int) -> PromptTemplates:
    """A case gives embedded templates, so each of its tokens gets an id of its own (see `golden_model`)."""
    if "in_prompt_embedding" not in case:
        return PromptTemplates(np.zeros((grains, 77), np.int64), np.full(grains, 12), 5, 2)
    embedded = case["in_prompt_embedding"]
    ids = np.arange(embedded.shape[0] * embedded.shape[1]).reshape(embedded.shape[:2])
    end = case["in_eos_index"] if "in_eos_index" in case else case["out_eos_index"]
    return PromptTemplates(ids, end, case["in_ctx_start"], case["w_prompt_ctx"].shape[2])


def golden_model(case: Mapping[str, Any], config: Config, classes: int) -> Muva:
    """Muva with a case's weights."""
    templates = golden_templates(case, config.grains)
    arch = golden_arch(case, config.image_size, max(600, templates.ids.size))
    torch.manual_seed(0)
    model = Muva(arch, config, classes, templates)
    values = {our_name(name): value for name, value in tensors(case).items()}
    if config.part_tokens != "learned":
        values.pop("image.embed.part_tokens", None)
    fill(model, values)
    if "in_prompt_embedding" in case:
        table = model.text.embed.tokens.weight.data
        table[: templates.ids.size] = torch.as_tensor(case["in_prompt_embedding"]).flatten(0, 1)
    return model


def parts_of(case: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(PARTS[i] for i in sorted(case["in_part_index"].tolist()))


def pixels(image: np.ndarray) -> Tensor:
    """uint8 [n, 3, h, w] -> normalised as MUVA's images."""
    return (torch.as_tensor(image).float() / 255 - 0.5) / 0.5


class ArrayView:
    """A table view over arrays: images uint8 [N, 3, h, w] or a list of [h, w, 3]."""

    def __init__(self, images: Any, pid: np.ndarray, camid: np.ndarray | None = None, domain: str = "d") -> None:
        self._images = [np.ascontiguousarray(i.transpose(1, 2, 0)) if i.shape[0] == 3 else i for i in images]
        self.pid = np.asarray(pid, dtype=np.int64)
        self.camid = np.zeros(len(self.pid), np.int64) if camid is None else np.asarray(camid)
        self.domain_name = np.full(len(self.pid), domain)
        self.label = np.unique(self.pid, return_inverse=True)[1].astype(np.int64)

    def __len__(self) -> int:
        return len(self._images)

    def images(self, rows: np.ndarray) -> list[np.ndarray]:
        return [self._images[int(row)] for row in rows]

    def path(self, row: int) -> str:
        return f"bounding_box_train/{self.pid[row]:04d}_c{self.camid[row] + 1}_{row}.jpg"

    def digests(self, rows: np.ndarray) -> list[str]:
        return [hashlib.sha256(f"{row}".encode() + self._images[int(row)].tobytes()).hexdigest() for row in rows]
