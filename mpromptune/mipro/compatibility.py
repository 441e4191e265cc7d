"""What the search is built on in DSPy's MIPROv2, none of which DSPy promises to keep."""

from __future__ import annotations

import inspect
from typing import Any

import dspy
from dspy.teleprompt.mipro_optimizer_v2 import MIPROv2 as StockMIPROv2

from mpromptune.errors import IncompatibleDSPyError

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
