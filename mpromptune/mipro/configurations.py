"""DSPy programs as configurations: the space of their prompts, building one, and scoring it."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import dspy
from dspy.teleprompt.utils import get_signature, set_signature

from mpromptune.execution.attempts import FAILURES
from mpromptune.execution.interrupts import contained
from mpromptune.execution.pool import Score, as_score
from mpromptune.execution.usage import Meter, current_meter
from mpromptune.lms.errors import blaming, classify
from mpromptune.lms.guard import note_call
from mpromptune.lms.metering import measured
from mpromptune.model.space import PromptSpace

logger = logging.getLogger(__name__)

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

    Attributes:
        candidates: Per component, under MIPROv2's name for it, what its indices stand for.
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
            self._add(f"{i}_predictor_instruction", texts, get_signature(predictor).instructions)
            if demos:
                sets = ([encodable_demo(demo) for demo in some] for some in demos[i])
                self._add(f"{i}_predictor_demos", sets, list(predictor.demos))

    def _add(self, component: str, candidates: Iterable[Any], own: Any) -> None:
        found: list[Any] = []
        for candidate in (*candidates, own):
            if not any(_equal(candidate, other) for other in found):
                found.append(candidate)
        self.candidates[component] = found
        self.baseline[component] = next(j for j, one in enumerate(found) if _equal(own, one))

    def prompt_space(self) -> PromptSpace:
        """The texts of all candidates."""
        return PromptSpace({name: [*map(candidate_text, some)] for name, some in self.candidates.items()})

    def build(self, params: Mapping[str, int]) -> dspy.Module:
        """A fresh program with the chosen instructions and demos."""
        program = self.program.deepcopy()
        chosen = {name: self.candidates[name][index] for name, index in params.items()}
        for i, predictor in enumerate(program.predictors()):
            text = chosen[f"{i}_predictor_instruction"]
            if text != get_signature(predictor).instructions:
                set_signature(predictor, get_signature(predictor).with_instructions(text))
            if (demos := chosen.get(f"{i}_predictor_demos")) is not None:
                predictor.demos = list(demos)
        return program


def _keep_nothing(params: Mapping[str, int], example: int, prediction: Any) -> None:
    pass


class ProgramRunner:
    """``score(params, example)``: runs a configuration on one validation example, wherever it is called.

    Args:
        programs: The configurations.
        valset: The validation examples.
        metric: ``metric(example, prediction)`` returning a number, a bool, or a prediction with ``.score``.
        keep: Called as ``keep(params, example, prediction)``, in the thread that made the prediction; in
            no other process.
    """

    def __init__(
        self, programs: ProgramSpace, valset: Sequence[Any], metric: Any, keep: Keep = _keep_nothing
    ) -> None:
        self._parts = programs, valset, metric
        self._keep = keep
        self._build = lru_cache(maxsize=_BUILT)(lambda items: programs.build(dict(items)))

    def __reduce__(self) -> Any:  # without what has been built
        return ProgramRunner, self._parts

    def __call__(self, params: Mapping[str, int], example: int) -> float:
        """The metric's value; an exception of the program or of the metric is passed on."""
        _, valset, metric = self._parts
        program, item = self._build(tuple(sorted(params.items()))), valset[example]
        try:
            # A trace of its own, or every call of the run would be kept in the caller's.
            with dspy.context(trace=[]), measured(current_meter()), blaming():
                prediction = program(**item.inputs())
                self._keep(params, example, prediction)
                return metric_value(metric(item, prediction))
        finally:
            for _, module in program.named_sub_modules():
                if history := getattr(module, "history", None):
                    history.clear()


def scorer(run: Score, show_traceback: bool = False) -> Score:
    """The score of a search: what ``run`` gives, and a line in the log for what a candidate failed on."""

    def score(params: dict[str, int], example: int) -> float:
        meter = current_meter() or Meter()
        before = meter.total
        try:
            value = contained(run, params, example)
        except Exception as error:
            if classify(error) in FAILURES:  # the other errors leave traces of their own
                said = example, dict(params), type(error).__name__, error
                exc_info = error if show_traceback else None
                logger.warning("Validation example %d failed with %s: %s: %s", *said, exc_info=exc_info)
            raise
        note_call(meter.total - before)
        return value

    return score


def metric_value(value: Any) -> float:
    """What a metric returned, as a number.

    Raises:
        ScoreError: It is not a finite number, a bool, or a prediction with such a ``score``.
    """
    if isinstance(value, dspy.Example) and "score" in value:
        value = value["score"]
    return as_score(value)


def candidate_text(candidate: str | Sequence[Any]) -> Any:
    """An instruction as it is; a demo set as the texts of its demos."""
    return candidate if isinstance(candidate, str) else [demo_text(demo) for demo in candidate]


def demo_text(demo: Any) -> str:
    """All fields of a demo as text, whatever its signature; binary content is digested."""
    fields = demo.items() if hasattr(demo, "items") else [("demo", demo)]
    lines = [f"{name}: {value}" for name, value in fields if name != "augmented"]
    return _BINARY.sub(_digest, "\n".join(lines))


def _digest(match: re.Match[str]) -> str:
    return hashlib.sha256(match.group().encode()).hexdigest()[:16]


def encodable(value: Any) -> Any:
    """A text with ``?`` for every half of a surrogate pair; anything else as it is.

    LMs return halves where they cut an emoji in two. No request can be made with one, no class can have it
    in its docstring, as DSPy's signatures do, and no file can be written with it.
    """
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def encodable_demo(demo: Any) -> Any:
    """A demo with such texts for its fields; the very same one where they are so already."""
    if not isinstance(demo, dspy.Example):
        return demo
    texts = {name: encodable(value) for name, value in demo.items()}
    changed = {name: text for name, text in texts.items() if text is not demo[name] and text != demo[name]}
    return demo.copy(**changed) if changed else demo


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (TypeError, ValueError):  # demos that hold arrays have no single truth value
        return a is b
