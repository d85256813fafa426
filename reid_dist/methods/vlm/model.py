"""A multimodal language model with a low-rank adapter: the library's model, peft's adapter, our row-wise answer loss.

LoRA (Hu et al. 2022) on every linear map of the language model's layers; the vision tower and everything else stay frozen.
Checkpoints hold the adapter alone, since `build` reads the base again.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from reid_dist.errors import UserError
from reid_dist.methods.vlm.chat import NOTHING
from reid_dist.methods.vlm.config import Config
from reid_dist.models.mllm_folder import content_digest, local_folder

TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


class TunedMllm(nn.Module):
    """`peft`: the base with its adapter."""

    frozen_is_rebuilt = True  # checkpoints hold what is trained (training/checkpoint.py)

    def __init__(self, base: nn.Module, config: Config, verdicts: tuple[int, int]) -> None:
        """`verdicts`: first tokens of the two answers."""
        super().__init__()
        from peft import LoraConfig, get_peft_model

        self.both, self._checkpointing = sum(verdicts), False
        lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=TARGETS, lora_dropout=0.0)
        self.peft = get_peft_model(base, lora)

    @property
    def base(self) -> Any:
        """The library's model, with adapted layers in it."""
        return self.peft.base_model.model

    @property
    def activation_checkpointing(self) -> bool:
        return self._checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        self._checkpointing = on
        if on:
            self.base.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.base.gradient_checkpointing_disable()

    def forward(self, ids: Tensor, labels: Tensor, length: Tensor, pixels: Tensor, grid: Tensor) -> dict[str, Tensor]:
        """Per row (Chat.batch's fields): "nll" [n], summed cross-entropy of the answer's tokens, "count" [n], how many,
        and "right" [n], 1 where the right one of the two answers is the likelier.
        """
        rows = len(ids)
        if (
            rows == 0
        ):  # a rank without rows runs the same modules, so that sharded weights are gathered alike everywhere
            ids, labels, length, pixels, grid = self._spare(pixels)
        image = self.base.config.image_token_id
        places = torch.arange(pixels.shape[1], device=pixels.device)
        patches = pixels[places[None] < grid.prod(dim=1)[:, None]]
        mask = torch.arange(ids.shape[1], device=ids.device)[None] < length[:, None]
        hidden = self.base.model(
            input_ids=ids, attention_mask=mask.long(), pixel_values=patches, image_grid_thw=grid,
            mm_token_type_ids=(ids == image).int(), use_cache=False,
        ).last_hidden_state  # fmt: skip
        wanted = labels != NOTHING
        logits = self.base.lm_head(hidden[wanted]).float()
        each = functional.cross_entropy(logits, labels[wanted], reduction="none")
        owner = torch.nonzero(wanted)[:, 0]
        count = wanted.sum(dim=1)
        nll = torch.zeros(len(ids), device=each.device).index_add(0, owner, each)
        first = count.cumsum(0) - count  # of each row's answer
        said = labels[wanted][first, None]
        right = logits[first].gather(1, said) > logits[first].gather(1, self.both - said)
        return {"nll": nll[:rows], "count": count[:rows], "right": right[:rows, 0].float()}

    def _spare(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """One row that asks about a picture of one token; its results are cut off."""
        config = self.base.config
        merge = config.vision_config.spatial_merge_size
        device = pixels.device
        ids = torch.tensor([[config.image_token_id, 0]], device=device)
        labels = torch.tensor([[NOTHING, self.both // 2]], device=device)
        picture = torch.zeros(1, merge**2, pixels.shape[2], device=device)
        return ids, labels, torch.tensor([2], device=device), picture, torch.tensor([[1, merge, merge]], device=device)


def base_folder(config: Config) -> Path:
    """The base model on this node. Raises UserError: not there, or of other content than `base_digest` says."""
    folder = local_folder(config.base, config.revision)
    if config.base_digest and content_digest(folder) != config.base_digest:
        raise UserError(
            f"model.base={config.base} has other content on node {socket.gethostname()} than when the job was started: "
            "give an s3:// prefix or a revision, which are the same everywhere"
        )
    return folder


def load_base(folder: Path, dtype: str) -> nn.Module:
    """The library's model of a folder. Raises UserError."""
    from transformers import AutoModelForImageTextToText

    try:
        model: nn.Module = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    return model
