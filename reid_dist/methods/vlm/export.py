"""What tuning leaves behind: the adapter in peft's form, and a model folder with the adapter merged in, ready to be served.

Both carry `tuning.json`: which base (by content), which questions, which run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reid_dist.methods.vlm.model import TunedMllm

WEIGHTS = (".safetensors", ".bin", ".pth")


def save_adapter(model: TunedMllm, folder: Path, base: str, facts: Mapping[str, Any]) -> None:
    """adapter_config.json (naming `base`), adapter_model.safetensors, tuning.json."""
    for config in model.peft.peft_config.values():
        config.base_model_name_or_path = base  # not the place where this node keeps it
    model.peft.save_pretrained(str(folder), save_embedding_layers=False)  # else peft looks the base up on the hub
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    _save_facts(folder, facts)


def save_merged(model: TunedMllm, base_folder: Path, folder: Path, facts: Mapping[str, Any]) -> None:
    """The base's files with the tuned weights in them. The model is merged in place and of no further use."""
    merged = model.peft.merge_and_unload()
    folder.mkdir(parents=True, exist_ok=True)
    for path in base_folder.iterdir():
        if path.is_file() and path.suffix not in WEIGHTS and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    merged.save_pretrained(folder)
    _save_facts(folder, facts)


def _save_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    (folder / "tuning.json").write_text(json.dumps(facts, indent=1, sort_keys=True, default=str) + "\n")
