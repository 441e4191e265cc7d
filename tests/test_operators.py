"""Operators: what they show a language model and what not, what they refuse, and the demo sets they make."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dspy
import numpy as np
import pytest
from dspy.teleprompt.gepa import instruction_proposal
from lms import completion, requested_fields
from tasks import Adder, Planner

from mpromptune.engine.proposers import Brief
from mpromptune.errors import InvalidArgumentError, ProposalRefusedError
from mpromptune.lms.adapters import Answer, keeping
from mpromptune.model.space import PromptSpace
from mpromptune.operators import registry
from mpromptune.operators.base import Setting
from mpromptune.operators.effects import Effects
from mpromptune.operators.guards import checked
from mpromptune.operators.reflect import default_proposer
from mpromptune.operators.registry import OPERATORS, made, register
from mpromptune.operators.texts import candidate_text, demo_text
from mpromptune.storage.findings import Measured

INSTRUCTION, DEMOS = "0_predictor_instruction", "0_predictor_demos"
TEXTS = ["Add the numbers.", "Guess something quickly.", "Work through every column of digits and carry."]
LONG = " ".join(f"Rule {i}: mind the {i}th place." for i in range(40))
REWRITERS = ["reflect", "contrast", "merge", "shorten"]


class WriterLM(dspy.BaseLM):
    """Writes one text into every requested field, and records requests with their settings."""

    def __init__(self, text: str | Callable[[], str] = "Add, and carry the one.") -> None:
        super().__init__("writer", "chat", 0.0, 1000, False)
        self.text = text
        self.requests: list[tuple[str, Any, Any]] = []
        self._lock = threading.Lock()

    def forward(self, prompt: str | None = None, messages: list | None = None, **kwargs: Any) -> Any:
        messages = messages or [{"role": "user", "content": prompt}]
        settings = {**self.kwargs, **kwargs}
        with self._lock:
            self.requests.append((repr(messages), settings.get("rollout_id"), settings.get("temperature")))
        text = self.text() if callable(self.text) else self.text
        if "JSON object" in str(messages[-1]["content"]):
            return completion(json.dumps({"new_instruction": text}), self.model)
        if not (fields := requested_fields(messages)):
            return completion(f"```\n{text}\n```", self.model)
        return completion("".join(f"[[ ## {field} ## ]]\n{text}\n\n" for field in fields), self.model)

    def copy(self, **kwargs: Any) -> WriterLM:
        twin = WriterLM(self.text)
        twin.requests, twin._lock = self.requests, self._lock
        twin.kwargs = {**self.kwargs, **kwargs}
        return twin

    def __deepcopy__(self, memo: dict) -> WriterLM:
        return self


def example(i: int, answer: str | None = None) -> dspy.Example:
    """A long question that names its number."""
    question = f"Number {i} of the sums is the one where someone adds {100 + i} and {200 + i} apples."
    return dspy.Example(question=question, answer=answer or f"{300 + 2 * i} apples").with_inputs("question")


VAL, TRAIN = [example(i) for i in range(10)], [example(i) for i in range(20, 40)]


def note(i: int, answer: str, feedback: str | None = None) -> dict[str, Any]:
    inputs, outputs = {"question": VAL[i].question}, {"answer": answer}
    own = {"inputs": inputs, "outputs": outputs}
    return {**own, "expected": {"answer": VAL[i].answer}, "feedback": feedback, "predictors": {"solve": own}}


def setting(lm: Any = None, program: Any = None, **changes: Any) -> Setting:
    given: dict[str, Any] = {
        "program": program or Adder(),
        "candidates": {INSTRUCTION: [*TEXTS, LONG]},
        "trainset": TRAIN,
        "valset": VAL,
        "visible": frozenset(range(6)),
        "prompt_model": lm or WriterLM(),
    }
    return Setting(**{**given, **changes})


def brief(
    of: Setting,
    component: str = INSTRUCTION,
    parent: Mapping[str, int] | None = None,
    measured: Sequence[tuple[Mapping[str, int], float, Mapping[int, float]]] | None = None,
    notes: Mapping[tuple[int, int], Any] | None = None,
    **changes: Any,
) -> Brief:
    """Candidate 2 is the best and does examples 0 to 3; the parent 0 does 2 and 3; nobody does 4 and 5."""
    rows = measured or [
        ({INSTRUCTION: 2}, 0.7, {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 0.0, 5: 0.0}),
        ({INSTRUCTION: 0}, 0.5, {0: 0.0, 1: 0.0, 2: 1.0, 3: 1.0, 4: 0.0, 5: 0.0}),
        ({INSTRUCTION: 1}, 0.2, {0: 0.0}),
    ]
    standings = tuple(Measured(dict(p), dict(s), mean, 0.05, False) for p, mean, s in rows)
    default = {(j, i): note(i, f"answer {j}.{i}", f"feedback {j}.{i}") for j in range(2) for i in range(6)}
    said = {
        "number": 7,
        "component": component,
        "index": len(of.candidates[component]),
        "parent": parent or {INSTRUCTION: 0},
        "standings": standings,
        "notes": default if notes is None else notes,
        "candidates": {name: [*map(candidate_text, some)] for name, some in of.candidates.items()},
        "seed": 3,
    }
    return Brief(**{**said, **changes})


def propose(name: str, of: Setting, asked: Brief) -> Any:
    (proposer,) = made([name], of)
    return proposer.propose(asked)


def parent_of(name: str) -> dict[str, int]:
    """A parent that the operator can do something with."""
    return {INSTRUCTION: 3 if name == "shorten" else 0}


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


# What is refused.


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
        checked(text, own, brief(own), INSTRUCTION)


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
    ],
)
def test_wrappers_are_taken_off(text: str, plain: str) -> None:
    """A code block around the whole text, or JSON with one text, is taken off; the text itself is kept."""
    own = setting()
    assert checked(text, own, brief(own), INSTRUCTION) == plain


def test_deeply_nested_json_is_an_instruction_like_any_other() -> None:
    """What Python's parser cannot read for its depth does not end a run."""
    own = setting(max_chars=10**6)
    text = "[" * 100_000
    assert checked(text, own, brief(own), INSTRUCTION) == text


def test_labels_are_copied_unless_several_examples_have_them() -> None:
    """The answer of one example is refused; the name of a class, or the student's own words, are not."""
    answer, name = "the Treaty of Westphalia", "card payment wrong exchange rate"
    own = setting(valset=[example(0, answer), example(1, name), example(2, name), example(3, "short one")])
    told = brief(own)
    with pytest.raises(ProposalRefusedError, match="treaty of westphalia"):
        checked(f"Often it is {answer}.", own, told, INSTRUCTION)
    for text in (f"Classes are {name} and so on.", "Not a short one."):
        assert checked(text, own, told, INSTRUCTION) == text
    student = Adder()
    student.solve.signature = student.solve.signature.with_instructions(f"Is it {answer}?")
    own = setting(program=student, valset=own.valset)
    assert checked(f"Often it is {answer}.", own, told, INSTRUCTION)


def test_what_the_output_is_read_by_is_kept() -> None:
    """If the student's own instruction names an output field, so does each new one; DSPy's is no such."""
    student = Adder()
    student.solve.signature = student.solve.signature.with_instructions("Think. End with `Answer: <number>`.")
    own = setting(program=student)
    with pytest.raises(ProposalRefusedError, match="lacks \\['answer:'\\]"):
        checked("Add up.", own, brief(own), INSTRUCTION)
    assert checked("Add up. Answer: the sum.", own, brief(own), INSTRUCTION)
    thinking = dspy.ChainOfThought("question -> answer")
    assert checked("Add up.", setting(program=thinking), brief(own), INSTRUCTION) == "Add up."


# Demo sets.


def labelled(i: int) -> dspy.Example:
    return dspy.Example(question=f"q{i}", answer=f"a{i}").with_inputs("question")


def demo_setting(sets: list[list[Any]], **changes: Any) -> Setting:
    given = {
        "candidates": {INSTRUCTION: TEXTS, DEMOS: sets},
        "trainset": [labelled(i) for i in range(8)],
        "valset": [labelled(i) for i in (100, 101)],
        **changes,
    }
    return setting(**given)


def demo_brief(own: Setting, means: Mapping[int, float], parent: int = 0, **changes: Any) -> Brief:
    rows = [({INSTRUCTION: 0, DEMOS: i}, mean, {0: 1.0}) for i, mean in means.items()]
    rows.sort(key=lambda row: -row[1])
    return brief(own, DEMOS, {INSTRUCTION: 0, DEMOS: parent}, rows, {}, **changes)


def test_effects_of_single_demos_are_recovered() -> None:
    """Means that are sums of the effects of their parts give these effects, less a little shrinkage."""
    truth = {"a": 0.2, "b": 0.1, "c": 0.0, "d": -0.1}
    parts = [[x for i, x in enumerate(truth) if code >> i & 1] for code in range(16)]
    effects = Effects(parts, [sum(truth[x] for x in some) for some in parts], [0.01] * 16)
    for part, effect in truth.items():
        assert effects.mean[part] == pytest.approx(effect, abs=0.02)
    rng = np.random.default_rng(0)
    draws = [effects.draw([*truth, "new"], rng) for _ in range(2000)]
    assert np.mean([draw["a"] for draw in draws]) == pytest.approx(effects.mean["a"], abs=0.005)
    assert np.mean([draw["new"] for draw in draws]) == pytest.approx(0.0, abs=0.02)
    spread = {part: np.std([draw[part] for draw in draws]) for part in ("a", "new")}
    assert spread["a"] < spread["new"]


def test_nothing_measured_gives_draws_all_the_same() -> None:
    """Without any configuration the effects are their prior."""
    assert set(Effects([], [], []).draw(["a"], np.random.default_rng(0))) == {"a"}


def test_certain_means_count_more_than_uncertain_ones() -> None:
    """A demo whose good mean is certain has a higher effect than one whose equal mean is not."""
    effects = Effects([["a"], ["b"], []], [0.9, 0.9, 0.1], [0.0, 0.5, 0.0])
    assert effects.mean["a"] > effects.mean["b"] > 0.0


def test_good_demos_come_and_bad_ones_go() -> None:
    """A demo whose sets score high is put into a middling set, and one whose sets score low is not."""
    sets = [[labelled(0)], [labelled(1)], [labelled(2)], []]
    own = demo_setting(sets, trainset=[])
    means = {0: 0.8, 1: 0.2, 2: 0.5}
    made_sets = [propose("demos", own, demo_brief(own, means, parent=2, number=n)) for n in range(40)]
    good, bad = (sum(labelled(i) in some for some in made_sets) for i in (0, 1))
    assert good > 35
    assert bad < 5


def test_moves_of_demo_sets() -> None:
    """All five moves occur; every set is new, within the limits, and without one example twice."""
    sets = [[labelled(i) for i in (0, 1, 2)], [labelled(3), labelled(4)], []]
    own = demo_setting(sets, max_labeled_demos=4, max_bootstrapped_demos=2)
    taken = [[demo_text(demo) for demo in some] for some in sets]
    changes = set()
    for n in range(100):
        new = [demo_text(d) for d in propose("demos", own, demo_brief(own, {0: 0.6, 1: 0.7}, number=n))]
        assert new not in taken
        assert len(new) == len(set(new)) <= 4
        here, there = (len({*new} & {*some}) for some in taken[:2])
        changes.add((len(new), here, there > 1))
    assert (3, 2, False) in changes  # swap
    assert (4, 3, False) in changes  # add
    assert (2, 2, False) in changes  # remove
    assert (3, 3, False) in changes  # reorder
    assert any(both for _, _, both in changes)  # recombine


def test_demos_are_the_same_for_the_same_seed_and_number() -> None:
    """Equal briefs give equal sets, and no request is made."""
    own = demo_setting([[labelled(0)], [labelled(1)]], prompt_model=None)
    first, second = (propose("demos", own, demo_brief(own, {0: 0.6, 1: 0.7})) for _ in range(2))
    assert first == second
    assert OPERATORS["demos"](own).calls == 0
    assert (
        len({str(propose("demos", own, demo_brief(own, {0: 0.6, 1: 0.7}, number=n))) for n in range(20)}) > 3
    )


def test_validation_examples_are_never_demos() -> None:
    """Neither from the training set nor from sets that have one already, bootstrapped or not."""
    told = dspy.Example(augmented=True, question="q100", reasoning="r", answer="other")
    sets = [[labelled(100), labelled(0)], [told, labelled(1)]]
    own = demo_setting(sets, trainset=[labelled(i) for i in (100, 101, 2, 3)])
    for n in range(50):
        new = propose("demos", own, demo_brief(own, {0: 0.6, 1: 0.7}, number=n))
        assert not {demo.question for demo in new} & {"q100", "q101"}


def test_no_demo_set_is_left() -> None:
    """If every change is known already, the proposal is refused instead of repeated."""
    own = demo_setting(
        [[labelled(0)], []], trainset=[labelled(0)], max_labeled_demos=1, max_bootstrapped_demos=1
    )
    with pytest.raises(ProposalRefusedError, match="No demo set was found"):
        propose("demos", own, demo_brief(own, {0: 0.6}))


def test_demos_of_a_predictor_have_some_of_its_fields() -> None:
    """A training example without any output of the predictor is no demo of it."""
    own = demo_setting([[]], program=Planner())  # its first predictor plans, and examples have no plans
    with pytest.raises(ProposalRefusedError, match="No demo set was found"):
        propose("demos", own, demo_brief(own, {0: 0.5}))


def test_kinds_of_demos_keep_their_limits() -> None:
    """There are at most as many bootstrapped and labelled demos as in DSPy's sets."""
    told = [dspy.Example(augmented=True, question=f"t{i}", answer="a") for i in range(4)]
    own = demo_setting([told[:2], told[2:], []], max_bootstrapped_demos=2, max_labeled_demos=3)
    for n in range(60):
        new = propose("demos", own, demo_brief(own, {0: 0.6, 1: 0.7}, number=n))
        assert sum("augmented" in demo for demo in new) <= 2
        assert len(new) <= 3


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
        (["reflct"], "Unknown operator 'reflct'. Did you mean 'reflect'?"),
        (["xyzzy"], "Unknown operator 'xyzzy'. Known are"),
        ("reflect", "must be a list of names or proposers; got 'reflect'"),
        (None, "must be a list of names or proposers; got None"),
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
        with pytest.raises(InvalidArgumentError, match="operator"):
            register(name, operator)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="instruction_proposer must be a function"):
        made(["reflect"], setting(instruction_proposer="dspy"))


def test_components_of_operators() -> None:
    """Instructions and demo sets are found by MIPROv2's names; other components belong to none of these."""
    own = setting(program=Planner())
    names = [f"{i}_predictor_{kind}" for i in range(2) for kind in ("instruction", "demos")]
    space = PromptSpace({name: ["a"] for name in [*names, "style"]})
    found = {proposer.name: [*proposer.components(space)] for proposer in made(OPERATORS, own)}
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
