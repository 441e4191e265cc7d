"""Operators that ask a language model: what they show it and what not, GEPA's protocol, the registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dspy
import pytest
from briefs import (
    DEMOS,
    INSTRUCTION,
    LONG,
    REWRITERS,
    TEXTS,
    TRAIN,
    VAL,
    WriterLM,
    brief,
    note,
    parent_of,
    propose,
    setting,
)
from dspy.teleprompt.gepa import instruction_proposal
from lms import completion
from tasks import Adder, Planner

from mpromptune.engine.proposers import Brief
from mpromptune.errors import EmptyAnswerError, InvalidArgumentError, ProposalRefusedError
from mpromptune.lms.adapters import Answer, keeping
from mpromptune.model.space import PromptSpace
from mpromptune.operators import registry
from mpromptune.operators.base import Setting
from mpromptune.operators.reflect import default_proposer
from mpromptune.operators.registry import OPERATORS, made, register

# What language models are asked, and how.


def test_reflect_shows_failures_beside_what_others_answered() -> None:
    """The request has the instruction, inputs, both outputs, expected values, feedback and scores."""
    lm = WriterLM()
    assert propose("reflect", setting(lm), brief(setting(lm))) == "Add, and carry the one."
    ((request, *_),) = lm.requests
    assert TEXTS[0] in request
    for i in (0, 1):  # lost to another configuration
        for said in (VAL[i].question, VAL[i].answer, f"answer 1.{i}", f"answer 0.{i}", f"feedback 1.{i}"):
            assert said in request
    assert sum(f"answer 1.{i}" in request for i in (4, 5)) == 2  # solved by none, in the places left over
    assert sum(f"answer 1.{i}" in request for i in (2, 3)) == 2  # solved
    assert "answer 0.2" not in request  # beside a success there is nothing to learn from another


def test_two_thirds_of_the_failures_are_lost_to_others() -> None:
    """Of four failures shown, three are those where another configuration does better."""
    shown: list[Any] = []

    def writer(candidate: Any, reflective_dataset: Any, components_to_update: Any) -> dict[str, str]:
        shown.extend(reflective_dataset["solve"])
        return {"solve": "Mind the carry."}

    scores = dict.fromkeys(range(6), 0.0)
    rows = [
        ({INSTRUCTION: 2}, 0.7, {**scores, 0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}),
        ({INSTRUCTION: 0}, 0.1, scores),
    ]
    own = setting(instruction_proposer=writer)
    propose("reflect", own, brief(own, measured=rows))
    told = [record["Feedback"] for record in shown]
    assert ["With another prompt" in text for text in told] == [True, True, True, False]
    assert "No prompt so far does better" in told[3]


def test_where_everything_fails_failures_are_shown() -> None:
    """If no prompt has solved anything, the scale of scores is still that of DSPy, from 0 to 1."""
    lm = WriterLM()
    rows = [({INSTRUCTION: 0}, 0.1, dict.fromkeys(range(6), 0.0))]
    notes = {(0, i): note(i, f"answer {i}") for i in range(6)}
    propose("reflect", setting(lm), brief(setting(lm), measured=rows, notes=notes))
    ((request, *_),) = lm.requests
    assert request.count("Score 0 on a scale of 0 to 1. No prompt so far does better") == 4
    assert "This succeeds" not in request


@pytest.mark.parametrize(
    ("scores", "shown"),
    [
        ({0: 0.9, 1: 0.2, 2: 0.6}, {0: "No prompt", 1: "No prompt", 2: "No prompt"}),  # two of them as good
        ({0: -3.0, 1: -1.0, 2: -1.0}, {0: "No prompt", 1: "succeeds", 2: "succeeds"}),  # -1 is the best seen
        ({0: 100.0, 1: 0.0}, {0: "succeeds", 1: "No prompt"}),
    ],
)
def test_scores_on_any_scale(scores: dict[int, float], shown: dict[int, str]) -> None:
    """What fails and succeeds is told apart for fractions, percentages and losses."""
    lm = WriterLM()
    notes = {(0, i): note(i, f"answer {i}") for i in scores}
    propose(
        "reflect", setting(lm), brief(setting(lm), measured=[({INSTRUCTION: 0}, 0.1, scores)], notes=notes)
    )
    request = lm.requests[0][0]
    for i, said in shown.items():
        assert said in request.partition(VAL[i].question)[2].partition("Inputs")[0]


def test_hidden_examples_are_shown_to_nobody() -> None:
    """No request has a text of a validation example outside the visible share, even where notes have it."""
    lm = WriterLM()
    own = setting(lm, visible=frozenset({0, 1, 2}))
    for name in [*REWRITERS, "fresh"]:
        propose(name, own, brief(own, parent=parent_of(name)))
        lm.text = f"{lm.text} Again."  # not what another operator wrote
    requests = "".join(request for request, *_ in lm.requests)
    assert VAL[1].question in requests
    assert not any(VAL[i].question in requests or f"answer 1.{i}" in requests for i in range(3, 10))


def test_contrast_shows_the_best_and_the_worst_with_intervals() -> None:
    """Posterior mean, 95 % interval and text of each; the worst are named as such."""
    lm = WriterLM()
    propose("contrast", setting(lm), brief(setting(lm)))
    ((request, *_),) = lm.requests
    good, bad = request.split("good_instructions ## ]]")[-1].split("bad_instructions ## ]]")[-2:]
    assert f"Score 0.700 (0.602 to 0.798):\\n{TEXTS[2]}" in good
    assert f"Score 0.200 (0.102 to 0.298):\\n{TEXTS[1]}" in bad
    assert "question -> answer" in request


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([({INSTRUCTION: 0}, 0.5, {0: 1.0})], "Fewer than two"),
        ([({INSTRUCTION: 2}, 0.7, {0: 1.0}), ({INSTRUCTION: 0}, 0.5, {0: 1.0})], "The parent is the worst"),
    ],
)
def test_contrast_needs_something_to_be_unlike(rows: Any, reason: str) -> None:
    """Without a worse instruction than the parent's, no request is made."""
    own = setting()
    with pytest.raises(ProposalRefusedError, match=reason):
        propose("contrast", own, brief(own, measured=rows))
    assert not own.prompt_model.requests


@pytest.mark.parametrize("name", [*REWRITERS, "fresh", "demos"])
def test_failed_proposals_are_passed_over(name: str) -> None:
    """Where a proposal has failed there is no candidate, and all others work on."""
    sets = [[], None, [TRAIN[0]]]
    own = setting(candidates={INSTRUCTION: [*TEXTS, LONG, None], DEMOS: sets})
    component = DEMOS if name == "demos" else INSTRUCTION
    rows = [({INSTRUCTION: i, DEMOS: 0}, 0.5, {0: float(i), 1: 1.0}) for i in (2, 0, 1)]
    notes = {(j, 0): note(0, "answer") for j in range(3)}
    parent = {**parent_of(name), DEMOS: 0}
    if name == "shorten":
        rows.append((parent, 0.1, {0: 0.0}))
    assert propose(name, own, brief(own, component, parent, rows, notes))


def test_merge_shows_the_parent_and_a_good_one_unlike_it() -> None:
    """Of the others, the best in a draw of posteriors; one with the parent's words is no other lineage."""
    lm = WriterLM()
    own = setting(lm, candidates={INSTRUCTION: [*TEXTS, "Add the two numbers."]})
    rows = [({INSTRUCTION: i}, mean, {0: 1.0}) for i, mean in ((2, 0.7), (0, 0.5), (1, 0.2))]
    propose("merge", own, brief(own, measured=rows))
    ((request, *_),) = lm.requests
    assert TEXTS[0] in request
    assert TEXTS[2] in request
    assert TEXTS[1] not in request
    alike = [({INSTRUCTION: i}, mean, {0: 1.0}) for i, mean in ((3, 0.9), (0, 0.5))]
    own.candidates[INSTRUCTION][3] = "Numbers: add the."
    with pytest.raises(ProposalRefusedError, match="differs enough"):
        propose("merge", own, brief(own, measured=alike))


def test_shorten_asks_only_for_what_is_long() -> None:
    """A short instruction is refused without a request, and an answer that is no shorter after it."""
    lm = WriterLM()
    own = setting(lm)
    with pytest.raises(ProposalRefusedError, match="is short: 16 characters"):
        propose("shorten", own, brief(own))
    assert not lm.requests
    assert propose("shorten", own, brief(own, parent={INSTRUCTION: 3})) == lm.text
    assert LONG in lm.requests[0][0]
    lm.text = LONG + " And more."
    with pytest.raises(ProposalRefusedError, match="no shorter"):
        propose("shorten", own, brief(own, parent={INSTRUCTION: 3}))


def test_fresh_is_a_proposal_as_before_the_search() -> None:
    """It has a summary of training examples, the program's code, demos and the student's own instruction;
    nothing that the search has found.
    """
    demo = dspy.Example(augmented=True, question="a demo's question", answer="a demo's answer")
    lm = WriterLM()
    own = setting(lm, candidates={INSTRUCTION: TEXTS, DEMOS: [[], [demo]]})
    (proposer,) = made(["fresh"], own)
    assert not proposer.keeps_parent
    proposer.propose(brief(own, parent={INSTRUCTION: 0, DEMOS: 0}))
    assert len(lm.requests) == proposer.calls == 5
    requests = [request for request, *_ in lm.requests]
    assert any(one.question in requests[0] for one in TRAIN)
    for said in ("class Adder", "a demo\\'s answer", Adder().solve.signature.instructions):
        assert said in requests[-1]
    assert not any(text in request for text in TEXTS for request in requests)
    plain = setting(lm, program_aware_proposer=False, data_aware_proposer=False)
    assert made(["fresh"], plain)[0].calls == 1


@pytest.mark.parametrize("name", [*REWRITERS, "fresh"])
def test_requests_depend_on_the_seed_and_the_number_alone(name: str) -> None:
    """Equal briefs make equal requests; another number or seed makes another request of an equal prompt."""

    def requests(**changes: Any) -> list[Any]:
        lm = WriterLM()
        own = setting(lm)
        propose(name, own, brief(own, parent=parent_of(name), **changes))
        return lm.requests

    first = requests()
    assert first == requests()
    assert all(temperature == 1.0 for *_, temperature in first)
    rollouts = {
        tuple(rollout for _, rollout, _ in requests(**change)) for change in ({}, {"number": 8}, {"seed": 4})
    }
    assert len(rollouts) == 3


def test_candidates_that_came_later_change_nothing() -> None:
    """A proposal knows the candidates of its brief, whatever others have written since."""
    own = setting()
    asked = brief(own)
    own.candidates[INSTRUCTION].append(own.prompt_model.text)
    assert propose("reflect", own, asked) == own.prompt_model.text
    with pytest.raises(ProposalRefusedError, match="equals candidate 4"):
        propose("reflect", own, brief(own))


def test_lms_have_their_tasks() -> None:
    """The reflection LM rewrites, the prompt model writes anew; without either, the LM of the settings."""
    reflection, writer, default = WriterLM(), WriterLM(), WriterLM()
    own = setting(writer, reflection_lm=reflection)
    for name in [*REWRITERS, "fresh"]:
        propose(name, own, brief(own, parent=parent_of(name)))
    assert len(reflection.requests) == 4
    assert len(writer.requests) == 5
    with dspy.context(lm=default):
        propose("reflect", setting(prompt_model=None), brief(own))
    assert len(default.requests) == 1


def test_an_outage_is_no_refusal() -> None:
    """Errors of the infrastructure are passed on, and those of an answer are refusals with a reason."""

    def fail() -> str:
        raise ConnectionError("reset by peer")

    own = setting(WriterLM(fail))
    with pytest.raises(ConnectionError):
        propose("contrast", own, brief(own))

    def broken(**given: Any) -> Any:
        raise KeyError("feedback")

    own = setting(instruction_proposer=broken)
    with pytest.raises(ProposalRefusedError, match="failed with KeyError: 'feedback'"):
        propose("reflect", own, brief(own))


class Shelf:
    """Answers in memory (see `mpromptune.lms.adapters.Answers`)."""

    def __init__(self) -> None:
        self.kept: dict[tuple[Any, ...], Answer] = {}

    def answer(self, scope: str, digest: str, number: int, cached: bool) -> Answer | None:
        return self.kept.get((scope, digest, number))

    def keep_answer(self, scope: str, digest: str, number: int, answer: Answer) -> None:
        self.kept[scope, digest, number] = answer


@pytest.mark.parametrize("name", [*REWRITERS, "fresh", "gepa's own"])
def test_kept_answers_are_not_asked_for_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proposal that is repeated after an interruption pays for no request twice, whoever makes it."""
    if name == "gepa's own":
        monkeypatch.setattr("mpromptune.operators.reflect._DSPY_PROPOSER", "absent")
        name = "reflect"
    lm, shelf, texts = WriterLM(), Shelf(), []
    own = setting(lm)
    for _ in range(2):
        with keeping(shelf, "proposal:7"):
            texts.append(propose(name, own, brief(own, parent=parent_of(name))))
        paid = len(lm.requests)
    assert texts[0] == texts[1]
    assert paid == len(shelf.kept) == made([name], own)[0].calls


def test_an_empty_answer_is_no_refusal() -> None:
    """DSPy's proposer, with its own adapter, does not take an empty answer for one that cannot be parsed."""

    class EmptyLM(WriterLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return completion("", self.model)

        def copy(self, **kwargs: Any) -> EmptyLM:
            return self

    if not hasattr(instruction_proposal, "InstructionProposer"):
        pytest.skip("DSPy ships one from 3.4 on.")
    own = setting(EmptyLM())
    with pytest.raises(EmptyAnswerError):
        propose("reflect", own, brief(own))


# GEPA's protocol.


def test_a_proposal_function_of_ones_own() -> None:
    """It gets GEPA's arguments, in a context with the reflection LM; only the predictor is updated."""
    given: list[dict[str, Any]] = []
    lm = WriterLM()

    def writer(candidate: Any, reflective_dataset: Any, components_to_update: Any) -> dict[str, str]:
        given.append({"candidate": candidate, "data": reflective_dataset, "update": components_to_update})
        assert dspy.settings.lm.requests is lm.requests
        return {"solve": "Mind the carry."}

    component = "1_predictor_instruction"
    candidates = {INSTRUCTION: ["Plan."], component: ["Solve."]}
    own = setting(program=Planner(), reflection_lm=lm, instruction_proposer=writer, candidates=candidates)
    parent = {INSTRUCTION: 0, component: 0}
    notes = {
        (0, 0): {
            **note(0, "wrong"),
            "predictors": {"solve": {"inputs": {"plan": "p"}, "outputs": {"answer": 9}}},
        }
    }
    asked = brief(own, component, parent, [(parent, 0.5, {0: 0.0, 1: 1.0})], notes)
    assert propose("reflect", own, asked) == "Mind the carry."
    assert given[0]["candidate"] == {"plan": "Plan.", "solve": "Solve."}
    assert given[0]["update"] == ["solve"]
    (record,) = given[0]["data"]["solve"]
    assert record["Inputs"] == {"plan": "p"}
    assert record["Generated Outputs"] == {"answer": "9"}
    assert "Expected:\nanswer: 300 apples" in record["Feedback"]
    assert "Outputs of the whole program:\nanswer: wrong" in record["Feedback"]


@pytest.mark.parametrize("returned", [None, "a text", {}, {"other": "x"}, {"solve": 3}])
def test_what_is_no_proposal(returned: Any) -> None:
    """What a proposal function returns instead of a text is refused, and named."""
    own = setting(instruction_proposer=lambda **given: returned)
    with pytest.raises(ProposalRefusedError, match="got 3|returned no text"):
        propose("reflect", own, brief(own))


def test_gepa_writes_where_dspy_has_no_proposer(monkeypatch: pytest.MonkeyPatch) -> None:
    """With versions of DSPy before 3.4, the request is GEPA's own, and its code block is the answer."""
    monkeypatch.setattr("mpromptune.operators.reflect._DSPY_PROPOSER", "absent")
    lm = WriterLM()
    own = setting(lm)
    assert propose("reflect", own, brief(own)) == lm.text
    ((request, *_),) = lm.requests
    assert "I provided an assistant with the following instructions" in request
    assert VAL[0].question in request
    assert f"at most {own.max_chars} characters" in request


def test_a_parent_without_failures_is_not_rewritten() -> None:
    """Where nothing fails among what may be shown, no request is made."""
    own = setting()
    rows = [({INSTRUCTION: 0}, 0.9, {0: 1.0, 1: 1.0})]
    with pytest.raises(ProposalRefusedError, match="fails at no example"):
        propose("reflect", own, brief(own, measured=rows, notes={(0, 0): note(0, "300 apples")}))
    assert not own.prompt_model.requests


# The registry.


class Polite:
    """A user's operator."""

    name = "polite"
    calls = 0
    keeps_parent = True

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def components(self, space: PromptSpace) -> Sequence[str]:
        return space.names

    def propose(self, brief: Brief) -> str:
        return f"Please: {self.setting.instructions(brief)['solve']}"


def test_an_operator_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is used by its registered name like others, or given as an object."""
    monkeypatch.setattr(registry, "OPERATORS", {**OPERATORS})
    register("polite", Polite)
    own = setting()
    assert propose("polite", own, brief(own)) == f"Please: {TEXTS[0]}"
    assert [proposer.name for proposer in made([Polite(own), "merge"], own)] == ["polite", "merge"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["reflct"], "Unknown proposer 'reflct'. Did you mean 'reflect'?"),
        (["xyzzy"], "Unknown proposer 'xyzzy'. Valid names are"),
        ([3], "got 3, which lacks"),
        ([Polite], "a class: register it"),
        (["merge", "merge"], "has 'merge' twice"),
    ],
)
def test_what_is_no_operator(given: Any, message: str) -> None:
    """The error names the value and what to do."""
    with pytest.raises(InvalidArgumentError) as caught:
        made(given, setting())
    assert message in str(caught.value)


def test_what_cannot_be_registered() -> None:
    """A name must be a text and an operator callable; so must an instruction proposer."""
    for name, operator in (("", Polite), (3, Polite), ("x", "Polite")):
        with pytest.raises(InvalidArgumentError, match="name of a proposer|register needs"):
            register(name, operator)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="instruction_proposer must be a function"):
        made(["reflect"], setting(instruction_proposer="dspy"))


def test_components_of_operators() -> None:
    """Instructions and demo sets are found by MIPROv2's names; other components belong to none of these."""
    own = setting(program=Planner())
    names = [f"{i}_predictor_{kind}" for i in range(2) for kind in ("instruction", "demos")]
    space = PromptSpace({name: ["a"] for name in [*names, "style"]})
    found = {proposer.name: [*proposer.components(space)] for proposer in made([*OPERATORS], own)}
    assert found.pop("demos") == ["0_predictor_demos", "1_predictor_demos"]
    assert len(found) == 5
    assert all(some == ["0_predictor_instruction", "1_predictor_instruction"] for some in found.values())


def test_the_default_proposer_is_that_of_dspy() -> None:
    """Where DSPy ships a proposer, it is the default, and told what will be refused."""
    cls = getattr(instruction_proposal, "InstructionProposer", None)
    if cls is None:
        pytest.skip("DSPy ships one from 3.4 on.")
    proposer: Any = default_proposer("Keep it short.")
    assert isinstance(proposer, cls)
    assert proposer.additional_instructions == "Keep it short."
