"""A DSPy that has changed what the search is built on."""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.teleprompt import BootstrapFewShot
from lms import arithmetic_lm
from tasks import SMALL_RUN, TRAIN, VAL, ZERO_SHOT, Adder, Counted

from mpromptune import MIPROv2
from mpromptune.errors import IncompatibleDSPyError, MPromptuneError
from mpromptune.mipro.checks import _PARAMETERS, TESTED_DSPY

ROOT = Path(__file__).parent.parent


OVERRIDDEN = [name for name in _PARAMETERS if name != "compile"]


def compiled(lm: Any, **options: Any) -> Any:
    with dspy.context(lm=lm):
        optimizer = MIPROv2(metric=Counted(), auto=None, num_candidates=3, num_threads=2, **ZERO_SHOT)
        return optimizer.compile(Adder(), trainset=TRAIN, valset=VAL, **SMALL_RUN, **options)


def widened(method: Any) -> Any:
    """A method of DSPy's with one more parameter, which is passed wherever it is called."""

    def changed(self: Any, budget: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    return changed


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_changed_parameters_are_named_before_any_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the method, what was expected and found, the versions, and what to do."""
    monkeypatch.setattr(dspy.MIPROv2, name, widened(getattr(dspy.MIPROv2, name)))
    monkeypatch.setattr(dspy, "__version__", "9.9.9")
    lm = arithmetic_lm()
    with pytest.raises(IncompatibleDSPyError) as raised:
        compiled(lm, sampler="random")
    message = str(raised.value)
    expected = ", ".join(_PARAMETERS[name].split())
    assert f"{name}({expected}) is now {name}(budget, args, kwargs)" in message
    assert "DSPy 9.9.9" in message
    assert f"tested with DSPy {', '.join(TESTED_DSPY[:-1])} and {TESTED_DSPY[-1]}" in message
    assert f"pip install 'dspy=={TESTED_DSPY[-1]}'" in message
    assert "compile without a sampler" in message
    assert isinstance(raised.value, MPromptuneError)
    assert lm.calls == []


def test_several_changes_are_named_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods and an attribute that are gone and a parameter of compile, in one message."""
    stock = dspy.MIPROv2.compile

    def compile_without_seed(self: Any, student: Any, *, trainset: Any, **kwargs: Any) -> Any:
        return stock(self, student, trainset=trainset, **kwargs)

    monkeypatch.setattr(dspy.MIPROv2, "compile", compile_without_seed)
    monkeypatch.delattr(dspy.MIPROv2, "_propose_instructions")
    monkeypatch.delattr(BootstrapFewShot, "_train")
    lm = arithmetic_lm()
    with dspy.context(lm=lm):
        optimizer = MIPROv2(metric=Counted(), auto=None, num_candidates=3, **ZERO_SHOT)
        del optimizer.init_temperature
        with pytest.raises(IncompatibleDSPyError) as raised:
            optimizer.compile(Adder(), trainset=TRAIN, valset=VAL, **SMALL_RUN, sampler="random")
    assert "_propose_instructions(program, trainset, demo_candidates, " in str(raised.value)
    assert "...) is gone" in str(raised.value)
    assert "...) is now compile(student, trainset, kwargs)" in str(raised.value)
    assert "it has no init_temperature" in str(raised.value)
    assert "BootstrapFewShot has no _train" in str(raised.value)
    assert lm.calls == []


def test_other_results_are_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What DSPy makes of ``auto`` has to be the five values that are read."""
    stock = dspy.MIPROv2._set_hyperparams_from_run_mode

    def six(
        self: Any,
        program: Any,
        num_trials: Any,
        minibatch: Any,
        zeroshot_opt: Any,
        valset: Any,
        num_instruct_candidates: Any,
        num_fewshot_candidates: Any,
    ) -> Any:
        given = program, num_trials, minibatch, zeroshot_opt, valset
        return *stock(self, *given, num_instruct_candidates, num_fewshot_candidates), None

    monkeypatch.setattr(dspy.MIPROv2, "_set_hyperparams_from_run_mode", six)
    lm = arithmetic_lm()
    with pytest.raises(IncompatibleDSPyError, match="returns 6 values, not 5"):
        compiled(lm, sampler="random")
    assert lm.calls == []


def test_without_a_sampler_changes_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """DSPy calls its new methods in its new way, and its own search runs as it always does."""
    expected = compiled(arithmetic_lm())

    def calling(name: str, method: Any) -> Any:
        return lambda self, *args, **kwargs: method(self, *args[1:], **kwargs)

    for name in OVERRIDDEN:
        monkeypatch.setattr(dspy.MIPROv2, name, calling(name, getattr(dspy.MIPROv2, name)))
        own = getattr(MIPROv2, name)
        # As a DSPy would that has one more argument to pass.
        monkeypatch.setattr(
            MIPROv2, name, lambda self, *args, own=own, **kwargs: own(self, "new", *args, **kwargs)
        )
    best = compiled(arithmetic_lm())
    assert best.score == expected.score
    assert best.solve.signature.instructions == expected.solve.signature.instructions


def test_later_parameters_of_a_step_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step may take something more, which is not needed here; the search goes on."""
    stock = dspy.MIPROv2._propose_instructions

    @functools.wraps(stock)
    def changed(self: Any, *args: Any, mood: str = "good", **kwargs: Any) -> Any:
        return stock(self, *args, **kwargs)

    more = inspect.Parameter("mood", inspect.Parameter.KEYWORD_ONLY, default="good")
    signature = inspect.signature(stock)
    changed.__signature__ = signature.replace(parameters=[*signature.parameters.values(), more])
    monkeypatch.setattr(dspy.MIPROv2, "_propose_instructions", changed)
    assert compiled(arithmetic_lm(), sampler="random").search_result.calls > 0


def test_tested_versions_are_those_of_the_project() -> None:
    """The oldest is the lower bound of pyproject.toml, the newest that of constraints.txt."""
    requirements = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bound = re.search(r'"dspy>=([\d.]+)', requirements)
    pinned = re.search(r"^dspy==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert bound is not None
    assert pinned is not None
    assert (TESTED_DSPY[0], TESTED_DSPY[-1]) == (bound[1], pinned[1])


def test_nothing_needs_numpy_typing() -> None:
    """DSPy 3.3.1 puts off loading numpy, after which `numpy.typing` cannot be imported."""
    modules = (ROOT / "mpromptune").rglob("*.py")
    assert not [path for path in modules if re.search(r"(from|import) numpy\.typing", path.read_text())]
