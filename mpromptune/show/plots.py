"""Figures of a search, similar to ``optuna.visualization``; needs ``m-promptune[plots]``."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import islice
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from mpromptune.errors import InvalidArgumentError, MissingExtraError
from mpromptune.model.space import FloatArray
from mpromptune.show.analysis import (
    baseline,
    example_scores,
    growth,
    is_share,
    main_effects,
    never_solved,
    random_in_full,
    random_in_hindsight,
)
from mpromptune.show.words import beside_winner, candidate_name, title
from mpromptune.storage.findings import Findings, Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Distinct with colour blindness, and against white and black.
BLUE, ORANGE, GREY, GREEN = "#3b6fb6", "#c46f17", "#808690", "#1b7f5c"
_OF_BASELINE: dict[str, Any] = {"color": ORANGE, "linestyle": "--", "linewidth": 1, "label": "baseline"}
_WIDTH = 4.8
# NOTE: most configurations in a map: the eigenvectors of a distance matrix of this size take a second.
_MAPPED = 1000
# NOTE: fraction of the trials at either end that may lie outside the figure of growth: with blocks of ten,
# these are trials in which two or more examples were not as expected.
_FAR_OFF = 0.1
# NOTE: characters in a line of a name, which fill a figure.
_NAME = 62
# NOTE: most candidates of a component in a figure; the others are worse.
_CANDIDATES = 6
# NOTE: most intervals between the ticks of an axis of scores, so that labels such as "100.0 %" stand apart.
_TICKS = 5


def plot_growth(findings: Findings) -> Figure:
    """Scores against the calls of the search: of each trial, and of the best configuration measured so far.

    The line is the highest posterior mean so far, where all posterior means are those at the end of the
    search. The score of a trial is the mean on its own examples (outliers are not shown). Two further lines
    show random choice: the highest posterior mean of as many configurations as the search had measured
    (dotted), and the highest score of as many as the calls allow to measure in full (dashed); the latter
    includes luck, the former does not.
    """
    steps = _some(growth(findings), "trial with a score")
    figure, axes = _panel(3.6)
    calls = [step.calls for step in steps]
    axes.plot(calls, [s.score for s in steps], ".", color=GREY, alpha=0.6, label="trial, on its examples")
    best = [step.best if np.isfinite(step.best) else np.nan for step in steps]
    axes.step(calls, best, where="post", color=BLUE, label="best estimate so far")
    _random_lines(axes, findings, calls)
    if own := baseline(findings):
        axes.axhline(own.posterior_mean, **_OF_BASELINE)
    # Outliers would compress the rest.
    trials, *others = (np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.lines)
    shown = np.concatenate([np.quantile(trials, [_FAR_OFF, 1.0 - _FAR_OFF]), *others])
    low, high = float(np.nanmin(shown)), float(np.nanmax(shown))
    margin = 0.05 * (high - low) or 0.05
    axes.set(xlabel="calls of the search", ylabel="score", ylim=(low - margin, high + margin))
    _set_unit(axes.yaxis, findings)
    _add_legend(figure, axes)
    return figure


def _random_lines(axes: Axes, findings: Findings, calls: Sequence[int]) -> None:
    """Draw the lines of random choice, if the result has random configurations."""
    style: dict[str, Any] = {"where": "post", "color": GREEN}
    if hindsight := random_in_hindsight(findings):
        axes.step(calls, hindsight, linestyle=":", label="best of as many at random", **style)
    if full := random_in_full(findings):
        known = [*(findings.n_examples * (k + 1) for k in range(len(full))), findings.calls]
        axes.step(known, [*full, full[-1]], linestyle="--", label="best at random, all in full", **style)


def plot_leaders(findings: Findings, limit: int = 10) -> Figure:
    """The configurations with the highest posterior means, ± one standard deviation.

    Args:
        findings: The findings of the search.
        limit: Most configurations to show.
    """
    leaders = _some(findings.configurations[:limit], "configuration that was measured")
    figure, axes = _panel(0.8 + 0.5 * len(leaders))
    means, deviations = [m.posterior_mean for m in leaders], [m.posterior_std for m in leaders]
    axes.errorbar(means, range(len(leaders)), xerr=deviations, fmt="o", color=BLUE, ecolor=GREY)
    names = [f"{_short(beside_winner(findings, m.params))} ({len(m.scores)})" for m in leaders]
    _name_rows(axes, findings, names, [m.params == findings.best_params for m in leaders])
    axes.set_xlabel("estimate ± std (in brackets: examples)")
    _set_unit(axes.xaxis, findings)
    _add_legend(figure, axes)
    return figure


def plot_map(findings: Findings) -> Figure:
    """The configurations in two dimensions; near ones have similar prompts.

    The positions are found by classical scaling of the model's distances, summed over components.

    Raises:
        InvalidArgumentError: The search did not embed texts, or measured fewer than three.
    """
    between = findings.distances or {}
    # The texts of candidates that were written during the search were not embedded.
    shown = [
        m for m in findings.configurations if all(m.params[name] < len(d) for name, d in between.items())
    ]
    shown = shown[:_MAPPED]
    if not between or len(shown) < 3:
        raise InvalidArgumentError(
            f"A map needs three configurations and the distances between their texts; got {len(shown)}"
            f"{'' if between else ' and no distances'}."
        )
    points = classical_scaling(distances_between(shown, between))
    figure, axes = _panel(3.6)
    drawn = axes.scatter(
        points[:, 0],
        points[:, 1],
        c=[m.posterior_mean for m in shown],
        s=[12 + 60 * len(m.scores) / findings.n_examples for m in shown],
        cmap="viridis",
        alpha=0.85,
    )
    _set_unit(figure.colorbar(drawn, ax=axes, label="estimate").ax.yaxis, findings)
    for params, name in ((findings.baseline_params, "baseline"), (findings.best_params, "winner")):
        for place in (i for i, m in enumerate(shown) if m.params == params):
            axes.annotate(name, points[place], xytext=(6, 6), textcoords="offset points")
    axes.set(xticks=[], yticks=[], xlabel="larger dots: measured on more examples")
    return figure


def plot_effects(findings: Findings) -> Figure:
    """The best candidates of each component, by the mean estimate of the configurations with each."""
    effects = main_effects(findings)
    _some(list(effects), "configuration that was measured")
    rows = [min(len(candidates), _CANDIDATES) for candidates in effects.values()]
    figure = _figure(0.4 + 0.5 * len(rows) + 0.42 * sum(rows))
    panels = figure.subplots(len(rows), 1, squeeze=False, sharex=True, height_ratios=rows)[:, 0]
    for axes, (component, candidates), n in zip(panels, effects.items(), rows, strict=True):
        best = dict(islice(candidates.items(), n))
        axes.plot([fmean(means) for means in best.values()], range(n), "o", color=BLUE)
        names = [
            f"{_short(candidate_name(findings, component, i))} ({len(means)})" for i, means in best.items()
        ]
        _name_rows(axes, findings, names, [findings.best_params.get(component) == i for i in best])
        more = f", the best {n} of {len(candidates)}" if len(candidates) > n else ""
        axes.set_title(_short(f"{title(findings, component)}{more}"), loc="left", fontsize="medium")
    panels[-1].set_xlabel("mean estimate (in brackets: configurations)")
    _set_unit(panels[-1].xaxis, findings)
    _add_legend(figure, panels[-1])
    return figure


def _name_rows(axes: Axes, findings: Findings, names: Sequence[str], are_bold: Sequence[bool]) -> None:
    """Names above the rows of a figure, from the top down, and the baseline's estimate between the names.

    So all of its width is left for the rows.
    """
    rows = np.arange(len(names))
    axes.set_yticks(rows - 0.4, names, fontsize="small", ha="left", va="center")
    axes.tick_params(axis="y", length=0, pad=0)
    for tick, is_bold in zip(axes.get_yticklabels(), are_bold, strict=True):
        tick.set_fontweight("bold" if is_bold else "normal")
    if own := baseline(findings):
        axes.vlines([own.posterior_mean] * len(rows), rows - 0.2, rows + 0.35, **_OF_BASELINE)
    axes.set_ylim(len(names) - 0.5, -0.9)
    axes.spines[["top", "right", "left"]].set_visible(False)


def plot_examples(findings: Findings) -> Figure:
    """The mean score of every validation example over the configurations measured on it, hardest first."""
    examples, hard = example_scores(findings), set(never_solved(findings))
    _some(list(examples), "example that was measured")
    figure, axes = _panel(3.0)
    places, means = np.arange(len(examples)), np.array([fmean(scores) for scores in examples.values()])
    is_hard = np.array([example in hard for example in examples])
    axes.plot(places[~is_hard], means[~is_hard], ".", color=BLUE, label="some configuration solves it")
    if hard:
        axes.plot(places[is_hard], means[is_hard], "x", color=ORANGE, label="none does")
        axes.legend(frameon=False)
    axes.set(xlabel="validation examples, the hardest first", ylabel="mean score")
    _set_unit(axes.yaxis, findings)
    return figure


def plot_usage(findings: Findings) -> Figure:
    """The usage of each step: in US dollars if known, otherwise in tokens or in program calls."""
    measures = (("US dollars", "cost"), ("tokens", "tokens"), ("program calls", "program_calls"))
    unit, attribute = next((m for m in measures if getattr(findings.usage.total, m[1])), ("", ""))
    if not unit:
        raise InvalidArgumentError("Nothing is known of what the search used: its usage is empty.")
    figure, axes = _panel(0.9 + 0.35 * len(findings.usage))
    steps = sorted(findings.usage)  # which is their order: bootstrap, propose, search
    axes.barh(steps, [getattr(findings.usage[step], attribute) for step in steps], color=BLUE)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    return figure


def distances_between(configurations: Sequence[Measured], distances: dict[str, FloatArray]) -> FloatArray:
    """Squared distances between configurations, ``n x n``: the sum of those of their components."""
    total = np.zeros((len(configurations), len(configurations)))
    for name, between in distances.items():
        chosen = [m.params[name] for m in configurations]
        total += between[np.ix_(chosen, chosen)]
    return total


def classical_scaling(squared: FloatArray) -> FloatArray:
    """Points in the plane, ``n x 2``, whose squared distances are near the given ones.

    Torgerson's method: the leading eigenvectors of the doubly centred matrix.
    """
    centred = squared - squared.mean(axis=0) - squared.mean(axis=1)[:, None] + squared.mean()
    values, vectors = np.linalg.eigh(-0.5 * centred)
    vectors = vectors[:, ::-1][:, :2]
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), [0, 1]])  # which eigh leaves open
    points: FloatArray = vectors * signs * np.sqrt(np.maximum(values[::-1][:2], 0.0))
    return points


def _figure(height: float) -> Figure:
    """One that no global state knows of."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "Figures need matplotlib, which is not installed: pip install 'm-promptune[plots]'"
        ) from error
    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _panel(height: float) -> tuple[Figure, Axes]:
    figure = _figure(height)
    axes: Axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _set_unit(axis: Axis, findings: Findings) -> None:
    """Few enough ticks that their labels stand apart, in percent if scores are."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axis.set_major_locator(MaxNLocator(_TICKS))
    if is_share(findings):
        axis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))


def _add_legend(figure: Figure, axes: Axes) -> None:
    """Above the figure; none if nothing in it has a name."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize="small")


def _some(items: Sequence[Any], what: str) -> Sequence[Any]:
    if not items:
        raise InvalidArgumentError(f"There is nothing to draw: the result has no {what}.")
    return items


def _short(text: str) -> str:
    """A name that fits in a figure, with dollar signs escaped, since they would begin a formula."""
    return textwrap.shorten(text, _NAME, placeholder=" …").replace("$", r"\$")
