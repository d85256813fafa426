"""The sweep file: typed and as strict as a recipe. What each section means stands beside its fields.

A sweep has two kinds of axes. `axes` are settings (any recipe key): each combination is a row of the leaderboard. `protocol`
axes say on what a setting is tried: recipes, domain splits, divisions, seeds. Splits become columns, seeds and divisions
repeats whose mean and spread stand in a cell.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from reid_dist.config import RecipeError, apply_overrides, merge, read_mapping, typed
from reid_dist.storage import check_name

FOLDER = Path(__file__).resolve().parent / "sweeps"


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Values of one recipe key: a list, or a range with a distribution. A plain list in the file means `values`."""

    values: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    log: bool = False  # uniform in the logarithm
    integer: bool = False
    steps: int | None = None  # a grid takes so many values of the range, evenly spaced
    mean: float | None = None  # normal distribution instead of a range; clipped to low, high where they are given
    std: float | None = None

    def __post_init__(self) -> None:
        ranged, normal = self.low is not None and self.high is not None, self.mean is not None
        if bool(self.values) + (ranged and not normal) + normal != 1:
            raise ValueError("give a list of values, or low and high, or mean and std")
        if normal and (self.std is None or self.std <= 0):
            raise ValueError(f"std={self.std}: a normal distribution needs one above 0")
        if ranged and not (self.low < self.high and (not self.log or self.low > 0)):  # type: ignore[operator]
            raise ValueError(f"low={self.low}, high={self.high}: low must be the smaller one, and above 0 with log")
        if len({repr(value) for value in self.values}) != len(self.values):
            raise ValueError(f"values={list(self.values)}: one is written twice")
        if self.steps is not None and self.steps < 2:
            raise ValueError(f"steps={self.steps}: a grid over a range needs at least 2")


@dataclass(frozen=True, kw_only=True)
class ProtocolAxes:
    """On what every setting is tried. Empty: as the recipe says."""

    # recipes that differ in data (a list: columns), or that are compared (label: list; the label is part of the row)
    recipes: tuple[str, ...] | dict[str, tuple[str, ...]] = ()
    splits: tuple[str, ...] = ()  # names or families of evaluation/domains.py: ss, loo4-train, small4/grid, ...
    per_source: dict[str, str] = field(default_factory=dict)  # key: "{source}-masks"; one entry per source of the split
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # label: overrides; the label is part of the row
    seeds: tuple[int, ...] = ()
    divisions: tuple[int, ...] = ()  # data.trial: train/test divisions with a model each (RegDB, iLIDS-VID)


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """One scoring of a trained model: a column of the leaderboard."""

    name: str = ""  # heading; default: what is trained and tested on
    protocol: str = ""  # default: the recipe's, else the method's
    test: tuple[str, ...] = ()  # tables; default: the recipe's data.test
    set: dict[str, Any] = field(default_factory=dict)  # overrides that do not shape the model


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """Who stops bad trials early. Times are optimizer steps. No PBT: a trial hands Tune no checkpoint to exploit."""

    name: Literal["none", "asha", "median"] = "none"
    grace: int = 1  # no trial is stopped before this step
    reduction: float = 3.0  # asha: one in so many goes on from rung to rung
    samples: int = 3  # median: trials that must have reported before one is stopped

    def __post_init__(self) -> None:
        if self.grace < 1 or self.reduction <= 1 or self.samples < 1:
            raise ValueError("grace and samples must be at least 1, reduction above 1")


@dataclass(frozen=True, kw_only=True)
class Search:
    """Who chooses the combinations of `axes`."""

    name: Literal["grid", "random", "optuna"] = "grid"
    samples: int | None = None  # random, optuna: how many combinations
    seed: int = 1
    warm_start: tuple[str, ...] = ()  # optuna: earlier sweeps (folder or s3://) to learn from

    def __post_init__(self) -> None:
        if self.name == "grid" and self.samples is not None:
            raise ValueError("search.samples is for random and optuna; a grid takes every combination")
        if self.name != "grid" and (self.samples is None or self.samples < 1):
            raise ValueError(f"search.name={self.name} needs search.samples, how many combinations to try")
        if self.warm_start and self.name != "optuna":
            raise ValueError(
                "search.warm_start is for optuna; a grid and random draws learn nothing from earlier trials"
            )


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one trial takes."""

    num_workers: int = 1
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 1.0  # where the cluster has GPUs; a fraction shares one
    use_gpu: bool | None = None
    driver: dict[str, float] = field(
        default_factory=lambda: {"CPU": 0.1}
    )  # the trial's driver; name a safe node's resource
    max_concurrent: int | None = None  # fewer than would fit
    hours_per_trial: float | None = None  # for the plan, as long as no trial is done
    max_failures: int = 3  # deaths of a trial's driver or node that are survived

    def __post_init__(self) -> None:
        if self.num_workers < 1 or self.cpus_per_worker < 0 or self.gpus_per_worker < 0:
            raise ValueError("num_workers must be at least 1, cpus_per_worker and gpus_per_worker not negative")
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise ValueError(f"max_concurrent={self.max_concurrent}: at least 1")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When the sweep starts no further trial. Running ones end by themselves."""

    trials: int | None = None
    gpu_hours: float | None = None


@dataclass(frozen=True, kw_only=True)
class SharedStage:
    """A run that many trials start from: computed once for all that agree in what it depends on."""

    name: str
    set: dict[str, Any]  # overrides that make the trial's recipe into the stage's
    then: dict[str, Any]  # overrides of the trials that follow; `init` is set to the stage's run
    without: tuple[str, ...] = ()  # axes that the stage does not see: it takes the base recipe's value


@dataclass(frozen=True, kw_only=True)
class SideTable:
    """A side table, or another file beside the tables, that all trials read; made once, when it is not there yet."""

    name: str  # <data.root>/tables/<name>.side.lance
    make: str  # the job that makes it: "jobs.generate WORDS ..."; {root} is data.root
    file: str = ""  # below data.root, where it is no side table: noise/<name>.npy


@dataclass(frozen=True, kw_only=True)
class PaperFigure:
    """A published figure, in percent as the paper prints it. Never mixed with ours."""

    column: str  # heading of the column
    source: str  # paper and table
    label: str = ""  # row label it stands under; empty: every row of the method
    rank1: float | None = None
    mAP: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One sweep, whole."""

    name: str
    base: str = ""  # recipe file or method/recipe; not with protocol.recipes
    output: str = "sweeps"  # folder or s3:// prefix; the sweep lives in <output>/<name>
    set: dict[str, Any] = field(default_factory=dict)  # overrides of every trial
    axes: dict[str, Axis] = field(default_factory=dict)
    protocol: ProtocolAxes = field(default_factory=ProtocolAxes)
    constraints: tuple[str, ...] = ()  # for example "model.top_k <= model.experts"
    evaluate: tuple[Scoring, ...] = ()  # empty: once, as the recipe says
    metric: str = ""  # what chooses, on the recipe's selection split; empty: nothing is chosen
    mode: Literal["max", "min"] = "max"
    scheduler: Scheduler = field(default_factory=Scheduler)
    search: Search = field(default_factory=Search)
    resources: Resources = field(default_factory=Resources)
    budget: Budget = field(default_factory=Budget)
    shared: tuple[SharedStage, ...] = ()
    side_tables: tuple[SideTable, ...] = ()
    paper: tuple[PaperFigure, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.base) == bool(self.protocol.recipes):
            raise ValueError("name either base, or protocol.recipes")
        if not self.metric and (self.scheduler.name != "none" or self.search.name == "optuna"):
            raise ValueError(
                "a scheduler that stops trials and a searcher that learns need metric, for example metric: mAP"
            )
        for key, reason in RESERVED.items():
            if key in self.axes:
                raise ValueError(f"axes.{key}: {reason}")

    @property
    def uri(self) -> str:
        """Where the sweep lives."""
        return f"{self.output.rstrip('/')}/{self.name}"


RESERVED = {
    "name": "names of trials are made here",
    "output": "the sweep's own output says where trials lie",
    "method": "use protocol.recipes to compare methods",
    "seed": "use protocol.seeds",
    "data.trial": "use protocol.divisions",
    "init": "use shared, or set",
}


def shipped() -> list[str]:
    """Names of the sweep files that come with the package, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_sweep(word: str, overrides: Iterable[str] = ()) -> Sweep:
    """The sweep of a YAML file or of a shipped name, with `key.sub=value` overrides. Raises RecipeError."""
    path = Path(word)
    if path.suffix not in (".yaml", ".yml"):
        if word not in shipped():
            near = difflib.get_close_matches(word, shipped(), n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"shipped: {', '.join(shipped())}"
            raise RecipeError(f"sweep {word!r}: give a .yaml file or a shipped name; {hint}")
        path = FOLDER / f"{word}.yaml"
    return build_sweep(apply_overrides(read_mapping(path), overrides))


def build_sweep(mapping: Mapping[str, Any]) -> Sweep:
    """Type a tree. Raises RecipeError."""
    tree = dict(mapping)
    axes = tree.get("axes") or {}
    if not isinstance(axes, Mapping):
        raise RecipeError(f"axes={axes!r}: expected a mapping of recipe keys")
    sweep: Sweep = typed(Sweep, tree | {"axes": {}}, "")
    try:
        sweep = dataclasses.replace(sweep, axes={str(key): _axis(str(key), value) for key, value in axes.items()})
    except ValueError as error:
        raise RecipeError(f"sweep {sweep.name}: {error}") from None
    check_name(sweep.name, "sweep name")
    return sweep


def _axis(key: str, value: Any) -> Axis:
    if isinstance(value, list):
        if not value:
            raise RecipeError(f"axes.{key}: the list is empty")
        value = {"values": value}
    if not isinstance(value, Mapping):
        raise RecipeError(f"axes.{key}={value!r}: expected a list of values, or low and high, or mean and std")
    axis: Axis = typed(Axis, value, f"axes.{key}")
    return axis


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1, "a": {"c": 2}} -> {"a": {"b": 1, "c": 2}}; keys may be dotted at any depth."""
    result: dict[str, Any] = {}
    for key, value in flat.items():
        tree: Any = nested(value) if isinstance(value, Mapping) else value
        for part in reversed(str(key).split(".")):
            tree = {part: tree}
        result = merge(result, tree)
    return result
