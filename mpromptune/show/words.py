"""Names, scores and amounts in words."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import lru_cache
from os.path import commonprefix
from typing import NamedTuple

from rich.filesize import pick_unit_and_suffix

from mpromptune.show.analysis import baseline, is_share, whole_score, winner
from mpromptune.storage.attributes import PREDICTORS
from mpromptune.storage.findings import Findings, Measured

_MIPRO_NAME = re.compile(r"^(\d+)_predictor_(instruction|demos)$")
# Characters that no name is shown with: they would act on a terminal, turn the direction of what follows, or
# be half of one, which cannot be drawn.
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# NOTE: characters in an excerpt of a text, a few words that fit beside a figure; and in the beginning that
# comes before the difference from another text, one or two words.
_EXCERPT, _HEAD = 28, 12


class Told(NamedTuple):
    """The score of a configuration on the whole validation set, in words.

    Attributes:
        score: The score.
        interval: Its 95 % interval: ``72.1 to 98.2 %``; empty if it was measured on all examples.
        examples: What it was measured on: ``20 of 60 examples``; empty if it was not measured.
    """

    score: str
    interval: str = ""
    examples: str = ""

    @property
    def basis(self) -> str:
        """How the score is known."""
        if self.interval:
            return f"estimate from {self.examples}, 95 %: {self.interval}"
        return f"measured on {self.examples}" if self.examples else ""


def told(findings: Findings, measured: Measured | None) -> Told:
    """The score of a configuration in words."""
    say = unit(findings)
    score, low, high = (math.nan,) * 3 if measured is None else whole_score(findings, measured)
    if measured is None or math.isnan(score):
        return Told(say(score))
    interval = "" if low == high or math.isnan(low) else f"{say(low).removesuffix(' %')} to {say(high)}"
    return Told(say(score), interval, f"{len(measured.scores)} of {findings.n_examples} examples")


def title(findings: Findings, component: str) -> str:
    """A readable name of a component, with the predictor's name in the program if the study has it."""
    return ", ".join(filter(None, _parts(findings, component)))


def _parts(findings: Findings, component: str) -> tuple[str, str]:
    """The predictor of a component, and which of its texts it is; either may be empty.

    The predictor has its name in the program, without ``.predict``; none if it is alone and has no name.
    """
    match = _MIPRO_NAME.match(component)
    if match is None:
        return _visible(component), ""
    index, kind = int(match[1]), match[2]
    names = [*map(_visible, findings.study.user_attrs.get(PREDICTORS, []))]
    short = [name.removesuffix(".predict") for name in names]
    if index < len(names) and names != ["self"]:  # which is DSPy's name of a program that is a predictor
        return (short if len({*short}) == len(short) else names)[index], kind
    is_alone = all(other.startswith(f"{index}_predictor_") for other in findings.best_params)
    return "" if is_alone else f"predictor {index + 1}", kind


def _visible(text: str) -> str:
    return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text)


def is_compile(findings: Findings) -> bool:
    """Whether the configurations are those of a DSPy program."""
    return all(map(_MIPRO_NAME.match, findings.best_params))


def label(findings: Findings, params: Mapping[str, int]) -> str:
    """A configuration in a few words: ``solve: “Think step by step.”, 2 demos``."""
    parts: dict[str, list[str]] = {}
    for component, index in params.items():
        name = candidate_name(findings, component, index)
        parts.setdefault(_parts(findings, component)[0], []).append(name)
    return "; ".join(f"{group}: {', '.join(words)}".removeprefix(": ") for group, words in parts.items())


def beside_winner(findings: Findings, params: Mapping[str, int]) -> str:
    """A configuration in a few words: only what differs, if it shares candidates with the winner."""
    others = {name: index for name, index in params.items() if findings.best_params.get(name) != index}
    is_near = 0 < len(others) < len(params) and params != findings.baseline_params
    return f"winner, but {label(findings, others)}" if is_near else label(findings, params)


def candidate_name(findings: Findings, component: str, index: int, in_short: bool = False) -> str:
    """A name of a candidate that is unique in its component; ``in_short`` only the number of its demos."""
    components = {} if findings.space is None else findings.space.components
    candidates = components.get(component, ())
    if index >= len(candidates):
        return f"no. {index}"
    candidate, kind = candidates[index], _parts(findings, component)[1]
    number = "" if isinstance(candidate, str) else counted(len(candidate), "demo")
    if number and (in_short or not candidate):
        return number
    if kind and candidate and index == (findings.baseline_params or {}).get(component):
        return f"own {kind}"
    texts = (" ".join((c if isinstance(c, str) else "\n".join(c)).split()) for c in candidates)
    excerpt = f"“{_excerpts(tuple(map(_visible, texts)))[index]}”"
    return f"{number} ({excerpt})" if number else excerpt


@lru_cache(maxsize=16)  # a page names each candidate many times, and all pairs of texts are compared
def _excerpts(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The beginnings of texts; where several begin alike, also what is at their first difference."""
    found = []
    for text in texts:
        shared = [len(commonprefix([text, other])) for other in texts if other != text]  # noqa: RUF071 - no paths
        differs = max((n for n in shared if n >= _EXCERPT), default=0)
        start = text.rfind(" ", 0, max(min(differs, len(text) - _EXCERPT), 0)) + 1
        end = start + _EXCERPT if len(text) > start + _EXCERPT + _HEAD else len(text)
        head = f"{text[: text.find(' ', _HEAD)]} … " if start > 2 * _HEAD else "…" if start else ""
        found.append(f"{head}{text[start:end]}{'…' if end < len(text) else ''}")
    return tuple(found)


def unit(findings: Findings) -> Callable[[float], str]:
    """A function that formats a score: in percent, or in the unit of the metric."""
    formatted: Callable[[float], str] = "{:.1%}".format if is_share(findings) else "{:.4g}".format
    return lambda score: formatted(score).replace("%", " %") if math.isfinite(score) else "not measured"


def points(findings: Findings, sign: str = "+") -> Callable[[float], str]:
    """A function that formats a difference of scores, by default with its sign: in points, or as `unit`."""
    if is_share(findings):
        return lambda difference: f"{100 * difference:{sign}.1f} points"
    return lambda difference: f"{difference:{sign}.4g}"


def gain_in_examples(findings: Findings) -> str:
    """The gain as a number of examples, if answers are right or wrong; empty without one."""
    found = findings.best_score - findings.baseline_score
    if found != found or not {s for m in findings.configurations for s in m.scores.values()} <= {0.0, 1.0}:
        return ""
    both = winner(findings), baseline(findings)
    about = "" if all(m is not None and m.fully for m in both) else "about "
    right = round(found * findings.n_examples)
    more = f"{abs(right)} {'more' if right > 0 else 'fewer'} of {findings.n_examples} right"
    return f"{about}{more}" if right else ""


def counted(number: int, what: str) -> str:
    """A number of things in words: ``no demos``, ``1 demo``, ``2 demos``."""
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def percent(chance: float) -> str:
    """A probability in words; never one of 0 or 100 %."""
    number = "over 99" if chance > 0.99 else "under 1" if chance < 0.01 else f"{100 * chance:.0f}"
    return f"{number} %"


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
