"""The workers of one of several processes that share a search: what they find out is there for all."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage

from mpromptune.calls.attempts import Verdict
from mpromptune.calls.execution import Keep, Outcome, Workers
from mpromptune.calls.interrupts import wait_for
from mpromptune.calls.usage import Meter, metered
from mpromptune.crew.members import Crew
from mpromptune.errors import MPromptuneError
from mpromptune.studies.attributes import FAILED, USAGE

Key = tuple[int, int]  # identity of a trial in the storage, and example
Submit = Callable[["Call", bool], Future[Outcome]]


@dataclass(frozen=True)
class Call:
    """A work item that any of the processes can do.

    Attributes:
        trial_id: Identity of its trial in the storage.
        params: The configuration.
        example: The example.
    """

    trial_id: int
    params: Mapping[str, int]
    example: int

    @property
    def key(self) -> Key:
        """What tells it from all others."""
        return self.trial_id, self.example


def written(calls: Iterable[Call]) -> list[Any]:
    """Calls as JSON: each trial with its params and its examples."""
    trials: dict[int, list[Any]] = {}
    for call in calls:
        trials.setdefault(call.trial_id, [call.trial_id, dict(call.params), []])[2].append(call.example)
    return list(trials.values())


def read_calls(items: Iterable[Any]) -> dict[Key, Call]:
    """What `written` wrote."""
    calls = (Call(trial_id, params, e) for trial_id, params, examples in items for e in examples)
    return {call.key: call for call in calls}


@dataclass(frozen=True)
class _Tally:
    """What this process has used for a trial."""

    meter: Meter = field(default_factory=Meter)
    lock: Any = field(default_factory=threading.Lock)


class HelperError(MPromptuneError, RuntimeError):
    """What a call failed with in another process, which has logged the details.

    Attributes:
        verdict: That process's verdict on it.
    """

    def __init__(self, name: str, host: str, verdict: Verdict) -> None:
        super().__init__(f"{name} on {host}")
        self.verdict = verdict


def failure_of(note: Mapping[str, str], host: str) -> HelperError:
    """A failure that a member has written down."""
    return HelperError(note["error"], host, Verdict[note["verdict"]])


class SharedWorkers(Workers):
    """Workers that save what they find out where all processes see it, whoever asked for it.

    Args:
        crew: The processes.
        storage: Of the study.
        *args: As `Workers`.

    Attributes:
        taken: Calls of this process that whoever leads has not ticked off yet.
        hand_out: What `submit` does with a call while this process leads.
    """

    def __init__(self, crew: Crew, storage: BaseStorage, *args: Any) -> None:
        super().__init__(*args)
        own = self._admits
        self._admits = lambda: not crew.leads or own()  # limits are up to whoever leads
        self.taken: dict[Key, Future[Outcome]] = {}
        self.hand_out: Submit | None = None
        self.unsaved: Exception | None = None
        self._crew = crew
        self._storage = storage
        self._tallies: dict[tuple[int, int], _Tally] = {}

    def submit(
        self,
        params: Mapping[str, int],
        example: int,
        keep: Keep | None = None,
        idle: bool = False,
        trial_id: int | None = None,
    ) -> Future[Outcome]:
        """Has one of the processes make a call; whichever it is saves what comes of it."""
        assert self.hand_out is not None
        assert trial_id is not None
        return self.hand_out(Call(trial_id, params, example), idle)

    def measure(self, call: Call) -> None:
        """Makes a call in this process, unless it is made here already."""
        if call.key in self.taken:
            return
        with metered(Meter()):  # whoever leads counts what is saved, and that alone
            self.taken[call.key] = super().submit(call.params, call.example, partial(self._save, call))

    def keep_only(self, wanted: Iterable[Key]) -> bool:
        """Begins nothing else; whether nothing else is under way."""
        others = self.taken.keys() - set(wanted)
        for key in others:
            future = self.taken[key]
            if future.cancel() or future.done():
                del self.taken[key]
        return not self.taken.keys() - set(wanted)

    def finish(self, grace: float) -> None:
        """Begins nothing more, and leaves what is under way some seconds to be saved."""
        if not self.keep_only(()):
            self.stopped.set()
            wait_for(list(self.taken.values()), grace)

    @property
    def has_refused(self) -> bool:
        """Whether a call was not made, although nobody took it back: a limit of this process's own."""
        done = [f.result() for f in list(self.taken.values()) if f.done() and not f.cancelled()]
        return any(outcome.score is None and outcome.error is None for outcome in done)

    def in_order(self, outcome: Outcome) -> Outcome:
        """The outcome as the last one so far."""
        return replace(outcome, order=next(self._ended))

    def _judge(self, error: BaseException) -> Verdict:
        return error.verdict if isinstance(error, HelperError) else super()._judge(error)

    def _save(self, call: Call, outcome: Outcome) -> None:
        try:
            with suppress(UpdateFinishedTrialError):  # its trial may be over
                self._write(call, outcome)
        except Exception as error:  # noqa: BLE001 - whatever a storage raises
            self.unsaved = self.fatal = self.fatal or error
            self.stopped.set()

    def _write(self, call: Call, outcome: Outcome) -> None:
        mine = self._crew.number
        tally = self._tallies.setdefault((mine, call.trial_id), _Tally())
        with tally.lock:  # or an older total could be the last one written
            tally.meter.add(outcome.usage)
            usage = json.dumps(tally.meter.total.as_dict())
            self._storage.set_trial_user_attr(call.trial_id, f"{USAGE}:{mine}", usage)
        if outcome.score is not None:
            self._storage.set_trial_intermediate_value(call.trial_id, call.example, outcome.score)
        elif (verdict := self.verdict(outcome)) is not None:  # not its message: nobody knows what is in it
            note = {"error": type(outcome.error).__name__, "verdict": verdict.name}
            self._crew.note(f"{FAILED}:{call.trial_id}:{call.example}", note)
