"""A search as one HTML page that needs nothing else: no script, no network. Its looks are in page.html."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from difflib import SequenceMatcher
from html import escape
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

from mpromptune.errors import InvalidArgumentError, MissingExtraError
from mpromptune.execution.usage import Usage
from mpromptune.model.space import Candidate
from mpromptune.show import analysis, plots, signs
from mpromptune.show.progress import Standing
from mpromptune.storage.attributes import ESTIMATE
from mpromptune.storage.findings import Findings, Measured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEADERS = 20
_LISTED = 60
# NOTE: comparing texts word by word takes the square of their length: a second or so for this many.
_COMPARED_WORDS = 3000
# NOTE: of difflib's ratio. Texts that have less in common read better one after the other.
_ALIKE = 0.6


def write_report(findings: Findings, path: str | os.PathLike[str], notes: Sequence[str] = ()) -> Path:
    """Writes the page of `render` to a file.

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
    """The page. Without matplotlib, a sentence stands in the place of its figures.

    Args:
        findings: Of the search.
        notes: What else the reader should know, a sentence each.
    """
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    source = resources.files("mpromptune.show").joinpath("page.html").read_text(encoding="utf-8")
    hard = analysis.never_solved(findings)
    return environment.from_string(source).render(
        findings=findings,
        baseline=_score(findings, analysis.baseline(findings), findings.baseline_score),
        winner=_score(findings, analysis.winner(findings), findings.best_score, findings.best_interval),
        gained=_gained(findings),
        evidence=_evidence(findings),
        changes=_changes(findings),
        spent=_spent(findings),
        steps=signs.next_steps(findings),
        warnings=signs.warning_signs(findings),
        notes=notes,
        leaders=_leaders(findings),
        figures=list(_figures(findings)),
        hard=[(example, len(analysis.example_scores(findings)[example])) for example in hard[:_LISTED]],
        more=max(0, len(hard) - _LISTED),
    )


def _score(
    findings: Findings,
    measured: Measured | None,
    score: float,
    interval: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """A score in words, with its 95 % interval where it is an estimate, not measured on all examples."""
    say = analysis.unit(findings)
    if measured is None or measured.fully or score != score:
        return {"score": say(score), "interval": ""}
    model = Standing(measured.posterior_mean, measured.posterior_std, measured.mean, len(measured.scores))
    low, high = interval or model.interval
    if analysis.is_share(findings):
        low, high = max(low, 0.0), min(high, 1.0)
    return {"score": say(score), "interval": f"{say(low).removesuffix(' %')} to {say(high)}"}


def _gained(findings: Findings) -> str:
    """The gain, in examples where they are right or wrong."""
    gain = findings.best_score - findings.baseline_score
    if gain != gain or findings.best_params == findings.baseline_params:
        return ""
    both = analysis.winner(findings), analysis.baseline(findings)
    about = "" if all(m is not None and m.fully for m in both) else "about "
    if {s for m in findings.configurations for s in m.scores.values()} <= {0.0, 1.0}:
        right = round(gain * findings.n_examples)
        return f"{about}{abs(right)} {'more' if right >= 0 else 'fewer'} of {findings.n_examples} right"
    return f"{about}{_points(findings, gain)}"


def _points(findings: Findings, difference: float) -> str:
    return f"{100 * difference:+.1f} points" if analysis.is_share(findings) else f"{difference:+.4g}"


def _evidence(findings: Findings) -> Iterator[str]:
    """How sure it is that the winner is better, and how much of its score may be luck."""
    chance, best = analysis.chance_of_gain(findings), analysis.winner(findings)
    if findings.best_params == findings.baseline_params:
        yield "The baseline is the winner: there is no gain to be sure of."
    elif chance is None:
        yield "How sure the gain is cannot be said: winner and baseline were not both measured."
    else:
        bounded = "over 99" if chance > 0.99 else "under 1" if chance < 0.01 else f"{100 * chance:.0f}"
        yield f"By the model, the winner is better than the baseline with a probability of {bounded} %."
    if found := analysis.differences(findings):
        up, down = sum(d > 0 for d in found), sum(d < 0 for d in found)
        yield f"Of {len(found)} examples that both were measured on, it gains on {up} and loses on {down}."
    if best is not None:
        say = analysis.unit(findings)
        risk = "some of its score may be luck" if signs.is_lucky(best) else "low"
        expected = f"{say(best.posterior_mean)} ± {say(best.posterior_std)}"
        yield f"Risk of overfitting: {risk}. Measured {say(best.mean)}; the model expects {expected}."


def _changes(findings: Findings) -> list[dict[str, Any]]:
    """Per component, the baseline's candidate against the winner's: words of a text, or demos as cards."""
    before = findings.baseline_params or findings.best_params
    changes = []
    for component, new in findings.best_params.items():
        old = before.get(component, new)
        change: dict[str, Any] = {
            "title": analysis.title(findings, component),
            "old": analysis.candidate_name(findings, component, old),
            "new": analysis.candidate_name(findings, component, new),
            "changed": old != new,
            "words": [],
            "cards": [],
        }
        if findings.space is not None:
            candidates = findings.space.components[component]
            is_text = isinstance(candidates[old], str) and isinstance(candidates[new], str)
            change["words" if is_text else "cards"] = _difference(candidates[old], candidates[new])
        changes.append(change)
    return changes


def _difference(old: Candidate, new: Candidate) -> list[tuple[str, str]]:
    """Pieces of a text, word by word, or demos, each marked as kept, removed or added."""
    if not (isinstance(old, str) and isinstance(new, str)):
        before, after = ([one] if isinstance(one, str) else list(one) for one in (old, new))
        return [(mark, text) for mark, texts in _marked(before, after) for text in texts]
    a, b = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (old, new))
    if max(len(a), len(b)) > _COMPARED_WORDS or SequenceMatcher(None, a, b).ratio() < _ALIKE:
        return [("removed", old), ("added", new)]
    return [(mark, "".join(texts)) for mark, texts in _marked(a, b)]


def _marked(old: Sequence[str], new: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    for kind, i, j, k, m in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            yield "kept", old[i:j]
            continue
        yield "removed", old[i:j]
        yield "added", new[k:m]


def _leaders(findings: Findings) -> list[dict[str, Any]]:
    """The best, and the baseline wherever it stands."""
    roles = {"winner": findings.best_params, "baseline": findings.baseline_params}
    return [
        {
            "name": analysis.label(findings, m.params),
            "roles": [role for role, params in roles.items() if params == m.params],
            "examples": len(m.scores),
            **_score(findings, m, m.mean if m.fully else m.posterior_mean),
        }
        for place, m in enumerate(findings.configurations)
        if place < _LEADERS or m.params in roles.values()
    ]


def _spent(findings: Findings) -> dict[str, Any]:
    """By step: what was used, what the estimate had allowed, and how long the search took."""
    planned = {k: Usage(**used) for k, used in findings.study.user_attrs.get(ESTIMATE, {}).items()}
    rows = {**findings.usage, "total": findings.usage.total} if findings.usage else {}
    if planned:
        planned["total"] = sum(planned.values(), Usage())
    trials = findings.study.get_trials(deepcopy=False)
    began = [t.datetime_start for t in trials if t.datetime_start]
    ended = [t.datetime_complete for t in trials if t.datetime_complete]
    took = max(ended) - min(began) if began and ended else timedelta(0)
    return {"steps": rows, "planned": planned, "took": str(timedelta(seconds=round(took.total_seconds())))}


def _growth_reading(findings: Findings) -> str:
    steps, say = analysis.growth(findings), analysis.unit(findings)
    first = next(step for step in steps if step.best == steps[-1].best)
    at_random = analysis.random_in_full(findings)
    chance = f"; random choice could expect {say(at_random[-1])} of as many calls" if at_random else ""
    best = (
        f"The best configuration ({say(first.best)}) was met after {first.calls} of {steps[-1].calls} calls"
    )
    return f"{best}{chance}."


def _leaders_reading(findings: Findings) -> str:
    near, all_ = len(analysis.rivals(findings)), len(findings.configurations)
    return f"{near} of {all_} configurations are within one standard deviation of the winner."


def _map_reading(findings: Findings) -> str:
    if findings.text_chance is None:
        return "Where prompts that are alike score alike, neighbours have like colours."
    share = f"{100 * findings.text_chance:.0f} %"
    return f"Dealt out at random, the embeddings explain the scores as well in {share} of cases."


def _effects_reading(findings: Findings) -> str:
    means = {name: [fmean(m) for m in by.values()] for name, by in analysis.main_effects(findings).items()}
    spread = {name: max(of) - min(of) for name, of in means.items()}
    most = max(spread, key=lambda name: spread[name])
    between = _points(findings, spread[most]).removeprefix("+")
    return f"{analysis.title(findings, most)} matters most: {between} between its best and worst candidate."


def _examples_reading(findings: Findings) -> str:
    examples = analysis.example_scores(findings)
    highest = max(max(scores) for scores in examples.values())
    easy = sum(min(scores) == highest for scores in examples.values())
    hard = len(analysis.never_solved(findings))
    return (
        f"Of {len(examples)} examples, no configuration solves {hard}, and all that were asked solve {easy}."
    )


def _usage_reading(findings: Findings) -> str:
    total = findings.usage.total
    of = next(name for name in ("cost", "tokens", "program_calls") if getattr(total, name))
    step = max(findings.usage, key=lambda name: getattr(findings.usage[name], of))
    share = 100 * getattr(findings.usage[step], of) / getattr(total, of)
    return f"The step “{step}” took {share:.0f} % of it."


_FIGURES: tuple[tuple[str, str, Callable[[Findings], Figure], Callable[[Findings], str]], ...] = (
    (
        "How the score grew with program calls",
        "Random choice stands beside it twice: measuring every configuration it draws on all examples, "
        "which is what it takes to know the best of them, and drawing as many as the search had met, with "
        "the best known in hindsight, as it is for the search's own line.",
        plots.plot_growth,
        _growth_reading,
    ),
    ("The leading configurations", "", plots.plot_leaders, _leaders_reading),
    (
        "Configurations by likeness of their prompts",
        "The nearer two dots, the more alike their texts, as the embedder sees them.",
        plots.plot_map,
        _map_reading,
    ),
    (
        "What each candidate is worth",
        "Mean estimate of the configurations that were measured with it.",
        plots.plot_effects,
        _effects_reading,
    ),
    ("How hard the validation examples are", "", plots.plot_examples, _examples_reading),
    ("What each step used", "", plots.plot_usage, _usage_reading),
)


def _figures(findings: Findings) -> Iterator[Mapping[str, str]]:
    for heading, about, draw, read in _FIGURES:
        try:
            figure = draw(findings)
        except MissingExtraError as error:
            yield {"heading": "", "about": str(error), "reading": "", "svg": ""}
            return
        except InvalidArgumentError:  # what this figure is about is not known
            continue
        reading = read(findings)
        name = escape(f"{heading}. {reading}")
        yield {"heading": heading, "about": about, "reading": reading, "svg": _svg(figure, name)}


def _svg(figure: Any, name: str) -> str:
    """The drawing alone, named for screen readers, with texts as texts and the page's colour for black."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=metadata, transparent=True)
    drawing = file.getvalue()
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing[drawing.index("<svg") :], flags=re.DOTALL)
    drawing = re.sub(r'\sxmlns(:\w+)?="[^"]*"|\sid="[a-zA-Z0-9.]+_\d+"', "", drawing)
    drawing = drawing.replace("#000000", "currentColor")
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
