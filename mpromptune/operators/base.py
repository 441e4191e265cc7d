"""What the proposers of DSPy programs share: their setting, and how one asks a language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import dspy
from dspy.teleprompt.utils import get_signature

from mpromptune.engine.proposers import Brief
from mpromptune.lms.adapters import kept
from mpromptune.model.space import PromptSpace
from mpromptune.operators.texts import value_text

# Rollout ids are drawn below this number, as in DSPy's proposer.
_ROLLOUTS = 10**9
# NOTE: most characters of an instruction: 2000 are about 350 words. Where candidates have that many already,
# a rewrite may still grow to three times the longest, but not without end over the generations.
_LONG, _TIMES_LONGEST = 2000, 3


@dataclass(eq=False)
class Setting:
    """A compile, as far as its proposers know it. It is made before the search begins.

    Attributes:
        program: The student.
        candidates: The candidates of each component, which grow during the search; None where a proposal
            failed. Instructions are texts, demo sets are lists of demos.
        trainset: The training examples; any of them may be shown.
        valset: The validation examples.
        visible: Indices of the validation examples that may be shown.
        metric: ``metric(example, prediction)``.
        prompt_model: Writes new instructions; by default the LM of DSPy's settings.
        reflection_lm: Rewrites instructions; by default the prompt model.
        instruction_proposer: A ``ProposalFn`` of GEPA for *reflect*; by default that of DSPy or GEPA.
        task_model: Runs the program; by default the LM of DSPy's settings.
        temperature: Of the requests of proposals.
        max_chars: Most characters of an instruction; by default 2000, or three times the longest candidate
            before the search if that is more.
        max_bootstrapped_demos: Most bootstrapped demos of a set.
        max_labeled_demos: Most labelled demos of a set.
        program_aware_proposer: Whether *fresh* shows the program's code, as in ``dspy.MIPROv2.compile``.
        data_aware_proposer: Whether it shows a summary of training examples.
        tip_aware_proposer: Whether it shows a random tip.
        fewshot_aware_proposer: Whether it shows demos.
        view_data_batch_size: Number of training examples in the summary.
    """

    program: Any
    candidates: Mapping[str, list[Any]]
    trainset: Sequence[Any]
    valset: Sequence[Any]
    visible: frozenset[int]
    metric: Any = None
    prompt_model: Any = None
    reflection_lm: Any = None
    instruction_proposer: Any = None
    task_model: Any = None
    temperature: float = 1.0
    max_chars: int = 0
    max_bootstrapped_demos: int = 4
    max_labeled_demos: int = 4
    program_aware_proposer: bool = True
    data_aware_proposer: bool = True
    tip_aware_proposer: bool = True
    fewshot_aware_proposer: bool = True
    view_data_batch_size: int = 10

    def __post_init__(self) -> None:
        texts = [one for some in self.candidates.values() for one in some if isinstance(one, str)]
        self.max_chars = self.max_chars or max(_LONG, _TIMES_LONGEST * max(map(len, texts), default=0))

    @cached_property
    def names(self) -> list[str]:
        """The names of the predictors, in the order of their components."""
        return [name for name, _ in self.program.named_predictors()]

    def components(self, space: PromptSpace, name_of: Callable[[int], str]) -> list[str]:
        """The components of one kind (`instruction_of` or `demos_of`), of all predictors."""
        own = set(map(name_of, range(len(self.names))))
        return [name for name in space.names if name in own]

    def signature(self, component: str) -> Any:
        """The signature of the component's predictor, with the student's own instruction."""
        return get_signature(self.program.predictors()[predictor_of(component)])

    @cached_property
    def _validation(self) -> dict[frozenset[str], set[tuple[str, ...]]]:
        """Names of input fields to the inputs of the validation examples that have these."""
        found: dict[frozenset[str], set[tuple[str, ...]]] = {}
        for example in self.valset:
            inputs = {name: value_text(value) for name, value in example.inputs().items()}
            if inputs:
                values = tuple(inputs[name] for name in sorted(inputs))
                found.setdefault(frozenset(inputs), set()).add(values)
        return found

    def is_held_out(self, demo: Any) -> bool:
        """Whether a demo has all inputs of a validation example."""
        fields = {name: value_text(value) for name, value in demo.items()}
        return any(
            names <= fields.keys() and tuple(fields[name] for name in sorted(names)) in inputs
            for names, inputs in self._validation.items()
        )

    def known(self, brief: Brief, component: str) -> dict[int, Any]:
        """The candidates of a component that the brief knows, by index; others may have come since."""
        live = self.candidates.get(component, [])
        told = brief.candidates.get(component, ())
        return {i: live[i] for i, text in enumerate(told) if text is not None}

    def instructions(self, brief: Brief) -> dict[str, str]:
        """The name of every predictor to its instruction in the parent."""
        components = [instruction_of(i) for i in range(len(self.names))]
        chosen = [self.candidates[component][brief.parent[component]] for component in components]
        return dict(zip(self.names, chosen, strict=True))


def predictor_of(component: str) -> int:
    """The index of the predictor that a component belongs to."""
    return int(component.partition("_")[0])


def instruction_of(predictor: int) -> str:
    """The name of the component with the predictor's instructions."""
    return f"{predictor}_predictor_instruction"


def demos_of(predictor: int) -> str:
    """The name of the component with the predictor's demo sets."""
    return f"{predictor}_predictor_demos"


def posteriors(brief: Brief) -> dict[int, tuple[float, float]]:
    """Posterior mean and deviation of the best configuration with each candidate, best mean first."""
    found: dict[int, tuple[float, float]] = {}
    for one in brief.standings:  # highest mean first
        found.setdefault(one.params[brief.component], (one.posterior_mean, one.posterior_std))
    return found


class InstructionOperator:
    """Base class of the proposers that write instructions with one request to an LM.

    Args:
        setting: The compile.
    """

    name: str
    calls = 1
    keeps_parent = True

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def components(self, space: PromptSpace) -> Sequence[str]:
        """The instructions of all predictors."""
        return self.setting.components(space, instruction_of)

    def parent(self, brief: Brief) -> str:
        """The instruction to improve."""
        return str(self.setting.candidates[brief.component][brief.parent[brief.component]])

    @property
    def lm(self) -> Any:
        """The language model that rewrites instructions."""
        return self.setting.reflection_lm or self.setting.prompt_model or dspy.settings.lm

    def request(self, brief: Brief, signature: Any, **inputs: Any) -> str:
        """The only output of one request."""
        with asking(self.lm, self.setting.temperature, brief):
            answer = dspy.Predict(signature)(**inputs)
        (output,) = signature.output_fields
        return str(answer[output])


@contextmanager
def asking(lm: Any, temperature: float, brief: Brief) -> Iterator[Any]:
    """A context in which all requests go to ``lm``; those of another proposal are other requests.

    Yields:
        The LM of DSPy's settings in this context.
    """
    rollout = int(brief.rng.integers(_ROLLOUTS))
    own = kept(lm.copy(rollout_id=rollout, temperature=temperature))
    with dspy.context(lm=own, trace=[]):
        yield own
