"""What is no candidate, whoever wrote it."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from briefs import (
    DEMOS,
    INSTRUCTION,
    REWRITERS,
    TEXTS,
    TRAIN,
    VAL,
    WriterLM,
    brief,
    example,
    parent_of,
    propose,
    setting,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks import Adder
from writers import Writer

from mpromptune.engine.proposers import Brief
from mpromptune.errors import ProposalRefusedError
from mpromptune.operators.guards import checked, unwrapped
from mpromptune.operators.registry import made


@pytest.mark.parametrize("name", [*REWRITERS, "fresh"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x" * 50_000, "has 50,000 characters"),
        ('{"plan": ["a"], "steps": 3}', "JSON without one text"),
        ('{"plan": "cut off', "JSON that cannot be read"),
        ("```json\nnot closed", "does not end"),
        ("  Add  the\nnumbers. ", "equals candidate 0"),
        (f"For instance, {VAL[8].question}", "copies from an example"),
        (f"For instance: {TRAIN[3].question.upper()}", "copies from an example"),
        ("   ", "empty"),
    ],
)
def test_unfit_instructions_are_refused(name: str, text: str, reason: str) -> None:
    """Whoever writes it, an unfit text is refused with the reason."""
    own = setting(WriterLM(text))
    with pytest.raises(ProposalRefusedError):
        propose(name, own, brief(own, parent=parent_of(name)))
    with pytest.raises(ProposalRefusedError, match=reason):
        checked(text, own, brief(own))


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("```\nAdd up.\n```", "Add up."),
        ("```markdown\nAdd up.\nThen stop.\n```", "Add up.\nThen stop."),
        ("```Add up.```", "Add up."),
        ('{"new_instruction": "Add up."}', "Add up."),
        ('["Add up."]', "Add up."),
        ('"Add up."', "Add up."),
        ('```json\n{"instruction": "Add up."}\n```', "Add up."),
        ("Add {question} up.", "Add {question} up."),
        ("[Role] You add.", "[Role] You add."),
        ("Reply like this:\n```\n3\n```", "Reply like this:\n```\n3\n```"),
        ("Add up \ud83d.", "Add up ?."),
        ('"Add up \\ud83d."', "Add up ?."),
    ],
)
def test_wrappers_are_taken_off(text: str, plain: str) -> None:
    """A code block around the whole text, or JSON with one text, is taken off; the text itself is kept."""
    own = setting()
    assert checked(text, own, brief(own)) == plain


def test_deeply_nested_json_is_an_instruction_like_any_other() -> None:
    """What Python's parser cannot read for its depth does not end a run."""
    own = setting(max_chars=10**6)
    text = "[" * 100_000
    assert checked(text, own, brief(own)) == text


@given(st.text(st.sampled_from('`{}[]":,\\ \nabc1'), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_unwrapped_or_refused(text: str) -> None:
    """There is no other error, and nothing is said that was not in the text."""
    try:
        plain = unwrapped(text)
    except ProposalRefusedError:
        return
    assert plain == plain.strip()
    assert len(plain) <= len(text)


def test_labels_are_copied_unless_several_examples_have_them() -> None:
    """The answer of one example is refused; the name of a class, or the student's own words, are not."""
    answer, name = "the Treaty of Westphalia", "card payment wrong exchange rate"
    own = setting(valset=[example(0, answer), example(1, name), example(2, name), example(3, "short one")])
    told = brief(own)
    with pytest.raises(ProposalRefusedError, match="treaty of westphalia"):
        checked(f"Often it is {answer}.", own, told)
    for text in (f"Classes are {name} and so on.", "Not a short one."):
        assert checked(text, own, told) == text
    student = Adder()
    student.solve.signature = student.solve.signature.with_instructions(f"Is it {answer}?")
    own = setting(program=student, valset=own.valset)
    assert checked(f"Often it is {answer}.", own, told)


def test_what_the_output_is_read_by_is_kept() -> None:
    """If the student's own instruction names an output field, so does each new one; DSPy's is no such."""
    student = Adder()
    student.solve.signature = student.solve.signature.with_instructions("Think. End with `Answer: <number>`.")
    own = setting(program=student)
    with pytest.raises(ProposalRefusedError, match="lacks \\['answer:'\\]"):
        checked("Add up.", own, brief(own))
    assert checked("Add up. Answer: the sum.", own, brief(own))
    thinking = dspy.ChainOfThought("question -> answer")
    assert checked("Add up.", setting(program=thinking), brief(own)) == "Add up."


def saying(answer: Any) -> Writer:
    """A user's proposer, which does what it is told."""

    def write(brief: Brief) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Writer(write, calls=0)


@pytest.mark.parametrize(
    ("component", "answer", "reason"),
    [
        (INSTRUCTION, VAL[8].question, "copies from an example"),
        (INSTRUCTION, None, "must be a text; got None"),
        (INSTRUCTION, KeyError("x"), "failed with KeyError: 'x'"),
        (DEMOS, "a text", "must be a list of demos; got a text"),
        (DEMOS, ["a text"], "must be a list of demos"),
        (DEMOS, [TRAIN[0]], "equals candidate 1"),
        (DEMOS, [TRAIN[1], VAL[9]], "has the inputs of a validation example: 'question: Number 9"),
    ],
)
def test_proposers_of_ones_own_are_checked_too(component: str, answer: Any, reason: str) -> None:
    """What a user's proposer returns or raises is judged like the rest, instructions and demo sets."""
    own = setting(candidates={INSTRUCTION: TEXTS, DEMOS: [[], [TRAIN[0]]]})
    (proposer,) = made([saying(answer)], own)
    with pytest.raises(ProposalRefusedError, match=reason):
        proposer.propose(brief(own, component, {INSTRUCTION: 0, DEMOS: 0}))


def test_demo_sets_that_are_fit() -> None:
    """A new set is kept as it is, apart from what cannot be encoded."""
    own = setting(candidates={INSTRUCTION: TEXTS, DEMOS: [[], [TRAIN[0]]]})
    (proposer,) = made([saying((TRAIN[1], dspy.Example(question="half \ud83d", answer="a")))], own)
    whole, half = proposer.propose(brief(own, DEMOS, {INSTRUCTION: 0, DEMOS: 0}))
    assert whole is TRAIN[1]
    assert half.question == "half ?"


def test_a_program_without_inputs_has_demos() -> None:
    """Where validation examples have no inputs, none can be shown by mistake."""
    own = setting(valset=[dspy.Example(answer="a").with_inputs()], candidates={DEMOS: [[]]})
    assert not own.is_held_out(TRAIN[0])
