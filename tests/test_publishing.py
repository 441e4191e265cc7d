"""What is published beside the code: the version, the citation, the forms for issues."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pages import ROOT

import mpromptune

FOLDER = ROOT / ".github" / "ISSUE_TEMPLATE"
FORMS = [FOLDER / f"{name}.yml" for name in ("bug", "feature", "question")]


def test_newest_version_is_in_the_changelog() -> None:
    """It comes first, and each version has known headings, each of them once."""
    _, *versions = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## ")
    numbers = [re.match(r"\[(\d+\.\d+\.\d+)\]", version)[1] for version in versions]
    assert numbers == ["0.3.0", "0.1.0"]
    assert mpromptune.__version__.partition(".dev")[0] == numbers[0]
    for version in versions:
        kinds = re.findall(r"^### (\w+)$", version, flags=re.MULTILINE)
        assert kinds == sorted(set(kinds), key=["Added", "Changed", "Removed", "Fixed"].index)


def test_citation_has_what_is_required() -> None:
    """The keys that the Citation File Format requires, and the licence of pyproject.toml."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_form_can_be_filled_in(path: Path) -> None:
    """Each form has a name, a description, and areas with different names, of which one must be filled in."""
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form["name"]
    assert form["description"]
    areas = form["body"]
    assert len({area["id"] for area in areas}) == len(areas)
    assert all(area["type"] == "textarea" and area["attributes"]["label"] for area in areas)
    assert any(area.get("validations", {}).get("required") for area in areas)
