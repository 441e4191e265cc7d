"""DSPy's default adapter as it is from 3.4 on, for versions before."""

from __future__ import annotations

import inspect
from typing import Any

import dspy
from dspy.utils import exceptions as dspy_errors


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


def given_adapter(adapter: Any) -> Any:
    """The user's own."""
    return adapter.stands_for if isinstance(adapter, PatientChatAdapter) else adapter
