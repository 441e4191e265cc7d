"""DSPy programs as configurations: the space of their prompts, and building and scoring a configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import dspy
from dspy.teleprompt.utils import get_signature, set_signature

from mpromptune.errors import ProposalRefusedError
from mpromptune.execution.attempts import FAILURES
from mpromptune.execution.interrupts import contained
from mpromptune.execution.notes import Noted, attach_note, note_of
from mpromptune.execution.pool import Score
from mpromptune.execution.usage import Meter, current_meter
from mpromptune.lms.errors import blaming, classify
from mpromptune.lms.guard import note_call
from mpromptune.lms.metering import measured
from mpromptune.mipro.checkpoint import demos_from_json, demos_to_json, gives_same_prompt
from mpromptune.mipro.metric import adapted, metric_value
from mpromptune.mipro.notes import note_of_call
from mpromptune.model.space import Candidate, PromptSpace
from mpromptune.operators.base import demos_of, instruction_of, predictor_of
from mpromptune.operators.texts import candidate_text, encodable, encodable_demo

logger = logging.getLogger(__name__)

Keep = Callable[[Mapping[str, int], int, Any], None]

# Number of built programs in memory; others are built again when needed, so that programs and their LM
# histories do not accumulate.
_BUILT = 64


class ProgramSpace:
    """All choices of instructions and demo sets for the predictors of a program.

    Equal candidates count once, so that no configuration is paid for twice. The student's own instruction and
    demos are added unless a candidate equals them.

    Args:
        program: The student; configuration `baseline` is exactly this program.
        instructions: The candidate instructions of each predictor.
        demos: The candidate demo sets of each predictor, or None if demos are not optimised.

    Attributes:
        candidates: The candidates of each component, by MIPROv2's name for it; they grow while proposers
            write. None where a proposal failed.
    """

    def __init__(
        self,
        program: dspy.Module,
        instructions: Mapping[int, Sequence[str]],
        demos: Mapping[int, Sequence[Sequence[Any]]] | None = None,
    ) -> None:
        self.program = program
        self.candidates: dict[str, list[Any]] = {}
        self.baseline: dict[str, int] = {}
        for i, predictor in enumerate(program.predictors()):
            texts = map(encodable, instructions.get(i, ()))
            self._add(instruction_of(i), texts, get_signature(predictor).instructions)
            if demos:
                sets = ([encodable_demo(demo) for demo in some] for some in demos[i])
                self._add(demos_of(i), sets, list(predictor.demos))

    def _add(self, component: str, candidates: Iterable[Any], own: Any) -> None:
        found: list[Any] = []
        for candidate in (*candidates, own):
            if not any(_equal(candidate, other) for other in found):
                found.append(candidate)
        self.candidates[component] = found
        self.baseline[component] = next(j for j, one in enumerate(found) if _equal(own, one))

    def plain(self, component: str, candidate: Any) -> Any:
        """See `mpromptune.engine.proposers.Candidates`.

        Raises:
            ProposalRefusedError: A demo would give another prompt after it was saved.
        """
        if isinstance(candidate, str):
            return candidate
        saved = demos_to_json(candidate)
        predictor = self.program.predictors()[predictor_of(component)]
        if not gives_same_prompt(predictor, candidate, demos_from_json(saved)):
            raise ProposalRefusedError("A demo would give another prompt after it was saved.")
        return saved

    def saved(self, component: str, index: int) -> Any:
        """A known candidate as `adopt` takes it."""
        candidate = self.candidates[component][index]
        return candidate if isinstance(candidate, str) else demos_to_json(candidate)

    def adopt(self, component: str, index: int, written: Any) -> Candidate:
        """See `mpromptune.engine.proposers.Candidates`."""
        known = self.candidates[component]
        known += [None] * (index + 1 - len(known))
        known[index] = written if isinstance(written, str) else demos_from_json(written)
        text: Candidate = candidate_text(known[index])
        return text

    def prompt_space(self) -> PromptSpace:
        """The texts of all candidates."""
        return PromptSpace({name: [*map(candidate_text, some)] for name, some in self.candidates.items()})

    def build(self, params: Mapping[str, int]) -> dspy.Module:
        """A fresh program with the chosen instructions and demos."""
        program = self.program.deepcopy()
        chosen = {name: self.candidates[name][index] for name, index in params.items()}
        for i, predictor in enumerate(program.predictors()):
            text = chosen[instruction_of(i)]
            if text != get_signature(predictor).instructions:
                set_signature(predictor, get_signature(predictor).with_instructions(text))
            if (demos := chosen.get(demos_of(i))) is not None:
                predictor.demos = list(demos)
        return program


def _keep_nothing(params: Mapping[str, int], example: int, prediction: Any) -> None:
    pass


class ProgramRunner:
    """``score(params, example)``: runs a configuration on one validation example, in any thread or process.

    Args:
        programs: The configurations.
        valset: The validation examples.
        metric: The metric; see `adapted` and `metric_value`.
        keep: Called as ``keep(params, example, prediction)`` in the thread that made the prediction; not
            called in other processes.
        takes_notes: Whether scores, and errors of candidates, have a note (see `mpromptune.mipro.notes`).
    """

    def __init__(
        self,
        programs: ProgramSpace,
        valset: Sequence[Any],
        metric: Any,
        keep: Keep = _keep_nothing,
        takes_notes: bool = False,
    ) -> None:
        self.programs = programs
        self._parts = programs, valset, metric
        self._keep = keep
        self._takes_notes = takes_notes
        self._metric = adapted(metric)
        self._build = lru_cache(maxsize=_BUILT)(lambda items: programs.build(dict(items)))

    def __reduce__(self) -> Any:  # without the built programs
        return ProgramRunner, (*self._parts, _keep_nothing, self._takes_notes)

    def __call__(self, params: Mapping[str, int], example: int) -> float:
        """The value of the metric; exceptions of the program or the metric are passed on."""
        program, item = self._build(tuple(sorted(params.items()))), self._parts[1][example]
        # An own trace, because otherwise the caller's trace would collect every call of the run.
        prediction, trace = None, list[Any]()
        try:
            with dspy.context(trace=trace), measured(current_meter()), blaming():
                prediction = program(**item.inputs())
                self._keep(params, example, prediction)
                score = metric_value(self._metric(item, prediction))
            if not self._takes_notes:
                return float(score)
            return Noted(score, note_of_call(program, item, trace, prediction, note_of(score)))
        except Exception as error:
            if self._takes_notes and classify(error) in FAILURES:
                attach_note(error, note_of_call(program, item, trace, prediction, error))
            raise
        finally:
            for _, module in program.named_sub_modules():
                if history := getattr(module, "history", None):
                    history.clear()


def scorer(run: Score, show_traceback: bool = False) -> Score:
    """The score of a search: calls ``run``, and logs failures of candidates."""

    def score(params: dict[str, int], example: int) -> float:
        meter = current_meter() or Meter()
        before = meter.total
        try:
            value = contained(run, params, example)
        except Exception as error:
            if classify(error) in FAILURES:  # other errors are reported elsewhere
                said = example, dict(params), type(error).__name__, error
                exc_info = error if show_traceback else None
                logger.warning("Validation example %d failed with %s: %s: %s", *said, exc_info=exc_info)
            raise
        note_call(meter.total - before)
        return value

    return score


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (TypeError, ValueError):  # comparing demos with arrays gives no single truth value
        return a is b
