"""The identity of a run of `compile`: equal in every process, and without secrets."""

from __future__ import annotations

import enum
import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence, Set
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import dspy
from dspy.teleprompt.utils import get_signature
from pydantic import BaseModel

from mpromptune.engine.options import SearchOptions
from mpromptune.lms.adapters import given_adapter
from mpromptune.operators.registry import OPERATORS

Part = str | int | float | bool | None

# The arguments that determine the candidates, in addition to the data; budget, threads and so on may change.
_ARGUMENTS = (
    "view_data_batch_size",
    "program_aware_proposer",
    "data_aware_proposer",
    "tip_aware_proposer",
    "fewshot_aware_proposer",
)
# Settings of a predictor that change its answers; others may be secrets.
_CONFIG = ("temperature", "max_tokens", "n", "top_p")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def fingerprint(
    optimizer: Any,
    program: Any,
    valset: Sequence[Any],
    candidates: tuple[int, int],
    arguments: Mapping[str, Any],
    options: SearchOptions,
) -> dict[str, Part]:
    """The identity of a run as named parts: digests and plain arguments.

    Args:
        optimizer: The ``dspy.MIPROv2``.
        program: The student.
        valset: The validation examples, in the order of the search.
        candidates: Numbers of instructions and of demo sets.
        arguments: The arguments of ``dspy.MIPROv2.compile``, with defaults.
        options: The options of the search.
    """
    adapter = given_adapter(dspy.settings.adapter)

    def given(name: str) -> Any:
        return getattr(optimizer, name) if arguments.get(name) is None else arguments[name]

    return {
        "program": _of_program(program),
        "trainset": _of_examples(arguments["trainset"]),
        "valset": _of_examples(valset),
        "metric": f"{_name(optimizer.metric)} {digest(_of_callable(optimizer.metric))}",
        "teacher": None if arguments.get("teacher") is None else _of_program(arguments["teacher"]),
        "teacher's model": _model(optimizer.teacher_settings.get("lm")),
        "task_model": _model(optimizer.task_model),
        "prompt_model": _model(optimizer.prompt_model),
        "adapter": type(adapter).__name__ if adapter else None,
        "instruction candidates": candidates[0],
        "demo set candidates": candidates[1],
        **{name: given(name) for name in ("max_bootstrapped_demos", "max_labeled_demos")},
        **{name: getattr(optimizer, name) for name in ("metric_threshold", "init_temperature")},
        "seed": int(given("seed")),
        **{name: arguments[name] for name in _ARGUMENTS},
        **(_of_proposers(options) if options.is_adaptive else {}),
    }


def _of_proposers(options: SearchOptions) -> dict[str, Part]:
    """What determines the candidates that are written during the search."""
    given = OPERATORS if options.proposers is None else options.proposers
    names = sorted(str(one if isinstance(one, str) else getattr(one, "name", one)) for one in given)
    proposer = options.instruction_proposer
    return {
        "proposals": "adaptive",
        "proposers": ", ".join(names),
        "reflection_lm": _model(options.reflection_lm),
        "instruction_proposer": None if proposer is None else _name(proposer),
    }


def differences(then: Mapping[str, Part], now: Mapping[str, Part]) -> list[str]:
    """The parts that differ, with both values."""
    names = [*now, *(name for name in then if name not in now)]
    changed = [name for name in names if then.get(name) != now.get(name)]
    return [f"{name} ({then.get(name)!r} then, {now.get(name)!r} now)" for name in changed]


def digest(value: Any) -> str:
    """A short digest of the `canonical` form of a value."""
    text = json.dumps(canonical(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def canonical(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """A value as JSON that is equal in every process; ``inside`` are its containers, to stop at cycles."""
    if value is None or isinstance(value, str | bool | int | float):
        return value.value if isinstance(value, enum.Enum) else value
    if id(value) in inside:
        return "..."
    within = partial(canonical, inside=(*inside, id(value)))
    parts = _parts(value)
    if isinstance(parts, Mapping):
        return {str(key): within(item) for key, item in parts.items()}
    if isinstance(parts, Set):
        return sorted(map(within, parts), key=json.dumps)
    return [*map(within, parts)] if isinstance(parts, list | tuple) else parts


def _parts(value: Any) -> Any:
    """The parts of a value as a mapping, a set, a sequence or a text."""
    if isinstance(value, Mapping | Set | list | tuple):
        return value
    if isinstance(value, bytes | bytearray):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, dspy.BaseLM):
        return _model(value)
    if isinstance(value, dspy.Example):
        return dict(value.items())
    return [_name(value), *_state(value)]


def _state(value: Any) -> tuple[Any, ...]:
    if isinstance(value, BaseModel):
        return (dict(value),)
    for method in ("tobytes", "tolist"):  # for arrays, images and tensors
        if callable(getattr(value, method, None)):
            return getattr(value, "shape", None), getattr(value, "size", None), getattr(value, method)()
    says_nothing = type(value).__dict__.get("__repr__", object.__repr__) is object.__repr__
    if says_nothing and hasattr(value, "__dict__"):
        return (vars(value),)
    return (_ADDRESS.sub("", repr(value)),)


def _of_examples(examples: Sequence[Any]) -> str:
    return f"{len(examples)} examples {digest(list(examples))}"


def _of_program(program: Any) -> str:
    modules = [(name, _of_class(type(module))) for name, module in program.named_sub_modules()]
    predictors = [(name, _of_predictor(p)) for name, p in program.named_predictors()]
    return f"{_name(program)} {digest([modules, predictors])}"


def _of_class(cls: type) -> list[Any]:
    """Name and source of a class; only the name for DSPy's own modules, so that DSPy may be updated."""
    is_own = cls.__module__.partition(".")[0] != "dspy"
    return [cls.__qualname__, _source(cls) if is_own else None]


def _of_predictor(predictor: Any) -> list[Any]:
    signature, fields = get_signature(predictor), []
    for name, field in signature.fields.items():
        extra = field.json_schema_extra or {}
        said = [str(extra.get(key)) for key in ("__dspy_field_type", "prefix", "desc")]
        fields.append((name, _ADDRESS.sub("", str(field.annotation)), *said))
    config = getattr(predictor, "config", None) or {}
    settings = {key: config[key] for key in _CONFIG if key in config}
    model = _model(getattr(predictor, "lm", None))
    return [signature.instructions, fields, list(predictor.demos), settings, model]


def _of_callable(function: Any) -> list[Any]:
    """Name and source of a function, or of the class of a callable object, whose state may change."""
    if isinstance(function, partial):
        return [_of_callable(function.func), function.args, function.keywords]
    function = getattr(function, "__func__", function)
    if not isinstance(function, FunctionType):
        function = function if isinstance(function, type) else type(function)
    elif function.__name__ == "<lambda>":  # its source line contains other code too
        return [function.__qualname__, _of_code(function.__code__)]
    return [function.__qualname__, _source(function)]


def _of_code(code: CodeType) -> list[Any]:
    constants = [_of_code(c) if isinstance(c, CodeType) else c for c in code.co_consts]
    return [code.co_code, code.co_names, constants]


def _source(item: Any) -> str | None:
    try:
        return inspect.getsource(item)
    except (OSError, TypeError):
        return None


def _name(value: Any) -> str:
    """The qualified name without the module, which may be ``__main__``."""
    if isinstance(value, partial):
        return _name(value.func)
    return str(getattr(value, "__qualname__", None) or type(value).__qualname__)


def _model(lm: Any) -> str | None:
    """The name of a model, without its settings, which may be secrets."""
    return None if lm is None else str(getattr(lm, "model", None) or type(lm).__qualname__)
