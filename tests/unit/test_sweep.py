"""Sweep files: strict typing, axes, constraints, and what they expand to. No data and no Ray: identities are stood in for."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from reid_dist import methods
from reid_dist.config import Recipe, RecipeError, flatten, to_mapping
from reid_dist.errors import UserError
from reid_dist.methods.muva.prompts import settings_keys
from reid_dist.runs.identity import FREE
from tuning.axes import combinations, grid_values
from tuning.constraints import Constraint
from tuning.expand import Expansion, expand, trial_of
from tuning.sweep import Axis, Sweep, build_sweep, load_sweep, shipped


def digest(recipe: Recipe) -> str:
    """An identity without data: what `identity_of` does to the recipe alone."""
    flat = {key: value for key, value in flatten(to_mapping(recipe)).items() if key not in FREE}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


def sweep_of(**sections: Any) -> Sweep:
    return build_sweep({"name": "s", "base": "comoe/tiny", **sections})


def trials(sweep: Sweep) -> Expansion:
    return expand(sweep, digest)


@pytest.mark.parametrize(
    ("sections", "telling"),
    [
        ({"axis": {}}, "did you mean 'axes'"),
        ({"axes": {"optim.lr": []}}, "axes.optim.lr: the list is empty"),
        ({"axes": {"optim.lr": {"low": 1.0}}}, "low and high"),
        ({"axes": {"optim.lr": {"low": 2.0, "high": 1.0}}}, "low must be the smaller one"),
        ({"axes": {"optim.lr": {"low": 0.0, "high": 1.0, "log": True}}}, "above 0 with log"),
        ({"axes": {"optim.lr": {"mean": 1.0}}}, "std"),
        ({"axes": {"optim.lr": [1, 1]}}, "written twice"),
        ({"axes": {"seed": [1, 2]}}, "use protocol.seeds"),
        ({"axes": {"data.trial": [1, 2]}}, "use protocol.divisions"),
        ({"scheduler": {"name": "pbt"}}, "choose one of 'none', 'asha', 'median'"),
        ({"scheduler": {"name": "asha"}}, "need metric"),
        ({"search": {"name": "random"}}, "needs search.samples"),
        ({"search": {"samples": 3}}, "a grid takes every combination"),
        ({"search": {"name": "random", "samples": 2, "warm_start": ["x"]}}, "learn nothing"),
        ({"resources": {"num_workers": 0}}, "num_workers must be at least 1"),
        ({"protocol": {"recipes": ["comoe/tiny"]}}, "either base, or protocol.recipes"),
        ({"name": "a/b"}, "sweep name"),
    ],
)
def test_a_wrong_file_is_refused_with_the_remedy(sections: dict[str, Any], telling: str) -> None:
    with pytest.raises(UserError) as caught:
        sweep_of(**sections)
    assert telling in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "telling"),
    [
        ({"axes": {"optim.learning_rate": [1.0]}}, "axes.optim.learning_rate: recipe comoe/tiny has no such key"),
        ({"set": {"model.expert": 3}}, "did you mean 'experts'"),
        ({"protocol": {"splits": ["ss/market-1501/nowhere"]}}, "no domain split"),
        ({"axes": {"optim.lr": {"low": 1e-5, "high": 1e-3}}}, "a grid needs a list of values"),
        ({"constraints": ["model.expert > 1"], "axes": {"optim.lr": [1.0]}}, "no key 'model.expert'"),
        ({"constraints": ["model.experts > 99"], "axes": {"optim.lr": [1.0]}}, "no combination satisfies"),
        ({"base": "comoe/nothing"}, "recipe 'comoe/nothing'"),
        ({"shared": [{"name": "a", "set": {}, "then": {}, "without": ["optim.lr"]}]}, "no axis of this sweep"),
    ],
)
def test_what_does_not_fit_the_recipe_is_refused(sections: dict[str, Any], telling: str) -> None:
    with pytest.raises(RecipeError) as caught:
        trials(sweep_of(**sections))
    assert telling in str(caught.value)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("model.top_k <= model.experts", True),
        ("model.experts * 2 == 8 and not model.top_k > 3", True),
        ("1 < model.top_k < 2", False),
        ("optim.name in ['adam', 'sgd'] or false", True),
        ("data.val == none", False),
        ("-model.top_k + 3 // 2 % 2 < 0", True),
    ],
)
def test_constraints_are_read_as_expressions(text: str, holds: bool) -> None:
    recipe = {"model.top_k": 2, "model.experts": 4, "optim.name": "adam", "data.val": []}
    assert Constraint(text).holds(recipe) is holds


@pytest.mark.parametrize(
    "text", ["__import__('os')", "model.experts.__class__", "[x for x in 'ab']", "lambda: 1", "1 +"]
)
def test_constraints_execute_nothing(text: str) -> None:
    with pytest.raises(RecipeError):
        Constraint(text).holds({"model.experts": 4})


def test_grid_over_lists_and_ranges() -> None:
    assert grid_values("k", Axis(low=1.0, high=3.0, steps=3)) == [1.0, 2.0, 3.0]
    assert grid_values("k", Axis(low=1e-4, high=1e-2, steps=3, log=True)) == [1e-4, 1e-3, 1e-2]
    assert grid_values("k", Axis(low=1, high=4, steps=7, integer=True)) == [1, 2, 3, 4]
    sweep = sweep_of(axes={"optim.lr": [1e-3, 1e-4], "model.experts": [2, 3, 4]})
    assert len(list(combinations(sweep))) == 6


def test_random_draws_keep_to_their_range_and_stay_when_more_are_asked_for() -> None:
    axes = {
        "optim.lr": {"low": 1e-5, "high": 1e-3, "log": True},
        "model.experts": {"low": 2, "high": 5, "integer": True},
        "model.balance_weight": {"mean": 1.0, "std": 5.0, "low": 0.0, "high": 2.0},
    }
    few, many = (
        [(t.setting, t.name) for t in trials(sweep_of(axes=axes, search={"name": "random", "samples": n})).trials]
        for n in (40, 60)
    )
    assert many[: len(few)] == few
    settings = [setting for setting, _ in many]
    assert {s["model.experts"] for s in settings} == {2, 3, 4, 5}
    rates = [math.log10(s["optim.lr"]) for s in settings]
    assert min(rates) >= -5
    assert max(rates) <= -3
    assert -4.4 < sum(rates) / len(rates) < -3.6  # the middle of the logarithm
    assert all(0 <= s["model.balance_weight"] <= 2 for s in settings)


def test_constraints_rule_out_before_the_method_is_asked() -> None:
    axes = {"model.experts": [1, 2, 4], "model.top_k": [1, 2, 4]}
    refused = trials(sweep_of(axes=axes))
    assert len(refused.problems) == 3  # the method's own check: top_k above experts
    assert "top_k=2" in refused.problems[0].reason
    allowed = trials(sweep_of(axes=axes, constraints=["model.top_k <= model.experts"]))
    assert (len(allowed.trials), allowed.dropped, allowed.problems) == (6, 3, [])


def test_names_follow_what_is_computed_and_not_where() -> None:
    axes = {"optim.lr": [1e-3, 1e-4]}
    here = trials(sweep_of(axes=axes))
    there = trials(sweep_of(axes=axes, name="other", output="elsewhere", resources={"num_workers": 2}))
    longer = trials(sweep_of(axes={"optim.lr": [1e-3, 1e-4, 1e-5]}))
    assert [t.name for t in here.trials] == [t.name for t in there.trials] == [t.name for t in longer.trials][:2]
    assert there.trials[0].recipe.uri == f"elsewhere/other/trials/{there.trials[0].name}"
    assert there.trials[0].recipe.training.num_workers == 2
    assert trials(sweep_of(axes={"optim.lr": [1e-3]}, set={"seed": 7})).trials[0].name != here.trials[0].name


def test_protocol_axes_multiply_and_repeats_are_told_from_rows() -> None:
    sweep = sweep_of(
        axes={"optim.lr": [1e-3, 1e-4]},
        protocol={"seeds": [1, 2, 3], "divisions": [0, 4], "settings": {"plain": {"model.augment": False}, "full": {}}},
    )
    found = trials(sweep).trials
    assert len(found) == len({t.name for t in found}) == 2 * 3 * 2 * 2
    assert {t.label for t in found} == {
        f"comoe {word} lr={lr}" for word in ("plain", "full") for lr in ("0.001", "0.0001")
    }
    one = next(t for t in found if t.repeat == {"seed": 3, "division": 4} and t.label == "comoe plain lr=0.001")
    assert (one.recipe.seed, one.recipe.data.trial, one.recipe.model.augment) == (3, 4, False)


def test_pairs_of_a_source_are_one_training_scored_on_every_target() -> None:
    sweep = build_sweep(
        {
            "name": "ss", "base": "muva/market1501_to_msmt17",
            "protocol": {"splits": ["ss"], "per_source": {"model.masks": "{source}-masks"}},
        }
    )  # fmt: skip
    found = trials(sweep).trials
    assert len(found) == 4
    assert sum(len(t.scorings) for t in found) == 12
    for trial in found:
        (source,) = trial.recipe.data.train
        assert trial.recipe.model.masks == (f"{source}-masks",)
        assert source not in {table for scoring in trial.scorings for table in scoring.test}
        assert trial.recipe.data.test == ()
    chosen_on_test = build_sweep(
        to_mapping(sweep) | {"axes": {}, "set": {"training.select_on": "test", "training.eval_every": 1}}
    )
    assert len(trials(chosen_on_test).trials) == 12  # there the target does take part


def test_all_image_splits_train_on_query_and_gallery_of_the_sources() -> None:
    found = trials(
        build_sweep({"name": "small", "base": "muva/market1501_to_msmt17", "protocol": {"splits": ["small4"]}})
    ).trials
    (trial,) = found
    assert trial.recipe.data.train_splits == ("train", "query", "gallery")
    assert {scoring.test: scoring.protocol for scoring in trial.scorings} == {
        ("prid2011",): "ten-splits",
        ("grid",): "ten-splits",
        ("viper",): "ten-splits-both-ways",
        ("i-lids",): "ten-splits",
    }


def test_a_shared_stage_is_one_run_for_all_that_agree_in_what_it_sees() -> None:
    shared = {"name": "prompts", "set": {"model.stages": ["prompts"]}, "then": {"model.stages": ["finetune"]}}
    sections = {
        "name": "two", "base": "muva/tiny", "axes": {"optim.lr": [1e-4, 2e-4], "model.prompts.epochs": [2, 3]},
        "protocol": {"seeds": [1, 2]},
    }  # fmt: skip
    found = trials(build_sweep(sections | {"shared": [shared | {"without": ["optim.lr"]}]})).trials
    stages, followers = [t for t in found if not t.scorings], [t for t in found if t.scorings]
    assert (len(stages), len(followers)) == (4, 8)
    for trial in followers:
        (first,) = [stage for stage in stages if stage.name == trial.needs[0]]
        assert trial.recipe.init == f"run:{first.recipe.uri}"
        assert (first.recipe.seed, first.recipe.model.prompts.epochs) == (
            trial.recipe.seed,
            trial.recipe.model.prompts.epochs,
        )
        assert (first.recipe.model.stages, trial.recipe.model.stages) == (("prompts",), ("finetune",))
    # Without saying so, a stage is taken to see every axis.
    assert sum(not t.scorings for t in trials(build_sweep(sections | {"shared": [shared]})).trials) == 8


def test_two_recipes_that_would_be_averaged_are_refused() -> None:
    recipes = ["rle/sysu_mm01", "rle/sysu_mm01_paper"]
    with pytest.raises(RecipeError, match="two different trials would share row"):
        trials(build_sweep({"name": "s", "protocol": {"recipes": recipes}}))
    labelled = {"released": recipes[:1], "described": recipes[1:]}
    found = trials(build_sweep({"name": "s", "protocol": {"recipes": labelled}})).trials
    assert [t.label for t in found] == ["rle released", "rle described"]


def test_facts_of_a_trial_come_back_whole() -> None:
    sweep = sweep_of(
        axes={"optim.lr": [1e-3]}, evaluate=[{"protocol": "image-to-text", "set": {"evaluation.batch": 4}}]
    )
    (trial,) = trials(sweep).trials
    assert trial_of(json.loads(json.dumps(trial.facts()))) == trial


@pytest.mark.parametrize("name", shipped())
def test_shipped_sweeps_expand_and_their_paper_figures_have_a_place(name: str) -> None:
    sweep = load_sweep(name)
    one = iter([{key: axis.values[0] if axis.values else axis.low for key, axis in sweep.axes.items()}])
    found = expand(sweep, digest, one if sweep.search.name == "optuna" else None)
    assert found.problems == []
    columns = {scoring.name for trial in found.trials for scoring in trial.scorings}
    rows = {trial.label for trial in found.trials if trial.scorings}
    assert {figure.column for figure in sweep.paper} <= columns
    assert {figure.label for figure in sweep.paper} - {""} <= rows
    assert len({(figure.label, figure.column) for figure in sweep.paper}) == len(sweep.paper)
    assert len(rows) == 1 or all(figure.label for figure in sweep.paper)
    models = [trial.recipe.model for trial in found.trials]
    wanted = {name for model in models for key in ("masks", "groups") for name in getattr(model, key, ())}
    wanted |= {model.noise for model in models if getattr(model, "noise", "")}
    assert {table.name for table in sweep.side_tables} == wanted  # what no recipe ships, the sweep makes
    for table in sweep.side_tables:
        assert importlib.util.find_spec(table.make.split()[0]) is not None


def test_the_sweeps_of_the_papers_have_their_sizes() -> None:
    def count(name: str) -> tuple[int, int]:
        found = [t for t in trials(load_sweep(name)).trials if t.scorings]
        return len(found), sum(len(t.scorings) for t in found)

    assert count("muva_single_source") == (4 * 3, 12 * 3)
    assert count("muva_leave_one_out") == (4 * 3, 4 * 3)
    assert count("rle_regdb") == (10, 20)
    assert count("rle_sysu_mm01") == (6, 12)
    assert count("climb_datasets") == (4 * 3, 4 * 3)
    assert count("icl_noise") == (4 * 3 * 3, 4 * 3 * 3)
    assert count("icl_cross") == (4 * 3, 4 * 4 * 3)
    assert count("comoe_experts") == (7 * 3, 7 * 3)  # 4 x 2 pairs of experts and top_k, one of them impossible


def test_a_sweep_file_may_extend_another(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\nbase: comoe/tiny\naxes: {optim.lr: [1e-3]}\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nname: b\nprotocol: {seeds: [1, 2]}\n")
    assert len(trials(load_sweep(str(tmp_path / "b.yaml"))).trials) == 2
    with pytest.raises(RecipeError, match="did you mean 'synthetic'"):
        load_sweep("synthetik")
    assert methods.recipe_path("comoe/tiny").exists()


def test_stage_1_of_the_shipped_muva_sweep_is_one_that_its_trials_may_start_from() -> None:
    """MUVA refuses prompts of other people or settings: same tables, same hold-out, same seed, same settings."""
    found = trials(load_sweep("muva_finetune")).trials
    stages = {trial.name: trial.recipe for trial in found if not trial.scorings}
    followers = [trial for trial in found if trial.scorings]
    assert (len(stages), len(followers)) == (2, 12)
    for trial in followers:
        (first,) = (stages[name] for name in trial.needs)
        assert settings_keys(first.model).tolist() == settings_keys(trial.recipe.model).tolist()
        assert (first.data, first.seed) == (trial.recipe.data, trial.recipe.seed)
        assert trial.recipe.init == f"run:{first.uri}"
