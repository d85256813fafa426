"""The shape of the house: import direction, where heavy libraries may be imported, file and function lengths, no prints.

Read from the syntax trees, so nothing is imported here.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEVELS = [
    {"tests"},
    {"jobs", "tuning"},
    {"training", "evaluation", "generation", "reporting"},
    {"methods"},
    {"models", "losses", "data"},
    {"config", "storage", "runs", "errors"},
]
HEAVY = {
    "ray": lambda p: p[0] in ("jobs", "tuning", "tests") or p in RAY_FILES,
    "deepspeed": lambda p: p[0] == "tests" or p == ("reid_dist", "training", "deepspeed.py"),
    "vllm": lambda p: p[0] == "tests" or p == ("reid_dist", "generation", "engine.py"),
    "boto3": lambda p: p[0] == "tests" or p[:2] == ("reid_dist", "storage"),
    "botocore": lambda p: p[0] == "tests" or p[:2] == ("reid_dist", "storage"),
    "s3fs": lambda p: p[0] == "tests" or p[:2] == ("reid_dist", "storage"),
}
RAY_FILES = {
    ("reid_dist", "training", "launch.py"),
    ("reid_dist", "evaluation", "distributed", "shards.py"),
    ("reid_dist", "generation", "hosting.py"),
    ("reid_dist", "data", "pack.py"),
}
# Modules that must not be imported when reid_dist or a job's module is: they cost seconds.
LAZY = {"ray", "deepspeed", "vllm", "transformers", "open_clip", "lance", "boto3", "s3fs", "matplotlib", "tensorboard"}


def files() -> list[Path]:
    folders = ("reid_dist", "jobs", "tuning", "tests")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, child) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            yield from ((f"{child.module}.{alias.name}", child) for alias in child.names)


def level(parts: tuple[str, ...]) -> int | None:
    name = parts[1].removesuffix(".py") if parts[0] == "reid_dist" and len(parts) > 1 else parts[0]
    return next((i for i, names in enumerate(LEVELS) if name in names), None)


def test_imports_point_downwards() -> None:
    wrong = []
    for path in files():
        parts = path.relative_to(ROOT).parts
        own = level(parts)
        if own is None:
            continue
        for name, _ in imports(tree(path)):
            target = level(tuple(name.split(".")))
            if target is not None and target < own:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, wrong


def test_heavy_libraries_stay_in_their_rooms() -> None:
    wrong = []
    for path in files():
        parts = path.relative_to(ROOT).parts
        for name, _ in imports(tree(path)):
            rule = HEAVY.get(name.split(".")[0])
            if rule is not None and not rule(parts):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, wrong


def test_heavy_libraries_are_imported_inside_functions() -> None:
    wrong = []
    for path in files():
        if path.relative_to(ROOT).parts[0] == "tests":
            continue
        for statement in tree(path).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                wrong += [
                    f"{path.relative_to(ROOT)}: {name}" for name, _ in imports(statement) if name.split(".")[0] in LAZY
                ]
    assert not wrong, wrong


def test_no_method_is_named_outside_its_folder() -> None:
    names = {path.parent.name for path in (ROOT / "reid_dist" / "methods").glob("*/__init__.py")}
    wrong = []
    for path in files():
        parts = path.relative_to(ROOT).parts
        if parts[0] != "reid_dist" or parts[1] == "methods":
            continue
        said = (n for n in ast.walk(tree(path)) if isinstance(n, ast.Constant) and isinstance(n.value, str))
        wrong += [f"{path.relative_to(ROOT)}:{node.lineno} says {node.value!r}" for node in said if node.value in names]
    assert not wrong, wrong


def test_files_and_functions_can_be_read_in_one_sitting() -> None:
    wrong = []
    for path in files():
        if path.relative_to(ROOT).parts[0] == "tests":
            continue
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > 400:
            wrong.append(f"{path.relative_to(ROOT)} has {count} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > 60:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines")
    assert not wrong, wrong


def test_public_functions_are_typed_and_no_print_is_left() -> None:
    wrong = []
    for path in files():
        if path.relative_to(ROOT).parts[0] in ("tests", "jobs"):
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} prints")
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.returns is None:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has no return type")
    assert not wrong, wrong


@pytest.mark.parametrize(
    "module", ["reid_dist", "reid_dist.config", "reid_dist.methods", "reid_dist.evaluation.protocols"]
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(sorted({LAZY!r} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert answer.stdout.strip() == "[]"
