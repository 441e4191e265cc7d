"""DSPy programs as configurations: the space of their prompts, building one, and scoring it."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import dspy
from dspy.teleprompt.utils import get_signature, set_signature

from mpromptune.execution.attempts import FAILURES
from mpromptune.execution.interrupts import contained
from mpromptune.execution.pool import Score, as_score
from mpromptune.execution.usage import Meter, current_meter
from mpromptune.lms.errors import blaming, classify
from mpromptune.lms.guard import measured, note_call
from mpromptune.mipro.demos import encodable, encodable_demo
from mpromptune.model.space import PromptSpace

logger = logging.getLogger(__name__)

T = TypeVar("T")
Keep = Callable[[Mapping[str, int], int, Any], None]

# Long runs of base64, as in data URLs of images and audio: digested, not embedded.
_BINARY = re.compile(r"[A-Za-z0-9+/_-]{256,}={0,2}")
# Programs kept built at a time; each is rebuilt from its indices when needed again, so that neither
# programs nor their LM histories pile up.
_BUILT = 64


class ProgramSpace:
    """Every choice of instruction and demos for the predictors of one program.

    Candidates that occur twice count once, so that no configuration is paid for under two names; the
    student's own instruction and demos are added where no candidate equals them.

    Args:
        program: The student; configuration `baseline` is exactly this program.
        instructions: Per predictor, its candidate instructions.
        demos: Per predictor, its candidate demo sets, or None when demos are not optimised.
    """

    def __init__(
        self,
        program: dspy.Module,
        instructions: Mapping[int, Sequence[str]],
        demos: Mapping[int, Sequence[Sequence[Any]]] | None,
    ) -> None:
        self.program = program
        self.instructions: dict[int, list[str]] = {}
        self.demos: dict[int, list[list[Any]]] = {}
        self.baseline: dict[str, int] = {}
        for i, predictor in enumerate(program.predictors()):
            own = get_signature(predictor).instructions
            self.instructions[i] = _distinct([*map(encodable, instructions[i]), own])
            self.baseline[f"{i}_predictor_instruction"] = _position(own, self.instructions[i])
            if demos:
                own_demos = list(predictor.demos)
                self.demos[i] = _distinct(
                    [*(list(map(encodable_demo, some)) for some in demos[i]), own_demos]
                )
                self.baseline[f"{i}_predictor_demos"] = _position(own_demos, self.demos[i])

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
            if text != get_signature(predictor).instructions:
                set_signature(predictor, get_signature(predictor).with_instructions(text))
            if i in self.demos:
                predictor.demos = list(self.demos[i][params[f"{i}_predictor_demos"]])
        return program


def _keep_nothing(params: Mapping[str, int], example: int, prediction: Any) -> None:
    pass


class ProgramRunner:
    """``score(params, example)``: runs a configuration on one validation example, wherever it is called.

    Args:
        programs: The configurations.
        valset: The validation examples.
        metric: ``metric(example, prediction)`` returning a number, a bool, or a prediction with
            ``.score``.
        keep: Called as ``keep(params, example, prediction)``, in the thread that has it; not in others'
            processes.
    """

    def __init__(
        self, programs: ProgramSpace, valset: Sequence[Any], metric: Any, keep: Keep = _keep_nothing
    ) -> None:
        self._parts = programs, valset, metric
        self._keep = keep
        self._built = lru_cache(maxsize=_BUILT)(lambda items: _Built(programs.build(dict(items))))

    def __reduce__(self) -> Any:  # without what has been built
        return ProgramRunner, self._parts

    def __call__(self, params: Mapping[str, int], example: int) -> float:
        """The metric's value; an exception of the program or of the metric is passed on."""
        _, valset, metric = self._parts
        built = self._built(tuple(sorted(params.items())))
        item = valset[example]
        try:
            # A trace of its own, or every call of the run would be kept in the caller's.
            with dspy.context(trace=[]), measured(current_meter()), blaming():
                prediction = built.program(**item.inputs())
                self._keep(params, example, prediction)
                return metric_value(metric(item, prediction))
        finally:
            built.forget()


class ProgramScorer:
    """The score of a search: a run of a program, and a line in the log for what a candidate failed on.

    Args:
        programs: The configurations.
        valset: The validation examples.
        metric: As a `ProgramRunner` takes it.
        show_traceback: Log where in the program a candidate's own errors come from.
        keep: As a `ProgramRunner` takes it.
        run: Runs a configuration on an example, where that is not to be done in this process.
    """

    def __init__(
        self,
        programs: ProgramSpace,
        valset: Sequence[Any],
        metric: Any,
        show_traceback: bool = False,
        keep: Keep = _keep_nothing,
        run: Score | None = None,
    ) -> None:
        self._run = run or ProgramRunner(programs, valset, metric, keep)
        self._show_traceback = show_traceback

    def __call__(self, params: dict[str, int], example: int) -> float:
        """The metric's value; an exception of the program or of the metric is passed on."""
        meter = current_meter() or Meter()
        before = meter.total
        try:
            score = contained(self._run, params, example)
        except Exception as error:
            self._log(error, params, example)
            raise
        note_call(meter.total - before)
        return score

    def _log(self, error: Exception, params: Mapping[str, int], example: int) -> None:
        """What scores ``failure_score`` would otherwise leave no trace; the other errors do."""
        if classify(error) in FAILURES:
            message = "Validation example %d failed with %s: %s: %s"
            exc_info = error if self._show_traceback else None
            logger.warning(message, example, dict(params), type(error).__name__, error, exc_info=exc_info)


class _Built:
    """A program and the modules whose LM history it would otherwise pile up."""

    def __init__(self, program: dspy.Module) -> None:
        self.program = program
        self._modules = [module for _, module in program.named_sub_modules()]

    def forget(self) -> None:
        for module in self._modules:
            if history := getattr(module, "history", None):
                history.clear()


def wants_traceback(own: bool | None) -> bool:
    """DSPy's ``provide_traceback``, which its settings decide unless it is given."""
    return bool(dspy.settings.provide_traceback if own is None else own)


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


def _distinct(items: Iterable[T]) -> list[T]:
    found: list[T] = []
    for item in items:
        if not any(_equal(item, other) for other in found):
            found.append(item)
    return found


def _position(item: T, items: Sequence[T]) -> int:
    return next(i for i, other in enumerate(items) if _equal(item, other))


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (TypeError, ValueError):  # demos that hold arrays have no single truth value
        return a is b
