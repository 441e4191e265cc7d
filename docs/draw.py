"""The pictures of the page "How it works", each of a real search on made-up scores: `python docs/draw.py`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import optuna
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from mpromptune import PromptSpace, SearchResult, search

FOLDER = Path(__file__).parent / "pictures"
_BLUE, _ORANGE, _GREY, _PALE = "#2f6db5", "#d9822b", "#8a8f98", "#e4e7eb"
# NOTE: as wide as a phone shows, in inches of 72 points, so that texts keep their size.
_WIDTH = 4.4
_EXAMPLES, _EARLY, _CALLS = 60, 60, 240
_INSTRUCTIONS = ["Answer.", "Think.", "Step by step.", "Be brief."]
_DEMOS = [[], ["2+2: 4"], ["2+2: 4", "3+5: 8"]]
_LUCK = np.random.default_rng(4).random((500, _EXAMPLES))
_DIFFICULTY = np.random.default_rng(5).normal(0.0, 1.6, _EXAMPLES)


def chance(skill: float) -> Any:
    """The probability of a right answer to each example."""
    return 1.0 / (1.0 + np.exp(_DIFFICULTY - skill))


def skill_of(params: dict[str, int]) -> float:
    """Of a configuration of the first two pictures."""
    return float(
        [-0.6, 0.3, 1.6, -1.0][params["0_predictor_instruction"]] + 0.5 * params["0_predictor_demos"]
    )


def score(params: dict[str, int], example: int) -> float:
    """Right or wrong."""
    luck = _LUCK[3 * params["0_predictor_instruction"] + params["0_predictor_demos"], example]
    return float(luck < chance(skill_of(params))[example])


def searched() -> list[SearchResult]:
    """One search, looked at early and at its end."""
    space = PromptSpace({"0_predictor_instruction": _INSTRUCTIONS, "0_predictor_demos": _DEMOS})
    with tempfile.TemporaryDirectory() as folder:
        same: dict[str, Any] = {"n_examples": _EXAMPLES, "seed": 1, "num_threads": 1, "embedder": "index"}
        same["storage"] = f"{folder}/run.log"
        return [search(space, score, max_calls=calls, **same) for calls in (_EARLY, _CALLS)]


def name_of(params: dict[str, int]) -> str:
    """Instruction and number of demos."""
    demos = params["0_predictor_demos"]
    return f"{_INSTRUCTIONS[params['0_predictor_instruction']].rstrip('.')}, {demos} demo{'s' * (demos != 1)}"


def blocks(result: SearchResult) -> Figure:
    """Which configuration was measured on which example, and what came of it."""
    ranked = sorted(result.configurations, key=lambda m: -len(m.scores))
    order = sorted(range(_EXAMPLES), key=lambda e: -sum(e in m.scores for m in ranked))
    cells = [[1 + m.scores[e] if e in m.scores else 0 for e in order] for m in ranked]
    figure, axes = panel(3.4)
    axes.imshow(cells, cmap=ListedColormap([_PALE, _ORANGE, _BLUE]), aspect="auto", interpolation="nearest")
    axes.hlines(np.arange(0.5, len(ranked) - 1), -0.5, _EXAMPLES - 0.5, color="white", linewidth=3)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_yticks(range(len(ranked)), [name_of(m.params) for m in ranked])
    axes.set(xticks=[], xlabel="validation examples")
    for label, colour in (("right", _BLUE), ("wrong", _ORANGE), ("not asked", _PALE)):
        axes.plot([], [], "s", color=colour, label=label)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, handletextpad=0.1)
    return figure


def posterior(results: list[SearchResult]) -> Figure:
    """Estimates early and at the end, beside the truth."""
    ranked = sorted(results[-1].configurations, key=lambda m: -m.posterior_mean)
    names = [name_of(m.params) for m in ranked]
    figure, axes = panel(4.2)
    pairs = zip(results, (_GREY, _BLUE), (-0.18, 0.18), (_EARLY, _CALLS), strict=True)
    for result, colour, shift, calls in pairs:
        found = [m for m in result.configurations if name_of(m.params) in names]
        axes.errorbar(
            [100 * m.posterior_mean for m in found],
            [names.index(name_of(m.params)) + shift for m in found],
            xerr=[196 * m.posterior_std for m in found],
            fmt="o",
            markersize=4,
            color=colour,
            label=f"after {calls} calls",
        )
    truth = [100 * float(chance(skill_of(m.params)).mean()) for m in ranked]
    axes.plot(truth, range(len(names)), "o", markersize=8, fillstyle="none", color=_ORANGE, label="truth")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="score, %", xlim=(None, 100))
    figure.legend(loc="outside upper center", ncols=3, frameon=False, handletextpad=0.1, columnspacing=1)
    return figure


class Hinting:
    """A proposer that adds a hint; some hints help."""

    name, calls, keeps_parent = "hint", 1, True
    gain = (0.1, 0.5)

    def components(self, space: PromptSpace) -> list[str]:
        """Those of instructions."""
        return list(space.names)

    def propose(self, brief: Any) -> str:
        """The parent and a number."""
        parent = brief.candidates[brief.component][brief.parent[brief.component]]
        return f"{parent} + hint {brief.number + 1}"


class Skills:
    """Skills of instructions, as they are written: a hint adds something good or bad."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = list(texts)

    def plain(self, component: str, candidate: str) -> str:
        """The text itself."""
        return candidate

    def adopt(self, component: str, index: int, written: str) -> str:
        """Remember the text."""
        self.texts += [""] * (index + 1 - len(self.texts))
        self.texts[index] = written
        return written

    def score(self, params: dict[str, int], example: int) -> float:
        """Right or wrong."""
        (index,) = params.values()
        hints = [int(part) for part in self.texts[index].split("+ hint ")[1:]]
        skill = -0.5 + sum(np.random.default_rng([7, hint]).normal(0.2, 0.7) for hint in hints)
        return float(_LUCK[index, example] < chance(skill)[example])


def lineage() -> Figure:
    """A tree of candidates, from left to right."""
    skills = Skills(["A", "B"])
    result = search(
        PromptSpace({"instruction": skills.texts}),
        skills.score,
        n_examples=_EXAMPLES,
        max_calls=600,
        seed=3,
        num_threads=1,
        embedder="index",
        proposers=[Hinting()],
        candidates=skills,
    )
    means = {m.params["instruction"]: 100 * m.posterior_mean for m in result.configurations}
    best = result.best_params["instruction"]
    line = {best, *(one.source for one in result.lineage("instruction", best))}
    born = {one.index: one.source for one in result.proposals if one.index in means}
    places = {index: max(0, index - 1) for index in sorted(means)}  # A and B are there from the beginning
    near: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
    figure, axes = panel(3.2)
    for child, parent in born.items():
        thick = {"color": _BLUE, "linewidth": 2.5} if {child, parent} <= line else {"color": _GREY}
        axes.plot([places[parent], places[child]], [means[parent], means[child]], zorder=1, **thick)
    for index, place in places.items():
        colour = _BLUE if index in line else _GREY if index in born else _ORANGE
        axes.plot(place, means[index], "o", color=colour, markersize=9 if index == best else 6)
        axes.annotate(
            _label(skills.texts[index]), (place, means[index]), (0, 7 if place % 2 else -14), **near
        )
    axes.set(xlabel="candidates in the order in which they were written", ylabel="score, %", xticks=[])
    axes.margins(y=0.15)
    return figure


def _label(text: str) -> str:
    root, *hints = text.split(" + hint ")
    return root if not hints else f"+{hints[-1]}"


def panel(height: float) -> tuple[Figure, Any]:
    """An empty picture."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(left=False)
    return figure, axes


def main() -> None:
    """Draw all pictures."""
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "m-promptune", "font.size": 9})
    matplotlib.rcParams["font.sans-serif"] = ["Helvetica", "Arial", "DejaVu Sans"]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    FOLDER.mkdir(exist_ok=True)
    results = searched()
    drawn = {"blocks": blocks(results[-1]), "posterior": posterior(results), "lineage": lineage()}
    for name, figure in drawn.items():
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
