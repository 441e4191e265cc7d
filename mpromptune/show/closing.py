"""The summary at the end of a compile: five lines, the last with what to do next."""

from __future__ import annotations

from mpromptune.show import analysis, words
from mpromptune.show.signs import warning_signs
from mpromptune.storage.findings import Findings

# NOTE: the next commands; `best` is what the examples of the documentation call the compiled program.
_SAVE, _REPORT = 'best.save("best.json")', 'best.search_result.report("report.html")'


def closing(
    findings: Findings, seconds: float, next_step: str | None = None, earlier: int = 0
) -> list[tuple[str, str]]:
    """Five lines on a finished search, each with a label.

    Args:
        findings: The result.
        seconds: Wall-clock time of all steps.
        next_step: What to do next; None for the lines of code that save the result.
        earlier: Number of the search's calls that earlier runs have made.
    """
    return [
        ("Score", _score(findings)),
        ("Certainty", _certainty(findings)),
        ("Winner", words.label(findings, findings.best_params)),
        ("Cost", _cost(findings, seconds, earlier)),
        ("Next", next_step or _next(findings)),
    ]


def _score(findings: Findings) -> str:
    both = [words.told(findings, one) for one in (analysis.baseline(findings), analysis.winner(findings))]
    scores = [
        f"{one.score} ({one.interval} from {one.examples})" if one.interval else one.score for one in both
    ]
    gained = words.gain_in_examples(findings)
    about = f", {gained}" if gained else f" on {findings.n_examples} validation examples"
    return f"{' → '.join(scores)}{about}"


def _certainty(findings: Findings) -> str:
    chance = analysis.chance_of_gain(findings)
    if findings.best_params == findings.baseline_params:
        text = "nothing better than your program was found, so it is the winner"
    elif chance is None:
        text = "not known: winner and baseline were not both measured"
    else:
        text = f"{words.percent(chance)} sure to be better than your program"
    if number := len(warning_signs(findings)):
        text += f"; {words.counted(number, 'doubt')} in the report"
    return text


def _cost(findings: Findings, seconds: float, earlier: int) -> str:
    used = findings.usage.total
    parts = [f"{used.program_calls:,} program calls", f"{used.lm_calls:,} LM calls"]
    if used.tokens:
        parts.append(f"{words.rounded(used.tokens)} tokens")
    if used.cost:
        parts.append(words.dollars(used.cost))
    time = words.duration(seconds)
    if not earlier:
        return ", ".join([*parts, time])
    new = f"{max(findings.calls - earlier, 0):,} calls of the search and {time}"
    return f"{', '.join(parts)} in all runs together; in this run: {new}"


def _next(findings: Findings) -> str:
    if findings.stopped_by is not None:
        return f"{_SAVE}; or raise {findings.stopped_by} and call again"
    known = analysis.winner(findings), analysis.baseline(findings)
    advice = "" if all(one is None or one.fully for one in known) else "; for exact scores: confirm=True"
    return f"{_SAVE}; {_REPORT}{advice}"
