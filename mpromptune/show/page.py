"""A search as one HTML page that needs nothing else: no script, no network."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from mpromptune.errors import InvalidArgumentError, MissingExtraError
from mpromptune.execution.usage import Usage
from mpromptune.model.space import Candidate
from mpromptune.show import plots
from mpromptune.show.analysis import gain, label, never_solved, title
from mpromptune.show.signs import warning_signs
from mpromptune.storage.findings import Findings, Measured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEADERS = 20
_LISTED = 60
# NOTE: comparing texts word by word takes the square of their length: a second or so for this many.
_COMPARED_WORDS = 3000
# NOTE: of difflib's ratio. Texts that have less in common read better one after the other.
_ALIKE = 0.6

_FIGURES: tuple[tuple[str, str, Callable[[Findings], Figure]], ...] = (
    (
        "How the score grew with program calls",
        "Random choice stands beside it twice: measuring every configuration it draws on all examples, "
        "which is what it takes to know the best of them, and drawing as many as the search had met, with "
        "the best known in hindsight, as it is for the search's own line.",
        plots.plot_growth,
    ),
    ("The leading configurations", "", plots.plot_leaders),
    (
        "Configurations by likeness of their prompts",
        "The nearer two dots, the more alike their texts, as the embedder sees them.",
        plots.plot_map,
    ),
    (
        "What each candidate is worth",
        "Mean estimate of the configurations that were measured with it.",
        plots.plot_effects,
    ),
    ("How hard the validation examples are", "", plots.plot_examples),
    ("What each step used", "", plots.plot_usage),
)

_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1d2430; --paper: #fbfbfa; --line: #d8dbe0; --soft: #f0f1f3;
  --added: #d5f0da; --removed: #fbdcd9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --paper: #16191e; --line: #3a404a;
  --soft: #22262d; --added: #1f4a2a; --removed: #5a2a26; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 52rem; margin: 0 auto; padding: 1rem; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; }
.headline { font-size: 1.6rem; margin: .5rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; vertical-align: top; padding: .3rem .7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
tr.winner { font-weight: 600; }
.wide { overflow-x: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .8rem;
  border-radius: .4rem; max-height: 40rem; overflow-y: auto; }
ins { background: var(--added); text-decoration: none; } del { background: var(--removed); }
figure { margin: 1.5rem 0; } figcaption { margin-bottom: .4rem; }
figure svg { max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
.signs li { margin: .4rem 0; }
@media print { figure, tr { break-inside: avoid; } pre { max-height: none; } }
footer { margin-top: 3rem; border-top: 1px solid var(--line); color: GrayText; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


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
    sections = (
        _headline(findings),
        _list("Warning signs", warning_signs(findings) or ["None was found."]),
        _list("About this page", notes),
        _section("From the baseline to the winner", _changes(findings)),
        _section("Leading configurations", _leaders(findings)),
        _section("Figures", "\n".join(_figures(findings))),
        _section("What was used", _usage(findings)),
        _section("Examples that no configuration solves", _hard_examples(findings)),
        f"<footer>Study {escape(repr(findings.study.study_name))}, written by m-promptune.</footer>",
    )
    return _PAGE.substitute(title="Prompt search report", body="\n".join(filter(None, sections)))


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>\n{body}</section>" if body else ""


def _list(heading: str, sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return _section(heading, f'<ul class="signs">{items}</ul>' if items else "")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], winner: int | None = None) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = [
        f"<tr{' class=winner' if i == winner else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for i, row in enumerate(rows)
    ]
    return f'<div class="wide"><table><tr>{cells}</tr>\n{"".join(lines)}</table></div>'


def _headline(findings: Findings) -> str:
    before, after = _score(findings.baseline_score), _score(findings.best_score)
    found = gain(findings)
    gained = "" if found is None else f" Gain: {found[0]:+.3g} ± {found[1]:.2g} (standard error)."
    cost = findings.usage.total.cost
    spent = f", ${cost:.4g}" if cost else ""
    facts = (
        f"{findings.calls} program calls on {findings.n_examples} validation examples{spent}; "
        f"{len(findings.configurations)} configurations measured.{gained}"
    )
    scores = f'<p class="headline">{before} → <strong>{after}</strong></p>'
    return f"{scores}\n<p>Baseline → winner. {escape(facts)}</p>"


def _score(score: float) -> str:
    return f"{score:.4g}" if score == score else "not measured"


def _changes(findings: Findings) -> str:
    """Per component, the baseline's candidate against the winner's."""
    before = findings.baseline_params
    if before is None:
        return f"<p>The winner is {escape(label(findings.best_params))}; the baseline is not known.</p>"
    if before == findings.best_params:
        return "<p>The baseline is the winner: nothing changes.</p>" + _prompts(findings, before)
    indices = f"<p>{escape(label(before))} → {escape(label(findings.best_params))}</p>"
    if findings.space is None:
        return indices + "<p>The texts of the candidates are not known.</p>"
    return indices + _prompts(findings, before)


def _prompts(findings: Findings, before: dict[str, int]) -> str:
    if findings.space is None:
        return ""
    parts = []
    for name, candidates in findings.space.components.items():
        old, new = candidates[before[name]], candidates[findings.best_params[name]]
        same = " (unchanged)" if old == new else ""
        parts.append(f"<h3>{escape(title(name))}{same}</h3>\n<pre>{_difference(old, new)}</pre>")
    return "\n".join(parts)


def _difference(old: Candidate, new: Candidate) -> str:
    """HTML of a text, word by word, or of a set of demos, demo by demo."""
    if isinstance(old, str) and isinstance(new, str):
        words = _words(old), _words(new)
        if max(map(len, words)) > _COMPARED_WORDS or SequenceMatcher(None, *words).ratio() < _ALIKE:
            return _marked([old], [new], "\n\n")
        return _marked(*words, "")
    return _marked(_demos(old), _demos(new), "\n\n") or "no demos"


def _demos(candidate: Candidate) -> list[str]:
    return [candidate] if isinstance(candidate, str) else list(candidate)


def _words(text: str) -> list[str]:
    return re.findall(r"\s+|\w+|[^\w\s]", text)


def _marked(old: Sequence[str], new: Sequence[str], between: str) -> str:
    """What was taken away and what was added, piece by piece."""
    pieces: list[str] = []
    for kind, i, j, k, m in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        before, after = escape(between.join(old[i:j])), escape(between.join(new[k:m]))
        if kind == "equal":
            pieces.append(before)
            continue
        pieces += [f"<del>{before}</del>"] if j > i else []
        pieces += [f"<ins>{after}</ins>"] if m > k else []
    return between.join(pieces)


def _leaders(findings: Findings) -> str:
    if not findings.configurations:
        return "<p>Nothing was measured.</p>"
    shown = findings.configurations[:_LEADERS]
    place = next((i for i, m in enumerate(shown) if m.params == findings.best_params), None)
    head = ("configuration", "estimate", "± std", "observed mean", "examples")
    return _table(head, [_leader(m, findings) for m in shown], place)


def _leader(measured: Measured, findings: Findings) -> tuple[str, ...]:
    roles = {"winner": findings.best_params, "baseline": findings.baseline_params}
    role = "".join(f" — {name}" for name, params in roles.items() if params == measured.params)
    return (
        label(measured.params) + role,
        _score(measured.posterior_mean),
        f"{measured.posterior_std:.2g}",
        _score(measured.mean),
        f"{len(measured.scores)} of {findings.n_examples}",
    )


def _figures(findings: Findings) -> Iterator[str]:
    for heading, about, draw in _FIGURES:
        try:
            figure = draw(findings)
        except MissingExtraError as error:
            yield f"<p>{escape(str(error))}</p>"
            return
        except InvalidArgumentError:  # what this figure is about is not known
            continue
        caption = f"<strong>{escape(heading)}</strong>{f'<br>{escape(about)}' if about else ''}"
        yield f"<figure><figcaption>{caption}</figcaption>\n{_svg(figure)}</figure>"


def _svg(figure: Any) -> str:
    """The drawing alone: no XML header, no metadata, no names of XML's own."""
    file = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=metadata)
    drawing = file.getvalue()
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing[drawing.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", drawing)


def _usage(findings: Findings) -> str:
    head = (
        "step",
        "program calls",
        "LM calls",
        "cache hits",
        "tokens in",
        "tokens out",
        "US dollars",
        "seconds",
    )
    if not findings.usage:
        return "<p>Nothing is known of it.</p>"
    steps = [*findings.usage.items(), ("total", findings.usage.total)]
    about = "<p>Seconds are those of all threads together; dollars as far as prices are known.</p>"
    return _table(head, [_used(step, usage) for step, usage in steps]) + about


def _used(step: str, usage: Usage) -> tuple[str, ...]:
    counts = (
        usage.program_calls,
        usage.lm_calls,
        usage.cache_hits,
        usage.prompt_tokens,
        usage.completion_tokens,
    )
    return (step, *(str(count) for count in counts), f"{usage.cost:.4f}", f"{usage.seconds:.0f}")


def _hard_examples(findings: Findings) -> str:
    hard = sorted(never_solved(findings), key=lambda one: one.example)
    if not hard:
        return "<p>None: on every example that was measured, some configuration is better than the worst.</p>"
    listed = ", ".join(f"{one.example} ({one.count})" for one in hard[:_LISTED])
    more = f" and {len(hard) - _LISTED} more" if len(hard) > _LISTED else ""
    return (
        f"<p>On {len(hard)} examples no configuration scores above the lowest score of the search. "
        "They may be too hard, or their labels wrong. Index of the validation set (configurations "
        f"measured on it): {listed}{more}.</p>"
    )
