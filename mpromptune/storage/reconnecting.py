"""A storage over a network: what a lost connection has failed is done again, once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from mpromptune.errors import StorageError
from mpromptune.execution.interrupts import deferred

logger = logging.getLogger(__name__)

# NOTE: seconds that a server may be away: a database that is started again takes a few, one that fails
# over to another host about half a minute.
PATIENCE = 60.0
# NOTE: seconds between two attempts, at most: short beside what a takeover waits.
_LONGEST_WAIT = 2.0

# Of gRPC, by name: its package need not be installed. UNKNOWN is what a proxy makes of its database's errors.
_LOST_CODES = {"UNAVAILABLE", "UNKNOWN", "DEADLINE_EXCEEDED"}


def is_lost(error: BaseException) -> bool:
    """Whether it was the connection that failed, rather than what was asked for."""
    from sqlalchemy.exc import InterfaceError, OperationalError, PendingRollbackError

    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    code = getattr(error, "code", None)
    # The last is what Optuna's second way of reading trials meets, in the session that the first has lost.
    if isinstance(cause, OperationalError | InterfaceError | PendingRollbackError):
        return True
    return callable(code) and getattr(code(), "name", None) in _LOST_CODES


def _forwarded(name: str) -> Any:
    def method(self: ReconnectingStorage, *args: Any, **kwargs: Any) -> Any:
        call = partial(getattr(self.inner, name), *args, **kwargs)
        return self._persistently(name, call, (*args, *kwargs.values()))

    return method


class ReconnectingStorage(BaseStorage):
    """Does with another storage what it is asked to, as soon as there is a connection.

    What was done before its answer was lost is not done twice. For studies whose trials are created
    and changed in state by one process at a time, as those of a search are.

    Args:
        inner: The storage.
        patience: Seconds for which a lost connection is waited for.
    """

    def __init__(self, inner: BaseStorage, patience: float | None = None) -> None:
        self.inner = inner
        self._patience = PATIENCE if patience is None else patience
        self._created: set[int] = set()
        self._is_down = False  # then nothing is waited for any more, until something works

    def _persistently(self, name: str, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        attempts = Retrying(
            retry=retry_if_exception(is_lost),
            stop=stop_after_delay(0.0 if self._is_down else self._patience),
            wait=wait_random_exponential(multiplier=0.1, max=_LONGEST_WAIT),
            before_sleep=_warn,
            reraise=True,
        )
        done: tuple[bool, Any] = False, None
        try:
            for attempt in attempts:
                with attempt:
                    if attempt.retry_state.attempt_number > 1:
                        done = self._done(name, args)
                    with deferred():  # within a question, an interrupt would leave its connection useless
                        value = done[1] if done[0] else call()
        except Exception as error:
            if not is_lost(error):
                raise
            self._is_down = True
            raise StorageError(
                f"The connection to the storage was lost and did not come back within {self._patience:g} s: "
                f"{type(error.__cause__ or error).__name__}. What was told before is kept there."
            ) from error
        self._is_down = False
        if name == "create_new_trial":
            self._created.add(value)
        return value

    def _done(self, name: str, args: tuple[Any, ...]) -> tuple[bool, Any]:
        """Whether an attempt whose answer was lost has done it, and what it would have returned."""
        if name == "set_trial_state_values":
            trial_id, state = args[:2]
            return self.inner.get_trial(trial_id).state == state, True
        if name == "create_new_trial":
            study_id, template = (*args, None)[:2]
            last = self.inner.get_all_trials(study_id, deepcopy=False)[-1:]
            found = [t._trial_id for t in last if t._trial_id not in self._created and _is_like(t, template)]
            return bool(found), found[0] if found else None
        return False, None

    create_new_study = _forwarded("create_new_study")
    create_new_trial = _forwarded("create_new_trial")
    set_trial_state_values = _forwarded("set_trial_state_values")
    get_study_directions = _forwarded("get_study_directions")
    delete_study = _forwarded("delete_study")
    set_study_user_attr = _forwarded("set_study_user_attr")
    set_study_system_attr = _forwarded("set_study_system_attr")
    get_study_id_from_name = _forwarded("get_study_id_from_name")
    get_study_name_from_id = _forwarded("get_study_name_from_id")
    get_study_user_attrs = _forwarded("get_study_user_attrs")
    get_study_system_attrs = _forwarded("get_study_system_attrs")
    get_all_studies = _forwarded("get_all_studies")
    set_trial_param = _forwarded("set_trial_param")
    get_trial_id_from_study_id_trial_number = _forwarded("get_trial_id_from_study_id_trial_number")
    set_trial_intermediate_value = _forwarded("set_trial_intermediate_value")
    set_trial_user_attr = _forwarded("set_trial_user_attr")
    set_trial_system_attr = _forwarded("set_trial_system_attr")
    get_trial = _forwarded("get_trial")
    get_all_trials = _forwarded("get_all_trials")
    get_best_trial = _forwarded("get_best_trial")
    remove_session = _forwarded("remove_session")


def _is_like(trial: FrozenTrial, template: FrozenTrial | None) -> bool:
    if template is None:
        return not (trial.params or trial.user_attrs or trial.system_attrs)
    return (trial.user_attrs, trial.system_attrs) == (template.user_attrs, template.system_attrs)


def _warn(state: RetryCallState) -> None:
    if state.attempt_number == 1:
        logger.warning("The connection to the storage is lost; waiting for it to come back.")
