"""The operators that rewrite an instruction from others: *contrast*, *merge* and *shorten*."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import dspy

from mpromptune.engine.proposers import Brief
from mpromptune.errors import ProposalDeclinedError, ProposalRefusedError
from mpromptune.operators.base import InstructionOperator, posteriors
from mpromptune.operators.guards import rules
from mpromptune.operators.texts import words

# NOTE: standard deviations on either side of the mean in a 95 % interval of a normal distribution.
_INTERVAL = 1.96
# NOTE: part of their different words that two instructions share if one is a version of the other.
_ALIKE = 0.8
# NOTE: characters from which an instruction is long: DSPy's proposer mostly writes less.
_LONG = 500
# NOTE: part of the parent's length that is left: saying less than half drops rules.
_SHORTER = 0.6


class FromContrast(dspy.Signature):  # type: ignore[misc]
    """Write a better instruction for a language model that performs a task.

    Find out what the instructions with high scores have in common and those with low scores lack or do wrong.
    The new instruction goes further in the direction of the good ones. It must be unlike the bad ones, and
    no mere paraphrase of a good one.
    """

    task: str = dspy.InputField(desc="The fields of the task, and its original instruction.")
    current_instruction: str = dspy.InputField(desc="The instruction to improve.")
    good_instructions: str = dspy.InputField(desc="The best so far: mean score, 95 % interval, text.")
    bad_instructions: str = dspy.InputField(desc="The worst so far: mean score, 95 % interval, text.")
    rules: str = dspy.InputField(desc="What the new instruction must keep to.")
    new_instruction: str = dspy.OutputField()


class FromTwo(dspy.Signature):  # type: ignore[misc]
    """Combine two instructions for the same task into one for a language model.

    Keep what either says and the other lacks, and say everything once. Where they contradict each other,
    follow the one with the higher score.
    """

    task: str = dspy.InputField(desc="The fields of the task, and its original instruction.")
    first_instruction: str = dspy.InputField(desc="Mean score, 95 % interval, text.")
    second_instruction: str = dspy.InputField(desc="Mean score, 95 % interval, text.")
    rules: str = dspy.InputField(desc="What the new instruction must keep to.")
    new_instruction: str = dspy.OutputField()


class Shorter(dspy.Signature):  # type: ignore[misc]
    """Shorten an instruction for a language model. Keep every rule; cut repetitions and empty words."""

    task: str = dspy.InputField(desc="The fields of the task, and its original instruction.")
    current_instruction: str = dspy.InputField(desc="The instruction to shorten.")
    length: str = dspy.InputField(desc="The length of the new instruction.")
    rules: str = dspy.InputField(desc="What the new instruction must keep to.")
    new_instruction: str = dspy.OutputField()


class Rewriter(InstructionOperator):
    """Base class of the operators with one request that has the task, the rules and other instructions."""

    def rewritten(self, brief: Brief, signature: Any, **inputs: Any) -> str:
        """The answer to one request."""
        own = self.setting.signature(brief.component)
        fields = " -> ".join(", ".join(some) for some in (own.input_fields, own.output_fields))
        told = {"task": f"{fields}\n{own.instructions}", "rules": rules(self.setting, brief.component)}
        return self.request(brief, signature, **told, **inputs)

    def scored(self, brief: Brief, indices: Iterable[int]) -> str:
        """Candidates with their posterior mean and interval, as far as they are measured."""
        known, scores = self.setting.known(brief, brief.component), posteriors(brief)
        return "\n\n".join(f"{_score(*scores[i]) if i in scores else 'unknown'}\n{known[i]}" for i in indices)


class Contrast(Rewriter):
    """Shows an LM the best and the worst instructions, with posterior means and intervals.

    Args:
        setting: The compile.
        number: Most instructions of each kind.
    """

    name = "contrast"

    def __init__(self, setting: Any, number: int = 3) -> None:
        super().__init__(setting)
        self._number = number

    def propose(self, brief: Brief) -> str:
        """See `mpromptune.engine.proposers.Proposer`."""
        parent, known = brief.parent[brief.component], self.setting.known(brief, brief.component)
        measured = [i for i in posteriors(brief) if i in known]
        number = min(self._number, len(measured) // 2)
        if not number:
            raise ProposalDeclinedError("Fewer than two instructions are measured, so none is the worst.")
        bad = [i for i in measured[-number:] if i != parent]
        if not bad:
            raise ProposalDeclinedError("The parent is the worst instruction, so there is none to be unlike.")
        return self.rewritten(
            brief,
            FromContrast,
            current_instruction=self.parent(brief),
            good_instructions=self.scored(brief, measured[:number]),
            bad_instructions=self.scored(brief, bad),
        )


class Merge(Rewriter):
    """Combines the parent's instruction with a good one that shares few of its words.

    The other is drawn by Thompson sampling: the best in a draw from the posterior of each.
    """

    name = "merge"

    def propose(self, brief: Brief) -> str:
        """See `mpromptune.engine.proposers.Proposer`."""
        known, own, rng = self.setting.known(brief, brief.component), brief.parent[brief.component], brief.rng
        drawn = {i: rng.normal(*score) for i, score in posteriors(brief).items() if i in known and i != own}
        unlike = [i for i in drawn if likeness(known[i], self.parent(brief)) < _ALIKE]
        if not unlike:
            raise ProposalDeclinedError("No measured instruction differs enough from the parent's.")
        other = max(unlike, key=lambda i: drawn[i])
        return self.rewritten(
            brief,
            FromTwo,
            first_instruction=self.scored(brief, [own]),
            second_instruction=self.scored(brief, [other]),
        )


class Shorten(Rewriter):
    """Shortens the parent's instruction; where it is short already, no request is made."""

    name = "shorten"

    def propose(self, brief: Brief) -> str:
        """See `mpromptune.engine.proposers.Proposer`."""
        parent = self.parent(brief)
        if len(parent) <= _LONG:
            raise ProposalDeclinedError(f"The parent's instruction is short: {len(parent)} characters.")
        length = f"At most {int(_SHORTER * len(parent))} characters; now it has {len(parent)}."
        text = self.rewritten(brief, Shorter, current_instruction=parent, length=length)
        if len(text) >= len(parent):
            raise ProposalRefusedError(
                f"The instruction is no shorter: {len(text)} of {len(parent)} characters."
            )
        return text


def likeness(one: str, other: str) -> float:
    """Number of different words in both texts, as a part of those in either (Jaccard's index)."""
    a, b = {*words(one)}, {*words(other)}
    return len(a & b) / len(a | b) if a | b else 1.0


def _score(mean: float, std: float) -> str:
    low, high = mean - _INTERVAL * std, mean + _INTERVAL * std
    return f"Score {mean:.3f} ({low:.3f} to {high:.3f}):"
