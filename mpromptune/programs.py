"""DSPy programs as configurations: the space of their prompts, building one, and scoring it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import dspy
from dspy.teleprompt.utils import get_signature, set_signature

from mpromptune.execution import as_score
from mpromptune.space import PromptSpace

# Long runs of base64, as in data URLs of images and audio: digested, not embedded.
_BINARY = re.compile(r"[A-Za-z0-9+/]{256,}={0,2}")
# Programs kept built at a time; each is rebuilt from its indices when needed again, so that neither
# programs nor their LM histories pile up.
_BUILT = 64


class ProgramSpace:
    """Every choice of instruction and demos for the predictors of one program.

    Args:
        program: The student; configuration `baseline` is exactly this program.
        instructions: Per predictor, its candidate instructions; the first is the student's own.
        demos: Per predictor, its candidate demo sets, or None when demos are not optimised. The
            student's own demos are added where no set equals them.
    """

    def __init__(
        self,
        program: dspy.Module,
        instructions: Mapping[int, Sequence[str]],
        demos: Mapping[int, Sequence[Sequence[Any]]] | None,
    ) -> None:
        self.program = program
        self.instructions = {i: list(texts) for i, texts in instructions.items()}
        self.demos: dict[int, list[list[Any]]] = {}
        self.baseline: dict[str, int] = {}
        for i, predictor in enumerate(program.predictors()):
            self.baseline[f"{i}_predictor_instruction"] = 0
            if demos:
                own = list(predictor.demos)
                self.demos[i] = [list(demo_set) for demo_set in demos[i]]
                if own not in self.demos[i]:
                    self.demos[i].append(own)
                self.baseline[f"{i}_predictor_demos"] = self.demos[i].index(own)

    def prompt_space(self) -> PromptSpace:
        """The texts of all candidates, under MIPROv2's parameter names."""
        components: dict[str, Sequence[Any]] = {}
        for i, instructions in self.instructions.items():
            components[f"{i}_predictor_instruction"] = instructions
            if i in self.demos:
                sets = [[demo_text(demo) for demo in demos] for demos in self.demos[i]]
                components[f"{i}_predictor_demos"] = sets
        return PromptSpace(components)

    def build(self, params: Mapping[str, int]) -> dspy.Module:
        """A fresh program with the chosen instructions and demos."""
        program = self.program.deepcopy()
        for i, predictor in enumerate(program.predictors()):
            text = self.instructions[i][params[f"{i}_predictor_instruction"]]
            set_signature(predictor, get_signature(predictor).with_instructions(text))
            if i in self.demos:
                predictor.demos = list(self.demos[i][params[f"{i}_predictor_demos"]])
        return program


class ProgramScorer:
    """``score(params, example)``: runs a configuration on one validation example.

    Args:
        programs: The configurations.
        valset: The validation examples.
        metric: ``metric(example, prediction)`` returning a number, a bool, or a prediction with
            ``.score``.
    """

    def __init__(self, programs: ProgramSpace, valset: Sequence[Any], metric: Any) -> None:
        self._valset = valset
        self._metric = metric
        self._built = lru_cache(maxsize=_BUILT)(lambda items: programs.build(dict(items)))

    def __call__(self, params: Mapping[str, int], example: int) -> float:
        program = self._built(tuple(sorted(params.items())))
        item = self._valset[example]
        # A trace of its own, or every call of the run would be kept in the caller's.
        with dspy.context(trace=[]):
            return metric_value(self._metric(item, program(**item.inputs())))


def metric_value(value: Any) -> float:
    """What a metric returned, as a number.

    Raises:
        ScoreError: It is not a finite number, a bool, or a prediction with such a ``score``.
    """
    if isinstance(value, dspy.Example) and "score" in value:
        value = value["score"]
    return as_score(value)


def demo_text(demo: Any) -> str:
    """All fields of a demo as text, whatever its signature; binary content is digested."""
    fields = demo.items() if hasattr(demo, "items") else [("demo", demo)]
    lines = [f"{name}: {value}" for name, value in fields if name != "augmented"]
    return _BINARY.sub(_digest, "\n".join(lines))


def _digest(match: re.Match[str]) -> str:
    return hashlib.sha256(match.group().encode()).hexdigest()[:16]
