"""qEISampler in plain Optuna studies."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import optuna
import pytest
import torch
from embedders import letters
from optuna.distributions import CategoricalDistribution
from optuna.trial import Trial, TrialState

from mpromptune import PromptSpace, qEISampler
from mpromptune.errors import InvalidArgumentError, UnknownOptionError
from mpromptune.model import surrogate
from mpromptune.sampling import sampler as sampler_module
from mpromptune.sampling.encoding import distributions_of
from mpromptune.storage.attributes import PROPOSED

TEXTS = [
    f"{verb} {manner}"
    for verb in ("solve", "answer", "reply")
    for manner in ("tersely", "with care", "aloud")
]

CHOICE = {"text": CategoricalDistribution(TEXTS)}


def create_trial(params: dict, distributions: dict, value: float) -> optuna.trial.FrozenTrial:
    return optuna.trial.create_trial(params=params, distributions=distributions, value=value)


def sampler(**kwargs: object) -> qEISampler:
    return qEISampler(**{"embedder": letters, "seed": 0, "n_batches": 4, **kwargs})


def quality(text: str) -> float:
    return text.count("a") + 0.1 * text.count("w")


def objective(trial: Trial) -> float:
    return quality(trial.suggest_categorical("text", TEXTS))


def study_of(make: Callable[[], qEISampler] = sampler, direction: str = "maximize") -> optuna.Study:
    return optuna.create_study(direction=direction, sampler=make())


@pytest.mark.parametrize(("direction", "best"), [("maximize", max), ("minimize", min)])
def test_finds_the_best_text_before_trying_all(direction: str, best: Callable) -> None:
    """Both directions."""
    study = study_of(direction=direction)
    study.optimize(objective, n_trials=8)
    assert study.best_value == best(map(quality, TEXTS))


def test_failed_trials_may_be_proposed_again_and_pruned_ones_not() -> None:
    """A failure says nothing about a text; a pruned trial was measured."""
    study = study_of(lambda: sampler(min_cold_start=1))
    space = {"text": CategoricalDistribution(TEXTS[:3])}
    failed = study.ask(space)
    study.tell(failed, state=TrialState.FAIL)
    pruned = study.ask(space)
    pruned.report(0.5, step=0)
    study.tell(pruned, state=TrialState.PRUNED)
    rest = []
    for _ in range(2):
        trial = study.ask(space)
        rest.append(trial.params["text"])
        study.tell(trial, 1.0)
    assert pruned.params["text"] not in rest
    assert len(set(rest)) == 2


def test_numbers_texts_and_flags_together() -> None:
    """Mixed spaces are featurised; a changing search space is followed."""

    def mixed(trial: Trial) -> float:
        x = trial.suggest_float("x", 1e-3, 1.0, log=True)
        k = trial.suggest_int("k", 1, 9, step=2)
        bonus = trial.suggest_categorical("flag", [True, False, None])
        late = trial.suggest_float("late", 0.0, 1.0) if trial.number > 5 else 0.0
        return objective(trial) - (np.log10(x) + 2) ** 2 - abs(k - 5) + bool(bonus) + late

    study = study_of()
    study.optimize(mixed, n_trials=12)
    assert all(t.state == TrialState.COMPLETE for t in study.trials)
    assert all(t.params["k"] in (1, 3, 5, 7, 9) for t in study.trials)


def test_max_space_size_bounds_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above it the space is sampled and searched locally; a cost of the bound, not of the product."""
    seen: list[int] = []
    import mpromptune.sampling.sampler as module

    original = module.propose
    monkeypatch.setattr(
        module, "propose", lambda m, choices, *a: seen.append(len(choices)) or original(m, choices, *a)
    )
    components = {f"{i}_predictor_instruction": [f"{t} {i}" for t in TEXTS * 3] for i in range(6)}
    space = PromptSpace(components)
    study = optuna.create_study(direction="maximize", sampler=sampler(space=space, max_space_size=50))

    def score(trial: Trial) -> float:
        return float(sum(trial.suggest_categorical(n, range(27)) for n in space.names))

    study.optimize(score, n_trials=8)
    assert space.size == 27**6
    assert 50 <= max(seen) < 50 + 3 * 8 * 64


def test_embeddings_carry_over_to_unseen_texts() -> None:
    """After a few trials the best unseen text is chosen for its likeness, not by index."""
    good, bad = [f"aaa {c}" for c in "bcdefghij"], [f"zzz {c}" for c in "bcdefghij"]
    texts = [t for pair in zip(good, bad, strict=True) for t in pair]
    study = study_of(lambda: sampler(min_cold_start=4, batch_size=1))
    study.enqueue_trial({"text": "aaa b"})
    for text in ("zzz b", "zzz c", "aaa c"):
        study.enqueue_trial({"text": text})
    study.optimize(
        lambda t: float(t.suggest_categorical("text", texts).startswith("aaa")) + 0.01 * (t.number % 3),
        n_trials=8,
    )
    assert all(t.params["text"].startswith("aaa") for t in study.trials[4:])


@pytest.mark.parametrize(
    "bad", [{"batch_size": 0}, {"max_space_size": "100"}, {"n_batches": -1}, {"min_cold_start": 1.5}]
)
def test_bad_arguments_are_refused(bad: dict) -> None:
    """The message names argument and value."""
    with pytest.raises(InvalidArgumentError, match=next(iter(bad))):
        qEISampler(**bad)


def test_an_unknown_argument_is_refused_with_the_nearest_one() -> None:
    """A misspelt name costs no search to find."""
    with pytest.raises(UnknownOptionError, match=r"'batchsize'. Did you mean 'batch_size'\?"):
        qEISampler(batchsize=3)


def test_nan_lists_and_booleans_are_choices() -> None:
    """Whatever Optuna takes as a choice; none is tried twice before all are measured."""
    choices = [float("nan"), True, 3, 2.0, None, "text"]
    study = study_of(lambda: sampler(min_cold_start=2))
    space = {"x": CategoricalDistribution(choices)}
    for _ in choices:
        trial = study.ask(space)
        study.tell(trial, float(trial.number % 3))
    assert len({repr(t.params["x"]) for t in study.trials}) == len(choices)


def test_every_integer_is_tried_before_any_is_repeated() -> None:
    """Stepped numbers are enumerated, not put on a coarse grid."""
    study = study_of(lambda: sampler(min_cold_start=68, batch_size=1))
    study.optimize(lambda t: -abs(t.suggest_int("x", 0, 69) - 30.0), n_trials=70)
    assert len({t.params["x"] for t in study.trials}) == 70


def test_values_of_an_earlier_range_are_not_proposed() -> None:
    """A failed trial with a wider range leaves no candidates behind."""
    study = study_of(lambda: sampler(min_cold_start=2))
    wide = study.ask({"x": optuna.distributions.FloatDistribution(0.0, 1000.0)})
    study.tell(wide, state=TrialState.FAIL)
    study.optimize(lambda t: t.suggest_float("x", 0.0, 1.0), n_trials=6)
    proposed = [t.system_attrs[PROPOSED]["x"] for t in study.trials if PROPOSED in t.system_attrs]
    assert all(value <= 1.0 for value in proposed[1:])


@pytest.mark.parametrize("n_jobs", [1, 4])
def test_no_text_twice_while_another_is_unmeasured(n_jobs: int) -> None:
    """Nine texts take nine trials, also where threads propose before others suggest; the tenth may repeat."""
    study = study_of()
    study.optimize(objective, n_trials=9, n_jobs=n_jobs)
    assert len({t.params["text"] for t in study.trials}) == 9
    assert all(t.system_attrs[PROPOSED] == t.params for t in study.trials[n_jobs:])
    study.optimize(objective, n_trials=1)
    assert len(study.trials) == 10


def test_running_trials_are_pending() -> None:
    """Asks without a tell all differ, also where the first of three suggests after the second."""
    study = study_of(lambda: sampler(min_cold_start=2))
    study.optimize(objective, n_trials=3)
    first, second, third = (study.ask() for _ in range(3))
    asked = [trial.suggest_categorical("text", TEXTS) for trial in (second, first, third)]
    asked += [study.ask(CHOICE).params["text"] for _ in range(3)]
    assert len({*asked, *(t.params["text"] for t in study.trials[:3])}) == 9


@pytest.mark.parametrize("fixed", [True, False])
def test_the_first_batch_has_no_text_twice(fixed: bool) -> None:
    """Before any trial is complete, running ones are pending already."""
    for seed in range(5):
        study = study_of(lambda s=seed: sampler(seed=s))
        trials = [study.ask(CHOICE if fixed else None) for _ in range(9)] if fixed else []
        asked = [trial.params["text"] for trial in trials]
        asked += [study.ask().suggest_categorical("text", TEXTS) for _ in range(9 - len(trials))]
        assert 9 - len(set(asked)) <= (0 if fixed else 1)


def test_trials_depend_on_the_seed_and_the_study_alone(tmp_path) -> None:
    """Not on torch's generator, and a study goes on in a storage as if it had never stopped."""

    def texts(seed: int) -> list[str]:
        study = study_of(lambda: sampler(seed=seed, min_cold_start=2))
        study.optimize(objective, n_trials=6)
        return [t.params["text"] for t in study.trials]

    before = torch.random.get_rng_state()
    whole = texts(0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert texts(3) != whole
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log"))
    for _ in range(3):
        part = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name="s",
            load_if_exists=True,
            direction="maximize",
            sampler=pickle.loads(pickle.dumps(sampler(min_cold_start=2))),  # as process pools copy it
        )
        part.optimize(objective, n_trials=2)
    assert [t.params["text"] for t in part.trials] == whole


def test_a_batch_needs_one_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """None before `min_cold_start` trials have finished; `batch_size` asks in a row share one proposal."""
    fits: list[int] = []
    original = sampler_module.fit
    monkeypatch.setattr(sampler_module, "fit", lambda *a: fits.append(len(a[0])) or original(*a))
    study = study_of(lambda: sampler(min_cold_start=2, batch_size=3))
    study.optimize(objective, n_trials=3)
    assert fits == [2]
    for _ in range(3):
        study.ask(CHOICE)
    assert fits == [2, 3]
    study.ask(CHOICE)
    assert fits == [2, 3, 3]


@pytest.mark.parametrize("n_batches", [0, 17])
def test_n_batches_changes_what_is_evaluated(n_batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The random joint batches are drawn only when asked for."""
    drawn: list[int] = []
    multinomial = torch.multinomial
    monkeypatch.setattr(
        torch, "multinomial", lambda p, *a, **k: drawn.append(len(p)) or multinomial(p, *a, **k)
    )
    study_of(lambda: sampler(n_batches=n_batches, min_cold_start=2)).optimize(objective, n_trials=3)
    assert drawn == [n_batches] * bool(n_batches)


@pytest.mark.parametrize(
    ("first", "rows"),
    [(["only"], [(0, i) for i in range(9)]), (TEXTS, [(i, (2 * i + 1) % 9) for i in range(9)])],
)
def test_only_existing_configurations_are_proposed(first: list[str], rows: list[tuple[int, int]]) -> None:
    """All of them, by ask and tell, though Optuna does not pass on parameters with a single value."""
    space = PromptSpace({"a": first, "b": TEXTS}, None if len(first) == 1 else rows)
    study = optuna.create_study(direction="maximize", sampler=sampler(space=space))
    for _ in rows:
        trial = study.ask(distributions_of(space))
        study.tell(trial, float(trial.params["b"]))
    assert {space.row(t.params) for t in study.trials} == set(rows)


def test_thousands_of_recorded_trials_are_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond as many as the exact model takes: the same proposals each time, of what is good."""
    monkeypatch.setattr(surrogate, "_EXACT", 64)
    texts = [f"{'a' * (i % 6)}{'b' * (i // 6)} style" for i in range(36)]
    space = PromptSpace({f"{p}_predictor_instruction": [f"{t} {p}" for t in texts] for p in range(4)})
    rng = np.random.default_rng(0)
    study = optuna.create_study(direction="maximize")
    for row in rng.integers(0, 36, size=(400, 4)).tolist():
        value = sum(i % 6 for i in row) / 20 + rng.normal(0, 0.05)  # the number of a's, 1 at best
        study.add_trial(create_trial(space.params(row), distributions_of(space), value))

    def proposals() -> list[dict]:
        again = optuna.create_study(direction="maximize", sampler=sampler(space=space, max_space_size=300))
        again.add_trials(study.trials)
        return [again.ask(distributions_of(space)).params for _ in range(4)]

    first = proposals()
    assert first == proposals()
    assert all(sum(i % 6 for i in params.values()) >= 17 for params in first)
