"""The README: its code runs, its table of options is complete, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from readme import BLOCKS, README, ROOT, run_block

from mpromptune.engine.options import OPTION_NAMES


def test_python_blocks_run_in_order(readme_names: dict[str, Any]) -> None:
    """Every example runs as it is printed, each going on from those before it."""
    assert len(BLOCKS) == 7
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"README.md, Python block {number}", "exec"), readme_names)
    assert Path("best.json").exists()
    assert Path("report.html").exists()
    assert readme_names["study"].best_params["style"] in readme_names["styles"][:2]
    result = readme_names["result"]
    assert result.best_score >= result.baseline_score
    assert result.calls == readme_names["again"].calls <= 300
    assert result.calls < readme_names["longer"].calls <= 500


@pytest.mark.parametrize("tool", ["mlflow", "optuna_dashboard"])
def test_blocks_with_other_tools_run(
    tool: str, request: pytest.FixtureRequest, readme_names: dict[str, Any]
) -> None:
    """What the README shows of another tool runs as it is printed, with that tool."""
    if tool == "mlflow":
        request.getfixturevalue(tool)
    else:
        pytest.importorskip(tool)
    assert run_block(tool, readme_names).search_result.calls > 0


def test_every_option_is_in_the_table() -> None:
    """The table has a row for each option that `compile` takes, and no other."""
    table = README.split("## Options", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    assert sorted(rows) == sorted(OPTION_NAMES)


@pytest.mark.parametrize("command", ["demo", "test"])
def test_commands_of_the_readme_exist(command: str) -> None:
    """`make demo` and `make test` stand in the README's first block and in the Makefile."""
    assert f"make {command} " in README.split("```console", 1)[1].split("```", 1)[0]
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
