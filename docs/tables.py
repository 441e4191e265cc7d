"""The tables of the page on benchmarks, from the results in the repository."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks import proposals, report, scripted
from benchmarks.runner import RESULTS, read


def tables() -> Iterator[tuple[str, str]]:
    """Names and texts."""
    quality = read(RESULTS / "quality.json")
    yield "regret", report.headline(quality)
    yield "excess", report.excess_table(quality)
    yield "budgets", report.budget_table(quality)
    yield "pools", report.slice_table(quality, "pool")
    yield "few-shot", report.headline(quality, few_shot=True)
    yield "shuffled", report.shuffled_table(quality)
    yield "pipelines", report.pipelines_table(read(RESULTS / "pipelines.json"))
    yield "wallclock", report.wallclock_table(json.loads((RESULTS / "wallclock.json").read_text())["rows"])
    yield "proposal", report.proposal_table(read(RESULTS / "proposal.json"))
    yield "scale", report.scale_table(read(RESULTS / "scale.json"))
    yield "enumeration", report.enumeration_table(read(RESULTS / "enumeration.json"))
    written = read(RESULTS / "proposals.json")
    recorded = [row for row in written if row["world"] != "scripted"]
    yield "scripted", scripted.summary(written)
    yield "over-fixed", proposals.summary(recorded, "fixed")
    yield "over-gepa", proposals.summary(recorded, "gepa")


def write(folder: Path) -> None:
    """Write each table to a file of its name."""
    folder.mkdir(exist_ok=True)
    for name, text in tables():
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
