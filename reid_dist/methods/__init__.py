"""The registry: every folder here with an `__init__.py` is a method. Nothing is imported until it is asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from reid_dist.config import Recipe, RecipeError, apply_overrides, build_recipe, read_mapping
from reid_dist.errors import UserError

if TYPE_CHECKING:
    from reid_dist.methods.spec import MethodSpec

FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """All methods, sorted."""
    return sorted(path.parent.name for path in FOLDER.glob("*/__init__.py"))


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def get(name: str) -> MethodSpec:
    """The method `name`. Raises UserError naming the nearest one."""
    if name not in names():
        raise UserError(f"method {name!r} does not exist: {_nearest(name, names())}")
    spec: MethodSpec = importlib.import_module(f"{__name__}.{name}").METHOD
    return spec


def recipes(method: str | None = None) -> list[str]:
    """Shipped recipes as "method/recipe", sorted; all of them, or one method's."""
    paths = FOLDER.glob(f"{method or '*'}/recipes/*.yaml")
    return sorted(f"{path.parent.parent.name}/{path.stem}" for path in paths)


def recipe_path(word: str) -> Path:
    """The file of "method/recipe", or of a path to a YAML file. Raises RecipeError."""
    path = Path(word)
    if path.suffix in (".yaml", ".yml"):
        return path
    if word in recipes():
        method, _, recipe = word.partition("/")
        return FOLDER / method / "recipes" / f"{recipe}.yaml"
    raise RecipeError(f"recipe {word!r}: give a .yaml file or method/recipe; {_nearest(word, recipes())}")


def load_recipe(word: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a file or "method/recipe" with `key.sub=value` overrides. Raises RecipeError, UserError."""
    mapping = apply_overrides(read_mapping(recipe_path(word)), overrides)
    return build_recipe(mapping, lambda name: get(name).Config)
