"""The shape of the package: imports point downwards, functions and files stay small."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mpromptune

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mpromptune"

# From the bottom to the top: a subpackage imports only from those above its own in this table.
MATHEMATICS = ("model",)
SEARCH = ("execution", "storage", "sampling", "show", "engine")
ADAPTER = ("local", "lms", "operators", "mipro", "demo", "cli")
LEVELS = {name: level for level, name in enumerate((*MATHEMATICS, *SEARCH, *ADAPTER))}
# What stands beside them: errors are everybody's; nothing inside imports the rest, which users know.
BESIDE = {"errors", "plots", "qEI", "__main__"}
# `from mpromptune import search` imports from the module that the package's door leads to.
DOOR = {name: home.split(".")[0] for name, home in mpromptune._HOME.items()}

MAX_BODY = 50
MAX_FILE = 350

FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [path for path in FILES if path.name != "__init__.py"]


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def unit(path: Path) -> str:
    """The subpackage that a file belongs to, or the module beside them."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def below(*units: str) -> list[Path]:
    return [path for path in MODULES if unit(path) in units]


def module_of(path: Path) -> str:
    return ".".join(("mpromptune", *path.relative_to(PACKAGE).with_suffix("").parts))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path: Path) -> set[str]:
    """Dotted names of everything imported anywhere in a file: in functions and for types too."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)} has a relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def units_imported(path: Path) -> set[str]:
    """Subpackages, and modules beside them, that a file imports from, its own excepted."""
    inside = [name.split(".") for name in imports(path) if name.startswith("mpromptune.")]
    units = {DOOR.get(parts[1], parts[1]) for parts in inside}
    return (units & (LEVELS.keys() | BESIDE)) - {unit(path)}


def modules_imported(path: Path) -> set[str]:
    """Modules of the package that a file imports."""
    known = {module_of(other) for other in MODULES}
    parents = {name.rpartition(".")[0] for name in imports(path)}
    return (imports(path) | parents) & known


def distributions_imported(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body, its docstring left out."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_every_module_has_a_layer(path: Path) -> None:
    """A new subpackage is given a place in the table, and nothing is put beside them lightly."""
    assert unit(path) in LEVELS.keys() | BESIDE, f"{unit(path)!r} is in no layer of tests/test_layers.py"


@pytest.mark.parametrize("path", below(*LEVELS), ids=label)
def test_imports_point_downwards(path: Path) -> None:
    """No module imports from a subpackage above its own, nor from what is for users."""
    level = LEVELS[unit(path)]
    upwards = {name for name in units_imported(path) - {"errors"} if LEVELS.get(name, level) >= level}
    assert not upwards, f"{label(path)} imports {upwards}"


def test_modules_form_no_circle() -> None:
    """Within a subpackage too, imports point one way."""
    graph = {module_of(path): modules_imported(path) - {module_of(path)} for path in MODULES}
    assert len(tuple(TopologicalSorter(graph).static_order())) == len(MODULES)


@pytest.mark.parametrize("path", below(*MATHEMATICS), ids=label)
def test_mathematics_knows_neither_optuna_nor_dspy(path: Path) -> None:
    """The lowest part can be read, tested and used with tensors alone."""
    assert not distributions_imported(path) & {"optuna", "dspy"}


@pytest.mark.parametrize("path", below(*SEARCH), ids=label)
def test_search_knows_no_dspy(path: Path) -> None:
    """`search()` optimises anything that has prompts and scores."""
    assert "dspy" not in distributions_imported(path)


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    """Imports in functions, for types only, and of several names do not escape the tests above."""
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import dspy.utils\n"
        "def f():\n    from mpromptune.model import space, embedding\n    import optuna as o\n"
    )
    assert imports(file) == {
        "typing.TYPE_CHECKING",
        "dspy.utils",
        "mpromptune.model.space",
        "mpromptune.model.embedding",
        "optuna",
    }


@pytest.mark.parametrize("path", FILES, ids=label)
def test_no_function_is_long(path: Path) -> None:
    """A function fits on a screen."""
    long = {f.name: n for f in functions(path) if (n := body_lines(f)) > MAX_BODY}
    assert not long


@pytest.mark.parametrize("path", FILES, ids=label)
def test_no_file_is_long(path: Path) -> None:
    """A file has one subject."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("test_*.py")), ids=label)
def test_every_test_says_what_it_shows(path: Path) -> None:
    """Each test has a docstring."""
    silent = [f.name for f in functions(path) if f.name.startswith("test_") and not ast.get_docstring(f)]
    assert not silent


def modules_after(statement: str) -> set[str]:
    """What a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.split())


def test_import_is_light() -> None:
    """`import mpromptune` waits for torch and sentence-transformers until they are needed."""
    assert not modules_after("import mpromptune") & {"torch", "botorch", "sentence_transformers", "optuna"}


def test_space_needs_no_torch() -> None:
    """Describing a space and reading about errors loads no model library."""
    loaded = modules_after("from mpromptune import MPromptuneError, PromptSpace")
    assert not loaded & {"torch", "sentence_transformers", "dspy"}
