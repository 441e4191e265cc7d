"""What is checked before any LM call is paid for: what a compile is called with, and the DSPy it runs on."""

from __future__ import annotations

import inspect
import logging
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import dspy
from dspy.propose import grounded_proposer
from dspy.teleprompt import BootstrapFewShot
from dspy.teleprompt.mipro_optimizer_v2 import MIPROv2 as StockMIPROv2
from dspy.teleprompt.utils import get_signature

from mpromptune.errors import IncompatibleDSPyError, InvalidArgumentError

logger = logging.getLogger(__name__)

# NOTE: the releases of `make matrix` (see CONTRIBUTING); the first is the oldest that may be installed.
TESTED_DSPY = ("3.2.0", "3.3.1", "3.4.1")

# Parameters after `self`, by position. A last "..." says that others may follow: those methods are handed
# on what they are given, and where it is not understood, DSPy's own serial step is run.
_PARAMETERS = {
    "_set_random_seeds": ("seed",),
    "_set_hyperparams_from_run_mode": (
        "program",
        "num_trials",
        "minibatch",
        "zeroshot_opt",
        "valset",
        "num_instruct_candidates",
        "num_fewshot_candidates",
    ),
    "_bootstrap_fewshot_examples": ("program", "trainset", "..."),
    "_propose_instructions": ("program", "trainset", "..."),
    "_optimize_prompt_parameters": (
        "program",
        "instruction_candidates",
        "demo_candidates",
        "evaluate",
        "valset",
        "num_trials",
        "minibatch",
        "minibatch_size",
        "minibatch_full_eval_steps",
        "seed",
    ),
}
# Those of `compile` that are read; it may have any others.
_OF_COMPILE = ("trainset", "seed", "minibatch_size", "minibatch_full_eval_steps")
_ATTRIBUTES = (
    "init_temperature",
    "log_dir",
    "max_bootstrapped_demos",
    "max_errors",
    "max_labeled_demos",
    "metric",
    "metric_threshold",
    "num_threads",
    "prompt_model",
    "seed",
    "task_model",
    "teacher_settings",
    "track_stats",
    "verbose",
)


def check_arguments(optimizer: Any, student: Any, given: Mapping[str, Any]) -> None:
    """Refuses what cannot work.

    Args:
        optimizer: The ``dspy.MIPROv2``.
        student: The program.
        given: What else ``compile`` was called with.

    Raises:
        InvalidArgumentError: Which argument it is, its value, and what to pass instead.
    """
    _check_program("student", student)
    if given.get("teacher") is not None:
        _check_teacher(given["teacher"], student)
    _check_lms(optimizer, student)
    _check_metric(optimizer.metric, _bootstraps(optimizer, given))
    if "trainset" in given:  # else DSPy says that it is missing
        _check_examples("trainset", given["trainset"])
    if given.get("valset") is not None:
        _check_examples("valset", given["valset"])


def _refused(name: str, must: str, value: Any) -> InvalidArgumentError:
    shown = reprlib.repr(value) or f"an instance of {type(value).__name__}"  # a bare program shows nothing
    return InvalidArgumentError(f"{name} must be {must}; got {shown}.")


def _check_program(name: str, program: Any) -> None:
    if not isinstance(program, dspy.Module):
        raise _refused(name, "a program, an instance of dspy.Module", program)
    if not program.predictors():
        raise _refused(
            name,
            "a program with a predictor that DSPy finds: a dspy.Predict, or a module with one, as an "
            "attribute, or in a list or dict that is an attribute (not in a list of lists)",
            program,
        )


def _check_teacher(teacher: Any, student: Any) -> None:
    _check_program("teacher", teacher)
    names, own = ([name for name, _ in p.named_predictors()] for p in (teacher, student))
    if names != own:
        raise _refused("teacher", f"a program with the student's predictors, {own}", names)
    for name, mine, other in zip(own, student.predictors(), teacher.predictors(), strict=True):
        wanted, given = get_signature(mine), get_signature(other)
        if not wanted.equals(given):
            must = f"a program with the student's signatures, for {name!r} {wanted.signature!r}"
            raise _refused("teacher", must, given.signature)


def _check_lms(optimizer: Any, student: Any) -> None:
    """Wherever an LM is wanted, its name is the usual mistake."""
    settings = optimizer.teacher_settings
    if not isinstance(settings, Mapping):
        raise _refused("teacher_settings", "a dict of DSPy's settings", settings)
    lms = {name: getattr(optimizer, name) for name in ("task_model", "prompt_model")}
    lms["teacher_settings['lm']"] = settings.get("lm")
    lms.update({f"the lm of predictor {name!r}": p.lm for name, p in student.named_predictors()})
    for name, lm in lms.items():
        # The second are clients of another kind, which DSPy takes as well.
        known = isinstance(lm, dspy.BaseLM) or getattr(lm, "supports_decision_requests", False)
        if lm is not None and not known:
            example = repr(lm) if isinstance(lm, str) else "'openai/gpt-4o'"
            raise _refused(name, f"a language model, as in dspy.LM({example})", lm)


def _bootstraps(optimizer: Any, given: Mapping[str, Any]) -> bool:
    """Whether demos are bootstrapped: not where there are to be labelled ones only."""
    bootstrapped, labelled = (
        getattr(optimizer, name) if given.get(name) is None else given[name]
        for name in ("max_bootstrapped_demos", "max_labeled_demos")
    )
    return bool(bootstrapped) or not labelled


def _check_metric(metric: Any, bootstraps: bool) -> None:
    """DSPy calls it with ``(example, prediction)`` in evaluations, with a trace as well in the bootstrap."""
    if not callable(metric) or isinstance(metric, type):
        raise _refused("metric", "a function metric(example, prediction, trace=None)", metric)
    try:
        signature = inspect.signature(metric)
    except (TypeError, ValueError):  # what is written in C may not say
        return
    for arguments in (2, 3) if bootstraps else (2,):
        try:
            signature.bind(*[None] * arguments)
        except TypeError as error:
            raise InvalidArgumentError(
                "metric must be a function that can be called as metric(example, prediction, trace=None) "
                f"({error}); got {reprlib.repr(metric)} with the parameters {signature}."
            ) from error


def _check_examples(name: str, examples: Any) -> None:
    if not isinstance(examples, Sequence) or isinstance(examples, str) or not examples:
        raise _refused(name, "a list of at least one dspy.Example", examples)
    for i, example in enumerate(examples):
        if not isinstance(example, dspy.Example):
            raise _refused(f"{name}[{i}]", "a dspy.Example", example)
        if not _has_inputs(example):
            must = "a dspy.Example with inputs, as in dspy.Example(question=..., answer=...)"
            raise _refused(f"{name}[{i}]", f"{must}.with_inputs('question')", example)


def _has_inputs(example: dspy.Example) -> bool:
    try:
        return bool(example.inputs().keys())
    except ValueError:  # they have not been set
        return False


def require_compatible(optimizer: StockMIPROv2) -> None:
    """Refuses a DSPy that has changed what the search relies on; called before any LM call.

    Args:
        optimizer: What is about to compile with a sampler.

    Raises:
        IncompatibleDSPyError: What has changed, and what can be done.
    """
    changes = [change for name, expected in _PARAMETERS.items() if (change := _changed(name, expected))]
    missing = [name for name in _OF_COMPILE if name not in _parameters("compile")]
    if missing:
        changes.append(f"compile has no parameters {missing}")
    gone = [name for name in _ATTRIBUTES if not hasattr(optimizer, name)]
    if gone:
        changes.append(f"it has no attributes {gone}")
    if changes:
        raise incompatible("; ".join(changes))


def incompatible(change: str) -> IncompatibleDSPyError:
    """The error for what has changed in ``dspy.MIPROv2``."""
    tested = f"{', '.join(TESTED_DSPY[:-1])} and {TESTED_DSPY[-1]}"
    return IncompatibleDSPyError(
        f"DSPy {dspy.__version__} has another MIPROv2 than the search of m-promptune is made for: {change}. "
        f"It is tested with DSPy {tested}. Install one of these (pip install 'dspy=={TESTED_DSPY[-1]}'), or "
        "compile without a sampler and other options of m-promptune, which is DSPy's own search and works."
    )


def _changed(name: str, expected: tuple[str, ...]) -> str | None:
    """What has become of a method, if it is not what it was."""
    if not hasattr(StockMIPROv2, name):
        return f"{name}({', '.join(expected)}) is gone"
    found = _parameters(name)
    known = (*found[: len(expected) - 1], "...") if expected[-1] == "..." else found
    return None if known == expected else f"{name}({', '.join(expected)}) is now {name}({', '.join(found)})"


def _parameters(name: str) -> tuple[str, ...]:
    """Names of a method's parameters, without ``self``."""
    parameters: Any = inspect.signature(getattr(StockMIPROv2, name)).parameters
    return tuple(parameters)[1:]


# What the concurrent first steps use of DSPy: parameters of MIPROv2's methods and of what proposals are made
# of, and methods of the bootstrap.
_FLAGS = (
    "view_data_batch_size",
    "program_aware_proposer",
    "data_aware_proposer",
    "tip_aware_proposer",
    "fewshot_aware_proposer",
)
_STEPS: dict[str, tuple[str, ...]] = {
    "compile": _FLAGS,
    "_bootstrap_fewshot_examples": (
        "teacher",
        "num_fewshot_candidates",
        "max_bootstrapped_demos",
        "max_labeled_demos",
        "max_errors",
        "metric_threshold",
    ),
    "_propose_instructions": ("demo_candidates", "num_instruct_candidates"),
}
_FIELDS = ("use_dataset_summary", "program_aware", "use_task_demos", "use_instruct_history", "use_tip")
_OF_BOOTSTRAP = (
    "_prepare_student_and_teacher",
    "_prepare_predictor_mappings",
    "_bootstrap",
    "_bootstrap_one_example",
    "_train",
)


def knows_steps() -> bool:
    """Whether DSPy's first steps are those that are made concurrent here; a warning says if they are not."""
    known = all(set(names) <= set(_parameters(method)) for method, names in _STEPS.items())
    known = known and all(hasattr(BootstrapFewShot, name) for name in _OF_BOOTSTRAP)
    known = known and hasattr(grounded_proposer.GroundedProposer, "propose_instruction_for_predictor")
    proposer = grounded_proposer.generate_instruction_class, grounded_proposer.GenerateModuleInstruction
    for maker in (proposer[0], proposer[1].__init__):
        known = known and set(_FIELDS) <= set(inspect.signature(maker).parameters)
    if not known:
        logger.warning("The first steps of DSPy %s are not known; running them serially.", dspy.__version__)
    return known
