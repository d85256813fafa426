"""Recipes: a typed, frozen tree read from YAML.

A recipe file may start from another (`extends: FILE`, relative to itself); `key.sub=value` overrides come last. Unknown keys,
wrong types and values outside a field's choices are refused with the field's full name and the nearest valid key. The
resolved tree is saved with every run, and `diff` says in what two trees differ.

The `model:` section is typed by the method (its `Config` dataclass); `build_recipe` asks for that class by the method's name,
so nothing here knows a method.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from reid_dist.errors import UserError


class RecipeError(UserError):
    """A recipe that cannot be used: the message names the field, the value and the remedy."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tables are read and how. A table is `<root>/tables/<name>.lance`, made by `jobs.pack`."""

    root: str = "data"  # folder or s3:// prefix that holds tables/
    train: tuple[str, ...] = ()  # tables whose train split is learned from
    train_splits: tuple[str, ...] = ("train",)  # [train, query, gallery]: all images of the sources ("all" protocols)
    val: tuple[str, ...] = ()  # tables whose val split selects; empty: those of `train`
    test: tuple[str, ...] = ()  # tables that are scored
    trial: int = 0  # which train/test division of sets that have several (RegDB, iLIDS-VID, CUHK03 classic, ...)
    val_fraction: float = 0.0  # share of the training identities held out where a table has no val split
    cache: str = ""  # node-local cache folder; empty: $REID_CACHE, else ~/.cache/reid-dist
    cache_gb: float = 50.0  # the cache evicts its least recently used entries beyond this size
    loader_threads: int = 2  # threads per worker that decode and augment
    prefetch: int = 2  # global batches prepared ahead


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Adam's constants. `decoupled` chooses AdamW's decay; the papers' Adam couples it as L2."""

    lr: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decoupled: bool = False
    name: Literal["adam", "sgd"] = "adam"
    momentum: float = 0.9  # sgd only
    nesterov: bool = False  # sgd only


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning-rate factor over time; formulas in training/schedule.py."""

    mode: Literal["constant", "cosine", "step", "linear", "poly", "exp"] = "cosine"
    unit: Literal["epoch", "step"] = "epoch"  # what the numbers below count
    warmup: int = 0
    warmup_factor: float = 0.1
    warmup_method: Literal["linear", "constant"] = "linear"
    target_lr: float = 0.0
    power: float = 0.9
    milestones: tuple[int, ...] = (20, 50)
    gamma: float = 0.1


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a run is computed. None of these changes the result beyond rounding, except epochs, global_batch and precision."""

    epochs: int = 60
    max_steps: int | None = None  # end after this many optimizer steps, whatever the epochs say
    global_batch: int = 64  # rows per optimizer step over all workers
    num_workers: int = 1
    min_workers: int | None = None  # elastic: as few go on when nodes go; None: always num_workers
    resize_every_s: float = 60.0  # elastic: between two looks for more room; a start waits as long for its own
    use_gpu: bool | None = None  # None: when the cluster has GPUs
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 1.0  # with use_gpu
    threads_per_worker: int | None = None  # torch threads; None: cpus_per_worker rounded up
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16", "fp16_pure"] = "fp32"  # bf16 keeps float32 masters, fp16_pure none (parity)
    micro_batches: int = 1  # each step's rows in this many pieces; in-batch losses stay exact (two-pass form)
    activation_checkpointing: bool = False  # recompute the towers' blocks in the backward pass
    gradient_clip: float | None = None  # global norm
    eval_every: int = 1  # epochs between evaluations on the selection split; 0: never
    select_on: Literal["val", "test", "none"] = "val"
    checkpoint_every: int = 1  # epochs between checkpoints; 0: only at the end of a stage
    checkpoint_every_steps: int | None = None  # and also every so many steps
    keep_last: int = 2
    keep_best: int = 1
    log_every: int = 10  # steps between reads of the losses (a read waits for the device)
    max_failures: int = 3  # real failures survived; preemptions do not count
    collective_timeout_s: int = 600
    hang_timeout_s: float = (
        300.0  # after the first step: longest silence between steps before the workers start again; 0: any
    )

    def __post_init__(self) -> None:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("precision=bf16 needs zero_stage of 1, 2 or 3 (DeepSpeed's bf16 at stage 0 is wrong)")
        if self.precision == "fp16_pure" and self.zero_stage != 0:
            raise ValueError(
                f"precision=fp16_pure needs zero_stage=0 (now {self.zero_stage}): ZeRO keeps float32 masters"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How features are scored."""

    protocol: str = ""  # a name of evaluation/protocols.py; empty: the method's own
    batch: int = 128  # rows per forward pass
    memory_mb: int = 256  # budget of one block of the similarity matrix
    ranks: tuple[int, ...] = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Outside trackers that also receive the metrics. TensorBoard files are always written."""

    mlflow: str = ""  # tracking URI
    wandb: str = ""  # project name


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, whole. `model` is an instance of the method's Config."""

    name: str
    method: str
    seed: int = 1
    output: str = "runs"  # folder or s3:// prefix; the run lives in <output>/<name>
    init: str = ""  # start weights: empty | run:URI | authors:PATH
    data: DataConfig = field(default_factory=DataConfig)
    model: Any = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def uri(self) -> str:
        """Where the run lives."""
        return f"{self.output.rstrip('/')}/{self.name}"


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice (plain YAML keeps the last one silently)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        doubled = {str(key) for key in keys if keys.count(key) > 1}
        if doubled:
            raise RecipeError(f"{node.start_mark.name}: key {', '.join(sorted(doubled))} is written twice")
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-3 as a string (it wants 1.0e-3); every learning rate in this field is written the short way.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    __import__("re").compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML strictly. Raises RecipeError naming `where` and the line."""
    loader = _StrictLoader(text)
    loader.name = where
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    finally:
        loader.dispose()


def read_mapping(path: str | Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML file, following `extends:` (nearest file wins key by key). Raises RecipeError."""
    path = Path(path)
    if path.resolve() in _seen:
        raise RecipeError(f"{path}: extends itself through {' -> '.join(p.name for p in _seen)}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from None
    mapping = parse_yaml(text, str(path))
    if not isinstance(mapping, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, found {type(mapping).__name__}")
    parent = mapping.pop("extends", None)
    if parent is None:
        return mapping
    return merge(read_mapping(path.parent / parent, (*_seen, path.resolve())), mapping)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Key-by-key union of two trees; `above` wins, lists are replaced whole."""
    result = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merge(result[key], value)
        else:
            result[key] = value
    return result


def apply_overrides(mapping: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply `key.sub=value` words; values are YAML. Raises RecipeError for a word without '='."""
    result = dict(mapping)
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise RecipeError(f"override {word!r}: write key=value, for example training.epochs=10")
        tree: Any = parse_yaml(value, f"override {key}") if value else ""
        for part in reversed(key.split(".")):
            tree = {part: tree}
        result = merge(result, tree)
    return result


def build_recipe(mapping: Mapping[str, Any], method_config: Callable[[str], type]) -> Recipe:
    """Type a tree. `method_config(name)` gives the method's Config class. Raises RecipeError."""
    name = mapping.get("method")
    if not isinstance(name, str):
        raise RecipeError("recipe: key 'method' is missing; name one method, for example method: comoe")
    model = typed(method_config(name), mapping.get("model") or {}, "model")
    rest = {key: value for key, value in mapping.items() if key != "model"}
    recipe = dataclasses.replace(typed(Recipe, rest, ""), model=model)
    if not recipe.name or "/" in recipe.name or recipe.name.startswith("."):
        raise RecipeError(
            f"name={recipe.name!r}: a run's name is one folder name, without '/' and not starting with '.'"
        )
    _check_workers(recipe.training)
    return recipe


def _check_workers(training: TrainingConfig) -> None:
    """Raises RecipeError for a number of workers that is none, or an elastic range that is empty."""
    if training.num_workers < 1:
        raise RecipeError(f"training.num_workers={training.num_workers}: at least 1")
    if training.min_workers is not None and not 1 <= training.min_workers <= training.num_workers:
        raise RecipeError(
            f"training.min_workers={training.min_workers}: from 1 to training.num_workers (now {training.num_workers}), "
            "or null for a fixed number"
        )
    if training.resize_every_s <= 0:
        raise RecipeError(f"training.resize_every_s={training.resize_every_s}: more than 0 seconds")


def typed(cls: type, mapping: Any, where: str) -> Any:
    """Build the dataclass `cls` from a plain tree, strictly. `where` prefixes names in messages. Raises RecipeError."""
    if not isinstance(mapping, Mapping):
        raise RecipeError(f"{where or 'recipe'}: expected a mapping of keys, got {mapping!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(fields)}"
            raise RecipeError(f"unknown key {name!r}: {hint}")
        values[key] = _value(hints[key], value, name)
    missing = [
        f.name
        for f in fields.values()
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError(f"{where or 'recipe'}: required key {', '.join(map(repr, missing))} is missing")
    try:
        return cls(**values)
    except ValueError as error:  # a dataclass's own __post_init__ check
        raise RecipeError(f"{where or 'recipe'}: {error}") from None


def _value(hint: Any, value: Any, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _first_that_fits([a for a in args if a is not type(None)], value, name)
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        raise RecipeError(f"{name}={value!r}: choose one of {', '.join(map(repr, args))}")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"{name}={value!r}: expected a list, for example {name}=[a, b]")
        kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise RecipeError(f"{name}={value!r}: expected {len(kinds)} entries, got {len(value)}")
        return tuple(
            _value(kind, item, f"{name}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, Mapping):
            raise RecipeError(f"{name}={value!r}: expected a mapping")
        return {str(k): _value(args[1], v, f"{name}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return typed(typing.cast(type, hint), value, name)
    return _scalar(hint, value, name)


def _scalar(hint: type, value: Any, name: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is hint:
        return value
    raise RecipeError(f"{name}={value!r}: expected {hint.__name__}, got {type(value).__name__}")


def _first_that_fits(hints: list[Any], value: Any, name: str) -> Any:
    errors = []
    for hint in hints:
        try:
            return _value(hint, value, name)
        except RecipeError as error:
            errors.append(error)
    raise errors[0]


def to_mapping(node: Any) -> Any:
    """The plain tree of a typed one: dataclasses become dicts, tuples lists; YAML and JSON can hold it."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {f.name: to_mapping(getattr(node, f.name)) for f in dataclasses.fields(node)}
    if isinstance(node, (list, tuple)):
        return [to_mapping(item) for item in node]
    if isinstance(node, Mapping):
        return {key: to_mapping(value) for key, value in node.items()}
    return node


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def diff(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """[(key, old value, new value)] of two recipes or plain trees; an absent key reads as None."""
    before, after = flatten(to_mapping(old)), flatten(to_mapping(new))
    keys = [*before, *(key for key in after if key not in before)]
    return [(k, before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)]
