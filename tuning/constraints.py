"""Conditions between recipe keys, such as "model.top_k <= model.experts": read as an expression, never executed as code.

Allowed: recipe keys, numbers, strings, lists, true/false/none, + - * / // %, comparisons (also `in`), and, or, not, brackets.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from reid_dist.config import RecipeError

_BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_WORDS = {"true": True, "false": False, "none": None, "True": True, "False": False, "None": None}


class Constraint:
    """One condition. Raises RecipeError when it cannot be read."""

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._tree = ast.parse(text, mode="eval").body
        except SyntaxError as error:
            raise RecipeError(f"constraint {text!r}: cannot be read ({error.msg})") from None

    def holds(self, recipe: Mapping[str, Any]) -> bool:
        """Whether a recipe (flat keys) satisfies it. Raises RecipeError: unknown key, something not allowed, wrong types."""
        try:
            return bool(self._value(self._tree, recipe))
        except (TypeError, ZeroDivisionError) as error:
            raise RecipeError(f"constraint {self.text!r}: {error}") from None

    def _value(self, node: ast.AST, recipe: Mapping[str, Any]) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as value):
                return value
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self._value(item, recipe) for item in items]
            case ast.Name() | ast.Attribute():
                return self._key(node, recipe)
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                return not self._value(inner, recipe)
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -self._value(inner, recipe)
            case ast.BoolOp(op=ast.And(), values=parts):
                return all(self._value(part, recipe) for part in parts)
            case ast.BoolOp(values=parts):
                return any(self._value(part, recipe) for part in parts)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return _BINARY[type(op)](self._value(left, recipe), self._value(right, recipe))
            case ast.Compare(left=left, ops=ops, comparators=rights) if all(type(op) in _COMPARE for op in ops):
                values = [self._value(part, recipe) for part in (left, *rights)]
                pairs = zip(ops, values, values[1:], strict=False)
                return all(_COMPARE[type(op)](a, b) for op, a, b in pairs)
        raise RecipeError(f"constraint {self.text!r}: {ast.unparse(node)!r} is not allowed in a condition")

    def _key(self, node: ast.AST, recipe: Mapping[str, Any]) -> Any:
        key = ast.unparse(node)
        if key in recipe:
            return recipe[key]
        if key in _WORDS:
            return _WORDS[key]
        raise RecipeError(f"constraint {self.text!r}: the recipe has no key {key!r}")
