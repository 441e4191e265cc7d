"""Demo sets as JSON and back, in the form in which DSPy saves programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import dspy
from dspy.adapters.utils import serialize_for_json
from dspy.teleprompt.utils import get_signature

DemoSets = dict[int, list[list[Any]]]


def encodable(value: Any) -> Any:
    """A text with ``?`` for every half of a character; anything else as it is.

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


def to_json(demos: Sequence[Any]) -> list[dict[str, Any]]:
    """The fields of each demo; what is no JSON as it stands in prompts.

    Raises:
        TypeError: A demo is no JSON all the same.
        ValueError: The same.
    """
    plain = [{str(name): serialize_for_json(value) for name, value in demo.items()} for demo in demos]
    loaded: list[dict[str, Any]] = json.loads(json.dumps(plain))
    return loaded


def from_json(demos: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The demos that `to_json` was given."""
    return [dspy.Example(dict(fields)) for fields in demos]


def require_same_prompts(program: Any, demos: DemoSets, loaded: DemoSets) -> None:
    """Checks that predictors are prompted with the loaded demos as they are with the others.

    Raises:
        ValueError: They are not.
    """
    adapter = dspy.settings.adapter or dspy.ChatAdapter()
    for i, predictor in enumerate(program.predictors()):
        signature = get_signature(predictor)
        for own, other in zip(demos[i], loaded[i], strict=True):
            if adapter.format_demos(signature, own) != adapter.format_demos(signature, other):
                raise ValueError("a demo would be formatted differently")
