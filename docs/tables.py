"""The tables of the page on benchmarks, from the results in the repository."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks import local, proposals, report, scripted
from benchmarks.runner import RESULTS, read


def tables() -> Iterator[tuple[str, str]]:
    """Names and texts."""
    yield from ((name, text) for name, _, text in report.sections(RESULTS))
    written = read(RESULTS / "proposals.json")
    recorded = [row for row in written if row["world"] != "scripted"]
    yield "scripted", scripted.summary(written)
    yield "over-fixed", proposals.summary(recorded, "fixed")
    yield "over-gepa", proposals.summary(recorded, "gepa")
    yield "local", local.summary(read(RESULTS / "local.json"))


def write(folder: Path) -> None:
    """Write each table to a file of its name."""
    folder.mkdir(exist_ok=True)
    for name, text in tables():
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
