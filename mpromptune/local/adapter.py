"""A DSPy adapter for language models that continue text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dspy
from dspy.adapters.utils import format_field_value, parse_value
from dspy.utils.exceptions import AdapterParseError


class CompletionAdapter(dspy.Adapter):
    """Writes a prompt that a language model continues: the instruction, the demos, and the inputs.

    For the signature ``word -> category`` and one demo::

        Name the category of the word.

        Word: tiger
        Category: animal

        Word: bread
        Category:

    An answer is one line for each output field, and what follows is ignored. The instruction and the demos
    are one message, which is the same for all inputs; the inputs are another.

    For language models whose ``model_type`` is not ``"text"``, it is DSPy's ``ChatAdapter``; so a hosted
    prompt model can be used with a local task model.
    """

    def __call__(
        self,
        lm: dspy.BaseLM,
        lm_kwargs: dict[str, Any],
        signature: type[dspy.Signature],
        demos: list[dict[str, Any]],
        inputs: dict[str, Any],
    ) -> Any:
        """Ask the language model, which stops at the end of the last output field."""
        if lm.model_type != "text":
            return dspy.ChatAdapter()(lm, lm_kwargs, signature, demos, inputs)
        return super().__call__(lm, _settings(lm, lm_kwargs, signature), signature, demos, inputs)

    async def acall(
        self,
        lm: dspy.BaseLM,
        lm_kwargs: dict[str, Any],
        signature: type[dspy.Signature],
        demos: list[dict[str, Any]],
        inputs: dict[str, Any],
    ) -> Any:
        """Like a call."""
        if lm.model_type != "text":
            return await dspy.ChatAdapter().acall(lm, lm_kwargs, signature, demos, inputs)
        return await super().acall(lm, _settings(lm, lm_kwargs, signature), signature, demos, inputs)

    def format(
        self, signature: type[dspy.Signature], demos: list[dict[str, Any]], inputs: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """The instruction and the demos as a system message, if there are any; and the inputs."""
        outputs = signature.output_fields
        shown = [demo for demo in demos if all(name in demo for name in outputs)]
        parts = [signature.instructions.strip(), *(_lines(signature.fields, demo) for demo in shown)]
        head = "\n\n".join(filter(None, parts))
        last = f"{_lines(signature.input_fields, inputs)}\n{_label(next(iter(outputs.values())))}"
        messages = [{"role": "system", "content": head}] if head else []
        return [*messages, {"role": "user", "content": last}]

    def parse(self, signature: type[dspy.Signature], completion: str) -> dict[str, Any]:
        """The value of each output field.

        Raises:
            AdapterParseError: A field is missing, or its value is not of its type.
        """
        lines = [line.strip() for line in completion.splitlines() if line.strip()]
        found: dict[str, Any] = {}
        for i, (name, field) in enumerate(signature.output_fields.items()):
            label = _label(field)
            # The label of the first field ends the prompt.
            if i >= len(lines) or (i > 0 and not lines[i].startswith(label)):
                raise _failure(signature, completion, f"There is no line with {label!r}.")
            try:
                found[name] = parse_value(lines[i].removeprefix(label).strip(), field.annotation)
            except ValueError as error:
                raise _failure(signature, completion, f"The value of {name} is wrong: {error}.") from error
        return found


def _label(field: Any) -> str:
    """The words before a value, such as ``"Word:"``."""
    return str(field.json_schema_extra["prefix"])


def _lines(fields: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """Labels and values, as far as there are values; those of output fields without line breaks."""
    lines = []
    for name, field in fields.items():
        if name in values:
            text = str(format_field_value(field, values[name]))
            is_output = field.json_schema_extra["__dspy_field_type"] == "output"
            lines.append(f"{_label(field)} {' '.join(text.split()) if is_output else text}")
    return "\n".join(lines)


def _settings(lm: dspy.BaseLM, lm_kwargs: dict[str, Any], signature: type[dspy.Signature]) -> dict[str, Any]:
    """With the stop text of the language model, or else the end of the last output field."""
    end = "\n" if len(signature.output_fields) == 1 else "\n\n"
    return {"stop": lm.kwargs.get("stop") or end, **lm_kwargs}


def _failure(signature: type[dspy.Signature], completion: str, message: str) -> AdapterParseError:
    return AdapterParseError("CompletionAdapter", signature, completion, message)
