"""Figures of a result: what they show is what is in it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from handmade import BASELINE, OTHER, SPACE, WINNER, findings, study_of

from mpromptune.errors import InvalidArgumentError, MissingExtraError
from mpromptune.execution.usage import StepUsage, Usage
from mpromptune.sampling.encoding import encode_prompts
from mpromptune.show import plots

ALL = [
    plots.plot_growth,
    plots.plot_leaders,
    plots.plot_map,
    plots.plot_effects,
    plots.plot_examples,
    plots.plot_usage,
]


@pytest.fixture
def matplotlib() -> Any:
    return pytest.importorskip("matplotlib")


@pytest.mark.parametrize("plot", ALL, ids=lambda plot: plot.__name__)
def test_every_figure_can_be_drawn(matplotlib: Any, plot: Any) -> None:
    """Each returns a figure that pyplot, with its global state, has not been asked for."""
    figure = plot(findings())
    figure.draw_without_rendering()
    assert isinstance(figure, matplotlib.figure.Figure)
    assert figure.axes


def test_growth_is_drawn_against_calls(matplotlib: Any) -> None:
    """The line goes through the best estimates at the calls spent; the baseline is a line of its own."""
    trials, best, baseline = plots.plot_growth(findings()).axes[0].lines
    assert trials.get_ydata().tolist() == [0.0, 0.5, 0.75, 0.5]
    assert best.get_xdata().tolist() == [2, 4, 8, 10]
    assert best.get_ydata().tolist() == [0.3, 0.5, 0.7, 0.7]
    assert list(baseline.get_ydata()) == [0.3, 0.3]
    # One that was never scored has none.
    assert len(plots.plot_growth(findings(configurations=(WINNER, OTHER))).axes[0].lines) == 2


def test_leaders_are_limited(matplotlib: Any) -> None:
    """As many as asked for, with their calls, the winner first and in bold."""
    first, second = plots.plot_leaders(findings(), limit=2).axes[0].get_yticklabels()
    assert (first.get_text(), second.get_text()) == (
        "“Answer <b>slowly</b>.”, no demos (4)",
        "own instruction, 1 demo (“</pre><script>alert(1)</script>”) (2)",
    )
    assert (first.get_fontweight(), second.get_fontweight()) == ("bold", "normal")


def test_dollars_in_names_are_no_formulas(matplotlib: Any) -> None:
    """Components may have any name."""
    odd = {"price_$x$_{": 0}
    named = tuple(type(m)(odd, m.scores, m.posterior_mean, m.posterior_std, m.fully) for m in (WINNER, OTHER))
    plots.plot_leaders(findings(configurations=named)).draw_without_rendering()
    plots.plot_effects(findings(configurations=named)).draw_without_rendering()


def test_map_keeps_distances() -> None:
    """Winner and baseline differ in the instruction (4), the third and the baseline in demos (1)."""
    distances = findings().distances
    assert distances is not None
    found = plots.distances_between([WINNER, BASELINE, OTHER], distances)
    assert found.tolist() == [[0.0, 4.0, 5.0], [4.0, 0.0, 1.0], [5.0, 1.0, 0.0]]
    points = plots.classical_scaling(found)
    between = ((points[:, None] - points[None]) ** 2).sum(axis=-1)
    assert between == pytest.approx(found)  # up to a turn


def test_map_needs_distances() -> None:
    """A search that compared candidates by identity has no map."""
    assert encode_prompts(SPACE, None).distances() is None
    with pytest.raises(InvalidArgumentError, match="no distances"):
        plots.plot_map(findings(distances=None))


def test_candidates_without_a_view_are_the_same_or_different() -> None:
    """Where one component was embedded, another that has only empty demo sets is told by identity."""
    space = type(SPACE)({"instruction": ["a", "b"], "demos": [[], []]})
    vectors = {"a": [0.0, 1.0], "b": [1.0, 0.0]}
    distances = encode_prompts(space, lambda texts: np.array([vectors[t] for t in texts])).distances()
    assert distances is not None
    assert distances["instruction"].tolist() == distances["demos"].tolist() == [[0.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("usage", "unit"),
    [
        (Usage(program_calls=3, prompt_tokens=5, cost=0.1), "US dollars"),
        (Usage(program_calls=3, prompt_tokens=5), "tokens"),
        (Usage(program_calls=3), "program calls"),
    ],
)
def test_usage_is_shown_in_the_dearest_unit_known(matplotlib: Any, usage: Usage, unit: str) -> None:
    """Dollars where there are any, otherwise tokens, otherwise calls."""
    assert plots.plot_usage(findings(usage=StepUsage(search=usage))).axes[0].get_xlabel() == unit


@pytest.mark.parametrize("plot", ALL, ids=lambda plot: plot.__name__)
def test_nothing_to_draw_is_said(plot: Any) -> None:
    """A result in which nothing was measured has no figures."""
    empty = findings(configurations=(), study=study_of(()), usage=StepUsage())
    with pytest.raises(InvalidArgumentError):
        plot(empty)


def test_missing_matplotlib_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error holds the command."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'm-promptune\[plots\]'"):
        plots.plot_growth(findings())
