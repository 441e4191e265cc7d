"""Checks before any LM call is paid for: the arguments of a compile, and the version of DSPy."""

from __future__ import annotations

import inspect
import reprlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import dspy
from dspy.propose import GroundedProposer
from dspy.teleprompt import BootstrapFewShot
from dspy.teleprompt.mipro_optimizer_v2 import MIPROv2 as StockMIPROv2
from dspy.teleprompt.utils import get_signature

from mpromptune.engine.options import SearchOptions
from mpromptune.errors import IncompatibleDSPyError, InvalidArgumentError, require_count
from mpromptune.mipro.metric import adapted
from mpromptune.show.view import LOADING, View

# NOTE: the releases of `make matrix` (see CONTRIBUTING); the first is the oldest supported one.
TESTED_DSPY = ("3.2.0", "3.3.1", "3.4.1")

# The methods of MIPROv2 that are used, with their parameters after `self`; "..." allows others.
_PARAMETERS = {
    "compile": "trainset seed minibatch_size minibatch_full_eval_steps view_data_batch_size "
    "program_aware_proposer data_aware_proposer tip_aware_proposer fewshot_aware_proposer ...",
    "_set_random_seeds": "seed",
    "_set_hyperparams_from_run_mode": "program num_trials minibatch zeroshot_opt valset "
    "num_instruct_candidates num_fewshot_candidates",
    "_bootstrap_fewshot_examples": "program trainset teacher num_fewshot_candidates max_bootstrapped_demos "
    "max_labeled_demos max_errors metric_threshold ...",
    "_propose_instructions": "program trainset demo_candidates num_instruct_candidates ...",
    "_optimize_prompt_parameters": "program instruction_candidates demo_candidates evaluate valset "
    "num_trials minibatch minibatch_size minibatch_full_eval_steps seed",
}
_ATTRIBUTES = (
    "init_temperature log_dir max_bootstrapped_demos max_errors max_labeled_demos metric metric_threshold "
    "num_threads prompt_model seed task_model teacher_settings track_stats verbose"
)
# NOTE: number of seeds of NumPy's legacy generator, which DSPy seeds when a compile begins.
_SEEDS = 2**32
# Methods of the DSPy classes that the first steps use.
_METHODS = {
    BootstrapFewShot: "_prepare_student_and_teacher _prepare_predictor_mappings "
    "_bootstrap_one_example _train",
    GroundedProposer: "propose_instructions_for_program propose_instruction_for_predictor",
}


def check_arguments(
    optimizer: Any, student: Any, given: Mapping[str, Any], reflection_lm: Any = None
) -> None:
    """Require valid arguments of a compile.

    Args:
        optimizer: The ``dspy.MIPROv2``.
        student: The program.
        given: The other arguments of ``compile``.
        reflection_lm: The option of that name.

    Raises:
        InvalidArgumentError: An argument is not valid; the message says what to pass instead.
    """
    _check_program("student", student)
    if given.get("teacher") is not None:
        _check_teacher(given["teacher"], student)
    _check_lms(optimizer, student, reflection_lm)
    _check_seed(optimizer.seed if given.get("seed") is None else given["seed"])
    _check_metric(optimizer.metric, _bootstraps(optimizer, given))
    if "trainset" in given:  # otherwise DSPy reports that it is missing
        _check_examples("trainset", given["trainset"])
    if given.get("valset") is not None:
        _check_examples("valset", given["valset"])


def _refused(name: str, must: str, value: Any) -> InvalidArgumentError:
    shown = reprlib.repr(value) or f"an instance of {type(value).__name__}"  # a bare program shows nothing
    return InvalidArgumentError(f"{name} must be {must}; got {shown}.")


def _check_seed(seed: Any) -> None:
    if not 0 <= require_count("seed", seed, least=None) < _SEEDS:
        raise InvalidArgumentError(f"seed must be from 0 to {_SEEDS - 1}, as NumPy requires; got {seed!r}.")


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


def _check_lms(optimizer: Any, student: Any, reflection_lm: Any) -> None:
    """Require language models; the usual mistake is to pass a name."""
    settings = optimizer.teacher_settings
    if not isinstance(settings, Mapping):
        raise _refused("teacher_settings", "a dict of DSPy's settings", settings)
    lms = {name: getattr(optimizer, name) for name in ("task_model", "prompt_model")}
    lms["reflection_lm"] = reflection_lm
    lms["teacher_settings['lm']"] = settings.get("lm")
    lms.update({f"the lm of predictor {name!r}": p.lm for name, p in student.named_predictors()})
    for name, lm in lms.items():
        # DSPy also accepts another kind of client, which has this attribute.
        known = isinstance(lm, dspy.BaseLM) or getattr(lm, "supports_decision_requests", False)
        if lm is not None and not known:
            example = repr(lm) if isinstance(lm, str) else "'openai/gpt-4o'"
            raise _refused(name, f"a language model, as in dspy.LM({example})", lm)


def _bootstraps(optimizer: Any, given: Mapping[str, Any]) -> bool:
    """Whether demos are bootstrapped, and not only labelled."""
    bootstrapped, labelled = (
        getattr(optimizer, name) if given.get(name) is None else given[name]
        for name in ("max_bootstrapped_demos", "max_labeled_demos")
    )
    return bool(bootstrapped) or not labelled


def _check_metric(metric: Any, bootstraps: bool) -> None:
    """Require a metric that can be called: in evaluations with two arguments, in the bootstrap with three."""
    if not callable(metric) or isinstance(metric, type):
        raise _refused("metric", "a function metric(example, prediction, trace=None)", metric)
    try:
        signature = inspect.signature(adapted(metric))
    except (TypeError, ValueError):  # functions written in C may have no signature
        return
    for arguments in (2, 3) if bootstraps else (2,):
        try:
            signature.bind(*[None] * arguments)
        except TypeError as error:
            raise InvalidArgumentError(
                "metric must be a function that can be called as metric(example, prediction, trace=None), or "
                f"with the five arguments of dspy.GEPA ({error}); got {reprlib.repr(metric)} with the "
                f"parameters {signature}."
            ) from None


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
    except ValueError:  # the inputs have not been set
        return False


def require_compatible(optimizer: StockMIPROv2) -> None:
    """Require a version of DSPy that has all that the search uses; called before any LM call.

    Args:
        optimizer: The optimizer.

    Raises:
        IncompatibleDSPyError: DSPy has changed; the message says what, and what to do.
    """
    found = (_changed(name, expected.split()) for name, expected in _PARAMETERS.items())
    changes = [change for change in found if change is not None]
    for holder, names in (*_METHODS.items(), (optimizer, _ATTRIBUTES)):
        if missing := [name for name in names.split() if not hasattr(holder, name)]:
            changes.append(f"{getattr(holder, '__name__', 'it')} has no {', '.join(missing)}")
    if changes:
        raise incompatible("; ".join(changes))


def incompatible(change: str) -> IncompatibleDSPyError:
    """The error for a change in ``dspy.MIPROv2``."""
    tested = f"{', '.join(TESTED_DSPY[:-1])} and {TESTED_DSPY[-1]}"
    return IncompatibleDSPyError(
        f"DSPy {dspy.__version__} has another MIPROv2 than the search of m-promptune is made for: {change}. "
        f"It is tested with DSPy {tested}. Install one of these (pip install 'dspy=={TESTED_DSPY[-1]}'), or "
        "compile without a sampler and other options of m-promptune: DSPy's own search works."
    )


def _changed(name: str, expected: Sequence[str]) -> str | None:
    """The change of a method, or None if it has not changed."""
    shown = f"{name}({', '.join(expected)})"
    if not hasattr(StockMIPROv2, name):
        return f"{shown} is gone"
    found = [*inspect.signature(getattr(StockMIPROv2, name)).parameters][1:]
    is_known = set(expected[:-1]) <= set(found) if expected[-1] == "..." else [*expected] == found
    return None if is_known else f"{shown} is now {name}({', '.join(found)})"


def check_embedder(options: SearchOptions, view: View, program: Any) -> None:
    """Load the embedding model, if the sampler has one, and embed the instructions of the program.

    Raises:
        EmbedderUnavailableError: The model cannot be loaded.
        EmbeddingError: It does not return vectors.
    """
    bar = None
    is_named = options.embedder is None or (isinstance(options.embedder, str) and options.embedder != "index")
    # Importing sentence-transformers takes longer than loading a model afterwards.
    if is_named and "sentence_transformers" not in sys.modules and str(options.sampler).lower() == "qei":
        bar = view.bar(LOADING, 1, "embedding model")
    if check := getattr(options.made_sampler(0), "check_embedder", None):
        check(list(dict.fromkeys(p.signature.instructions for p in program.predictors())))
    if bar is not None:
        bar.advance()
        bar.end()
