"""The summary at the end of a compile: five lines, the last with what to do next."""

from __future__ import annotations

from datetime import timedelta

from rich.filesize import pick_unit_and_suffix

from mpromptune.show import analysis
from mpromptune.show.signs import warning_signs
from mpromptune.storage.findings import Findings

# NOTE: the next commands; `best` is what the examples of the documentation call the compiled program.
_SAVE, _REPORT = 'best.save("best.json")', 'best.search_result.report("report.html")'


def closing(findings: Findings, seconds: float, next_step: str | None = None) -> list[tuple[str, str]]:
    """Five lines on a finished search, each with a label.

    Args:
        findings: The result.
        seconds: Wall-clock time of all steps.
        next_step: What to do next; None for the lines of code that save the result.
    """
    return [
        ("Score", _score(findings)),
        ("Certainty", _certainty(findings)),
        ("Winner", analysis.label(findings, findings.best_params)),
        ("Cost", _cost(findings, seconds)),
        ("Next", next_step or _next(findings)),
    ]


def _score(findings: Findings) -> str:
    say = analysis.unit(findings)
    gained = analysis.gain_in_examples(findings)
    about = f", {gained}" if gained else f" on {findings.n_examples} validation examples"
    return f"{say(findings.baseline_score)} → {say(findings.best_score)}{about}"


def _certainty(findings: Findings) -> str:
    chance = analysis.chance_of_gain(findings)
    if findings.best_params == findings.baseline_params:
        text = "nothing better than your program was found, so it is the winner"
    elif chance is None:
        text = "not known: winner and baseline were not both measured"
    else:
        text = f"{analysis.percent(chance)} sure to be better than your program"
    if number := len(warning_signs(findings)):
        text += f"; {analysis.counted(number, 'doubt')} in the report"
    return text


def _cost(findings: Findings, seconds: float) -> str:
    used = findings.usage.total
    parts = [f"{findings.calls:,} program calls", f"{used.lm_calls:,} LM calls"]
    if used.tokens:
        parts.append(f"{rounded(used.tokens)} tokens")
    if used.cost:
        parts.append(dollars(used.cost))
    return ", ".join([*parts, duration(seconds)])


def _next(findings: Findings) -> str:
    if findings.stopped_by is not None:
        return f"{_SAVE}; or raise {findings.stopped_by} and call again"
    return f"{_SAVE}; {_REPORT}"


def rounded(number: int) -> str:
    """A number in thousands, millions or billions: ``1.2M``."""
    unit, suffix = pick_unit_and_suffix(number, ["", "k", "M", "G"], 1000)
    return f"{number / unit:.1f}{suffix}" if suffix else str(number)


def dollars(amount: float) -> str:
    """US dollars, with four decimals below one."""
    return f"${amount:.2f}" if amount >= 1 or not amount else f"${amount:.4f}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=int(seconds)))
