"""What all tests share: no network, one torch thread, readable assertions of Optuna's contract."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the default model comes from the offline package

import optuna
import pytest
import torch

pytest.register_assert_rewrite("optuna.testing.pytest_samplers")
torch.set_num_threads(1)
optuna.logging.set_verbosity(optuna.logging.WARNING)
