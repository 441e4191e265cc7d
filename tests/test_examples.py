"""The recipes: each runs offline, says what it is about, and returns no worse program than it was given."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from recipes import RECIPES, run_recipes

NAMES = sorted(path.stem for path in RECIPES.glob("*.py") if path.stem != "stubs")
_MARK = "# ---- The one line to change for a real API: "
_SCORES = re.compile(r"([\d.]+)% before, ([\d.]+)% after")


def test_there_are_five() -> None:
    """The tests below are about something."""
    assert NAMES == ["cheap_and_strong", "classify", "multi_hop", "rag", "react_tools"]


def test_recipes_run(tmp_path: Path, forks: Any) -> None:
    """With a stub, each program is better on the validation set, as its recipe prints; there is a report."""
    process = forks.Process(target=run_recipes, args=(NAMES, str(tmp_path)))
    process.start()
    process.join()
    assert process.exitcode == 0
    for name in NAMES:
        failed = tmp_path / name / "failed"
        assert not failed.exists(), failed.read_text(encoding="utf-8")
        printed = (tmp_path / name / "printed").read_text(encoding="utf-8")
        scores = [(float(before), float(after)) for before, after in _SCORES.findall(printed)]
        assert scores, name
        assert all(before <= after for before, after in scores), printed
        assert scores[0][0] < scores[0][1], printed
        assert (tmp_path / name / f"{name}.html").stat().st_size > 10_000


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_short_and_has_one_line_to_change(name: str) -> None:
    """At most 100 lines, with what it shows and costs; a comment says what to write for a real API."""
    text = (RECIPES / f"{name}.py").read_text(encoding="utf-8")
    assert 60 <= len(text.splitlines()) <= 100
    assert all(f"\n{word}: " in str(ast.get_docstring(ast.parse(text))) for word in ("Shows", "Costs"))
    (comment,) = (line for line in text.splitlines() if line.startswith(_MARK))
    meant, written = comment.removeprefix(_MARK).rstrip(" -"), text.split(f"{comment}\n")[1].splitlines()[0]
    assert "dspy.LM(" in ast.unparse(ast.parse(meant))
    assert re.match(r"[A-Z, ]+ = .*stubs\.", written)
