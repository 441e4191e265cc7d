"""Adapters that end a call whose request failed, or was answered with nothing, where DSPy's ask again."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import dspy
from dspy.utils import exceptions as dspy_errors

from mpromptune.errors import AnswerRefusedError, EmptyAnswerError
from mpromptune.lms.errors import note_failed

# Reasons that providers give for the end of an answer, and that say something of its prompt.
_OF_THE_PROMPT = ("content_filter", "refusal", "length")


class PatientChatAdapter(dspy.ChatAdapter):
    """Asks again as JSON after an answer that cannot be parsed, but not after a request that failed.

    Up to DSPy 3.2, a ``ChatAdapter`` does so after any error, in 3.3 after those that are not DSPy's own: a
    request that was refused or timed out is followed at once by another one with another prompt. What
    comes of that would be scored.

    Args:
        stands_for: The adapter of the user's settings; None for the default one.
    """

    def __init__(self, stands_for: dspy.ChatAdapter | None) -> None:
        super().__init__()
        self.stands_for = stands_for
        self.__dict__.update({} if stands_for is None else vars(stands_for))
        self._falls_back: bool = vars(self)["use_json_adapter_fallback"]
        self.use_json_adapter_fallback = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As ``ChatAdapter``."""
        try:
            return super().__call__(*args, **kwargs)
        except dspy_errors.AdapterParseError:
            if not self._falls_back:
                raise
            return self._as_json()(*args, **kwargs)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        """As ``ChatAdapter``."""
        try:
            return await super().acall(*args, **kwargs)
        except dspy_errors.AdapterParseError:
            if not self._falls_back:
                raise
            return await self._as_json().acall(*args, **kwargs)

    def _as_json(self) -> Any:
        """As ``ChatAdapter`` makes it, which 3.2 does in the midst of things."""
        return getattr(self, "_make_json_adapter_fallback", dspy.JSONAdapter)()


def patient(adapter: Any) -> Any:
    """``adapter`` of DSPy's settings, or what stands for it where this version needs that."""
    is_default = adapter is None or type(adapter) is dspy.ChatAdapter
    return PatientChatAdapter(adapter) if is_default and not is_patient(dspy.ChatAdapter) else adapter


def is_patient(adapter: type[dspy.Adapter]) -> bool:
    """Whether an adapter's class asks again only after an answer that cannot be parsed."""
    try:
        return "except AdapterParseError" in inspect.getsource(adapter.__call__)
    except OSError:  # no source: what stands for it does no harm
        return False


def strict(adapter: Any) -> Any:
    """A copy of an adapter, to which an answer without text is a fault of the infrastructure.

    DSPy takes such an answer for one that cannot be parsed, and asks again with another prompt; to some
    versions, an answer without choices is a prediction without fields.
    """
    own = dspy.ChatAdapter() if adapter is None else copy.copy(adapter)
    if not hasattr(type(own), "_call_postprocess"):
        return adapter
    own.stands_for = given_adapter(adapter)
    own._call_postprocess = partial(_parsed, own)
    return own


def _parsed(
    adapter: Any, processed: Any, original: Any, outputs: Any, lm: Any, *args: Any, **kwargs: Any
) -> Any:
    """As the adapter's class does it, for all outputs of a request.

    Raises:
        AnswerRefusedError: One of them says nothing, for a reason that is the prompt's.
        EmptyAnswerError: One of them says nothing, nor is there any.
    """
    if not outputs or any(map(_is_empty, outputs)):
        if (reason := _refusal(lm, outputs)) is not None:
            raise AnswerRefusedError(f"The language model answered with nothing: {reason}.")
        error = EmptyAnswerError(f"The language model answered with nothing to parse: {outputs!r}.")
        note_failed(error)
        raise error
    return type(adapter)._call_postprocess(adapter, processed, original, outputs, lm, *args, **kwargs)


def _refusal(lm: Any, outputs: Any) -> str | None:
    """The reason of the prompt's for which an answer is empty, if the LM's history has one."""
    entries = reversed(list(getattr(lm, "history", ())))
    response = next((entry.get("response") for entry in entries if entry.get("outputs") is outputs), None)
    for choice in getattr(response, "choices", None) or [response]:
        message, reason = getattr(choice, "message", None), getattr(choice, "finish_reason", None)
        parts = getattr(message, "parts", ())  # from DSPy 3.4 on
        if getattr(message, "refusal", None) or any(getattr(part, "type", "") == "refusal" for part in parts):
            reason = "refusal"
        if reason in _OF_THE_PROMPT:
            return str(reason)
    return None


def _is_empty(output: Any) -> bool:
    if not isinstance(output, dict):
        output = {"text": output}
    return not output.get("tool_calls") and not str(output.get("text") or "").strip()


def given_adapter(adapter: Any) -> Any:
    """The user's adapter, whether or not another one stands for it."""
    return getattr(adapter, "stands_for", adapter)
