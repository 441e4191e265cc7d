"""Compiles that were interrupted before their search go on where they were, and pay for nothing twice."""

from __future__ import annotations

import logging
import pickle
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest
from lms import ScriptedLM, arithmetic_lm
from tasks import FEW_SHOT, LABELLED_ONLY, QEI, SMALL_RUN, TRAIN, VAL, ZERO_SHOT, Counted, Planner, compiled

from mpromptune import MIPROv2
from mpromptune.errors import SearchStoppedError, StorageError, StudyMismatchError
from mpromptune.storage.attributes import ANSWERS, DEMOS, INSTRUCTIONS
from mpromptune.storage.storage import open_study

SHOTS = {"zero": ZERO_SHOT, "labelled": LABELLED_ONLY, "few": FEW_SHOT}


class Killed(SystemExit):
    """What no code handles, as if the process had gone."""


class Mortal(ScriptedLM):
    """An LM like another one, with which the run ends at the n-th request of some kind."""

    def __init__(self, of: ScriptedLM, kind: Callable[[Any], bool], n: int) -> None:
        super().__init__(of._answer)
        self._kind = kind
        self._left = n
        self._guard = threading.Lock()

    def forward(self, prompt: str | None = None, messages: list | None = None, **kwargs: Any) -> Any:
        with self._guard:
            self._left -= self._kind(messages)
            dead = self._left <= 0
        if dead:
            raise Killed
        return super().forward(prompt, messages, **kwargs)


def _text(messages: Any) -> str:
    return "".join(str(m["content"]) for m in messages)


def _is_proposal(messages: Any) -> bool:
    return "proposed_instruction" in _text(messages[-1:])


def _is_bootstrap(messages: Any) -> bool:
    last = str(messages[-1]["content"])
    return any(f"\n{x.question}\n" in last for x in TRAIN) and not _is_proposal(messages)


def _is_of_valset(messages: Any) -> bool:
    last = str(messages[-1]["content"])
    return any(f"\n{x.question}\n" in last for x in VAL)


class Watched(MIPROv2):
    """Remembers what the search was given."""

    def _optimize_prompt_parameters(self, program: Any, *args: Any, **kwargs: Any) -> Any:
        self.instructions, self.demos = args[:2]
        return super()._optimize_prompt_parameters(program, *args, **kwargs)


def _compile(storage: Any, lm: Any = None, shots: Any = FEW_SHOT, program: Any = None, **options: Any) -> Any:
    """The optimizer, and the program that it returned."""
    seen: list[Watched] = []

    def watched(**settings: Any) -> Watched:
        seen.append(Watched(**settings))
        return seen[0]

    init = {**shots, **{name: options.pop(name) for name in ("seed", "num_candidates") if name in options}}
    # Confirmed, so that the student is scored in any case.
    run = {**QEI, "batch_size": 4, "confirm": True, "optimizer": watched, **options}
    best = compiled(program or Planner(), lm=lm, init=init, storage=storage, **run)
    return seen[0], best


def _measured(best: Any) -> list[Any]:
    trials = best.search_result.study.trials
    return [(t.params, t.user_attrs.get("mpromptune:scores"), t.value) for t in trials]


def _plain(demos: Any) -> Any:
    return demos and {i: [[dict(demo.items()) for demo in one] for one in sets] for i, sets in demos.items()}


@pytest.mark.parametrize("shots", SHOTS.values(), ids=SHOTS)
def test_storage_changes_nothing(tmp_path: Path, shots: Any) -> None:
    """With a storage, candidates, trials, result and LM calls are what they are without."""
    lms = arithmetic_lm(), arithmetic_lm()
    plain, stored = _compile(None, lms[0], shots), _compile(tmp_path / "run.log", lms[1], shots)
    assert stored[0].instructions == plain[0].instructions
    assert _plain(stored[0].demos) == _plain(plain[0].demos)
    assert _measured(stored[1]) == _measured(plain[1])
    assert stored[1].dump_state() == plain[1].dump_state()
    assert Counter(map(repr, lms[1].calls)) == Counter(map(repr, lms[0].calls))


@pytest.fixture(scope="module")
def whole() -> Any:
    """The LM, the optimizer and the program of a compile in one go."""
    lm = arithmetic_lm()
    return lm, *_compile(None, lm)


@pytest.mark.parametrize(
    ("kind", "n", "place"),
    [
        (_is_bootstrap, 3, "{}/run.log"),
        (_is_proposal, 1, "{}/run.log"),
        (_is_proposal, 4, "sqlite:///{}/run.db"),
    ],
    ids=["bootstrap", "proposal", "proposal in a database"],
)
def test_interrupted_steps(tmp_path: Path, kind: Any, n: int, place: str, whole: Any) -> None:
    """After the end of a step it is not repeated, and the run ends as if nothing had happened."""
    storage, rest_lm = place.format(tmp_path), arithmetic_lm()
    whole_lm, expected_optimizer, expected = whole
    mortal = Mortal(arithmetic_lm(), kind, n)
    with pytest.raises((Killed, KeyboardInterrupt)):
        _compile(storage, mortal)
    kept = open_study(storage).user_attrs
    optimizer, best = _compile(storage, rest_lm)
    assert optimizer.instructions == expected_optimizer.instructions
    assert _plain(optimizer.demos) == _plain(expected_optimizer.demos)
    assert _measured(best) == _measured(expected)
    assert best.dump_state() == expected.dump_state()
    if DEMOS in kept:
        assert not any(map(_is_bootstrap, rest_lm.calls))
    answers = sum(key.startswith(f"{ANSWERS}:search:") for key in kept)
    of_valset = sum(map(_is_of_valset, whole_lm.calls))
    assert sum(map(_is_of_valset, rest_lm.calls)) == of_valset - answers


@pytest.mark.parametrize(
    "where", ["mpromptune.mipro.optimizer.MIPROv2._propose_instructions", "mpromptune.engine.search.search"]
)
def test_killed_between_the_steps(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    """What the proposal draws at random follows from where the bootstrap left the generator; with both steps
    behind it, only the search makes calls.
    """

    def killed(*args: Any, **kwargs: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(where, killed)
        with pytest.raises(Killed):
            _compile(tmp_path / "run.log")
    lm = arithmetic_lm()
    optimizer, best = _compile(tmp_path / "run.log", lm)
    assert optimizer.instructions == whole[1].instructions
    assert _measured(best) == _measured(whole[2])
    assert not any(map(_is_bootstrap, lm.calls))
    if where.endswith("search"):
        assert all(map(_is_of_valset, lm.calls))
        assert len(lm.calls) == sum(map(_is_of_valset, whole[0].calls)) - 2  # the first score


@pytest.mark.parametrize("end", [*range(2, 7)])
def test_the_first_score_is_paid_for_once(tmp_path: Path, end: int) -> None:
    """Wherever its requests, or the proposals, are cut off."""
    lms = arithmetic_lm(), Mortal(arithmetic_lm(), lambda messages: True, end), arithmetic_lm()
    expected = _compile(None, lms[0], LABELLED_ONLY)[1]
    with pytest.raises((Killed, KeyboardInterrupt)):
        _compile(tmp_path / "run.log", lms[1], LABELLED_ONLY)
    best = _compile(tmp_path / "run.log", lms[2], LABELLED_ONLY)[1]
    assert _measured(best) == _measured(expected)
    of_valset = [sum(map(_is_of_valset, lm.calls)) for lm in lms]
    assert of_valset[1] + of_valset[2] == of_valset[0]
    used, whole = best.search_result.usage["search"], expected.search_result.usage["search"]
    assert replace(used, seconds=0.0) == replace(whole, seconds=0.0)


@pytest.mark.parametrize(("n", "schedule"), [(40, "blocks"), (80, "blocks"), (60, "mipro")])
def test_interrupted_search(tmp_path: Path, n: int, schedule: str) -> None:
    """Wherever the run stops, the steps are not repeated, and no example of a configuration is."""
    whole, before, after = Counted(), Counted(), Counted()
    _compile(None, metric=whole, schedule=schedule)
    mortal = Mortal(arithmetic_lm(), _is_of_valset, n)
    with pytest.raises((Killed, SearchStoppedError)):
        _compile(tmp_path / "run.log", mortal, metric=before, schedule=schedule)
    lm = arithmetic_lm()
    best = _compile(tmp_path / "run.log", lm, metric=after, schedule=schedule)[1]
    assert all(map(_is_of_valset, lm.calls))
    assert before.calls + after.calls == best.search_result.calls == whole.calls


def test_second_call_is_free(tmp_path: Path) -> None:
    """A run that has ended is loaded without a single LM call, whatever the threads: the same program, and
    what all steps used, for limits too.
    """
    best = _compile(tmp_path / "run.log", batch_size=None)[1]
    lm = arithmetic_lm()
    again = _compile(tmp_path / "run.log", lm, batch_size=None, n_jobs=16)[1]
    assert again.dump_state() == best.dump_state()
    assert again.score == best.score
    assert _measured(again) == _measured(best)
    first, second = best.search_result.usage, again.search_result.usage
    for step in ("bootstrap", "propose", "search"):
        assert replace(second[step], seconds=0.0) == replace(first[step], seconds=0.0)
    spent = first.total.tokens
    limited = _compile(tmp_path / "run.log", lm, batch_size=None, max_calls=200, max_tokens=spent)[1]
    assert (limited.search_result.stopped_by, lm.calls) == ("max_tokens", [])


class Verbose(Planner):
    """The same predictors in another program."""

    def forward(self, question: str) -> Any:
        return super().forward(question=question)


def _other_instruction() -> Any:
    program = Planner()
    program.solve.signature = program.solve.signature.with_instructions("Add up.")
    return program


def _other_demos() -> Any:
    program = Planner()
    program.plan.demos = [dspy.Example(question="1+1", plan="add")]
    return program


def exact(example: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(example.answer == prediction.answer)


CHANGES = {
    "program": {"program": Verbose()},
    "program ": {"program": _other_instruction()},
    "program  ": {"program": _other_demos()},
    "trainset": {"trainset": TRAIN[:-1]},
    "valset": {"valset": [*VAL[:-1], VAL[-1].copy(answer="0")]},
    "metric": {"metric": exact},
    "teacher": {"teacher": _other_demos()},
    "seed": {"seed": 1},
    "max_labeled_demos": {"shots": {**FEW_SHOT, "max_labeled_demos": 1}},
    "instruction candidates": {"num_candidates": 4},
    "tip_aware_proposer": {"tip_aware_proposer": False},
    "task_model": {"lm": arithmetic_lm(model="another")},
}


@pytest.fixture(scope="module")
def bootstrapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The journal of a run that was killed in its proposal."""
    path = tmp_path_factory.mktemp("checkpoint") / "run.log"
    with pytest.raises(Killed):
        _compile(path, Mortal(arithmetic_lm(), _is_proposal, 1))
    return path


@pytest.mark.parametrize("part", CHANGES)
def test_another_run_is_refused(bootstrapped: Path, part: str) -> None:
    """What has changed is named, with what to do, before any LM call; and the study stays as it was."""
    before = open_study(bootstrapped).user_attrs
    change = {"lm": arithmetic_lm(), **CHANGES[part]}
    with pytest.raises(StudyMismatchError, match="belongs to another run") as caught:
        _compile(bootstrapped, **change)
    changed = str(caught.value).partition("differs in: ")[2]
    assert changed.startswith(f"{part.strip()} (")
    assert "study_name" in changed
    assert change["lm"].calls == []
    assert open_study(bootstrapped).user_attrs == before


def test_what_may_change(bootstrapped: Path, tmp_path: Path) -> None:
    """Budget, threads, callbacks and how the search stops are no part of what a run is; and a study name of
    its own keeps another run apart in the same file.
    """
    path = tmp_path / "run.log"
    path.write_bytes(bootstrapped.read_bytes())
    lm = arithmetic_lm()
    _compile(path, lm, max_calls=40, n_jobs=2, callbacks=[lambda study, trial: None], patience=50)
    assert not any(map(_is_bootstrap, lm.calls))
    other = _compile(path, study_name="b", seed=1, sampler="random", embedder=None)[1]
    assert other.search_result.study.study_name == "b"


def test_nothing_is_lost_by_a_change_before_the_first_call(tmp_path: Path) -> None:
    """A run that failed before anything was paid for may be mended under the same name."""
    with pytest.raises(ZeroDivisionError):
        _compile(tmp_path / "run.log", embedder=lambda texts: 1 / 0)
    _, best = _compile(tmp_path / "run.log", seed=1)
    assert _measured(best) == _measured(_compile(None, seed=1)[1])


def test_study_of_a_search_is_refused(tmp_path: Path) -> None:
    """A study that `search` made by itself is no compile's."""
    from mpromptune import PromptSpace, search

    space = PromptSpace({"0_predictor_instruction": ["a", "b"]})
    search(space, lambda p, e: 1.0, n_examples=4, max_calls=8, sampler="random", storage=tmp_path / "run.log")
    lm = arithmetic_lm()
    with pytest.raises(StudyMismatchError, match="made by search"):
        _compile(tmp_path / "run.log", lm)
    assert lm.calls == []


def test_damaged_checkpoint(
    bootstrapped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, whole: Any
) -> None:
    """A demo set whose line is unreadable costs another bootstrap, and the run ends as it would have."""
    path = tmp_path / "run.log"
    lines = bootstrapped.read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if f"{DEMOS}:1:2".encode() in line)
    path.write_bytes(b"".join([*lines[:at], lines[at][:50] + b"\n", *lines[at + 1 :]]))
    with caplog.at_level(logging.WARNING):
        optimizer, best = _compile(path)
    assert f"Line {at + 1} of {path} is unreadable" in caplog.text
    assert _plain(optimizer.demos) == _plain(whole[1].demos)
    assert _measured(best) == _measured(whole[2])


class Opaque:
    """No JSON: as a text it says where it is in memory."""


def test_objects_in_examples(tmp_path: Path) -> None:
    """Fields that no signature has may hold anything; the run is recognised in spite of it."""
    trainset = [x.copy(extra={1, "a"}, source=Opaque()) for x in TRAIN]
    same = [x.copy(extra={"a", 1}, source=Opaque()) for x in TRAIN]
    with pytest.raises(Killed):
        _compile(tmp_path / "run.log", Mortal(arithmetic_lm(), _is_proposal, 1), trainset=trainset)
    lm = arithmetic_lm()
    _compile(tmp_path / "run.log", lm, trainset=same)
    assert not any(map(_is_bootstrap, lm.calls))


def test_demos_that_are_no_json(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    """A warning says that they are not kept; the run itself goes on, and loses nothing."""

    def refuse(demos: Any) -> Any:
        raise TypeError("Object of type Opaque is not JSON serializable")

    monkeypatch.setattr("mpromptune.mipro.checkpoint.demos_to_json", refuse)
    with caplog.at_level(logging.WARNING):
        optimizer, best = _compile(tmp_path / "run.log")
    assert "The demo sets cannot be kept in the study (TypeError: Object of type Opaque" in caplog.text
    assert _plain(optimizer.demos) == _plain(whole[1].demos)
    kept = best.search_result.study.user_attrs
    assert DEMOS not in kept
    assert INSTRUCTIONS in kept


def test_disk_that_is_full_after_the_bootstrap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    """It stops with a StorageError before the proposal; later the same call goes on."""
    from mpromptune.mipro.checkpoint import Checkpoint

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    keep = Checkpoint.keep_demo_sets

    def keeping(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            return keep(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "keep_demo_sets", keeping)
        with pytest.raises(StorageError, match="No space left on device"):
            _compile(tmp_path / "run.log")
    assert _measured(_compile(tmp_path / "run.log")[1]) == _measured(whole[2])


def test_no_secrets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An API key reaches neither storage nor logs nor the pickled result."""

    class Keyed(ScriptedLM):
        def __init__(self) -> None:
            super().__init__(arithmetic_lm()._answer)
            self.kwargs = {**self.kwargs, "api_key": "sk-secret", "headers": {"Authorization": "sk-secret"}}

    class Failing(Counted):
        def __call__(self, example: Any, prediction: Any, trace: Any = None) -> bool:
            super().__call__(example, prediction, trace)
            if trace is None and example.question == VAL[0].question:
                raise ConnectionResetError("sk-secret") if self.calls < 3 else ValueError("wrong")
            return bool(example.answer == prediction.answer)

    lm = Keyed()
    program = Planner()
    program.solve.config = {"api_key": "sk-secret"}
    with caplog.at_level(logging.DEBUG), dspy.context(lm=lm):
        optimizer = MIPROv2(
            metric=Failing(),
            auto=None,
            num_candidates=3,
            num_threads=4,
            teacher_settings={"lm": lm},
            prompt_model=lm,
            task_model=lm,
            **FEW_SHOT,
        )
        run = {**QEI, **SMALL_RUN}
        best = optimizer.compile(program, trainset=TRAIN, valset=VAL, storage=tmp_path / "run.log", **run)
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    assert files
    assert not any(b"sk-secret" in content for content in files)
    assert "sk-secret" not in caplog.text
    assert b"sk-secret" not in pickle.dumps(best.search_result)
