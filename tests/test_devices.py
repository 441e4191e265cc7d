"""The device that the surrogate computes on."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
import torch
from embedders import letters

from mpromptune import PromptSpace, qEISampler
from mpromptune.engine.options import SearchOptions
from mpromptune.errors import InvalidArgumentError
from mpromptune.model.devices import resolve_device
from mpromptune.model.surrogate import fit
from mpromptune.sampling.encoding import distributions_of, encode_prompts
from mpromptune.sampling.sampler import resolve_embedder

SPACE = PromptSpace({f"{i}_predictor_instruction": [f"{'a' * j} {i}" for j in range(9)] for i in range(2)})

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def observed(n_trials: int) -> optuna.Study:
    """A study of so many trials with values drawn at random."""
    study = optuna.create_study(direction="maximize")
    rng = np.random.default_rng(0)
    for row in rng.integers(0, SPACE.sizes, size=(n_trials, len(SPACE.sizes))).tolist():
        params, distributions = SPACE.params(row), distributions_of(SPACE)
        value = float(rng.random())
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    return study


def proposals(device: str | None, n_trials: int) -> list[dict]:
    """A round of four after so many trials."""
    study = observed(n_trials)
    study.sampler = qEISampler(space=SPACE, embedder=letters, seed=0, batch_size=4, device=device)
    return [study.ask(distributions_of(SPACE)).params for _ in range(4)]


@pytest.mark.parametrize("bad", ["tpu9", "meta", 1.5, "cuda:99"])
def test_a_device_that_is_not_there_is_refused(bad: object) -> None:
    """By the sampler and by the options, naming what was given, before anything is paid for."""
    for ask in (resolve_device, lambda d: qEISampler(device=d), lambda d: SearchOptions(device=d)):
        with pytest.raises(InvalidArgumentError, match=f"device must be one .* got {bad!r}"):
            ask(bad)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_cuda_is_refused_where_there_is_none() -> None:
    """The message counts what torch has found."""
    with pytest.raises(InvalidArgumentError, match="CUDA devices found by torch .*: 0"):
        qEISampler(device="cuda")


def test_a_device_is_for_the_default_sampler_only() -> None:
    """Other samplers have no surrogate of ours."""
    with pytest.raises(InvalidArgumentError, match="device"):
        SearchOptions(sampler="tpe", device="cpu")


def test_the_cpu_by_name_is_the_default() -> None:
    """The same proposals."""
    assert proposals("cpu", 12) == proposals(None, 12)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_everything_of_the_model_is_on_its_device(device: str) -> None:
    """Parameters, tables and observations follow the geometries; what is asked comes back to the CPU."""
    study, plain = observed(12), encode_prompts(SPACE, resolve_embedder(letters))
    encoding = plain.on(resolve_device(device))
    history = encoding.history(study, study.trials)
    model = fit(history.train_X, history.train_Y, encoding.geometries)
    held = [*model.model.parameters(), *model.model.train_inputs, model.points, model.weights, model.half]
    assert {tensor.device.type for tensor in held} == {device}
    here = fit(history.train_X, history.train_Y, plain.geometries)
    rows = torch.tensor([(0, 0), (3, 8)])
    for ours, theirs in zip(model.single(rows), here.single(rows), strict=True):
        assert ours.device.type == "cpu"
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@needs_cuda
@pytest.mark.parametrize("exact", [512, 20])
def test_cuda_proposes_what_the_cpu_does(exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the exact model and with inducing points."""
    from mpromptune.model import surrogate

    monkeypatch.setattr(surrogate, "_EXACT", exact)
    assert proposals("cuda", 40) == proposals("cpu", 40)
