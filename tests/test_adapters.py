"""What stands for an adapter in a compile: which answers it takes, and after which it asks again."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from dspy.utils import exceptions as dspy_errors
from lms import ScriptedLM, completion

from mpromptune.errors import EmptyAnswerError
from mpromptune.lms.adapters import given_adapter, watched


class Answers(ScriptedLM):
    """Gives texts one after the other; an exception among them is raised."""

    def __init__(self, *answers: str | Exception) -> None:
        super().__init__(lambda field, messages: "")
        self._answers = list(answers)

    def forward(self, prompt: str | None = None, messages: list | None = None, **kwargs: Any) -> Any:
        self.calls.append(messages or [])
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return completion(answer, self.model)


CHAT, JSON = "[[ ## answer ## ]]\n4\n\n[[ ## completed ## ]]", '{"answer": "4"}'


def asked(lm: Answers, adapter: Any) -> Any:
    with dspy.context(lm=lm, adapter=watched(adapter)):
        return dspy.Predict("question -> answer")(question="2+2").answer


@pytest.mark.parametrize(
    ("answers", "adapter"),
    [
        ([CHAT], None),
        ([CHAT], watched(None)),  # as in a compile within a compile
        (["four", JSON], None),
        (["four", JSON], watched(dspy.ChatAdapter())),
        ([JSON], dspy.JSONAdapter()),
    ],
)
def test_it_reads_as_the_users_own(answers: list[str], adapter: Any) -> None:
    """The default one asks for an answer as JSON that cannot be parsed, as DSPy does in all versions."""
    lm = Answers(*answers)
    assert asked(lm, adapter) == "4"
    assert len(lm.calls) == len(answers)


def test_json_may_be_switched_off() -> None:
    """By the user, as in DSPy."""
    lm = Answers("four", JSON)
    with pytest.raises(dspy_errors.AdapterParseError):
        asked(lm, dspy.ChatAdapter(use_json_adapter_fallback=False))
    assert len(lm.calls) == 1


def test_a_request_that_fails_is_not_followed_by_another() -> None:
    """Whether and when to ask again is for those to say who know what failed."""
    lm = Answers(ConnectionError("down"), JSON)
    with pytest.raises(Exception, match="down"):
        asked(lm, None)
    assert len(lm.calls) == 1


@pytest.mark.parametrize("adapter", [None, dspy.ChatAdapter(), dspy.JSONAdapter(), object()])
def test_the_users_adapter_is_known_and_left_as_it_was(adapter: Any) -> None:
    """Whatever stands for it, once or twice; what is no adapter of DSPy's is taken as it is."""
    before = dict(vars(adapter)) if hasattr(adapter, "__dict__") else {}
    assert given_adapter(watched(watched(adapter))) is adapter
    assert (dict(vars(adapter)) if hasattr(adapter, "__dict__") else {}) == before


@pytest.mark.parametrize("empty", ["", " \n", None])
@pytest.mark.parametrize("adapter", [None, dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter()])
def test_an_answer_with_nothing_in_it_is_no_answer(adapter: Any, empty: Any) -> None:
    """Whichever adapter is to read it: it is not asked for in another form, nor is it a prediction."""
    if isinstance(adapter, dspy.XMLAdapter) and not hasattr(dspy.BaseLM, "_record_response"):
        pytest.skip("up to 3.2, DSPy asks again after any error, whichever adapter its user has chosen")
    lm = Answers(empty, JSON)
    with pytest.raises(EmptyAnswerError):
        asked(lm, adapter)
    assert len(lm.calls) == 1
