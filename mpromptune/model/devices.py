"""The device of torch, and computing with torch's default settings instead of the caller's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from mpromptune.errors import InvalidArgumentError

_LOCK = threading.Lock()
_USERS: list[tuple[int, torch.dtype]] = []  # for each thread in the context, the settings to restore
_HERE = threading.local()


@contextmanager
def plain_torch() -> Iterator[None]:
    """A context for all computations with torch; the caller's settings are restored afterwards.

    It uses one thread: more threads do not pay below a few thousand points, compete with the pool that
    evaluates programs, and hang in a process forked from one in which torch had several. Gradients are on,
    even within ``torch.no_grad()`` or ``torch.inference_mode()``; autocast is off; new tensors are on the
    CPU, in single precision by default.

    The number of threads and the default precision apply to the whole process, so meanwhile other threads of
    the caller have these settings too.
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
    """Set the settings that torch has once per process; the last thread to leave restores them."""
    with _LOCK:
        threads = torch.get_num_threads()
        before = _USERS[0] if _USERS else (threads, torch.get_default_dtype())
        if threads == 1:  # a new thread may have this setting from another thread in the context
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
    """The device of a name, such as ``"cuda"`` or ``"cuda:1"``; None is the CPU.

    Raises:
        InvalidArgumentError: torch cannot compute on it in float64.
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
        ) from None
    return found
