"""The folder of a multimodal language model: found by name, and named by its content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from reid_dist.errors import UserError
from reid_dist.storage import is_remote, open_store
from reid_dist.storage.base import file_sha256
from reid_dist.storage.cache import NodeCache

BUILT_IN = "small"  # the project's own small model
SMALL = Path(__file__).resolve().parents[1] / "generation" / "tiny" / "weights"
CONTENT = (".safetensors", ".json", ".jinja", ".txt", ".model")
IGNORED = ("recipe.json", "tuning.json", "manifest.json", "README.md")  # say how a model was made


def local_folder(name: str, revision: str = "") -> Path:
    """The model `small` (built in), a folder, an s3:// prefix, or a name on the Hugging Face hub (with `revision`), as a
    folder of this node. Raises UserError: nothing there.
    """
    if name == BUILT_IN:
        return SMALL
    if is_remote(name):
        return Path(NodeCache().tree(open_store(name)))
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"model={name}: no such folder; give `small`, a folder, an s3:// prefix or OWNER/NAME of the hub"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(
            snapshot_download(name, revision=revision or None, ignore_patterns=["*.bin", "*.pth", "original/*"])
        )
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError) as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"model={name}: neither a folder nor reachable on the hub ({cause})") from None


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """config.json of a model folder. Raises UserError."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{name}: there is no config.json: not a model folder") from None
    except ValueError:
        raise UserError(f"{name}: config.json is not JSON") from None
    return dict(config)


def content_digest(folder: Path) -> str:
    """Digest of the files that answers depend on: weights, configuration, tokenizer, templates."""
    files = sorted(path for path in folder.iterdir() if path.suffix in CONTENT and path.name not in IGNORED)
    named = [[path.name, file_sha256(path)] for path in files]
    text = json.dumps(named, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
