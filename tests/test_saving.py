"""What becomes of a compiled program: saved, loaded, copied, and compiled again."""

from __future__ import annotations

import copy
from typing import Any

import cloudpickle
import dspy
import pytest
from embedders import hashed
from tasks import QEI, Adder, compiled

from mpromptune import qEISampler


def _compile(program: dspy.Module, **options: Any) -> Any:
    return compiled(program, **{**QEI, **options})


@pytest.fixture(scope="module")
def best() -> Any:
    return _compile(Adder(), confirm=True)


@pytest.mark.parametrize("suffix", ["json", "pkl"])
def test_state_is_saved_and_loaded(best: Any, tmp_path: Any, suffix: str) -> None:
    """dspy's save and load of the state work on the result."""
    best.save(tmp_path / f"best.{suffix}")
    loaded = Adder()
    loaded.load(tmp_path / f"best.{suffix}", allow_pickle=True)
    assert loaded.dump_state() == best.dump_state()


def test_whole_program_is_saved_and_loaded(best: Any, tmp_path: Any) -> None:
    """save_program=True keeps the program with its statistics and search result."""
    best.save(tmp_path / "best", save_program=True)
    loaded = dspy.load(str(tmp_path / "best"), allow_pickle=True)
    assert loaded.dump_state() == best.dump_state()
    assert loaded.score == best.score
    assert loaded.search_result.best_params == best.search_result.best_params
    assert len(loaded.search_result.study.trials) == len(best.search_result.study.trials)


class Unpicklable:
    """An embedder that holds what cannot be pickled, as models and clients do."""

    def __call__(self, texts: list[str]) -> Any:
        return hashed(texts)

    def __reduce__(self) -> Any:
        raise TypeError("this embedder cannot be pickled")


@pytest.mark.parametrize("as_object", [True, False])
def test_saving_does_not_depend_on_the_embedder(tmp_path: Any, as_object: bool) -> None:
    """The result can be pickled even if the embedder cannot."""
    embedder = Unpicklable()
    if as_object:
        result = _compile(Adder(), sampler=qEISampler(embedder=embedder), embedder=None)
    else:
        result = _compile(Adder(), embedder=embedder)
    result.save(tmp_path / "best", save_program=True)
    assert dspy.load(str(tmp_path / "best"), allow_pickle=True).score == result.score


def test_copies_share_the_search_result(best: Any) -> None:
    """deepcopy and DSPy's own copy keep the prompts; the frozen result is shared, not copied."""
    for copied in (copy.deepcopy(best), best.deepcopy()):
        assert copied.dump_state() == best.dump_state()
        assert copied.search_result is best.search_result


def test_compiling_the_result_again(best: Any) -> None:
    """The result is a student like any other: its score is the new baseline, and nothing piles up."""
    again = _compile(best, confirm=True)
    assert again.search_result.baseline_score == pytest.approx(best.search_result.best_score)
    assert again.score >= best.score
    for entry in again.candidate_programs:
        assert not hasattr(entry["program"], "trial_logs")
        assert not hasattr(entry["program"], "search_result")
    assert len(cloudpickle.dumps(again)) < 2 * len(cloudpickle.dumps(best))
    assert hasattr(best, "trial_logs")  # the student is left as it was
