"""Whoever leads a shared search hands out its calls, and sees in the storage what came of them."""

from __future__ import annotations

import contextvars
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mpromptune.calls.attempts import Verdict
from mpromptune.calls.daemons import started
from mpromptune.calls.execution import Outcome
from mpromptune.calls.limits import SEARCH, Budget
from mpromptune.calls.usage import Usage
from mpromptune.crew.members import POLL, Crew, Member
from mpromptune.crew.shared import Call, HelperError, Key, SharedWorkers, failure_of, read_calls, written
from mpromptune.studies.attributes import FAILED, HANDED, HOST
from mpromptune.studies.record import Record, usage_of
from mpromptune.studies.storage import reported

# NOTE: calls in a member's hands for each of its threads. Between the end of a call and the next one
# that is handed out pass two looks; with a second call in hand, a thread need not wait for them.
_IN_HAND = 2


class Handout:
    """Gives every call to one member at a time; what a member that goes leaves behind, to another.

    What those who led before have handed out and is still under way stays where it is.

    Args:
        crew: The processes, of which this one leads.
        workers: Those of this process.
        study: The study.
        budget: Limits, which cover what all processes use.
        record: The trials of earlier runs, whose usage is counted already.
    """

    def __init__(
        self, crew: Crew, workers: SharedWorkers, study: Study, budget: Budget, record: Record
    ) -> None:
        self._crew, self._workers, self._study, self._budget = crew, workers, study, budget
        self._promises: dict[Key, Future[Outcome]] = {}
        self._calls: dict[Key, Call] = {}
        self._queues: tuple[deque[Key], deque[Key]] = deque(), deque()  # for all, and for idle ones
        self._usage = {recorded.trial_id: recorded.usage for recorded in record}
        self._lock = threading.Lock()
        self._holder: dict[Key, int] = dict.fromkeys(workers.taken, crew.number)
        for member in self._helpers():
            calls = read_calls(member.handed["items"])
            self._calls.update(calls)
            self._holder.update(dict.fromkeys(calls, member.number))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hands out until the search has ended."""
        over = threading.Event()
        run = partial(contextvars.copy_context().run, self._run, over)  # as the calls of this thread
        thread = started(run, "mpromptune-handout")
        self._workers.hand_out = self.submit
        try:
            yield
        finally:
            over.set()
            thread.join(timeout=5 * POLL)

    def submit(self, call: Call, idle: bool) -> Future[Outcome]:
        """Queues a call, unless somebody has it in hand; ``idle`` ones wait for idle threads."""
        promise: Future[Outcome] = Future()
        with self._lock:
            self._promises[call.key], self._calls[call.key] = promise, call
            if call.key not in self._holder:
                self._queues[idle].append(call.key)
        return promise

    def usage(self, trial_id: int) -> Usage | None:
        """What a trial has used, whoever measured it, as of the last look; None for an unknown one."""
        return self._usage.get(trial_id)

    def _run(self, over: threading.Event) -> None:
        try:
            while not over.is_set() and not self._workers.stopped.is_set():
                self._turn()
                over.wait(POLL)
        except Exception as error:  # noqa: BLE001 - the search stops on it
            self._workers.fatal = self._workers.fatal or error
            self._workers.stopped.set()

    def _turn(self) -> None:
        """Who is there, what came in, and what is handed to whom."""
        self._crew.look()
        failed = self._failures()  # before the trials, which then hold what they have used
        with reported():
            trials = self._study._storage.get_all_trials(
                self._study._study_id, deepcopy=False, states=(TrialState.RUNNING,)
            )
        running = {trial._trial_id: trial for trial in trials}
        self._count(trials)
        with self._lock:
            self._collect(running, failed)
            self._take_back()
            if self._budget.admits():
                self._hand_out()
            else:
                self._end()
            self._write()

    def _helpers(self) -> list[Member]:
        return [member for member in self._crew.present if member.number != self._crew.number]

    def _failures(self) -> dict[Key, BaseException | None]:
        """What calls have failed with; None where one was not made."""
        failed: dict[Key, BaseException | None] = {}
        for member in self._helpers():
            failed.update(_noted(member))
        for key, future in list(self._workers.taken.items()):
            if future.cancelled():
                failed[key] = None
            elif future.done() and future.result().score is None:
                failed[key] = future.result().error
        return failed

    def _count(self, trials: list[FrozenTrial]) -> None:
        for trial in trials:
            before, now = self._usage.get(trial._trial_id, Usage()), usage_of(trial.user_attrs)
            if now != before:
                self._budget.step(SEARCH).add(now - before)
            self._usage[trial._trial_id] = now

    def _collect(
        self, running: Mapping[int, FrozenTrial], failed: Mapping[Key, BaseException | None]
    ) -> None:
        for key in [*self._promises, *(key for key in self._holder if key not in self._promises)]:
            trial_id, example = key
            trial = running.get(trial_id)
            if trial is not None and example in trial.intermediate_values:
                self._settle(key, Outcome(example, trial.intermediate_values[example]))
            elif key in failed:
                self._settle(key, Outcome(example, error=failed[key]))
            elif trial is None and key not in self._promises:  # told by somebody who led before
                self._settle(key, Outcome(example))

    def _settle(self, key: Key, outcome: Outcome) -> None:
        self._holder.pop(key, None)
        self._calls.pop(key, None)
        for queue in self._queues:
            if key in queue:
                queue.remove(key)
        promise = self._promises.pop(key, None)
        if isinstance(outcome.error, HelperError) and outcome.error.verdict is Verdict.STOP:
            self._workers.fatal = self._workers.fatal or outcome.error
            self._workers.stopped.set()
        if promise is not None and promise.set_running_or_notify_cancel():
            promise.set_result(self._workers.in_order(outcome))

    def _take_back(self) -> None:
        """What members had in hand that have gone, or take no calls any more, comes first."""
        present = {member.number for member in self._crew.present if member.threads}
        left = [key for key, number in self._holder.items() if number not in present]
        for key in left:
            del self._holder[key]
        self._queues[0].extendleft(key for key in reversed(left) if key in self._promises)

    def _hand_out(self) -> None:
        load = Counter(self._holder.values())
        for queue, most in zip(self._queues, (_IN_HAND, 1), strict=True):
            while queue:
                free = [m for m in self._crew.present if load[m.number] < most * m.threads]
                if not free:
                    break
                member = min(free, key=lambda m: load[m.number] / m.threads)
                load[member.number] += 1
                self._give(member, queue.popleft())

    def _give(self, member: Member, key: Key) -> None:
        self._holder[key] = member.number
        if member.number == self._crew.number:
            self._workers.measure(self._calls[key])

    def _end(self) -> None:
        """Once a limit is used up, nothing more begins; what is under way is waited for."""
        for queue in self._queues:
            while queue:
                self._settle(queue[0], Outcome(queue[0][1]))
        for member in self._helpers():
            if member.handed.get("last") and member.has_taken:
                for key in [key for key, number in self._holder.items() if number == member.number]:
                    self._settle(key, Outcome(key[1]))

    def _write(self) -> None:
        """Tells members what is theirs, where that has changed."""
        is_last = self._budget.reached is not None
        self._workers.keep_only(key for key, n in self._holder.items() if n == self._crew.number)
        for member in self._helpers():
            mine = [self._calls[key] for key, number in self._holder.items() if number == member.number]
            now = {"by": self._crew.number, "last": is_last, "items": written(() if is_last else mine)}
            version = member.handed["version"]
            if {**member.handed, **now} != member.handed:
                self._crew.write(member, HANDED, {**now, "version": version + 1})


def _noted(member: Member) -> Iterator[tuple[Key, HelperError]]:
    """The failures that a member has written down."""
    for name, note in member.notes.items():
        if name.startswith(f"{FAILED}:"):
            trial_id, example = name.rsplit(":", 2)[1:]
            yield (int(trial_id), int(example)), failure_of(note, str(member.notes.get(HOST)))
