"""The operator *reflect*: rewrites an instruction from what it fails at, through GEPA's protocol.

The failures go to a ``ProposalFn`` of GEPA (Agrawal et al. 2025, arXiv 2507.19457), the user's or the default
one, as a reflective dataset: ``Inputs``, ``Generated Outputs`` and ``Feedback`` of the predictor per example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import dspy
import numpy as np
from dspy.teleprompt.gepa import instruction_proposal
from gepa.strategies.instruction_proposal import InstructionProposalSignature

from mpromptune.engine.proposers import Brief
from mpromptune.errors import InvalidArgumentError, ProposalDeclinedError, ProposalRefusedError
from mpromptune.lms.adapters import watched
from mpromptune.model.space import Gain
from mpromptune.operators.base import InstructionOperator, Setting, asking, predictor_of
from mpromptune.operators.guards import rules
from mpromptune.operators.texts import shortened

# NOTE: most characters of one value of an example: six examples of this length are some 10,000 tokens.
_VALUE = 3000
# What DSPy 3.4 names its proposer; earlier versions have only GEPA's own prompt.
_DSPY_PROPOSER = "InstructionProposer"

Record = dict[str, Any]


class Reflect(InstructionOperator):
    """Shows an LM what the parent fails at, and what other prompts answer there.

    Two thirds of the failures shown are examples that another configuration solves, the others are solved
    by none, as far as there are such; some successes are shown so that nothing gets worse.

    Args:
        setting: The compile.
        failures: Most examples shown that the parent fails at.
        successes: Most examples shown that it succeeds at.

    Raises:
        InvalidArgumentError: ``instruction_proposer`` cannot be called.
    """

    name = "reflect"
    # NOTE: less doubt than of a proposer of which nothing is known: GEPA, which writes like this, gains 12
    # points on six tasks, and the gains of another task are uncertain.
    gain = Gain(0.1, 0.5)

    def __init__(self, setting: Setting, failures: int = 4, successes: int = 2) -> None:
        super().__init__(setting)
        self._failures, self._successes = failures, successes
        given = setting.instruction_proposer
        if given is not None and not callable(given):
            raise InvalidArgumentError(
                "instruction_proposer must be a function of candidate, reflective_dataset and "
                f"components_to_update, as in dspy.GEPA; got {given!r}."
            )

    def propose(self, brief: Brief) -> str:
        """See `mpromptune.engine.proposers.Proposer`."""
        name = self.setting.names[predictor_of(brief.component)]
        records = [self._record(run, name, brief) for run in self._chosen(brief)]
        write = self.setting.instruction_proposer or default_proposer(rules(self.setting, brief.component))
        with asking(self.lm, self.setting.temperature, brief):
            written = write(
                candidate=self.setting.instructions(brief),
                reflective_dataset={name: records},
                components_to_update=[name],
            )
        if not isinstance(written, Mapping) or name not in written:
            said = shortened(repr(written), 200)
            raise ProposalRefusedError(f"instruction_proposer returned no text for {name!r}, but {said}.")
        text: str = written[name]
        return text

    def _chosen(self, brief: Brief) -> list[_Run]:
        """The examples to show, failures first.

        Raises:
            ProposalDeclinedError: Nothing that may be shown is known to fail.
        """
        runs, rng = runs_of_parent(brief, self.setting.visible), brief.rng
        lost = [run for run in runs if run.best > run.score]
        level = [run for run in runs if run.best <= run.score]
        failed = [run for run in level if run.score < run.top]
        if not lost and not failed:
            raise ProposalDeclinedError("The parent fails at no example that may be shown.")
        some = max(ceil(2 * self._failures / 3), self._failures - len(failed))
        chosen = _drawn(lost, some, rng)
        chosen += _drawn(failed, self._failures - len(chosen), rng)
        good = [run for run in level if run not in chosen and run.is_good]
        return chosen + _drawn(good, self._successes, rng)

    def _record(self, run: _Run, name: str, brief: Brief) -> Record:
        """One example of GEPA's reflective dataset."""
        own = run.note.get("predictors", {}).get(name) or run.note
        outputs = run.note.get("outputs")
        said = [run.verdict, _block("Expected", run.note.get("expected"))]
        if own.get("outputs") != outputs:
            said.append(_block("Outputs of the whole program", outputs))
        if run.better is not None:
            theirs = run.better.get("predictors", {}).get(name) or run.better
            said.append(_block("Outputs with the other prompt", theirs.get("outputs")))
        said.append(_block("Feedback", run.note.get("feedback")))
        return {
            "Inputs": _plain(own.get("inputs")),
            "Generated Outputs": _plain(own.get("outputs")),
            "Feedback": "\n".join(filter(None, said)),
        }


@dataclass(frozen=True, eq=False)
class _Run:
    """The parent on one example.

    Attributes:
        note: What the score function said about it.
        score: Its score.
        best: The highest score of other configurations on the example; its own if there are none.
        better: What was said about that configuration, if it is better and has a note.
        bottom: The lowest score there can be, as far as is known.
        top: The highest.
    """

    note: Mapping[str, Any]
    score: float
    best: float
    better: Mapping[str, Any] | None
    bottom: float
    top: float

    @property
    def is_good(self) -> bool:
        """Whether the score is in the upper half of the scale."""
        return 2 * self.score >= self.bottom + self.top

    @property
    def weight(self) -> float:
        """What could be gained; 1 if nothing could."""
        return (self.best if self.best > self.score else self.top) - self.score or 1.0

    @property
    def verdict(self) -> str:
        """The score in words."""
        if self.best > self.score:
            said = f"With another prompt the score was {self.best:g}."
        elif self.score < self.top:
            said = "No prompt so far does better on this example."
        else:
            said = "This succeeds: nothing about it should change."
        return f"Score {self.score:g} on a scale of {self.bottom:g} to {self.top:g}. {said}"


def runs_of_parent(brief: Brief, visible: frozenset[int]) -> list[_Run]:
    """The parent on each visible example with a note; else another configuration with its candidate."""
    standings, component = brief.standings, brief.component
    own = [j for j, m in enumerate(standings) if m.params[component] == brief.parent[component]]
    own.sort(key=lambda j: standings[j].params != brief.parent)
    scale = _scale([score for m in standings for example, score in m.scores.items() if example in visible])
    runs = []
    for example in sorted({e for j, e in brief.notes if e in visible}):
        noted = (j for j in own if (j, example) in brief.notes and example in standings[j].scores)
        if (mine := next(noted, None)) is None:
            continue
        scores = {j: m.scores[example] for j, m in enumerate(standings) if example in m.scores}
        score = scores.pop(mine)
        # Of several with the highest score, one with a note.
        j = max(scores, key=lambda j: (scores[j], (j, example) in brief.notes), default=mine)
        best = scores.get(j, score)
        better = brief.notes.get((j, example)) if best > score else None
        runs.append(_Run(brief.notes[mine, example], score, best, better, *scale))
    return runs


def _scale(scores: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest score: 0 and 1 as usual in DSPy if that is possible, else what was seen."""
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    return (0.0, 1.0) if low >= 0.0 and high <= 1.0 else (low, high)


def _drawn(runs: Sequence[_Run], number: int, rng: np.random.Generator) -> list[_Run]:
    """At most ``number`` runs, drawn in proportion to what could be gained."""
    if not runs:
        return []
    weights = np.array([run.weight for run in runs])
    chosen = rng.choice(len(runs), min(number, len(runs)), replace=False, p=weights / weights.sum())
    return [runs[i] for i in chosen]


def _plain(values: Any) -> dict[str, str] | str:
    if not isinstance(values, Mapping):
        return "" if values is None else shortened(values, _VALUE)
    return {str(name): shortened(value, _VALUE) for name, value in values.items()}


def _block(title: str, values: Any) -> str | None:
    """Values under a title; None if there are none."""
    plain = _plain(values)
    lines = [f"{name}: {value}" for name, value in plain.items()] if isinstance(plain, dict) else [plain]
    text = "\n".join(lines)
    return f"{title}:\n{text}" if text else None


def default_proposer(said: str) -> Callable[..., dict[str, str]]:
    """The ``ProposalFn`` of DSPy, or of GEPA if DSPy has none, which tells the LM also what is ``said``."""
    if (cls := getattr(instruction_proposal, _DSPY_PROPOSER, None)) is not None:
        # Its own adapter would take an answer without text for one that cannot be parsed.
        proposer: Callable[..., dict[str, str]] = cls(
            additional_instructions=said, adapter=watched(dspy.JSONAdapter())
        )
        return proposer
    template = f"{InstructionProposalSignature.default_prompt_template}\n\n{said}"

    def propose(candidate: Any, reflective_dataset: Any, components_to_update: Any) -> dict[str, str]:
        return {
            name: InstructionProposalSignature.run(
                lm=_first_text,
                input_dict={
                    "current_instruction_doc": candidate[name],
                    "dataset_with_feedback": reflective_dataset[name],
                    "prompt_template": template,
                },
            )["new_instruction"]
            for name in components_to_update
        }

    return propose


def _first_text(prompt: Any) -> str:
    """The first output of the LM of DSPy's settings."""
    output = dspy.settings.lm(prompt)[0]
    return str(output["text"] if isinstance(output, Mapping) else output)
