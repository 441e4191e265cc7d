"""Options: where they may be given, and what is refused before any LM call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import dspy
import optuna
import pytest
from embedders import hashed
from lms import ScriptedLM, arithmetic_lm
from tasks import SMALL_RUN, TRAIN, VAL, ZERO_SHOT, Adder, Counted

from mpromptune import MIPROv2, PromptSpace, search
from mpromptune.engine.arguments import gather, resolve
from mpromptune.engine.batches import BatchPlan
from mpromptune.engine.options import OPTION_NAMES, SEARCH_OPTIONS
from mpromptune.engine.plan import Request
from mpromptune.errors import InvalidArgumentError, SearchStoppedError, StudyMismatchError, UnknownOptionError
from mpromptune.sampling.samplers import resolve_sampler
from mpromptune.storage.attributes import EXAMPLES


def _optimizer(lm: ScriptedLM, **options: Any) -> MIPROv2:
    with dspy.context(lm=lm):
        return MIPROv2(metric=Counted(), auto=None, num_candidates=3, num_threads=2, **ZERO_SHOT, **options)


def _compile(lm: ScriptedLM, optimizer: MIPROv2, **options: Any) -> Any:
    with dspy.context(lm=lm):
        return optimizer.compile(Adder(), trainset=TRAIN, valset=VAL, **{**SMALL_RUN, **options})


def test_nothing_given_means_no_search_of_ours() -> None:
    """No option, None, and n_jobs alone leave DSPy's search in place."""
    assert resolve({}, {}) is None
    assert resolve({}, gather({"sampler": None}, {"batch_size": None})) is None
    assert resolve({"n_jobs": 4}, {}) is None
    assert resolve({"dry_run": False}, {}) is None


@pytest.mark.parametrize("given", [{"batch_size": 2}, {"max_calls": 9}, {"storage": "run.log"}, {"seed": 1}])
def test_any_other_option_asks_for_the_search(given: dict[str, Any]) -> None:
    """Its sampler is qEI then; DSPy's own arguments ask for nothing."""
    options = resolve({}, {name: value for name, value in given.items() if name in OPTION_NAMES})
    assert options.sampler == "qei" if options else "seed" in given


def test_compile_overrides_the_constructor() -> None:
    """An option of compile replaces the constructor's; the others stay."""
    options = resolve({"sampler": "qei", "batch_size": 2, "block_size": 3}, {"batch_size": 5})
    assert options is not None
    assert (options.sampler, options.batch_size, options.block_size) == ("qei", 5, 3)


def test_another_sampler_drops_the_arguments_of_qei() -> None:
    """sampler='tpe' in compile is not refused for qEI's arguments in the constructor."""
    options = resolve({"sampler": "qei", "max_space_size": 100, "batch_size": 2}, {"sampler": "tpe"})
    assert options is not None
    assert (options.sampler, options.max_space_size, options.batch_size) == ("tpe", None, 2)


def test_an_unknown_option_is_refused_with_the_nearest_one() -> None:
    """A misspelt name is a TypeError; what was meant may be ours, DSPy's, or of the other method."""
    lm = arithmetic_lm()
    with pytest.raises(TypeError, match="'batchsize'. Did you mean 'batch_size'.$") as caught:
        _compile(lm, _optimizer(lm), batchsize=4)
    assert isinstance(caught.value, UnknownOptionError)
    with pytest.raises(TypeError, match=r"'smapler'. Did you mean 'sampler'\?$"):
        _compile(lm, _optimizer(lm), sampler_config={"smapler": "qei"})
    with pytest.raises(
        TypeError, match=r"'num_thread'. Did you mean 'num_threads', an argument of MIPROv2's"
    ):
        _compile(lm, _optimizer(lm), num_thread=4)
    with pytest.raises(TypeError, match=r"'metrics'. Did you mean 'metric'\?$"):
        _optimizer(lm, metrics=None)
    with pytest.raises(TypeError, match=r"'xyzzy'. All names: help"):
        _optimizer(lm, xyzzy=None)
    assert lm.calls == []


def test_sampler_given_twice_is_refused() -> None:
    """The same option as keyword and in sampler_config is a ValueError, unless one of them is None."""
    lm = arithmetic_lm()
    with pytest.raises(ValueError, match="'sampler' is given twice: 'qei' and 'tpe'"):
        _compile(lm, _optimizer(lm), sampler_config={"sampler": "qei"}, sampler="tpe")
    with pytest.raises(ValueError, match="'sampler' is given twice"):
        _optimizer(lm, sampler_config={"sampler": "qei"}, sampler="qei")
    assert lm.calls == []
    assert gather({"sampler": "qei"}, {"sampler": None}) == {"sampler": "qei"}


@pytest.mark.parametrize("config", ["qei", 3, ["sampler"], optuna.samplers.RandomSampler()])
def test_sampler_config_must_be_a_mapping(config: Any) -> None:
    """sampler_config of another type is a ValueError that names it."""
    lm = arithmetic_lm()
    with pytest.raises(ValueError, match="sampler_config must be a dict"):
        _compile(lm, _optimizer(lm), sampler_config=config)
    assert lm.calls == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sampler": "cmaes"}, "'cmaes'"),
        ({"sampler": 3}, "3"),
        ({"n_jobs": 0}, "n_jobs.*0"),
        ({"n_jobs": -1, "sampler": "qei"}, "n_jobs.*-1"),
        ({"batch_size": 0}, "batch_size.*0"),
        ({"batch_size": 2.5}, "batch_size.*2.5"),
        ({"batch_size": True}, "batch_size.*True"),
        ({"max_space_size": 0}, "max_space_size.*0"),
        ({"n_batches": -1}, "n_batches.*-1"),
        ({"min_cold_start": 0}, "min_cold_start.*0"),
        ({"block_size": 0}, "block_size.*0"),
        ({"block_size": 13}, "block_size.*12 validation.*13"),
        ({"max_calls": 0}, "max_calls.*0"),
        ({"max_calls": 23, "confirm": True}, "max_calls=23.*24"),
        ({"confirm": "yes"}, "confirm.*'yes'"),
        ({"confirm": 1}, "confirm.*1"),
        ({"confirm": 0, "schedule": "mipro"}, "confirm.*0"),
        ({"embedder": 3.5}, "embedder.*3.5"),
        ({"failure_score": float("nan")}, "failure_score.*nan"),
        ({"failure_score": "0"}, "failure_score.*'0'"),
        ({"timeout": 0}, "timeout.*0"),
        ({"timeout": "30"}, "timeout.*'30'"),
        ({"max_retries": -1}, "max_retries.*-1"),
        ({"grace": -1}, "grace.*-1"),
        ({"grace": float("inf")}, "grace.*inf"),
        ({"callbacks": 3}, "callbacks.*3"),
        ({"callbacks": [3]}, "callbacks.*3"),
        ({"sampler": "tpe", "max_space_size": 10}, "max_space_size.*'tpe'"),
        ({"sampler": optuna.samplers.RandomSampler(), "embedder": hashed}, "embedder.*RandomSampler"),
        ({"sampler": "qei", "num_trials": 0}, "num_trials.*0"),
        ({"sampler": "qei", "minibatch_full_eval_steps": 0}, "minibatch_full_eval_steps.*0"),
        ({"patience": 0}, "patience.*0"),
        ({"target": "0.9"}, "target.*'0.9'"),
        ({"target": float("inf")}, "target.*inf"),
        ({"max_tokens": 0}, "max_tokens.*0"),
        ({"max_cost": -1.0}, "max_cost.*-1.0"),
        ({"max_seconds": "1 h"}, "max_seconds.*'1 h'"),
        ({"max_requests_per_minute": 0}, "max_requests_per_minute.*0"),
        ({"max_tokens_per_minute": 1.5}, "max_tokens_per_minute.*1.5"),
        ({"prices": {"m": 3}}, "prices.*'m': 3"),
        ({"prices": 3}, "prices.*3"),
        ({"executor": 3}, "executor.*3"),
        ({"executor": "dask"}, "executor.*'dask'"),
        ({"dry_run": "yes"}, "dry_run.*'yes'"),
        ({"schedule": "stock"}, "schedule.*'blocks', 'mipro'.*'stock'"),
        ({"schedule": "mipro", "max_calls": 27}, "max_calls=27.*28"),
        ({"schedule": "mipro", "minibatch_size": 13}, "minibatch_size=13.*12"),
        ({"schedule": "mipro", "block_size": 3}, "block_size.*'mipro'"),
        ({"schedule": "mipro", "patience": 3, "confirm": False}, "patience.*confirm.*'mipro'"),
    ],
)
def test_bad_values_are_refused_before_any_call(options: dict[str, Any], named: str) -> None:
    """A value out of range is a ValueError that names it, and no LM call has been made."""
    lm = arithmetic_lm()
    with pytest.raises(ValueError, match=named) as caught:
        _compile(lm, _optimizer(lm), **options)
    assert isinstance(caught.value, InvalidArgumentError)
    assert lm.calls == []


def test_the_constructor_refuses_bad_values_itself() -> None:
    """Options in the constructor fail there, not in compile."""
    with pytest.raises(ValueError, match="batch_size"):
        _optimizer(arithmetic_lm(), sampler_config={"sampler": "qei", "batch_size": 0})


@pytest.mark.parametrize("empty", [{"trainset": []}, {"valset": []}])
def test_empty_data_is_refused_before_any_call(empty: dict[str, list]) -> None:
    """An empty trainset or valset is a ValueError."""
    lm = arithmetic_lm()
    data = {"trainset": TRAIN, "valset": VAL, **empty}
    with dspy.context(lm=lm), pytest.raises(ValueError, match="(?i)set"):
        _optimizer(lm, sampler="qei").compile(Adder(), **data, **SMALL_RUN)
    assert lm.calls == []


def test_a_study_of_something_else_is_refused_before_any_call(tmp_path: Any) -> None:
    """A study of that name which is none of ours is found before the bootstrap is paid for."""
    storage = f"sqlite:///{tmp_path}/studies.db"
    study = optuna.create_study(storage=storage, study_name="taken", direction="maximize")
    study.tell(study.ask(), 1.0)
    lm = arithmetic_lm()
    with pytest.raises(StudyMismatchError, match="'taken' has trials that were not made by a search"):
        _compile(lm, _optimizer(lm), sampler="random", storage=storage, study_name="taken")
    assert lm.calls == []


def test_signatures_show_all_options() -> None:
    """The signatures list DSPy's parameters and ours, for callers that filter by them."""
    for ours, stock in [(MIPROv2.compile, dspy.MIPROv2.compile), (MIPROv2.__init__, dspy.MIPROv2.__init__)]:
        names = set(inspect.signature(ours).parameters)
        assert names == {*inspect.signature(stock).parameters, "sampler_config", *OPTION_NAMES}


# Those of `search`.

SPACE = PromptSpace({"style": ["a", "aa", "aaa", "aaaa"]})


def _searched(asked: list[int], **options: Any) -> Any:
    def score(params: dict[str, int], example: int) -> float:
        asked.append(example)
        return float(example % 4 <= params["style"])

    return search(SPACE, score, n_examples=12, max_calls=40, num_threads=2, **options)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("max_tokns", "Did you mean 'max_tokens'?"),
        ("embeder", "Did you mean 'embedder'?"),
        ("on_progres", "Did you mean 'on_progress'?"),
        ("n_jobs", "is an option of MIPROv2, not of search"),
        ("xyzzy", "All names: help(mpromptune.search)"),
    ],
)
def test_search_refuses_what_is_no_option_of_it(name: str, nearest: str) -> None:
    """A name that was misspelt, is gone, or means something for a compile only, before any call."""
    asked: list[int] = []
    with pytest.raises(UnknownOptionError, match=repr(name)) as caught:
        _searched(asked, **{name: 1})
    assert nearest in str(caught.value)
    assert not asked


def test_search_takes_options_by_name() -> None:
    """Those of qEI, of calls and of limits are keywords; None stands for the default."""
    embedded: list[str] = []

    def embedder(texts: list[str]) -> Any:
        embedded.extend(texts)
        return hashed(texts)

    given = {"min_cold_start": 2, "timeout": 30, "max_retries": 0, "max_cost": 1.0, "max_seconds": 60}
    result = _searched([], embedder=embedder, sampler=None, failure_score=None, **given)
    assert set(SPACE.components["style"]) <= set(embedded)
    assert 0 < result.calls <= 40


def _plan(*args: Any, batch_size: int | None) -> BatchPlan:
    return BatchPlan(*args, batch_size=batch_size, block_size=4)


class _Plan(BatchPlan):
    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, block_size=4, **given)


@pytest.mark.parametrize(
    "plan", [_plan, _Plan, partial(BatchPlan, block_size=4)], ids=["function", "class", "partial"]
)
def test_a_plan_of_ones_own(plan: Callable[..., Any], tmp_path: Any) -> None:
    """Whatever makes a plan is a schedule, and its study is gone on with."""
    asked: list[int] = []
    run = {"schedule": plan, "sampler": "random", "storage": tmp_path / "run.log"}
    result = _searched(asked, **run)
    assert len(asked) == result.calls
    assert len(result.study.trials[0].user_attrs[EXAMPLES]) == 4
    assert _searched(asked, **run).best_params == result.best_params
    assert len(asked) == result.calls
    with pytest.raises(InvalidArgumentError, match="patience.* only apply to schedule='blocks'"):
        _searched(asked, **run, patience=3)


def test_no_plan_spends_more_than_the_budget() -> None:
    """One that asks for all of four configurations, 48 calls, gets 40."""

    class Greedy(BatchPlan):
        def next_batch(self, evidence: Any) -> Any:
            return (Request((i,), lambda row, number: tuple(range(12))) for i in range(4))

    asked: list[int] = []
    assert _searched(asked, schedule=Greedy, sampler="random").calls == len(asked) == 40


def test_search_shows_its_options() -> None:
    """To `help` and editors: few arguments of its own, then each option with its default."""
    parameters = inspect.signature(search).parameters
    own = [name for name in parameters if name not in SEARCH_OPTIONS]
    assert len(own) == 14
    assert parameters["embedder"].default is None
    assert parameters["confirm"].default == "auto"
    assert not {"options", "n_jobs", "dry_run"} & parameters.keys()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_call": 9}, "Did you mean 'max_calls'"),
        ({"seed": "one"}, "seed must be an integer; got 'one'"),
        ({"baseline": "0"}, "baseline must map each component to an index; got '0'"),
        ({"score": None}, r"score must be a function score\(params, example\); got None"),
        ({"space": {"text": ["a"]}}, "space must be a PromptSpace"),
        ({"schedule": "mipro"}, "minibatch_size=35 exceeds the 4 validation examples.*minibatch=False"),
    ],
)
def test_search_says_what_is_wrong_before_any_call(given: dict[str, Any], message: str) -> None:
    """Arguments of search that are not valid are refused with a message that says what is."""
    calls: list[int] = []

    def score(params: dict[str, int], example: int) -> float:
        calls.append(example)
        return 1.0

    valid = {"space": PromptSpace({"text": ["a", "b"]}), "score": score, "n_examples": 4, "max_calls": 8}
    with pytest.raises((InvalidArgumentError, UnknownOptionError), match=message):
        search(**{**valid, "embedder": "index", **given})
    assert calls == []


def test_an_argument_of_another_method_says_where_it_belongs() -> None:
    """An argument of DSPy's constructor given to compile, or the other way round, names the right method."""
    lm = arithmetic_lm()
    with pytest.raises(UnknownOptionError, match="'num_threads' is an argument of MIPROv2's constructor"):
        _compile(lm, _optimizer(lm), num_threads=4)
    with pytest.raises(UnknownOptionError, match="'trainset' is an argument of compile"):
        _optimizer(lm, trainset=TRAIN)
    assert lm.calls == []


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        ("x", "an integer; got 'x'"),
        (-1, "from 0 to 4294967295.*got -1"),
        (2**32, "from 0 to .*got 4294967296"),
    ],
)
def test_the_seed_of_a_compile_is_an_integer_that_numpy_accepts(seed: Any, message: str) -> None:
    """Another seed is refused before any LM call, with its name, wherever it is given."""
    lm = arithmetic_lm()
    with pytest.raises(InvalidArgumentError, match=f"seed must be {message}"):
        _compile(lm, _optimizer(lm, sampler="qei"), seed=seed)
    with pytest.raises(InvalidArgumentError, match=f"seed must be {message}"):
        _compile(lm, _optimizer(lm, sampler="qei", seed=seed))
    assert lm.calls == []


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp"])
def test_a_search_takes_any_integer_as_a_seed(sampler: str) -> None:
    """Optuna's samplers would refuse negative ones."""
    assert resolve_sampler(sampler, PromptSpace({"text": ["a", "b"]}), -1)


@pytest.mark.parametrize("components", [None, {3: ["a"]}, {"text": [1, 2]}, {"text": ["a", [None]]}])
def test_a_space_of_other_things_than_texts_is_refused(components: Any) -> None:
    """Names that are no strings, and candidates that are no texts, are refused with what is expected."""
    with pytest.raises(InvalidArgumentError, match="components must map names|candidate must be a text"):
        PromptSpace(components)


def test_a_plan_that_fails_at_the_end_keeps_what_was_paid() -> None:
    """An error in the choice of the winner stops the search with the study, which has all scores."""

    class Undecided(BatchPlan):
        def winner(self, ranked: Any, is_cut_short: bool) -> Any:
            raise RuntimeError("no winner.")

    space = PromptSpace({"text": ["a", "b"]})
    with pytest.raises(SearchStoppedError, match="RuntimeError: no winner. The study keeps") as caught:
        search(space, lambda p, e: 1.0, n_examples=4, max_calls=8, embedder="index", schedule=Undecided)
    assert caught.value.study is not None
    assert sum(len(t.intermediate_values) for t in caught.value.study.trials) > 0
