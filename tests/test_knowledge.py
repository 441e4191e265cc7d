"""What the surrogate makes of a study, and what it expects of configurations that nobody has tried."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
import torch
from embedders import letters
from optuna.trial import TrialState, create_trial

from mpromptune import PromptSpace
from mpromptune.model.embedding import as_embedder
from mpromptune.model.space import Row
from mpromptune.model.stopping import expected_gains
from mpromptune.plans.knowledge import Knowledge
from mpromptune.sampling.encoding import encode_prompts
from mpromptune.sampling.history import fit_history, read
from mpromptune.sampling.samplers import distributions_of
from mpromptune.studies.attributes import EXAMPLES, N_EXAMPLES, SCORES

TEXTS = [f"{'a' * i} style" for i in range(16)]
# 4096 configurations, twice as many as are listed; the later a candidate, the better.
LARGE = PromptSpace({f"{i}_predictor_instruction": TEXTS for i in range(3)})


def known(space: PromptSpace, n_trials: int) -> Knowledge:
    """Random configurations, each measured on a random half of 20 examples."""
    rng = np.random.default_rng(0)
    study = optuna.create_study(direction="maximize")
    study.set_user_attr(N_EXAMPLES, 20)
    knowledge = Knowledge(study, encode_prompts(space, as_embedder(letters)))
    for row in map(tuple, space.sample(10**6, rng)[rng.permutation(space.size)[:n_trials]].tolist()):
        examples = sorted(rng.choice(20, 10, replace=False).tolist())
        scores = [float(rng.random() < 0.2 + 0.6 * sum(row) / (15 * len(row))) for _ in examples]
        attributes = {EXAMPLES: examples, SCORES: scores}
        trial = create_trial(
            value=float(np.mean(scores)),
            params=space.params(row),
            distributions=distributions_of(space),
            user_attrs=attributes,
        )
        study.add_trial(trial)
        knowledge.ledger.add(row, dict(zip(examples, scores, strict=True)))
    return knowledge


def gains_of_all(knowledge: Knowledge, space: PromptSpace, leader: Row) -> torch.Tensor:
    encoding = knowledge.encoding
    history = read(knowledge.study, knowledge.study.get_trials(), encoding.row, len(encoding.names))
    model = fit_history(history, encoding.geometries)
    return expected_gains(model, torch.tensor(space.rows()), torch.tensor(leader))


def test_the_largest_gain_of_a_small_space_is_that_of_all_configurations() -> None:
    """By brute force; closed configurations do not count, and nothing is gained where all are closed."""
    space = PromptSpace({"style": TEXTS})
    knowledge = known(space, 8)
    leader = knowledge.best_first(knowledge.ledger.rows())[0][0]
    gains = gains_of_all(knowledge, space, leader)
    assert knowledge.largest_gain(leader, lambda row: True) == pytest.approx(float(gains.max()))
    best = (int(gains.argmax()),)
    others = float(gains[torch.arange(16) != best[0]].max())
    assert knowledge.largest_gain(leader, lambda row: row != best) == pytest.approx(others)
    assert knowledge.largest_gain(leader, lambda row: False) == 0.0


def test_the_largest_gain_of_a_large_space_is_found_nearby() -> None:
    """Half of the configurations at random and a local search come within a tenth of brute force."""
    knowledge = known(LARGE, 30)
    leader = knowledge.best_first(knowledge.ledger.rows())[0][0]
    found = knowledge.largest_gain(leader, lambda row: True)
    most = float(gains_of_all(knowledge, LARGE, leader).max())
    assert 0.9 * most <= found <= most * (1.0 + 1e-6)


def test_nothing_measured_is_everything_to_gain() -> None:
    """Without a completed trial there is no posterior, and no reason to stop."""
    knowledge = known(LARGE, 0)
    trial = knowledge.study.ask(distributions_of(LARGE))
    knowledge.study.tell(trial, state=TrialState.FAIL)
    assert knowledge.largest_gain((0, 0, 0), lambda row: True) == float("inf")
    mean, variance = knowledge.posterior([(0, 0, 0), (1, 1, 1)])
    assert (mean.tolist(), variance.tolist()) == ([0.0, 0.0], [1.0, 1.0])


def test_the_posterior_follows_the_study() -> None:
    """Another trial changes it; asking twice does not."""
    space = PromptSpace({"style": TEXTS})
    knowledge = known(space, 6)
    before = knowledge.posterior([(3,)])[0].tolist()
    assert knowledge.posterior([(3,)])[0].tolist() == before
    trial = knowledge.study.ask(distributions_of(space))
    trial.set_user_attr(EXAMPLES, [0, 1])
    trial.set_user_attr(SCORES, [1.0, 1.0])
    assert knowledge.posterior([(3,)])[0].tolist() == before  # still running
    knowledge.study.tell(trial, 1.0)
    assert knowledge.posterior([(3,)])[0].tolist() != before


def test_drawn_are_all_configurations_or_a_sample() -> None:
    """Up to 500, those that were measured among them with the same posterior; more are a sample of 500."""
    small = known(PromptSpace({f"{i}_predictor_instruction": TEXTS for i in range(2)}), 20)
    drawn = small.drawn()
    assert drawn.shape == (256, 2)
    means, variances = small.posterior(small.ledger.rows())
    found = [int(np.argmin(np.abs(drawn[:, 0] - mean))) for mean in means.tolist()]
    assert drawn[found, 0] == pytest.approx(means.numpy())
    assert sorted(drawn[found, 1]) == pytest.approx(sorted(variances.sqrt().tolist()))
    assert len(known(LARGE, 20).drawn()) == pytest.approx(500, abs=40)  # what is drawn twice counts once


def test_nothing_is_drawn_from_nothing_known() -> None:
    """Before any trial, all configurations are alike; and texts have explained nothing yet."""
    nothing = known(LARGE, 0)
    assert len(set(map(tuple, nothing.drawn().tolist()))) == 1
    assert nothing.text_chance() is None


def test_texts_are_judged_only_where_there_are_any() -> None:
    """Scores that rise with the letters of a text are explained by it; by identity, nothing is said."""
    told = known(PromptSpace({"style": TEXTS}), 16)
    assert told.text_chance() == pytest.approx(0.0, abs=0.1)
    blind = Knowledge(told.study, encode_prompts(PromptSpace({"style": TEXTS}), None), told.ledger)
    assert blind.text_chance() is None
