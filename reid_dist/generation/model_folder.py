"""The folder of a model and of an adapter: found, checked and named by content before any engine starts."""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reid_dist.errors import UserError
from reid_dist.generation.ledger import digest
from reid_dist.models.mllm_folder import content_digest, local_folder, read_config
from reid_dist.storage.base import file_sha256

TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A local model folder. `digest`: of the content that answers depend on."""

    path: str
    digest: str
    prompts: str  # the prompt family that fits
    context: int = 1 << 20  # most tokens that it reads


def find_model(name: str, revision: str = "", expected: str = "") -> ModelFolder:
    """The model `small` (built in), a folder, an s3:// prefix, or a name on the Hugging Face hub (with `revision`).

    `expected`: the digest that it must have (of the model that the driver found). Raises UserError: nothing there, no
    tokenizer, no weights, a kind of model that is not served, another content than expected.
    """
    folder = local_folder(name, revision)
    config = read_config(folder, name)
    if not any((folder / file).exists() for file in TOKENIZERS):
        raise UserError(
            f"{name}: there is no tokenizer ({', '.join(TOKENIZERS)}): copy the base model's files beside it"
        )
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{name}: there are no weights (*.safetensors)")
    content = content_digest(folder)
    if expected and content != expected:
        raise UserError(
            f"{name} has other content on node {socket.gethostname()} ({content[:12]}) than where the job was started "
            f"({expected[:12]}): give an s3:// prefix or a revision, which are the same everywhere"
        )
    positions = config.get("text_config", config).get("max_position_embeddings")
    context = {"context": int(positions)} if positions else {}
    return ModelFolder(str(folder), content, _family(config, folder, name), **context)


def _family(config: dict[str, Any], folder: Path, name: str) -> str:
    kind = str(config.get("model_type"))
    if kind == "qwen2_vl" and (folder / "recipe.json").exists():
        return "tiny"
    families = {"qwen2_vl": "qwen2-vl", "qwen2_5_vl": "qwen2.5-vl", "qwen3_vl": "qwen3-vl", "qwen3_vl_moe": "qwen3-vl"}
    if kind not in families:
        raise UserError(f"{name}: model type {kind!r} is not served here; known: {', '.join(families)}")
    return families[kind]


def adapter_digest(adapter: str, model: ModelFolder) -> str:
    """Content digest of a LoRA folder, after checking that it fits the model: the base that it was tuned on, where it says
    so (`jobs.finetune_vlm` writes it down), and for every pair of matrices a target of its widths.

    Raises UserError: no adapter there, or one for another base.
    """
    folder = Path(adapter)
    files = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    missing = [path.name for path in files if not path.exists()]
    if missing:
        raise UserError(f"adapter={adapter}: {' and '.join(missing)} missing: give a folder that peft wrote")
    if (folder / "tuning.json").exists():
        tuned_on = str(json.loads((folder / "tuning.json").read_text())["base_digest"])
        if tuned_on != model.digest:
            raise UserError(
                f"adapter={adapter} was tuned on another base model (content {tuned_on[:12]}) than {model.path} "
                f"({model.digest[:12]})"
            )
    base: dict[str, list[int]] = {}
    for path in sorted(Path(model.path).glob("*.safetensors")):
        base |= tensor_shapes(path)
    targets = {_tail(name.removesuffix(".weight")): shape for name, shape in base.items() if name.endswith(".weight")}
    shapes = tensor_shapes(files[1])
    for name, shape in shapes.items():
        end = next((e for e in (".lora_A.weight", ".lora_B.weight") if name.endswith(e)), None)
        if end is None:
            continue
        target = targets.get(_tail(name.removesuffix(end).removeprefix("base_model.model.")))
        fits = target is not None and (shape[1] == target[1] if end == ".lora_A.weight" else shape[0] == target[0])
        if not fits:
            raise UserError(
                f"adapter={adapter}: {name} {shape} has no place in {model.path}"
                + (f" (there: {target})" if target else "")
                + ": the adapter was tuned on another base model"
            )
    return digest([[path.name, file_sha256(path)] for path in files])


def adapter_rank(adapter: str) -> int:
    """The least rank that vLLM can be told to make room for and that holds the adapter's. Raises UserError."""
    try:
        rank = int(json.loads((Path(adapter) / "adapter_config.json").read_text())["r"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"adapter={adapter}: adapter_config.json does not say its rank (r)") from None
    room = next((one for one in RANKS if one >= rank), 0)
    if not room:
        raise UserError(f"adapter={adapter}: rank {rank}; vLLM serves up to {RANKS[-1]}: merge it into the base model")
    return room


def _tail(name: str) -> str:
    """A module's name from its layer on: libraries disagree about the prefix."""
    parts = name.split(".")
    start = next((i for i, part in enumerate(parts) if part in ("layers", "blocks", "merger", "lm_head")), 0)
    tower = "visual" if "visual" in parts else ""
    return ".".join([tower, *parts[start:]])


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes of the tensors of a safetensors file, from its header. Raises UserError when it is none."""
    try:
        with path.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
    except (struct.error, ValueError, MemoryError, OverflowError):
        raise UserError(f"{path} is not a safetensors file") from None
    return {name: list(facts["shape"]) for name, facts in header.items() if name != "__metadata__"}
