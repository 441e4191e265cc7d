"""qEISampler in plain Optuna studies."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable

import numpy as np
import optuna
import pytest
from embedders import letters
from optuna.trial import Trial, TrialState

from mpromptune import PromptSpace, qEISampler
from mpromptune.errors import InvalidArgumentError, UnknownOptionError
from mpromptune.storage.attributes import PROPOSED

TEXTS = [
    f"{verb} {manner}"
    for verb in ("solve", "answer", "reply")
    for manner in ("tersely", "with care", "aloud")
]


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


def test_no_text_twice_while_another_is_unmeasured() -> None:
    """Nine texts take nine trials; the tenth may repeat."""
    study = study_of()
    study.optimize(objective, n_trials=9)
    assert len({t.params["text"] for t in study.trials}) == 9
    study.optimize(objective, n_trials=1)
    assert len(study.trials) == 10


def test_no_text_twice_with_threads() -> None:
    """`n_jobs` threads see each other's proposals before they are suggested."""
    study = study_of()
    study.optimize(objective, n_trials=9, n_jobs=4)
    assert len({t.params["text"] for t in study.trials}) == 9


def test_a_trial_that_is_overtaken_takes_no_text_twice() -> None:
    """The first of three trials suggests after the second has made the plan for all of them."""
    study = study_of(lambda: sampler(min_cold_start=2))
    study.optimize(objective, n_trials=3)
    first, second, third = (study.ask() for _ in range(3))
    texts = [trial.suggest_categorical("text", TEXTS) for trial in (second, first, third)]
    assert len({*texts, *(t.params["text"] for t in study.trials[:3])}) == 6


def test_running_trials_are_pending() -> None:
    """Asks without a tell all differ."""
    study = study_of(lambda: sampler(min_cold_start=2))
    study.optimize(objective, n_trials=3)
    space = {"text": optuna.distributions.CategoricalDistribution(TEXTS)}
    asked = [study.ask(space).params["text"] for _ in range(6)]
    assert len({*asked, *(t.params["text"] for t in study.trials[:3])}) == 9


def test_same_seed_same_trials_and_another_seed_others() -> None:
    """Randomness comes from (seed, trial number)."""

    def texts(seed: int) -> list[str]:
        study = study_of(lambda: sampler(seed=seed))
        study.optimize(objective, n_trials=7)
        return [t.params["text"] for t in study.trials]

    assert texts(0) == texts(0)
    assert texts(0) != texts(3)


def test_a_resumed_study_goes_on_as_if_it_had_never_stopped(tmp_path) -> None:
    """State lives in the study: a new sampler on the same storage proposes the same."""
    url = f"sqlite:///{tmp_path}/study.db"
    whole = study_of()
    whole.optimize(objective, n_trials=8)
    for _ in range(4):
        part = optuna.create_study(
            storage=url, study_name="s", load_if_exists=True, direction="maximize", sampler=sampler()
        )
        part.optimize(objective, n_trials=2)
    assert [t.params for t in part.trials] == [t.params for t in whole.trials]


def test_failed_trials_may_be_proposed_again_and_pruned_ones_not() -> None:
    """A failure says nothing about a text; a pruned trial was measured."""
    study = study_of(lambda: sampler(min_cold_start=1))
    space = {"text": optuna.distributions.CategoricalDistribution(TEXTS[:3])}
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


def test_cold_start_is_random_and_then_the_model_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """min_cold_start counts finished trials before the first fit."""
    fits: list[int] = []
    import mpromptune.sampling.sampler as module

    original = module.fit
    monkeypatch.setattr(module, "fit", lambda *a: fits.append(len(a[0])) or original(*a))
    study = study_of(lambda: sampler(min_cold_start=3))
    study.optimize(objective, n_trials=6)
    assert fits == [3, 4, 5]


def test_a_batch_needs_one_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """batch_size asks in a row share one proposal."""
    fits: list[int] = []
    import mpromptune.sampling.sampler as module

    original = module.fit
    monkeypatch.setattr(module, "fit", lambda *a: fits.append(len(a[0])) or original(*a))
    study = study_of(lambda: sampler(min_cold_start=2, batch_size=3))
    space = {"text": optuna.distributions.CategoricalDistribution(TEXTS)}
    study.optimize(objective, n_trials=2)
    for _ in range(3):
        study.ask(space)
    assert fits == [2]
    study.ask(space)
    assert fits == [2, 2]


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


def test_n_batches_changes_what_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The random joint batches are drawn only when asked for."""
    drawn: list[int] = []
    import mpromptune.model.acquisition as module

    original = torch_multinomial = module.torch.multinomial
    monkeypatch.setattr(
        module.torch, "multinomial", lambda p, *a, **k: drawn.append(len(p)) or torch_multinomial(p, *a, **k)
    )
    for n_batches in (0, 17):
        study_of(lambda n=n_batches: sampler(n_batches=n, min_cold_start=2)).optimize(objective, n_trials=3)
    assert drawn == [17]
    assert original is torch_multinomial


def test_only_existing_combinations_are_proposed() -> None:
    """A PromptSpace with combinations, driven by ask and tell."""
    pairs = [(i, (2 * i + 1) % 9) for i in range(9)]
    space = PromptSpace({"a": TEXTS, "b": TEXTS}, combinations=pairs)
    study = optuna.create_study(direction="maximize", sampler=sampler(space=space))
    distributions = {n: optuna.distributions.CategoricalDistribution(range(9)) for n in space.names}
    for _ in range(9):
        trial = study.ask(distributions)
        study.tell(trial, float(trial.params["a"]))
    assert {tuple(t.params[n] for n in space.names) for t in study.trials} == set(pairs)


def test_a_component_with_one_candidate_is_no_obstacle() -> None:
    """Optuna does not pass on parameters with a single value."""
    space = PromptSpace({"a": ["only"], "b": TEXTS})
    study = optuna.create_study(direction="maximize", sampler=sampler(space=space))
    distributions = {
        n: optuna.distributions.CategoricalDistribution(range(s))
        for n, s in zip(space.names, space.sizes, strict=True)
    }
    for _ in range(6):
        trial = study.ask(distributions)
        study.tell(trial, float(trial.params["b"]))
    assert len({t.params["b"] for t in study.trials}) == 6


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


def test_attributes_show_what_was_proposed() -> None:
    """The study itself says what the sampler decided."""
    study = study_of()
    study.optimize(objective, n_trials=3)
    proposed = [t.system_attrs.get(PROPOSED) for t in study.trials[1:]]
    assert proposed == [t.params for t in study.trials[1:]]


def test_a_sampler_survives_pickling() -> None:
    """Process pools and joblib copy it."""
    study = study_of(lambda: pickle.loads(pickle.dumps(sampler())))
    study.optimize(objective, n_trials=2)
    assert len(study.trials) == 2


@pytest.mark.parametrize(
    "bad", [{"batch_size": 0}, {"max_space_size": "100"}, {"n_batches": -1}, {"min_cold_start": 1.5}]
)
def test_bad_arguments_are_refused(bad: dict) -> None:
    """The message names argument and value."""
    with pytest.raises(InvalidArgumentError, match=next(iter(bad))):
        qEISampler(**bad)


def test_an_unknown_argument_is_refused_with_the_nearest_one() -> None:
    """A misspelt name costs no search to find."""
    with pytest.raises(UnknownOptionError, match=r"no argument 'batchsize'. Did you mean 'batch_size'\?"):
        qEISampler(batchsize=3)


def test_old_positional_order() -> None:
    """(max_space_size, n_batches, batch_size, min_cold_start)."""
    old = qEISampler(100, 200, 5, 6)
    assert (old.max_space_size, old.n_batches, old.batch_size, old.min_cold_start) == (100, 200, 5, 6)


def test_infinite_values_do_not_break_the_model() -> None:
    """They are clipped to the finite ones' range."""
    study = study_of(lambda: sampler(min_cold_start=2))
    values = itertools.cycle([1.0, float("inf"), float("-inf"), 2.0])
    study.optimize(lambda t: t.suggest_categorical("text", TEXTS) and next(values), n_trials=6)
    assert len(study.trials) == 6


@pytest.mark.parametrize("fixed", [True, False])
def test_the_first_batch_has_no_text_twice(fixed: bool) -> None:
    """Before any trial is complete, running ones are pending already."""
    for seed in range(5):
        study = study_of(lambda s=seed: sampler(seed=s))
        distribution = optuna.distributions.CategoricalDistribution(TEXTS)
        asked = []
        for _ in range(9):
            trial = study.ask({"text": distribution} if fixed else None)
            asked.append(trial.suggest_categorical("text", TEXTS))
        repeats = 9 - len(set(asked))
        assert repeats <= (0 if fixed else 1)


def test_nan_lists_and_booleans_are_choices() -> None:
    """Whatever Optuna takes as a choice; none is tried twice before all are measured."""
    choices = [float("nan"), True, 3, 2.0, None, "text"]
    study = study_of(lambda: sampler(min_cold_start=2))
    space = {"x": optuna.distributions.CategoricalDistribution(choices)}
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


def test_fits_leave_the_global_generator_alone() -> None:
    """Even a fit that is tried again: same study, same proposals, same generator state."""
    import torch

    def trials() -> list[dict]:
        study = study_of(lambda: sampler(min_cold_start=2))
        study.optimize(lambda t: np.sin(9 * t.suggest_float("x", 0, 1)) + objective(t), n_trials=8)
        return [t.params for t in study.trials]

    before = torch.random.get_rng_state()
    first = trials()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert trials() == first


def test_thousands_of_recorded_trials_are_gone_on_with(tmp_path) -> None:
    """From a journal file, twice: the model with inducing points proposes the same, and what is good."""
    path = str(tmp_path / "study.log")
    texts = [f"{'a' * (i % 6)}{'b' * (i // 6)} style" for i in range(36)]
    space = PromptSpace({f"{p}_predictor_instruction": [f"{t} {p}" for t in texts] for p in range(4)})
    distributions = {n: optuna.distributions.CategoricalDistribution(range(36)) for n in space.names}
    rng = np.random.default_rng(0)
    made = optuna.create_study(direction="maximize")
    for row in map(tuple, rng.integers(0, 36, size=(1500, 4)).tolist()):
        value = sum(i % 6 for i in row) / 20 + rng.normal(0, 0.05)  # the number of a's, 1 at best
        made.add_trial(
            optuna.create_trial(params=space.params(row), distributions=distributions, value=value)
        )
    backend = optuna.storages.journal.JournalFileBackend
    storage = optuna.storages.JournalStorage(backend(path))
    optuna.create_study(study_name="s", storage=storage, direction="maximize").add_trials(made.trials)

    def proposals() -> list[dict]:
        again = optuna.load_study(
            study_name="s",
            storage=optuna.storages.JournalStorage(backend(path)),
            sampler=sampler(space=space, batch_size=4),
        )
        copied = optuna.create_study(direction="maximize", sampler=again.sampler)
        copied.add_trials(again.trials)
        return [copied.ask(distributions).params for _ in range(4)]

    first = proposals()
    assert first == proposals()
    assert all(sum(i % 6 for i in params.values()) >= 17 for params in first)
