"""What stands for DSPy's ChatAdapter where that answers a refusal with another request."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from dspy.utils import exceptions as dspy_errors
from lms import ScriptedLM, completion

from mpromptune.errors import EmptyAnswerError
from mpromptune.lms import adapters
from mpromptune.lms.adapters import PatientChatAdapter, given_adapter, is_patient, patient, strict


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
    with dspy.context(lm=lm, adapter=adapter):
        return dspy.Predict("question -> answer")(question="2+2").answer


def test_an_answer_in_order_is_taken() -> None:
    """One request."""
    lm = Answers(CHAT)
    assert asked(lm, PatientChatAdapter(None)) == "4"
    assert len(lm.calls) == 1


def test_an_answer_that_cannot_be_parsed_is_asked_for_as_json() -> None:
    """As DSPy does in all versions; unless its user has switched that off."""
    lm = Answers("four", JSON)
    assert asked(lm, PatientChatAdapter(None)) == "4"
    assert len(lm.calls) == 2
    with pytest.raises(dspy_errors.AdapterParseError):
        asked(Answers("four", JSON), PatientChatAdapter(dspy.ChatAdapter(use_json_adapter_fallback=False)))


def test_a_request_that_fails_is_not_followed_by_another() -> None:
    """Whether and when to ask again is for those to say who know what failed."""
    lm = Answers(ConnectionError("down"), JSON)
    with pytest.raises(Exception, match="down"):
        asked(lm, PatientChatAdapter(None))
    assert len(lm.calls) == 1


def test_it_stands_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the default adapter, where that is not patient itself; the user's own is known all the same."""
    own, custom = dspy.ChatAdapter(), dspy.JSONAdapter()
    monkeypatch.setattr(adapters, "is_patient", lambda adapter: True)
    assert [patient(adapter) for adapter in (None, own, custom)] == [None, own, custom]
    monkeypatch.setattr(adapters, "is_patient", lambda adapter: False)
    assert isinstance(patient(None), PatientChatAdapter)
    assert [given_adapter(patient(adapter)) for adapter in (None, own, custom)] == [None, own, custom]


def test_the_default_adapter_is_patient_in_every_version() -> None:
    """What a compile sets, whichever class it is, asks once where a custom LM's own error comes."""
    lm = Answers(ConnectionError("down"), JSON)
    with pytest.raises(Exception, match="down"):
        asked(lm, patient(None))
    assert len(lm.calls) == 1


@pytest.mark.parametrize("empty", ["", " \n", None])
@pytest.mark.parametrize("adapter", [None, dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter()])
def test_an_answer_with_nothing_in_it_is_no_answer(adapter: Any, empty: Any) -> None:
    """Whichever adapter is to read it: it is not asked for in another form, nor is it a prediction."""
    if isinstance(adapter, dspy.XMLAdapter) and not is_patient(dspy.ChatAdapter):
        pytest.skip("this DSPy asks again after any error, whichever adapter its user has chosen")
    lm = Answers(empty, JSON)
    with pytest.raises(EmptyAnswerError):
        asked(lm, strict(patient(adapter)))
    assert len(lm.calls) == 1
    assert given_adapter(strict(patient(adapter))) is adapter


def test_a_strict_adapter_reads_as_the_users_own() -> None:
    """Also once it has been made strict twice, as in a compile within a compile."""
    assert asked(Answers(CHAT), strict(strict(None))) == "4"
    assert asked(Answers(JSON), strict(dspy.JSONAdapter())) == "4"
    assert asked(Answers("four", JSON), strict(patient(None))) == "4"
