"""The documentation: its code runs, its links lead somewhere, what it lists is complete."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
from pages import FILES, PAGES, ROOT, python_blocks, run, run_tool

import mpromptune
from mpromptune import errors
from mpromptune.engine.options import OPTION_NAMES

TEXT = "\n".join([*PAGES.values(), (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")])
WITH_CODE = [page for page in PAGES if python_blocks(page) and not page.endswith("tools.md")]

legacy_lm = pytest.mark.filterwarnings("ignore:.*scheduled for removal in (DSPy )?3.5:DeprecationWarning")


@legacy_lm
@pytest.mark.parametrize("page", WITH_CODE)
def test_python_blocks_run_in_order(page: str, page_names: dict[str, Any]) -> None:
    """Every example of a page runs as it is printed, each going on from those before it."""
    for code in python_blocks(page):
        run(page, code, page_names)
    check = CHECKS.get(page)
    assert check is None or check(page_names)


# What must be true after the blocks of a page.
CHECKS: dict[str, Any] = {
    "README.md": lambda _: Path("best.json").exists() and Path("report.html").exists(),
    "docs/guides/optuna.md": lambda names: names["study"].best_params["style"] in names["styles"][:2],
    "docs/guides/engine.md": lambda names: names["again"].calls <= 200 < names["longer"].calls <= 300,
    "docs/guides/resuming.md": lambda names: names["longer"].search_result.calls > 60,
    "docs/start.md": lambda names: names["result"].best_score >= names["result"].baseline_score,
}


@pytest.mark.parametrize("tool", ["mlflow", "optuna_dashboard"])
def test_blocks_with_other_tools_run(
    tool: str, request: pytest.FixtureRequest, page_names: dict[str, Any]
) -> None:
    """What is shown of another tool runs as it is printed, with that tool."""
    if tool == "mlflow":
        request.getfixturevalue(tool)
    else:
        pytest.importorskip(tool)
    assert run_tool(tool, page_names).search_result.calls > 0


def test_every_option_is_in_the_tables() -> None:
    """There is one row for each option that `compile` takes, and no other."""
    rows = re.findall(r"^\| `(\w+)` \|", PAGES["docs/options.md"], flags=re.MULTILINE)
    assert sorted(rows) == sorted(OPTION_NAMES)


def test_every_error_is_explained() -> None:
    """Each error of the package has a heading, with what it means and what to do, and no other has one."""
    for module in pkgutil.walk_packages(mpromptune.__path__, "mpromptune."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    known = {errors.SearchInterrupted, errors.SearchTerminated, errors.MPromptuneError}
    while more := {sub for one in known for sub in one.__subclasses__()} - known:
        known |= more
    page = PAGES["docs/troubleshooting.md"].split("\n## Errors\n")[1]
    explained = re.findall(r"^### (\w+)\n\n\*\*Means:\*\* .+ \*\*Do:\*\* .+$", page, flags=re.MULTILINE)
    assert sorted(explained) == sorted(
        one.__name__ for one in known if one.__module__.startswith("mpromptune")
    )


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Of the headings of a page, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*FILES, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    """Each link to a file of the repository leads to one, and to a heading of it if it names one."""
    for link in re.findall(r"\]\(([^)]+)\)", prose(path)):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_benchmarks_say_what_they_take(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Each `python -m benchmarks.NAME` of the table has a `--help`, and each slice is one that it knows."""
    page = PAGES["docs/benchmarks.md"]
    names = re.findall(r"^\| `python -m benchmarks\.(\w+)`", page, flags=re.MULTILINE)
    assert len(names) == 12
    for name in names:
        monkeypatch.setattr("sys.argv", [name, "--help"])
        with pytest.raises(SystemExit, match="0"):
            importlib.import_module(f"benchmarks.{name}").main()
        assert "usage: " in capsys.readouterr().out
    slices = re.findall(r"`([\w-]+)`", page.split("`--only headline` (or ", 1)[1].split(")", 1)[0])
    assert {"headline", *slices} <= set(importlib.import_module("benchmarks.quality").SLICES)


def test_commands_stand_in_the_makefile() -> None:
    """Each `make` that a page or the changelog names exists."""
    named = set(re.findall(r"[`\n]make (\w+)", TEXT))
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert {"demo", "test", "bench", "report", "docs", "matrix", "notebooks"} <= named <= targets


def test_extras_can_be_installed() -> None:
    """Each extra that a page or the changelog names is one of pyproject.toml, but for those removed."""
    named = {
        name for names in re.findall(r"(?:\.|m-promptune)\[([\w,]+)\]", TEXT) for name in names.split(",")
    }
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.findall(r"^(\w+) = \[", project.split("optional-dependencies]")[1], flags=re.MULTILINE)
    assert {"offline", "dask", "postgres", "plots", "bench"} <= named <= set(extras)
    assert "grpc" not in extras


def test_the_reference_names_what_exists() -> None:
    """Each module, class and function of docs/api.md can be imported, and each public name stands there."""
    page = PAGES["docs/api.md"]
    for kind, name in re.findall(r"^\.\. auto(\w+):: (\S+)", page, flags=re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert (
            importlib.import_module(name)
            if kind == "module"
            else getattr(pkgutil.resolve_name(module), attribute)
        )
    documented = set(re.findall(r"mpromptune\.(\w+)$", page, flags=re.MULTILINE))
    assert documented >= {*mpromptune.__all__} - {"MPromptuneError", "Progress", "Usage"}  # in modules there
