"""The device that the surrogate computes on: found, or refused before anything is paid for."""

from __future__ import annotations

import torch

from mpromptune.errors import InvalidArgumentError


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device by name, such as ``"cuda"`` or ``"cuda:1"``; None is the CPU.

    Raises:
        InvalidArgumentError: torch cannot compute there, in float64.
    """
    try:
        found = torch.device("cpu" if device is None else device)
        torch.ones(1, dtype=torch.float64, device=found).item()
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise InvalidArgumentError(
            "device must be one that torch can compute on in float64, such as 'cpu', 'cuda' or 'cuda:1'; got "
            f"{device!r}. CUDA devices found by torch {torch.__version__}: {count}. Its reason: {reason}."
        ) from error
    return found
