"""The shape of the package: imports point downwards, functions and files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mpromptune

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mpromptune"

# From the bottom to the top; a module imports only from lines above its own in this table.
MATHEMATICS = (
    ("attributes", "errors"),
    ("embedding", "space"),
    ("candidates", "chance", "devices", "difficulty", "geometry", "noise"),
    ("kernels",),
    ("sparse",),
    ("surrogate",),
    ("acquisition", "explained", "stopping"),
)
LOOP = (
    ("daemons", "flights", "interrupts", "journal", "pace", "priority", "speed", "travel", "usage"),
    ("reconnecting",),
    ("limits", "storage", "throttle"),
    ("attempts", "crew", "progress"),
    ("encoding", "execution", "findings", "ledger", "schedule"),
    ("worker",),
    ("remote",),
    ("options", "outage", "record", "shared"),
    ("analysis", "arguments", "handout", "helping", "history"),
    ("knowledge", "plots", "sampler", "signs"),
    ("plan", "report", "samplers", "qEI"),
    ("block_plan", "mipro_plan", "result", "settings", "trials"),
    ("health", "monitor", "setup", "shared_trials", "summary"),
    ("coordinator",),
    ("sharing",),
    ("engine",),
)
ADAPTER = (
    ("adapters", "frames", "lm_errors", "prices"),
    ("compatibility", "estimate", "lm_guard", "screens", "threads"),
    ("bootstrap", "demos", "fingerprint", "interception", "programs", "proposal", "view"),
    ("checkpoint", "remote_programs"),
    ("ahead", "reading", "records"),
    ("evaluations",),
    ("steps",),
    ("optimizer", "standing", "targets"),
    ("command_output", "commands", "demo"),
    ("cli",),
    ("__main__",),
)
LEVELS = {name: level for level, line in enumerate((*MATHEMATICS, *LOOP, *ADAPTER)) for name in line}
# `from mpromptune import search` imports from the module that the package's door leads to.
DOOR = mpromptune._HOME

MAX_BODY = 50
MAX_FILE = 350

FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [path for path in FILES if path != PACKAGE / "__init__.py"]


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def unit(path: Path) -> str:
    """The module, or the subpackage, that a file belongs to: a name of the table above."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names of everything imported anywhere in a file: in functions and for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)} has a relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def units_imported(path: Path) -> set[str]:
    """Names of the table above that a file imports from, its own excepted."""
    inside = [name.split(".") for name in imports(path) if name.startswith("mpromptune.")]
    units = {DOOR.get(parts[1], parts[1]) for parts in inside}
    return (units & LEVELS.keys()) - {unit(path)}


def distributions_imported(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body, its docstring left out."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_every_module_has_a_layer(path: Path) -> None:
    """A new module is given a place in the table."""
    assert unit(path) in LEVELS, f"{unit(path)!r} is in no layer of tests/test_layers.py: choose one"


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_imports_point_downwards(path: Path) -> None:
    """No module imports from its own level or from one above."""
    level = LEVELS[unit(path)]
    upwards = {name for name in units_imported(path) if LEVELS[name] >= level}
    assert not upwards, f"{unit(path)} (level {level}) imports {upwards}"


@pytest.mark.parametrize("name", [name for line in MATHEMATICS for name in line])
def test_mathematics_knows_neither_optuna_nor_dspy(name: str) -> None:
    """The lower half can be read, tested and used with tensors alone."""
    assert not distributions_imported(PACKAGE / f"{name}.py") & {"optuna", "dspy"}


@pytest.mark.parametrize("name", [name for line in LOOP for name in line])
def test_loop_knows_no_dspy(name: str) -> None:
    """`search()` optimises anything that has prompts and scores."""
    assert "dspy" not in distributions_imported(PACKAGE / f"{name}.py")


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    """Imports in functions, for types only, and of several names do not escape the tests above."""
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import dspy.utils\n"
        "def f():\n    from mpromptune import space, engine\n    import optuna as o\n"
    )
    assert imports(file) == {
        "typing.TYPE_CHECKING",
        "dspy.utils",
        "mpromptune.space",
        "mpromptune.engine",
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
