"""A LoRA adapter for the small model, of random matrices: large enough to change what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from reid_dist.models.mllm_folder import SMALL, read_config

RANK = 4


def write_adapter(folder: Path, scale: float = 0.3, width: int = 0) -> Path:
    """Adapt every query projection. `width`: of another base model's layers; 0: the small model's own."""
    text = read_config(SMALL, "small")["text_config"]
    width = width or int(text["hidden_size"])
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(int(text["num_hidden_layers"])):
        name = f"base_model.model.model.language_model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = rng.normal(0, scale, (RANK, width)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.normal(0, scale, (width, RANK)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4 * RANK, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(facts))
    return folder
