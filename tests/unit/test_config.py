"""Recipes: strict typing, overrides, extends, diff; every shipped recipe is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from reid_dist import methods
from reid_dist.config import (
    RecipeError,
    apply_overrides,
    build_recipe,
    diff,
    flatten,
    parse_yaml,
    read_mapping,
    to_mapping,
)


@dataclass(frozen=True, kw_only=True)
class Model:
    width: int = 8
    rate: float = 0.5
    name: str | None = None
    sizes: tuple[int, int] | None = None


BASE = {"name": "run", "method": "m", "model": {"width": 4}}


def build(*overrides: str) -> object:
    return build_recipe(apply_overrides(BASE, overrides), lambda name: Model)


@pytest.mark.parametrize(
    ("override", "telling"),
    [
        ("traning.epochs=3", "unknown key 'traning': did you mean 'training'?"),
        ("training.epoch=3", "unknown key 'training.epoch': did you mean 'epochs'?"),
        ("model.widht=3", "unknown key 'model.widht': did you mean 'width'?"),
        ("training.epochs=three", "training.epochs='three': expected int, got str"),
        ("training.epochs=3.0", "training.epochs=3.0: expected int, got float"),
        ("training.epochs=true", "training.epochs=True: expected int, got bool"),
        ("training.zero_stage=4", "training.zero_stage=4: choose one of 0, 1, 2, 3"),
        ("data.train=cuhk", "data.train='cuhk': expected a list"),
        ("model.sizes=[1,2,3]", "expected 2 entries, got 3"),
        ("optim=3", "optim: expected a mapping"),
        ("name=a/b", "one folder name"),
        ("nothing", "write key=value"),
        ("name=[1, 2", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_refused_by_name(override: str, telling: str) -> None:
    with pytest.raises(RecipeError) as refused:
        build(override)
    assert telling in str(refused.value)


def test_overrides_are_typed_and_last() -> None:
    recipe = build("optim.lr=1e-3", "model.rate=2", "model.sizes=[3, 4]", "data.train=[a, b]", "training.max_steps=7")
    assert (recipe.optim.lr, recipe.model.rate, recipe.model.sizes) == (1e-3, 2.0, (3, 4))  # type: ignore[attr-defined]
    assert (recipe.data.train, recipe.training.max_steps) == (("a", "b"), 7)  # type: ignore[attr-defined]
    assert isinstance(recipe.model.rate, float)  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        recipe.seed = 2  # type: ignore[attr-defined]


def test_extends_nearest_wins_and_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("name: base\noptim: {lr: 1.0, eps: 1.0}\ndata: {train: [a]}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nname: mine\noptim: {lr: 2.0}\ndata: {train: [b]}\n")
    expected = {"name": "mine", "optim": {"lr": 2.0, "eps": 1.0}, "data": {"train": ["b"]}}
    assert read_mapping(tmp_path / "mine.yaml") == expected
    (tmp_path / "base.yaml").write_text("extends: mine.yaml\nname: base\n")
    with pytest.raises(RecipeError, match="extends itself"):
        read_mapping(tmp_path / "mine.yaml")


def test_yaml_is_safe_and_strict() -> None:
    assert parse_yaml("a: 1e-3", "x") == {"a": 1e-3}
    with pytest.raises(RecipeError, match="written twice"):
        parse_yaml("a: 1\na: 2", "x")
    with pytest.raises(RecipeError, match="not valid YAML"):
        parse_yaml("!!python/object/apply:os.system ['true']", "x")


@pytest.mark.parametrize(
    ("words", "telling"),
    [
        (["training.num_workers=0"], "num_workers=0: at least 1"),
        (["training.num_workers=2", "training.min_workers=3"], "from 1 to training.num_workers (now 2)"),
        (["training.num_workers=2", "training.min_workers=0"], "or null for a fixed number"),
        (["training.resize_every_s=0"], "more than 0 seconds"),
    ],
)
def test_numbers_of_workers_that_cannot_be(words: list[str], telling: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(telling)):
        build(*words)
    assert build("training.num_workers=4", "training.min_workers=2").training.min_workers == 2


def test_a_missing_file_and_a_missing_method_are_one_line() -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_mapping("nowhere.yaml")
    with pytest.raises(RecipeError, match="'method' is missing"):
        build_recipe({"name": "x"}, lambda name: Model)


def test_diff_names_each_key_and_a_tree_survives_its_plain_form() -> None:
    before, after = build(), build("optim.lr=0.5", "model.width=9")
    assert sorted(diff(before, after)) == [
        ("model.width", 4, 9),
        ("optim.lr", 1e-4, 0.5),
    ]
    again = build_recipe(to_mapping(after), lambda name: Model)
    assert again == after
    assert flatten({"a": {"b": 1}, "c": 2}) == {"a.b": 1, "c": 2}


@pytest.mark.parametrize("name", methods.recipes())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    recipe = methods.load_recipe(name)
    assert recipe.method == name.split("/")[0]
    assert recipe.data.train


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("training.precision=bf16", "training.zero_stage=0"), "precision=bf16 needs zero_stage of 1, 2 or 3"),
        (("training.precision=fp16_pure",), r"precision=fp16_pure needs zero_stage=0 \(now 1\)"),
    ],
)
def test_precisions_that_a_zero_stage_cannot_hold_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(*words)
    assert build("training.precision=fp16_pure", "training.zero_stage=0").training.precision == "fp16_pure"
