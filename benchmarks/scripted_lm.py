"""A task in DSPy, and language models for it whose answers are a known function of the request.

A case has a kind in every step of the program. A step is right with a chance that depends on the instruction:
the rule for the kind of the case helps, and every distractor harms; a demo of the same kind helps a little.
The answer is right if all steps are. What is wrong, the metric says in words, as metrics for `dspy.GEPA` do.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from math import exp, prod
from statistics import NormalDist
from typing import Any

import dspy
from dspy.teleprompt.gepa.gepa_utils import ScoreWithFeedback

from benchmarks.lms import completion, uniform

FIELDS = ("facts", "plan", "answer")
KINDS = ("amounts", "dates", "names", "places", "units", "sources", "exceptions", "signs")
RULES = {field: tuple(f"State the {kind} in the {field}." for kind in KINDS) for field in FIELDS}
DISTRACTORS = tuple(f"Write like a {who}." for who in ("poet", "pirate", "lawyer", "child", "robot", "king"))
# NOTE: logits. A program starts with 40 % right answers, whatever the number of its steps, and has over 90 %
# with all rules and demos; nothing else was looked at when these were chosen.
START, RULE, DISTRACTOR, DEMO = {1: -0.4, 3: 1.2}, 3.0, -0.4, 0.5
# Standard deviation of the difficulty of a case in a step, in logits.
DIFFICULTY = 1.0
# Chances that a writer loses a statement of the instruction that it rewrites, and that it adds a distractor.
LOST, DISTRACTED = 0.1, 0.25
# Inputs of a request to combine two instructions.
_COMBINED = ("first_instruction", "second_instruction")
# An input field in a request of DSPy, and its value.
_INPUT = re.compile(r"\[\[ ## (\w+) ## \]\]\n(.*?)\n\n(?=\[\[ ##|Respond with)", re.DOTALL)
# A step that went wrong, and the rule that it needed.
_MARK = re.compile(r"\[(\w+) (\d+)\]")


class Chain(dspy.Module):  # type: ignore[misc]
    """A program of one predictor for each of the last ``n_steps`` fields."""

    def __init__(self, n_steps: int) -> None:
        super().__init__()
        self.fields = FIELDS[-n_steps:]
        for before, field in zip((None, *self.fields), self.fields, strict=False):
            inputs = "question" if before is None else f"question, {before}"
            setattr(self, field, dspy.Predict(dspy.Signature(f"{inputs} -> {field}", task_of(field))))

    def forward(self, question: str) -> Any:
        """The prediction of the last step."""
        said: dict[str, str] = {}
        for field in self.fields:
            prediction = getattr(self, field)(question=question, **said)
            said = {field: prediction[field]}
        return prediction


def task_of(field: str) -> str:
    """How every instruction for a step begins."""
    return f"Work out the {field} of the case."


class ScriptedLM(dspy.BaseLM):  # type: ignore[misc]
    """Answers at once, from the request and the rollout id alone.

    Args:
        name: Name of the model.
        answer: The value of an output field, of its name, the messages and the rollout id.
        on_call: Called before every answer with the names of the fields.
    """

    def __init__(
        self,
        name: str,
        answer: Callable[[str, list[Any], object], str],
        on_call: Callable[[Sequence[str]], None],
    ) -> None:
        super().__init__(name, "chat", 0.0, 1000, False)
        self._answer, self._on_call = answer, on_call

    def forward(self, prompt: str | None = None, messages: list[Any] | None = None, **kwargs: Any) -> Any:
        """One completion, as DSPy's chat or JSON adapter asks for it."""
        messages = messages or []
        rollout = kwargs.get("rollout_id", self.kwargs.get("rollout_id"))
        asked = str(messages[-1]["content"]).rsplit("Respond with", 1)[-1]
        in_json = asked.lstrip().startswith("a JSON object")
        names = re.findall(r"`(?:\[\[ ## )?(\w+)(?: ## \]\])?`", asked)
        fields = [name for name in names if name != "completed"]
        self._on_call(fields)
        answers = {field: self._answer(field, messages, rollout) for field in fields}
        if in_json:
            return completion(json.dumps(answers), 0.0)
        blocks = (f"[[ ## {field} ## ]]\n{value}" for field, value in answers.items())
        return completion("\n\n".join((*blocks, "[[ ## completed ## ]]")), 0.0)

    def copy(self, **kwargs: Any) -> ScriptedLM:
        """The same model with another rollout or temperature."""
        twin = ScriptedLM(self.model, self._answer, self._on_call)
        twin.kwargs = {**self.kwargs, **kwargs}
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> ScriptedLM:
        return self


class Scripted:
    """The task and its language models.

    Args:
        n_steps: Predictors of the program, 1 or 3.
        seed: Same seed, same cases, and same answers to the same requests.

    Attributes:
        task_lm: Runs the program.
        prompt_lm: Writes instructions.
        program: The student.
        log: True for every program call so far, False for every request to ``prompt_lm``.
    """

    def __init__(self, n_steps: int, seed: int) -> None:
        self.n_steps, self.seed = n_steps, seed
        self.program = Chain(n_steps)
        self.log: list[bool] = []
        self._lock = threading.Lock()
        self.task_lm = ScriptedLM("scripted-task", self._solve, self._count_step)
        self.prompt_lm = ScriptedLM("scripted-prompt", self._write, lambda fields: self._count(False))

    def examples(self, start: int, stop: int) -> list[dspy.Example]:
        """The cases with these numbers."""
        pairs = ((f"Case {number}", self._label(number)) for number in range(start, stop))
        return [dspy.Example(question=q, answer=a).with_inputs("question") for q, a in pairs]

    def kind(self, field: str, number: int) -> int:
        """Index of the rule that a case needs in a step: k in proportion to 1 / (k + 2)."""
        shares = [1 / (k + 2) for k in range(len(KINDS))]
        left = uniform(self.seed, "kind", field, number) * sum(shares)
        for kind, share in enumerate(shares):
            left -= share
            if left < 0:
                return kind
        return len(KINDS) - 1

    def chance(self, field: str, instruction: str, demos: Iterable[int], number: int) -> float:
        """Probability that a step is right.

        Args:
            field: The output of the step.
            instruction: A text with the instruction.
            demos: The numbers of the cases in the demos.
            number: The number of the case.
        """
        kind = self.kind(field, number)
        difficulty = DIFFICULTY * NormalDist().inv_cdf(uniform(self.seed, "difficulty", field, number))
        logit = START[self.n_steps] - difficulty
        logit += RULE * (RULES[field][kind] in instruction)
        logit += DISTRACTOR * sum(one in instruction for one in DISTRACTORS)
        logit += DEMO * any(self.kind(field, demo) == kind for demo in demos)
        return 1 / (1 + exp(-logit))

    def accuracy(self, program: Any, numbers: Iterable[int]) -> float:
        """Expected share of right answers of a program on the cases with these numbers."""
        steps = []
        for field, predictor in zip(self.program.fields, program.predictors(), strict=True):
            demos = _numbers(demo.get("question") for demo in predictor.demos)
            steps.append((field, predictor.signature.instructions, demos))
        values = [prod(self.chance(*step, number) for step in steps) for number in numbers]
        return sum(values) / len(values)

    def metric(
        self, gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None
    ) -> Any:
        """1.0 if the answer is right; feedback names the rules that were needed."""
        score = float(pred.answer == gold.answer)
        if trace is not None and pred_name is None:  # the bootstrap only asks whether it is right
            return score
        broken = [RULES[field][int(kind)] for field, kind in _MARK.findall(pred.answer)]
        feedback = " ".join(("This is wrong. What it lacks:", *broken)) if broken else "This is right."
        return ScoreWithFeedback(score=score, feedback=feedback)

    def _label(self, number: int) -> str:
        return f"{int(1e6 * uniform(self.seed, 'label', number))}"

    def _solve(self, field: str, messages: list[Any], rollout: object) -> str:
        """The output of a step, with a mark for every step that went wrong."""
        system, *demos, last = (str(message["content"]) for message in messages)
        (number,) = _numbers([last])
        marks = [f"[{step} {kind}]" for step, kind in _MARK.findall(last)]
        chance = self.chance(field, system, _numbers(demos), number)
        if uniform(self.seed, system, demos, last, rollout) > chance:
            marks.append(f"[{field} {self.kind(field, number)}]")
        if marks:
            return f"unclear {' '.join(marks)}"
        return self._label(number) if field == "answer" else f"{field} of {number}"

    def _write(self, field: str, messages: list[Any], rollout: object) -> str:
        """A new instruction, or a few words about something else."""
        request = [str(message["content"]) for message in messages]
        luck = _Luck(self.seed, request, rollout)
        inputs = dict(_INPUT.findall(request[-1]))
        if field == "proposed_instruction":
            return _fresh(inputs["basic_instruction"], luck)
        if field == "new_instruction":
            return _rewritten(inputs, luck)
        return "Cases are worked out."

    def _count_step(self, fields: Sequence[str]) -> None:
        if self.program.fields[0] in fields:
            self._count(True)

    def _count(self, is_program_call: bool) -> None:
        with self._lock:
            self.log.append(is_program_call)


class _Luck:
    """Random numbers that depend on a request alone."""

    def __init__(self, *parts: object) -> None:
        self._parts, self._drawn = parts, 0

    def __call__(self) -> float:
        self._drawn += 1
        return uniform(*self._parts, self._drawn)

    def some(self, values: Sequence[str], number: int) -> list[str]:
        """At most so many of some values, in random order."""
        return sorted(values, key=lambda _: self())[:number]


def _fresh(basic: str, luck: _Luck) -> str:
    """What can be written without any failure: one to three statements, good and bad ones."""
    field = field_of(basic)
    return _text(field, luck.some([*RULES[field], *DISTRACTORS], 1 + int(3 * luck())))


def _rewritten(inputs: dict[str, str], luck: _Luck) -> str:
    """Most of what the instructions say, and one or two of the rules that the rest of the request names.

    The rest are examples with feedback, or good instructions; where two instructions are to be combined, it
    is empty.
    """
    given = " ".join(inputs.get(name, "") for name in ("current_instruction", *_COMBINED))
    shown = " ".join(inputs.get(name, "") for name in ("examples_with_feedback", "good_instructions"))
    field = field_of(given)
    had = statements(field, given)
    said = [one for one in had if luck() >= LOST]
    said += luck.some([one for one in statements(field, shown) if one not in had], 1 + int(2 * luck()))
    if luck() < DISTRACTED:
        said += luck.some([one for one in DISTRACTORS if one not in said], 1)
    return _text(field, said)


def statements(field: str, text: str) -> list[str]:
    """The rules of a step and the distractors in a text."""
    return [one for one in (*RULES[field], *DISTRACTORS) if one in text]


def field_of(text: str) -> str:
    """The step that an instruction is for."""
    return next(field for field in FIELDS if task_of(field) in text)


def _text(field: str, said: Sequence[str]) -> str:
    return " ".join((task_of(field), *said))


def _numbers(texts: Iterable[Any]) -> list[int]:
    """The numbers of the cases in some texts."""
    return [int(number) for text in texts for number in re.findall(r"Case (\d+)", str(text))]
