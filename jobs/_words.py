"""The words of `jobs.evaluate`: flags that take a value, and options typed as recipes are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from jobs._trials import TrialOptions
from reid_dist.config import apply_overrides, typed
from reid_dist.errors import UserError
from reid_dist.evaluation.pipeline import Expansion, Options, Rerank
from reid_dist.evaluation.similarity import EvaluationError

STEPS = ("rerank", "expansion")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What both kinds of scoring take."""

    protocol: str = ""
    rerank: Rerank | None = None
    expansion: Expansion | None = None
    memory_mb: float | None = None  # MiB for one block of scores; None: the recipe's evaluation.memory_mb, or 256
    shards: int = 0  # Ray tasks; 0: in this process
    store: str = ""  # where shards read features from, a place that every node reaches
    permutations: str = ""  # SYSU-MM01's rand_perm_cam.mat, instead of the seeded draws
    allow_constant: bool = False  # score features that are all the same

    def __post_init__(self) -> None:
        if self.shards < 0:
            raise ValueError(f"shards={self.shards}: a number of Ray tasks, or 0 for none")
        if self.memory_mb is not None and self.memory_mb <= 0:
            raise ValueError(f"memory_mb={self.memory_mb}: expected more than 0")


@dataclass(frozen=True, kw_only=True)
class RunOptions(ScoreOptions, TrialOptions):
    """Scoring a run."""

    checkpoint: str = "best"
    trial: int | None = None  # one train/test division of a set that has several


@dataclass(frozen=True, kw_only=True)
class FileOptions(ScoreOptions):
    """Scoring a feature file."""

    metric: Literal["cosine", "dot", "euclidean"] = "cosine"


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Searching a feature file."""

    top: int = 10
    out: str = "search.html"
    images: str = ""  # folder or s3:// prefix that the path column is relative to
    table: str = ""  # or a packed table with those paths, below root
    root: str = "data"
    run: str = ""  # encodes queries that are not in the file
    checkpoint: str = "best"
    modality: Literal["rgb", "ir"] = "rgb"  # of an image that the run encodes
    metric: Literal["cosine", "dot", "euclidean"] = "cosine"

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"top={self.top}: at least one item must be asked for")
        if self.images and self.table:
            raise ValueError("images= and table= both say where pictures lie: give one")


def take_valued(argv: list[str], names: tuple[str, ...]) -> tuple[dict[str, list[str]], list[str]]:
    """Take `--name VALUE` and `--name=VALUE` out of the words; a name may come several times. Raises UserError."""
    taken: dict[str, list[str]] = {}
    rest, words = [], iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in names:
            rest.append(word)
            continue
        following = value if equals else next(words, None)
        if not following:
            raise UserError(f"--{name} needs a value: --{name} VALUE")
        taken.setdefault(name, []).append(following)
    return taken, rest


def split_options(cls: type, values: list[str], rest_allowed: bool) -> tuple[Any, list[str]]:
    """(options of dataclass `cls`, the other key=value words). `rerank=true` means its defaults. Raises RecipeError."""
    known = {field.name for field in dataclasses.fields(cls)}
    own = [word for word in values if not rest_allowed or word.split("=")[0].split(".")[0] in known]
    rest = [word for word in values if word not in own]
    switched = [word for word in own if word in [f"{step}=true" for step in STEPS]]
    tree = apply_overrides({word.split("=")[0]: {} for word in switched}, [w for w in own if w not in switched])
    return typed(cls, tree, ""), rest


def pipeline_options(options: ScoreOptions, memory_mb: float) -> Options:
    """The evaluator's options. Raises UserError."""
    try:
        return Options(
            metric=getattr(options, "metric", "cosine"),
            rerank=options.rerank,
            expansion=options.expansion,
            memory_mb=options.memory_mb or memory_mb,
        )
    except EvaluationError as error:
        raise UserError(str(error)) from None
