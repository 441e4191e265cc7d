"""The picture at the top of the README: quality and time of a compile, stock's and ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.rows import HEADLINE, OURS, STOCK, pretty, select
from benchmarks.runner import Cell, find, read

_GREY, _BLUE = "#8a8f98", "#2f6db5"


def overview(results: Path, figure: Figure) -> bool:
    """Draws what there are results of; False, and nothing, where any of the three are missing."""
    tables = select(read(results / "quality.json"), **HEADLINE)
    programs = read(results / "pipelines.json")
    walls = results / "wallclock.json"
    if not (tables and programs and walls.exists()):
        return False
    quality, pipelines, time = figure.subplots(1, 3, width_ratios=(5, 5, 3))
    _regrets(quality, tables, "table")
    quality.set_title("one predictor, 72 prompts", fontsize=10)
    _regrets(pipelines, programs, "program")
    pipelines.set_title("two and three predictors", fontsize=10)
    _times(time, json.loads(walls.read_text(encoding="utf-8"))["rows"])
    _legend(figure)
    return True


def _regrets(axes: Axes, rows: Sequence[Cell], across: str) -> None:
    """A line for each table, from stock's regret to ours."""
    names = list(dict.fromkeys(row[across] for row in rows))
    for place, name in enumerate(names):
        pair = [find({across: name, "method": method}, list(rows)) for method in (STOCK, OURS)]
        stock, ours = (row and row["regret"] for row in pair)
        axes.plot([stock, ours], [place, place], color=_GREY, linewidth=1, zorder=1)
        for row, colour in zip(pair, (_GREY, _BLUE), strict=True):
            if row:
                axes.errorbar(row["regret"], place, xerr=row["regret_se"], fmt="o", color=colour)
    axes.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("points below the best prompt, ± s.e.", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _short(name: str) -> str:
    words = {
        "gsm8k llama33 70b": "GSM8K",
        "agnews llama33 70b s42": "AG News",
        "means subj qwen25 32b": "Subj, Qwen, means",
        "subj llama33 70b s42": "Subj, Llama",
        "subj qwen25 32b s42": "Subj, Qwen",
        " + ": "\n+ ",
    }
    text = pretty(name)
    for old, new in words.items():
        text = text.replace(old, new)
    return text


def _times(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Wall-clock seconds of the compile, of those timed, whose workers are the nearest to 64."""
    stock = min((r for r in rows if r["method"] == "stock"), key=lambda row: abs(row["workers"] - 64))
    cell = {name: stock[name] for name in ("mode", "workers", "scale")}
    bars = [find({**cell, "method": method}, list(rows)) for method in ("stock", "ours")]
    drawn = axes.bar(["stock", "ours"], [row["wall"] for row in bars if row], color=[_GREY, _BLUE], width=0.6)
    axes.bar_label(drawn, fmt="%.0f s", fontsize=9)
    axes.set_title(f"compile, {cell['workers']} workers", fontsize=10)
    axes.set(xticks=[], yticks=[])
    axes.spines[["top", "right", "left"]].set_visible(False)


def _legend(figure: Figure) -> None:
    for colour, label in ((_GREY, "dspy.MIPROv2"), (_BLUE, "mpromptune.MIPROv2, the same number of calls")):
        figure.axes[0].plot([], [], "o", color=colour, label=label)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
