"""The report of a search as one self-contained HTML page; its template is page.html."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from mpromptune.errors import InvalidArgumentError, MissingExtraError
from mpromptune.execution.usage import Usage
from mpromptune.model.space import Candidate
from mpromptune.show import analysis, descent, plots, readings, signs, words
from mpromptune.show.progress import QUANTILE
from mpromptune.show.readings import Reading
from mpromptune.storage.attributes import ESTIMATE
from mpromptune.storage.findings import Findings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEADERS = 10
_LISTED = 60
# NOTE: most words in texts that are compared word by word, which takes quadratic time: about a second for
# this many.
_COMPARED_WORDS = 3000
# NOTE: smallest share of words that both texts have for such a comparison; less similar texts are shown one
# after another.
_ALIKE = 0.6


def write_report(findings: Findings, path: str | os.PathLike[str], notes: Sequence[str] = ()) -> Path:
    """Write the page of `render` to a file.

    Returns:
        The file's path.

    Raises:
        InvalidArgumentError: The file cannot be written.
    """
    page, file = render(findings, notes), Path(path)
    try:
        file.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise InvalidArgumentError(f"The report cannot be written to {os.fspath(path)!r}: {error}") from error
    return file


def render(findings: Findings, notes: Sequence[str] = ()) -> str:
    """The HTML page. Without matplotlib, it has a sentence instead of figures.

    Args:
        findings: The findings of the search.
        notes: Further notes for the reader, one or two sentences each.
    """
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters.update(prose=_prose)
    source = resources.files("mpromptune.show").joinpath("page.html").read_text(encoding="utf-8")
    figures, missing = _figures(findings)
    return environment.from_string(source).render(
        findings=findings,
        analysis=analysis,
        descent=descent,
        signs=signs,
        words=words,
        points=words.points(findings),
        changes=_changes(findings),
        spent=_spent(findings),
        notes=notes,
        leaders=_leaders(findings),
        figures=figures,
        missing=missing,
        listed=_LISTED,
        quantile=QUANTILE,
    )


def _prose(sentence: str) -> Markup:
    """A sentence as HTML: with code between backquotes, and no line break before a percent sign."""
    text = re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", str(escape(sentence)))
    return Markup(re.sub("`(.+?)`", r"<code>\1</code>", text))


def _changes(findings: Findings) -> list[dict[str, Any]]:
    """The changes from baseline to winner by component, and how its candidate was written."""
    before = findings.baseline_params or findings.best_params
    origins = descent.descents(findings)
    changes = []
    for component, new in findings.best_params.items():
        old, origin = before.get(component, new), origins.get(component)
        candidates = () if findings.space is None else findings.space.components[component]
        change = {
            "title": words.title(findings, component),
            "new": words.candidate_name(findings, component, new, in_short=True),
            "changed": old != new,
            "pieces": _difference(candidates[old], candidates[new]) if candidates else {},
            "origin": origin,
            "steps": [_difference(a, b) for a, b in pairwise(origin.texts)] if origin else [],
        }
        changes.append(change)
    return changes


def _difference(old: Candidate, new: Candidate) -> dict[str, list[tuple[str, str]]]:
    """Pieces that are kept, removed or added: "words" of texts that are alike, otherwise "cards"."""
    if not (isinstance(old, str) and isinstance(new, str)):
        before, after = ([one] if isinstance(one, str) else list(one) for one in (old, new))
        return {"cards": [(mark, text) for mark, texts in _marked(before, after) for text in texts]}
    a, b = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (old, new))
    pieces = [] if max(len(a), len(b)) > _COMPARED_WORDS else [*_marked(a, b)]
    kept = sum(len(texts) for mark, texts in pieces if mark == "kept")
    if 2 * kept < _ALIKE * (len(a) + len(b)):
        return {"cards": [("removed", old), ("added", new)]}
    return {"words": [(mark, "".join(texts)) for mark, texts in pieces]}


def _marked(old: Sequence[str], new: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    for kind, i, j, k, m in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            yield "kept", old[i:j]
            continue
        yield "removed", old[i:j]
        yield "added", new[k:m]


def _leaders(findings: Findings) -> list[dict[str, Any]]:
    """The best configurations and the baseline: the winner first, then by score."""
    roles = {"winner": findings.best_params, "baseline": findings.baseline_params}
    shown = [
        m for place, m in enumerate(findings.configurations) if place < _LEADERS or m.params in roles.values()
    ]
    shown.sort(key=lambda m: (m.params != findings.best_params, -analysis.whole_score(findings, m)[0]))
    return [
        {
            "name": words.beside_winner(findings, m.params),
            "roles": [role for role, params in roles.items() if params == m.params],
            "told": words.told(findings, m),
        }
        for m in shown
    ]


def _spent(findings: Findings) -> dict[str, Any]:
    """Usage of each step, in their order, the estimate for all of them, and the duration of the search."""
    estimate = findings.study.user_attrs.get(ESTIMATE, {})
    planned = sum((Usage(**used) for used in estimate.values()), Usage())
    # By the alphabet, which is the order of the steps: bootstrap, propose, search.
    rows = {**dict(sorted(findings.usage.items())), "total": findings.usage.total} if findings.usage else {}
    if rows and estimate:
        rows["estimated at most"] = planned
    trials = findings.study.get_trials(deepcopy=False)
    began = [t.datetime_start for t in trials if t.datetime_start]
    ended = [t.datetime_complete for t in trials if t.datetime_complete]
    took = (max(ended) - min(began)).total_seconds() if began and ended else 0.0
    return {
        "steps": rows,
        "planned": planned,
        "took": words.duration(took),
        "ended": max(ended, default=None),
    }


# Heading, reading and drawing of each figure.
_FIGURES: dict[str, tuple[str, Callable[[Findings], Reading], Callable[[Findings], Figure]]] = {
    "growth": ("How the score grew with the calls of the search", readings.growth, plots.plot_growth),
    "examples": ("How hard the validation examples are", readings.examples, plots.plot_examples),
    "leaders": ("The leading configurations", readings.leaders, plots.plot_leaders),
    "effects": ("Scores by candidate", readings.effects, plots.plot_effects),
    "map": ("Configurations by similarity of their prompts", readings.similarity, plots.plot_map),
}


def _figures(findings: Findings) -> tuple[list[tuple[str, ...]], str]:
    """Name, heading, readings and drawing of the figures that can be drawn; a message if none can."""
    figures: list[tuple[str, ...]] = []
    for name, (heading, read, draw) in _FIGURES.items():
        if name == "effects" and len(findings.best_params) == 1:  # they are those of the configurations
            continue
        try:
            drawing = _svg(draw(findings), name)
        except MissingExtraError as error:
            return [], str(error)
        except InvalidArgumentError:  # the findings lack the data of this figure
            continue
        figures.append((name, heading, *read(findings), drawing))
    return figures, ""


def _svg(figure: Any, name: str) -> str:
    """The SVG of a figure, labelled by its caption, with texts as text and the page's colour for black."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        # Characters that matplotlib's font lacks are drawn by the reader's browser.
        warnings.simplefilter("ignore", UserWarning)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=metadata, transparent=True)
    drawing = file.getvalue()
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing[drawing.index("<svg") :], flags=re.DOTALL)
    drawing = re.sub(r'\sxmlns(:\w+)?="[^"]*"|\sid="[a-zA-Z0-9.]+_\d+"', "", drawing)
    drawing = drawing.replace("#000000", "currentColor")
    return drawing.replace("<svg ", f'<svg role="img" aria-labelledby="caption-{name}" ', 1)
