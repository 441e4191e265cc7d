"""Compiles whose candidates are also written while the search runs."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import handmade
import pytest
import tasks
from briefs import WriterLM
from dspy.utils.callback import BaseCallback
from lms import ScriptedLM, digest
from paid import THREADS, LoggedLM, adapt, adapt_and_die, read
from remote_lms import WrittenLM
from tasks import QEI, ZERO_SHOT, additions
from test_report import Checked, text_of
from writers import Writer

from mpromptune import PromptSpace
from mpromptune.errors import InvalidArgumentError, StudyMismatchError
from mpromptune.execution.usage import Usage
from mpromptune.mipro.reading import read_result
from mpromptune.model.space import Gain
from mpromptune.operators import registry
from mpromptune.operators.demos import Demos
from mpromptune.show.page import render
from mpromptune.storage.proposals import Proposal

ASKED = "Someone who has {} apples wants to know how many these are in all."
VAL = [x.copy(question=ASKED.format(x.question)) for x in additions(30, offset=6)]
BETTER = "Add the numbers column by column."
INSTRUCTION = "0_predictor_instruction"


def adding_lm(latency: Any = 0.0) -> ScriptedLM:
    """Adds two numbers: nearly always right if told to go column by column, otherwise on two sums of five."""

    def answer(field: str, messages: list[dict[str, Any]]) -> str:
        if field == "proposed_instruction":
            return f"Add, style {digest(str(messages)) % 50}."
        if field != "answer":
            return f"some {field}"
        a, b = map(int, re.findall(r"(\d+)\+(\d+)", str(messages[-1]["content"]))[-1])
        skill = 0.95 if "column by column" in str(messages[0]["content"]) else 0.4
        return str(a + b + (random.Random(digest(a, skill)).random() > skill))

    return ScriptedLM(answer, latency)


def adaptive(writer: Any = None, **options: Any) -> Any:
    """The best program of a compile in which *reflect* may write; ``writer`` is the reflection LM."""
    init = {**ZERO_SHOT, **options.pop("init", {})}
    run = {"proposals": "adaptive", "proposers": ["reflect"], "max_calls": 500, "verbose": False, **options}
    return tasks.compiled(
        lm=run.pop("lm", None) or adding_lm(),
        init=init,
        reflection_lm=writer or WriterLM(BETTER),
        valset=VAL,
        **{**QEI, **run},
    )


def trials_of(best: Any) -> Any:
    """All that a search decided and found out."""
    trials = [(t.params, t.value, t.intermediate_values) for t in best.search_result.study.trials]
    return trials, best.search_result.proposals, best.search_result.best_params


def test_reflect_finds_the_better_instruction() -> None:
    """It is the winner, and the result has the proposal by which it came about."""
    writer = WriterLM(BETTER)
    best = adaptive(writer)
    result = best.search_result
    assert best.solve.signature.instructions == BETTER
    assert result.best_score > result.baseline_score + 0.3
    (proposal,) = result.lineage(INSTRUCTION, result.best_params[INSTRUCTION])
    assert (proposal.proposer, proposal.written) == ("reflect", BETTER)
    assert result.space.components[INSTRUCTION][proposal.index] == BETTER
    assert result.lineage(INSTRUCTION, 0) == ()
    assert proposal.usage.lm_calls == 1


def test_usage_counts_every_request() -> None:
    """Those of proposals belong to the step that proposes."""
    lm, writer = adding_lm(), WriterLM(BETTER)
    best = adaptive(writer, lm=lm)
    usage, proposals = best.search_result.usage, best.search_result.proposals
    assert usage.total.lm_calls == len(lm.calls) + len(writer.requests)
    assert usage.total.tokens == 15 * usage.total.lm_calls
    before = tasks.compiled(lm=adding_lm(), init=ZERO_SHOT, valset=VAL, **QEI).search_result.usage
    written = sum(one.usage.lm_calls for one in proposals)
    assert written == len(writer.requests) > 0
    assert usage["propose"].lm_calls == before["propose"].lm_calls + written
    assert best.prompt_model_total_calls == usage["propose"].lm_calls


def refused() -> str:
    raise RuntimeError("the model is gone")


LONG = "Add. " * 10_000
USELESS = {
    "fails": refused,
    "empty": "",
    "long": LONG,
    "JSON": '{"role": "system", "content": ["Add."]}',
    "an example": f"Add. {VAL[0].question} {VAL[0].answer}",
}


def notes_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "is not asked again" in r.getMessage()]


@pytest.mark.parametrize("text", USELESS.values(), ids=USELESS)
def test_a_useless_reflection_lm(text: str | Callable[[], str], caplog: pytest.LogCaptureFixture) -> None:
    """The run goes on with its candidates, and says so once; after three proposals it costs nothing more."""
    writer = WriterLM(text)
    with caplog.at_level(logging.WARNING):
        best = adaptive(writer)
    result = best.search_result
    assert all(one.refused is not None for one in result.proposals)
    assert len(result.proposals) == 3
    assert len(writer.requests) <= 3 * 3
    (said,) = notes_of(caplog)
    assert "'reflect' has failed several times" in said
    assert len(said) < 1000
    assert result.best_params[INSTRUCTION] < 3
    assert result.best_score >= result.baseline_score
    assert all(t.params[INSTRUCTION] < 3 for t in result.study.trials if t.value is not None)
    assert len(best.trial_logs) == sum(t.value is not None for t in result.study.trials)


def test_a_reflection_lm_that_repeats_itself(caplog: pytest.LogCaptureFixture) -> None:
    """Its first text counts, the same again is refused, and that is said once."""
    best = adaptive(WriterLM("Add, or do not add."))
    written = [one.written for one in best.search_result.proposals if one.written is not None]
    assert written == ["Add, or do not add."]
    assert len(best.search_result.proposals) <= 4
    assert len(notes_of(caplog)) <= 1


def test_a_reflection_lm_that_hangs() -> None:
    """It is given up after the ``timeout``, and after three of these it is not asked again."""

    def hanging() -> str:
        time.sleep(60.0)
        return BETTER

    writer, began = WriterLM(hanging), time.monotonic()
    result = adaptive(writer, timeout=1.0).search_result
    assert time.monotonic() - began < 30.0
    assert [str(one.refused).partition(":")[0] for one in result.proposals] == ["CallTimeoutError"] * 3
    assert len(writer.requests) == 3
    assert "cut short" not in text_of(render(result))


def by_digest(candidate: Any, reflective_dataset: Any, components_to_update: Any) -> dict[str, str]:
    """A ``ProposalFn`` whose text depends on all that it is shown."""
    number = digest(candidate, reflective_dataset) % 50
    return dict.fromkeys(components_to_update, f"Add carefully, style {number}.")


@pytest.mark.parametrize("shots", [ZERO_SHOT, tasks.FEW_SHOT], ids=["zero", "few"])
def test_threads_change_nothing(shots: Any) -> None:
    """Whatever the order in which answers come in: the same trials, proposals and winner."""

    def latency(messages: Any) -> float:
        return 0.004 * (digest(str(messages), len(found)) % 10) / 10

    found: list[Any] = []
    for threads in (1, 8):
        lm = tasks.arithmetic_lm(latency=latency)
        init = {**shots, "num_threads": threads}
        best = adaptive(lm=lm, init=init, proposers=None, instruction_proposer=by_digest, max_calls=300)
        found.append(trials_of(best))
    assert found[0] == found[1]
    assert any(one.written is not None for one in found[0][1])


def test_budgets_hold_with_proposals() -> None:
    """A proposal counts as a program call for each request; tokens and dollars are those of all steps."""
    init = {**tasks.FEW_SHOT, "num_threads": 1}
    whole = adaptive(lm=tasks.arithmetic_lm(), init=init, proposers=["contrast", "merge", "demos"])
    result = whole.search_result
    calls = {"contrast": 1, "merge": 1, "demos": 0}
    assert result.calls + sum(calls[one.proposer] for one in result.proposals) <= 500
    assert {one.proposer for one in result.proposals if one.written} != {"demos"}
    tokens = result.usage.total.tokens // 2
    for limits in ({"max_tokens": tokens}, {"max_cost": 1e-6 * tokens, "prices": {"scripted": (1.0, 1.0)}}):
        cut = adaptive(
            lm=tasks.arithmetic_lm(), init=init, proposers=["contrast", "merge", "demos"], **limits
        ).search_result
        assert cut.stopped_by == next(iter(limits))
        assert cut.usage.total.tokens <= tokens + 2 * 15  # what was in flight


def test_fixed_proposals_are_the_default() -> None:
    """The same trials, nothing of proposals in the study, and no notes."""
    plain, fixed = (
        tasks.compiled(lm=adding_lm(), init=ZERO_SHOT, valset=VAL, **QEI, **more).search_result
        for more in ({}, {"proposals": "fixed"})
    )
    trials = [[(t.params, t.value, {*t.user_attrs}) for t in r.study.trials] for r in (plain, fixed)]
    assert trials[0] == trials[1]
    assert plain.study.user_attrs == fixed.study.user_attrs
    assert "propos" not in str([t.user_attrs for t in fixed.study.trials])
    assert (fixed.proposals, fixed.visible, fixed.gains) == ((), frozenset(), {})


def writing(components: Any, name: Any = "own") -> Any:
    """A proposer with these components."""
    return Writer(lambda brief: BETTER, name, only=components)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proposals": "always"}, "proposals must be one of ['fixed', 'adaptive']; got 'always'"),
        ({"sampler": "tpe"}, "only with sampler='qei' and schedule='blocks'; got sampler='tpe'"),
        ({"schedule": "mipro"}, "only with sampler='qei' and schedule='blocks'"),
        ({"proposers": ["reflct"]}, "Unknown proposer 'reflct'. Did you mean 'reflect'?"),
        ({"proposers": []}, "must be a list of at least one name or proposer; got []"),
        ({"proposers": "reflect"}, "must be a list: pass proposers=['reflect']; got 'reflect'"),
        ({"proposers": [3]}, "got 3, which lacks"),
        ({"proposers": ["merge", "merge"]}, "'merge' twice"),
        ({"proposers": ["demos"], "init": ZERO_SHOT}, "['demos'] write nothing for the components"),
        ({"proposers": [writing([INSTRUCTION], name=3)]}, "name of a proposer must be a text; got 3"),
        ({"proposers": [writing(["answer"])]}, "must return a list of some of ['0_predictor_instruction', "),
        ({"proposers": [writing(INSTRUCTION)]}, "; got '0_predictor_instruction'"),
        ({"reflection_lm": "openai/gpt-4o"}, "reflection_lm must be a language model, as in dspy.LM("),
        ({"instruction_proposer": "best"}, "instruction_proposer must be a callable; got 'best'"),
        ({"proposals": "fixed", "proposers": ["merge"]}, "['proposers'] only apply to proposals='adaptive'"),
        ({"proposals": None, "reflection_lm": WriterLM()}, "['reflection_lm'] only apply to"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_errors_come_before_money(options: Any, message: str, dry_run: bool) -> None:
    """In a dry run too."""
    lm = adding_lm()
    given = {**QEI, "proposals": "adaptive", "dry_run": dry_run, **options}
    if given["sampler"] != "qei":
        del given["embedder"]
    with pytest.raises(InvalidArgumentError) as caught:
        tasks.compiled(lm=lm, **given)
    assert message in str(caught.value)
    assert lm.calls == []


def test_options_of_the_constructor() -> None:
    """Fixed proposals in one compile drop what the constructor has for adaptive ones."""
    init = {**ZERO_SHOT, "proposals": "adaptive", "reflection_lm": WriterLM(BETTER)}
    best = tasks.compiled(lm=adding_lm(), init=init, valset=VAL, max_calls=300, proposers=["reflect"], **QEI)
    assert best.solve.signature.instructions == BETTER
    best = tasks.compiled(lm=adding_lm(), init=init, valset=VAL, max_calls=100, proposals="fixed", **QEI)
    assert best.search_result.proposals == ()


def test_a_second_call_is_free(tmp_path: Path) -> None:
    """The same program with its new candidates, without a request."""
    path = tmp_path / "run.log"
    best = adaptive(storage=path)
    lm, writer = adding_lm(), WriterLM("never asked")
    again = adaptive(writer, lm=lm, storage=path)
    assert (lm.calls, writer.requests) == ([], [])
    assert again.dump_state() == best.dump_state()
    assert trials_of(again) == trials_of(best)
    for step in ("bootstrap", "propose", "search"):
        first, second = (one.search_result.usage[step] for one in (best, again))
        assert (second.lm_calls, second.tokens) == (first.lm_calls, first.tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {"proposals": "fixed", "proposers": None, "reflection_lm": None},
        {"proposers": ["reflect", "merge"]},
        {"instruction_proposer": by_digest},
    ],
)
def test_other_proposers_are_another_run(tmp_path: Path, changes: Any) -> None:
    """In either direction, before any request."""
    base = {**ZERO_SHOT}
    given = {**QEI, "proposals": "adaptive", "proposers": ["reflect"], "reflection_lm": WriterLM(BETTER)}
    for number, (then, now) in enumerate([(given, {**given, **changes}), ({**given, **changes}, given)]):
        path, lm = tmp_path / f"{number}.log", adding_lm()
        tasks.compiled(lm=adding_lm(), init=base, max_calls=100, storage=path, **then)
        with pytest.raises(StudyMismatchError, match="propos"):
            tasks.compiled(lm=lm, init=base, max_calls=100, storage=path, **now)
        assert lm.calls == []


def test_reading_a_study_with_proposals(tmp_path: Path) -> None:
    """At any time of the search, and at its end: candidates, proposals, usage and winner."""
    path, seen = tmp_path / "run.log", []

    def look(progress: Any) -> None:
        if progress.calls:
            seen.append(read_result(path)[0])

    result = adaptive(storage=path, on_progress=look).search_result
    read = read_result(path)[0]
    assert read.proposals == result.proposals
    assert read.space.components == result.space.components
    assert (read.best_params, read.best_score) == (result.best_params, result.best_score)
    assert (read.visible_score, read.hidden_score) == (result.visible_score, result.hidden_score)
    assert read.usage == result.usage
    assert {len(one.proposals) for one in seen} >= {0, 1}


def proposal(number: int, proposer: str, parent: int, refused: str | None = None, **more: Any) -> Proposal:
    params = {handmade.INSTRUCTION: parent, handmade.DEMOS: 0}
    written = None if refused else "Answer <i>well</i>."
    used = Usage(lm_calls=1, cost=0.25)
    told = number, handmade.INSTRUCTION, 2 + number, proposer, params
    return Proposal(*told, written=written, refused=refused, usage=used, **more)


def written_by_hand() -> Any:
    """Instruction 5 is made from 2, which is made from 0; 3 and 4 were refused."""
    said = "ProposalRefusedError: The instruction equals candidate {}."
    made = (
        proposal(0, "reflect", 0),
        proposal(1, "merge", 2, said.format(0)),
        proposal(2, "merge", 2, said.format(2)),
        proposal(3, "shorten", 2),
    )
    space = PromptSpace(
        {**handmade.SPACE.components, handmade.INSTRUCTION: ["Brief.", "Slow.", "Well.", "", "", "Good."]}
    )
    winner = replace(handmade.WINNER, params={handmade.INSTRUCTION: 5, handmade.DEMOS: 0})
    return handmade.findings(
        best_params=winner.params,
        configurations=(winner, handmade.OTHER, handmade.BASELINE),
        space=space,
        proposals=made,
        visible=frozenset({0, 1}),
        gains={"reflect": Gain(0.5, 0.1), "merge": Gain(-0.2, 0.3)},
    )


def test_the_page_says_how_candidates_were_written() -> None:
    """The descent of the winner and what it took, its scores on both shares, and a row for each proposer."""
    found = written_by_hand()
    assert [one.number for one in found.lineage(handmade.INSTRUCTION, 5)] == [0, 3]
    assert (found.visible_score, found.hidden_score) == (0.5, 1.0)
    page = render(found)
    Checked(page)
    said = text_of(page)
    assert (
        "Written during the search in 2 steps by reflect, shorten, with 2 LM calls and 0.5000 US dollars"
        in said
    )
    assert re.search("own instruction .*“Well.”, by reflect .*“Good.”, by shorten", said)
    assert "On the examples that proposers may see, it scores 50.0 %, on hidden ones 100.0 %." in said
    assert "reflect 1 0 +0.50 (+0.30 to +0.70) 1 0.2500" in said
    assert "merge 2 times: The instruction equals candidate …. 2 2 not known 2 0.5000" in said
    assert "shorten 1 0 not known 1 0.2500" in said
    assert "ritten during the search" not in text_of(render(handmade.findings()))


def test_scores_on_both_shares() -> None:
    """Together they are the score of a winner that was measured in full."""
    result = adaptive(confirm=True).search_result
    assert len(result.visible) == 18
    mean = 0.6 * result.visible_score + 0.4 * result.hidden_score
    assert mean == pytest.approx(result.best_score)


def test_each_kill_costs_one_request_a_thread(tmp_path: Path, forks: Any) -> None:
    """In all steps, proposals during the search among them; the program is that of a run in one go."""
    path, log = tmp_path / "run.journal", tmp_path / "run.log"
    expected = adapt(None, LoggedLM(tmp_path / "whole.log"))
    rng = random.Random(3)
    kills = 0
    for _ in range(10):
        arguments = path, log, rng.randint(20, 50), 0.02 * rng.random()
        process = forks.Process(target=adapt_and_die, args=arguments)
        process.start()
        process.join()
        assert process.exitcode in (0, -9)
        kills += process.exitcode == -9
        Path(f"{path}.lock").unlink(missing_ok=True)  # which would time out by itself
    best = adapt(path, LoggedLM(log))
    again = read(log) - read(tmp_path / "whole.log")
    assert kills >= 5
    assert sum(again.values()) <= (THREADS + 1) * kills  # one proposal at a time
    assert best.dump_state() == expected.dump_state()
    assert trials_of(best)[2] == trials_of(expected)[2]
    whole, found = (
        [replace(one, usage=Usage()) for one in b.search_result.proposals] for b in (expected, best)
    )
    assert found == whole
    assert any(one.written is not None for one in whole)


def exact(example: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(example.answer == prediction.answer)


@pytest.mark.parametrize(("proposer", "kind"), [("reflect", str), ("demos", list)])
def test_workers_in_other_processes_get_new_candidates(tmp_path: Path, proposer: str, kind: type) -> None:
    """With the first calls that need them."""
    given = {"proposers": [proposer], "init": tasks.FEW_SHOT, "max_calls": 250, "metric": exact}
    given["instruction_proposer"] = by_digest
    here = adaptive(lm=WrittenLM(tmp_path / "here.log"), **given)
    with ProcessPoolExecutor(2) as executor:
        away = adaptive(lm=WrittenLM(tmp_path / "away.log"), executor=executor, **given)
    assert trials_of(away) == trials_of(here)
    new = [one for one in here.search_result.proposals if one.written is not None]
    assert {type(one.written) for one in new} == {kind}
    assert "start away" in (tmp_path / "away.log").read_text()


def test_callbacks_of_dspy_see_evaluations_only() -> None:
    """A trial whose candidate was refused is none; all others are reported in order."""
    seen: list[Any] = []

    class Watching(BaseCallback):
        def on_evaluate_end(self, call_id: str, outputs: Any, exception: Any = None) -> None:
            seen.append(outputs.score if exception is None else exception)

    with dspy.context(callbacks=[Watching()]):
        best = adaptive(WriterLM(""))
    told = [t for t in best.search_result.study.trials if t.value is not None]
    refused = [one for one in best.search_result.proposals if one.refused is not None]
    assert len(refused) == len(best.search_result.study.trials) - len(told) > 0
    assert len(seen) == len(told)
    assert not any(isinstance(one, Exception) for one in seen)


def test_programs_of_several_predictors() -> None:
    """Each has its own new candidates, and what was measured exists."""
    best = adaptive(
        lm=tasks.arithmetic_lm(),
        program=tasks.Planner(),
        init=tasks.FEW_SHOT,
        proposers=None,
        instruction_proposer=by_digest,
    )
    result = best.search_result
    assert {one.component[0] for one in result.proposals if one.written is not None} == {"0", "1"}
    for trial in (t for t in result.study.trials if t.value is not None):
        assert all(index < len(result.space.components[name]) for name, index in trial.params.items())


def test_proposers_know_which_examples_are_whose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where DSPy divides the training set; and what they may see is what the search shows them."""
    seen: list[Any] = []

    class Seeing(Demos):
        name = "seeing"

        def __init__(self, setting: Any) -> None:
            super().__init__(setting)
            seen.append(setting)

    monkeypatch.setattr(registry, "OPERATORS", {**registry.OPERATORS})
    registry.register("seeing", Seeing)
    given = {
        "proposals": "adaptive",
        "proposers": ["seeing"],
        "trainset": additions(40),
        "valset": None,
        **QEI,
    }
    result = tasks.compiled(max_calls=200, **given).search_result
    train, val = ({x.question for x in some} for some in (seen[-1].trainset, seen[-1].valset))
    assert not train & val
    assert len(train) + len(val) == 40
    assert seen[-1].visible == result.visible
    assert 0 < len(result.visible) < len(val) == result.n_examples


def test_a_file_of_gains_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder that does not exist is an error before any call; what happens later costs no program."""
    lm = adding_lm()
    with pytest.raises(InvalidArgumentError, match=r"gains_file=.*folder that does not exist"):
        adaptive(lm=lm, gains_file=tmp_path / "none" / "gains.json")
    assert lm.calls == []
    path = tmp_path / "gains.json"

    def damaging() -> str:
        path.write_text("{")
        return BETTER

    best = adaptive(WriterLM(damaging), gains_file=path)
    assert best.solve.signature.instructions == BETTER
    assert "What was learned about proposers was not saved" in caplog.text


def test_a_proposer_of_demos_alone() -> None:
    """It may name components of demos without a look at the space, where demos are optimised."""
    lm = adding_lm()
    given = {"init": tasks.FEW_SHOT, "proposers": [writing([handmade.DEMOS])], "dry_run": True}
    assert adaptive(lm=lm, **given).usage["proposals"].lm_calls > 0
    assert lm.calls == []
