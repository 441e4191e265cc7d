"""How torch computes for us: on which device, and with the settings of a fresh process, not the caller's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from mpromptune.errors import InvalidArgumentError

_LOCK = threading.Lock()
_USERS: list[tuple[int, torch.dtype]] = []  # threads that are in here, with the settings before the first
_HERE = threading.local()


@contextmanager
def plain_torch() -> Iterator[None]:
    """All that we compute with torch is computed in here; the caller's settings are back afterwards.

    One thread: more cost more than they give below a few thousand points, fight with the pool that
    evaluates programs, and wait for ever in a process forked from one in which torch had several.
    Gradients, even within ``torch.no_grad()`` or ``torch.inference_mode()``; no autocast; new tensors on
    the CPU, in single precision unless another is asked for.

    The number of threads and the default precision are the whole process's: other threads of the caller
    see ours for as long as this takes, where theirs are others.
    """
    if getattr(_HERE, "inside", False):
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(_shared_settings())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        if not _is_on_cpu():  # torch's own context costs a third of a fit
            stack.enter_context(torch.device("cpu"))
        _HERE.inside = True
        stack.callback(setattr, _HERE, "inside", False)
        yield


@contextmanager
def _shared_settings() -> Iterator[None]:
    """Settings that torch has once in a process; whoever leaves last puts them back."""
    with _LOCK:
        threads = torch.get_num_threads()
        before = _USERS[0] if _USERS else (threads, torch.get_default_dtype())
        if threads == 1:  # a new thread may have it from another one that is in here
            threads = before[0]
        _USERS.append(before)
        torch.set_num_threads(1)
        if torch.get_default_dtype() != torch.float32:
            torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        with _LOCK:
            _USERS.pop()
            torch.set_num_threads(threads)
            if not _USERS and torch.get_default_dtype() != before[1]:
                torch.set_default_dtype(before[1])


def _is_on_cpu() -> bool:
    # torch 2.4 says "cpu" within `with torch.device(...)` too
    return torch.get_default_device().type == torch.empty(0).device.type == "cpu"


@plain_torch()
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
