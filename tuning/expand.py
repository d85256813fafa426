"""From a sweep to its trials: pure, apart from the identity of a recipe, which its caller gives (it depends on data and code).

A trial is one training: a recipe, and the scorings of the trained model. Drafts that differ only in what is tested become one
trial with several scorings, because a target takes no part in training (unless the recipe selects on it). What `shared` names
is taken out of the trials into runs of its own, one per different recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from reid_dist import methods
from reid_dist.config import Recipe, RecipeError, build_recipe, flatten, merge, read_mapping, to_mapping
from reid_dist.errors import UserError
from reid_dist.evaluation import domains
from reid_dist.evaluation.similarity import EvaluationError
from tuning.axes import Setting, combinations
from tuning.constraints import Constraint
from tuning.sweep import Scoring, Sweep, nested

Identify = Callable[[Recipe], str]  # hex digest of a recipe with its data and code. Raises UserError (no such table)
DIGITS = 12  # of the digest in a trial's name


@dataclass(frozen=True)
class Trial:
    """One run of the sweep."""

    recipe: Recipe  # whole; its name ends with the digest
    label: str  # row of the leaderboard; a shared run's says what it is
    setting: Mapping[str, Any]  # axis key -> value
    repeat: Mapping[str, int]  # seed, division
    scorings: tuple[Scoring, ...]  # with every field filled in; none: a shared run
    level: int = 0  # runs of a lower level come first
    needs: tuple[str, ...] = ()  # names of the shared runs that it starts from

    @property
    def name(self) -> str:
        return self.recipe.name

    def facts(self) -> dict[str, Any]:
        """Plain form, as stored and as handed to the trial's driver."""
        plain: dict[str, Any] = to_mapping({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        return plain | {"name": self.name, "uri": self.recipe.uri}


def trial_of(facts: Mapping[str, Any]) -> Trial:
    """The inverse of `Trial.facts`."""
    return Trial(
        recipe=build_recipe(facts["recipe"], lambda name: methods.get(name).Config),
        label=facts["label"],
        setting=facts["setting"],
        repeat=facts["repeat"],
        scorings=tuple(Scoring(**{**entry, "test": tuple(entry["test"])}) for entry in facts["scorings"]),
        level=facts["level"],
        needs=tuple(facts["needs"]),
    )


@dataclass(frozen=True)
class Problem:
    """A trial that cannot run."""

    label: str
    reason: str


@dataclass
class Expansion:
    """All trials in order, shared runs first; and those that are impossible."""

    trials: list[Trial] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    dropped: int = 0  # combinations that a constraint rules out


@dataclass(frozen=True)
class Place:
    """One combination of the protocol axes."""

    recipe: str
    label: str
    overrides: Mapping[str, Any]  # nested
    repeat: Mapping[str, int]


def places(sweep: Sweep) -> list[Place]:
    """All combinations of the protocol axes. Raises RecipeError."""
    axes = sweep.protocol
    recipes = axes.recipes or (sweep.base,)
    groups = recipes if isinstance(recipes, dict) else {"": recipes}
    named = [(label, word) for label, words in groups.items() for word in words]
    settings = list(axes.settings.items()) or [("", {})]
    found = []
    divisions, seeds = axes.divisions or (None,), axes.seeds or (None,)
    for recipe, split, setting, division, seed in itertools.product(named, _splits(sweep), settings, divisions, seeds):
        overrides = merge(split, nested(setting[1]))
        repeat = {}
        if division is not None:
            overrides, repeat["division"] = merge(overrides, {"data": {"trial": division}}), division
        if seed is not None:
            overrides, repeat["seed"] = merge(overrides, {"seed": seed}), seed
        found.append(Place(recipe[1], " ".join(word for word in (recipe[0], setting[0]) if word), overrides, repeat))
    return found


def _splits(sweep: Sweep) -> list[dict[str, Any]]:
    """Overrides per domain split; a family's name means all of it. Raises RecipeError."""
    result = []
    for word in sweep.protocol.splits:
        family = [split for name, split in domains.DOMAIN_SPLITS.items() if name.startswith(f"{word}/")]
        try:
            chosen = family or [domains.get(word)]
        except EvaluationError as error:
            raise RecipeError(f"protocol.splits: {error}") from None
        for split in chosen:
            images = ["train"] if split.images == "train" else ["train", "query", "gallery"]
            data = {"train": list(split.sources), "test": [split.target], "train_splits": images}
            listed = {
                key: [text.format(source=source) for source in split.sources]
                for key, text in sweep.protocol.per_source.items()
            }
            result.append(merge({"data": data, "evaluation": {"protocol": split.protocol}}, nested(listed)))
    return result or [{}]


def expand(sweep: Sweep, identify: Identify, settings: Iterator[Setting] | None = None) -> Expansion:
    """Every trial of the sweep, or those of the given settings. Raises RecipeError: unknown keys, constraints, clashes."""
    where = places(sweep)
    check_axes(sweep, where)
    constraints = [Constraint(text) for text in sweep.constraints]
    result, drafts = Expansion(), _Drafts()
    wanted = sweep.search.samples if settings is None else None
    kept = 0
    for tried, setting in enumerate(settings if settings is not None else combinations(sweep), start=1):
        if wanted is not None and (kept == wanted or tried > 200 * wanted):
            break
        allowed = [drafts.add(sweep, place, setting, constraints, result) for place in where]
        kept += any(allowed)
        result.dropped += not any(allowed)
    if wanted is not None and kept < wanted and sweep.search.name == "random":
        raise RecipeError(
            f"only {kept} of {wanted} random combinations satisfy the constraints: widen axes or constraints"
        )
    if settings is None and not drafts.found and not result.problems:
        raise RecipeError(f"sweep {sweep.name}: no combination satisfies the constraints {list(sweep.constraints)}")
    shared: dict[str, Trial] = {}
    trials: dict[str, Trial] = {}
    for draft in drafts.found.values():
        try:
            trial = _finish(sweep, draft, identify, shared)
        except RecipeError:
            raise
        except UserError as error:
            result.problems.append(Problem(_describe(draft), str(error)))
            continue
        trials.setdefault(trial.name, trial)
    result.trials = [*sorted(shared.values(), key=lambda t: t.level), *trials.values()]
    _refuse_clashes(result.trials)
    return result


@dataclass
class _Draft:
    place: Place
    setting: Setting
    recipe: Recipe
    label: str
    scorings: tuple[Scoring, ...]


class _Drafts:
    """Collects drafts; those of one training become one."""

    def __init__(self) -> None:
        self.found: dict[str, _Draft] = {}
        self._base: dict[str, dict[str, Any]] = {}

    def _allowed(self, sweep: Sweep, place: Place, setting: Setting, constraints: list[Constraint]) -> bool:
        """Whether the constraints hold; asked before the method sees the combination, which it might refuse."""
        if not constraints:
            return True
        key = json.dumps([place.recipe, place.overrides], sort_keys=True)
        if key not in self._base:
            self._base[key] = flatten(to_mapping(make_recipe(sweep, place, {})))
        flat = self._base[key] | flatten(nested(setting))
        return all(constraint.holds(flat) for constraint in constraints)

    def add(
        self, sweep: Sweep, place: Place, setting: Setting, constraints: list[Constraint], result: Expansion
    ) -> bool:
        """Whether the constraints allow the combination. A recipe that its method refuses is noted as a problem."""
        label = row_label(place, setting)
        if not self._allowed(sweep, place, setting, constraints):
            return False
        try:
            recipe = make_recipe(sweep, place, setting)
        except RecipeError as error:
            result.problems.append(Problem(f"{label} {_words(place.repeat)}".strip(), str(error)))
            return True
        label = f"{recipe.method} {label}".strip()
        scorings = tuple(_filled(scoring, recipe) for scoring in sweep.evaluate or (Scoring(),))
        if recipe.training.select_on != "test":
            recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, test=()))
            if not recipe.training.eval_every:  # nothing is scored while it trains
                recipe = dataclasses.replace(recipe, evaluation=dataclasses.replace(recipe.evaluation, protocol=""))
        key = json.dumps([label, dict(place.repeat), to_mapping(recipe)], sort_keys=True)
        draft = self.found.setdefault(key, _Draft(place, setting, recipe, label, ()))
        draft.scorings += tuple(scoring for scoring in scorings if scoring not in draft.scorings)
        return True


def make_recipe(
    sweep: Sweep, place: Place, setting: Mapping[str, Any], last: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe of one combination. Raises RecipeError."""
    own = sweep.resources
    resources = {
        "num_workers": own.num_workers,
        "cpus_per_worker": own.cpus_per_worker,
        "gpus_per_worker": own.gpus_per_worker,
        "use_gpu": own.use_gpu,
    }
    tree: dict[str, Any] = read_mapping(methods.recipe_path(place.recipe))
    layers = ({"training": resources}, nested(sweep.set), place.overrides, nested(setting), nested(last or {}))
    for layer in (*layers, {"name": sweep.name, "output": f"{sweep.uri}/trials"}):
        tree = merge(tree, layer)
    return build_recipe(tree, lambda name: methods.get(name).Config)


def _filled(scoring: Scoring, recipe: Recipe) -> Scoring:
    test = scoring.test or recipe.data.test or recipe.data.train
    protocol = scoring.protocol or recipe.evaluation.protocol or methods.get(recipe.method).protocol
    train = recipe.data.train
    heading = "+".join(test) if set(test) == set(train) else f"{'+'.join(train)} -> {'+'.join(test)}"
    return dataclasses.replace(scoring, test=test, protocol=protocol, name=scoring.name or heading)


def _finish(sweep: Sweep, draft: _Draft, identify: Identify, shared: dict[str, Trial]) -> Trial:
    """Name the draft's runs by their digests, shared ones first. Raises UserError."""
    recipe = draft.recipe
    needs: list[str] = []
    for level, stage in enumerate(sweep.shared):
        seen = {key: value for key, value in draft.setting.items() if key not in stage.without}
        free = {"data": {"test": []}, "init": recipe.init}
        first = make_recipe(sweep, draft.place, seen, merge(nested(stage.set), free))
        first = _named(dataclasses.replace(first, output=f"{sweep.uri}/shared"), stage.name, identify)
        repeat = draft.place.repeat
        shared.setdefault(
            first.name, Trial(first, f"{stage.name} ({draft.label})", seen, repeat, (), level, tuple(needs))
        )
        needs.append(first.name)
        after = merge(nested(stage.then), {"init": f"run:{first.uri}", "data": {"test": list(draft.recipe.data.test)}})
        recipe = make_recipe(sweep, draft.place, draft.setting, after)
    recipe = _named(recipe, recipe.method, identify)
    return Trial(
        recipe, draft.label, draft.setting, draft.place.repeat, draft.scorings, len(sweep.shared), tuple(needs)
    )


def _named(recipe: Recipe, stem: str, identify: Identify) -> Recipe:
    return dataclasses.replace(recipe, name=f"{stem}-{identify(recipe)[:DIGITS]}")


def row_label(place: Place, setting: Mapping[str, Any]) -> str:
    """What tells a row from others: labels, and "key=value" with the shortest tail of each key that is unique."""
    words = [f"{_tail(key, list(setting))}={_short(value)}" for key, value in setting.items()]
    return " ".join([place.label, *words]).strip()


def _tail(key: str, keys: list[str]) -> str:
    parts = key.split(".")
    for count in range(1, len(parts)):
        tail = ".".join(parts[-count:])
        if sum(other == tail or other.endswith(f".{tail}") for other in keys) == 1:
            return tail
    return key


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "+".join(_short(item) for item in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _words(facts: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in facts.items())


def _describe(draft: _Draft) -> str:
    where = ", ".join(scoring.name for scoring in draft.scorings)
    return f"{draft.label} {_words(draft.place.repeat)} ({where})"


def check_axes(sweep: Sweep, where: list[Place]) -> None:
    """Raises RecipeError when an axis, or the axis that a shared stage leaves out, is no key of a recipe."""
    for place in {place.recipe: place for place in where}.values():
        keys = list(flatten(to_mapping(make_recipe(sweep, place, {}))))
        for axis in sweep.axes:
            if axis not in keys and not any(key.startswith(f"{axis}.") for key in keys):
                near = difflib.get_close_matches(axis, keys, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else "axes name recipe keys such as optim.lr"
                raise RecipeError(f"axes.{axis}: recipe {place.recipe} has no such key; {hint}")
    for stage in sweep.shared:
        unknown = [key for key in stage.without if key not in sweep.axes]
        if unknown:
            raise RecipeError(f"shared.{stage.name}.without names {', '.join(unknown)}, which is no axis of this sweep")


def _refuse_clashes(trials: list[Trial]) -> None:
    """Raises RecipeError when two different trainings would be averaged as if they were repeats of each other."""
    seen: dict[Any, str] = {}
    for trial in trials:
        for scoring in trial.scorings:
            cell = (trial.label, scoring.name, scoring.protocol, tuple(sorted(trial.repeat.items())))
            if seen.setdefault(cell, trial.name) != trial.name:
                raise RecipeError(
                    f"two different trials would share row {trial.label!r}, column {scoring.name!r}: give the recipes "
                    "labels (protocol.recipes as label: [recipe, ...]) or the scorings names"
                )
