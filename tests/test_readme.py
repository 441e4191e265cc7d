"""The README: its code runs, its table of options is complete, what it names exists."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
from readme import BLOCKS, README, ROOT, run_block

import mpromptune
from mpromptune.engine.options import OPTION_NAMES

CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_python_blocks_run_in_order(readme_names: dict[str, Any]) -> None:
    """Every example runs as it is printed, each going on from those before it."""
    assert len(BLOCKS) == 8
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


def test_commands_stand_in_the_makefile() -> None:
    """`make demo` and `make test` come first in the README; each `make` of README and changelog exists."""
    first = README.split("```console", 1)[1].split("```", 1)[0]
    assert re.findall(r"^make (\w+) ", first, flags=re.MULTILINE) == ["demo", "test"]
    named = set(re.findall(r"[`\n]make (\w+)", README + CHANGELOG))
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert {"demo", "test", "bench", "report", "docs", "matrix", "notebooks"} <= named <= targets


def test_benchmarks_say_what_they_take(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Each `python -m benchmarks.NAME` of the README has a `--help`, and each slice is one that it knows."""
    table = README.split("## Benchmarks", 1)[1].split("\n## ", 1)[0]
    names = re.findall(r"^\| `python -m benchmarks\.(\w+)`", table, flags=re.MULTILINE)
    assert len(names) == 11
    for name in names:
        monkeypatch.setattr("sys.argv", [name, "--help"])
        with pytest.raises(SystemExit, match="0"):
            importlib.import_module(f"benchmarks.{name}").main()
        assert "usage: " in capsys.readouterr().out
    slices = re.findall(r"`([\w-]+)`", table.split("`--only headline` (or ", 1)[1].split(")", 1)[0])
    assert {"headline", *slices} <= set(importlib.import_module("benchmarks.quality").SLICES)


def test_extras_can_be_installed() -> None:
    """Each extra that README and changelog name is one of pyproject.toml, but for those that were removed."""
    named = set(re.findall(r"(?:\.|m-promptune)\[(\w+)\]", README + CHANGELOG))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.findall(r"^(\w+) = \[", project.split("optional-dependencies]")[1], flags=re.MULTILINE)
    assert {"offline", "dask", "postgres", "plots", "bench"} <= named <= set(extras)
    assert "grpc" not in extras


def test_the_reference_names_what_exists() -> None:
    """Each module, class and function of docs/api.md can be imported, and each public name stands there."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for kind, name in re.findall(r"^\.\. auto(\w+):: (\S+)", page, flags=re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert (
            importlib.import_module(name)
            if kind == "module"
            else getattr(pkgutil.resolve_name(module), attribute)
        )
    documented = set(re.findall(r"mpromptune\.(\w+)$", page, flags=re.MULTILINE))
    assert documented >= {*mpromptune.__all__} - {"MPromptuneError", "Progress", "Usage"}  # in modules there
