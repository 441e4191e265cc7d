"""What a search knows: the scores that came in, and what the surrogate makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import numpy as np
import torch
from botorch.models import SingleTaskGP
from optuna.study import Study
from optuna.trial import FrozenTrial

from mpromptune.model.candidates import LISTED, choice_set
from mpromptune.model.devices import plain_torch
from mpromptune.model.difficulty import LARGEST
from mpromptune.model.embedding import FloatArray
from mpromptune.model.explained import chance_of_likeness, without_texts
from mpromptune.model.space import Row
from mpromptune.model.stopping import expected_gains, standard_error
from mpromptune.model.surrogate import OnRanked, Surrogate, posterior_mean_and_variance, unheard
from mpromptune.sampling.encoding import Encoding
from mpromptune.sampling.history import History, fit_history, read
from mpromptune.studies.ledger import Ledger

# NOTE: the expected best of a few of so many differs from that of all by less than can be drawn.
_DRAWN = 500


@dataclass
class Knowledge:
    """The ledger, and the posterior of everything told.

    Attributes:
        study: Its finished trials are what the surrogate is fitted to.
        encoding: Configurations as the surrogate sees them.
        ledger: The scores.
        hidden: Numbers of trials that an earlier run finished, and this one has yet to come to.
        on_ranked: Called when the surrogate has ranked configurations.
    """

    study: Study
    encoding: Encoding
    ledger: Ledger = field(default_factory=Ledger)
    hidden: AbstractSet[int] = frozenset()
    on_ranked: OnRanked = unheard
    _fitted: tuple[int, Surrogate | None] = (-1, None)

    def posterior(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean and variance of configurations."""
        model = self._model()
        with plain_torch():
            if model is None:  # every trial so far has failed
                return torch.zeros(len(rows)), torch.ones(len(rows))
            return posterior_mean_and_variance(model, torch.tensor(rows, dtype=torch.float64))

    def best_first(self, rows: Sequence[Row]) -> list[tuple[Row, float]]:
        """Configurations and their posterior means, the highest first."""
        if not rows:
            return []
        means = self.posterior(rows)[0].tolist()
        ranked = sorted(zip(rows, means, strict=True), key=lambda pair: -pair[1])
        if self._fitted[1] is not None:
            self.on_ranked(self._fitted[1], ranked[0][0])
        return ranked

    def largest_gain(self, leader: Row, is_open: Callable[[Row], bool]) -> float:
        """The most that is expected from any open configuration over ``leader``; infinite unfitted.

        In spaces too large to list, the rivals are a sample and what a local search meets.
        """
        model = self._model()
        if model is None:
            return float("inf")

        def gains(rows: torch.Tensor) -> torch.Tensor:
            return expected_gains(model, rows, torch.tensor(leader))

        rng = np.random.default_rng(self.ledger.rounds)
        starts = [row for row, _ in self.best_first(self.ledger.rows())]
        with plain_torch():
            rivals = choice_set(self.encoding.space, LISTED, is_open, rng, gains, starts)
            return float(gains(rivals).max()) if len(rivals) else 0.0

    def standard_error(self, n_examples: int) -> float:
        """Of a configuration's mean over a whole validation set."""
        scores = [np.array(list(self.ledger.means(row).values())) for row in self.ledger.rows()]
        return standard_error([np.clip(some, -LARGEST, LARGEST) for some in scores], n_examples)

    @plain_torch()
    def drawn(self) -> FloatArray:
        """Posterior means and standard deviations of configurations drawn at random, ``m x 2``."""
        rows = self.encoding.space.sample(_DRAWN, np.random.default_rng(0))
        means, variances = self.posterior([tuple(row) for row in rows.tolist()])
        pairs: FloatArray = torch.stack([means, variances.sqrt()], dim=1).numpy()
        return pairs

    def text_chance(self) -> float | None:
        """How easily chance explains as much as the embeddings do.

        None where there are none, and with more observations than an exact surrogate takes.
        """
        geometries = self.encoding.geometries
        if not any(geometry.has_text for geometry in geometries):
            return None
        with plain_torch():
            history = self._history(self._trials())
            if not len(history):
                return None
            blind = fit_history(history, without_texts(geometries))
            return chance_of_likeness(blind, geometries) if isinstance(blind, SingleTaskGP) else None

    def _trials(self) -> list[FrozenTrial]:
        return [t for t in self.study.get_trials(deepcopy=False) if t.number not in self.hidden]

    def _history(self, trials: Sequence[FrozenTrial]) -> History:
        return read(self.study, trials, self.encoding.row, len(self.encoding.names))

    def _model(self) -> Surrogate | None:
        """The surrogate, fitted again only when another trial has finished."""
        trials = self._trials()
        finished = sum(trial.state.is_finished() for trial in trials)
        if self._fitted[0] != finished:
            with plain_torch():
                history = self._history(trials)
                model = self.encoding.surrogates.of(history) if len(history) else None
            self._fitted = (finished, model)
        return self._fitted[1]
