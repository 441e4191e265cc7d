"""Collects the requests of concurrent threads into batches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from mpromptune.execution.interrupts import SLICE, check_stopped

R = TypeVar("R")
A = TypeVar("A")


@dataclass(eq=False)
class _Place(Generic[R, A]):
    """A place in the queue: a request, and then its answer or error."""

    request: R
    answer: A | None = None
    error: Exception | None = None
    is_done: bool = False


class Batcher(Generic[R, A]):
    """Answers the requests of many threads in batches, without threads of its own.

    While fewer than ``side_by_side`` batches are computed, a thread whose request is in the queue waits a
    moment for further requests, and then answers the first ones in the queue: its share of them. The other
    threads wait for their answers.

    Args:
        answer: Answers a batch, in order. Its error is raised for each request of the batch.
        size: A batch waits until there are so many requests, or until none comes within ``wait`` seconds.
        side_by_side: Number of batches computed at the same time.
        wait: Seconds without a further request after which a batch is computed though it is not full.
        most: Number of requests in a batch, at most; by default ``size``.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[R]], Sequence[A]],
        size: int,
        side_by_side: int = 1,
        wait: float = 0.005,
        most: int | None = None,
    ) -> None:
        self._answer = answer
        self._size = size
        self._most = most or size
        self._side_by_side = side_by_side
        self._free = side_by_side
        self._in_batches = 0
        self._wait = wait
        self._changed = threading.Condition()
        self._queue: list[_Place[R, A]] = []

    def __call__(self, request: R) -> A:
        """The answer to a request."""
        place: _Place[R, A] = _Place(request)
        with self._changed:
            self._queue.append(place)
            self._changed.notify_all()
        try:
            while not self._is_answered(place):
                self._answer_batch()
        finally:
            with self._changed:
                if place in self._queue:  # interrupted
                    self._queue.remove(place)
        if place.error is not None:
            raise place.error
        return place.answer  # type: ignore[return-value] # it is answered

    def _is_answered(self, place: _Place[R, A]) -> bool:
        """Wait until ``place`` is answered, or it is the turn of this thread to answer a batch.

        Raises:
            Stopped: Its answer is no longer needed; a batch that is being computed is finished.
        """
        with self._changed:
            while not self._changed.wait_for(
                lambda: place.is_done or (self._free and place in self._queue), SLICE
            ):
                check_stopped()
            if place.is_done:
                return True
            check_stopped()
            self._free -= 1
            return False

    def _answer_batch(self) -> None:
        batch: list[_Place[R, A]] = []
        try:
            batch = self._gathered()
            if batch:
                _compute(self._answer, batch)
        finally:
            with self._changed:
                self._free += 1
                self._in_batches -= len(batch)
                # After an interrupt, the others are answered by another thread.
                self._queue[:0] = [place for place in batch if not place.is_done]
                self._changed.notify_all()

    def _gathered(self) -> list[_Place[R, A]]:
        """The first places of the queue, when it is as long as a batch or has stopped growing."""
        with self._changed:
            while 0 < len(self._queue) < self._size and self._grows():
                pass
            # Of all requests, also those that other threads now answer: otherwise batches stay small.
            share = (len(self._queue) + self._in_batches) // self._side_by_side
            n = min(max(self._size, share), self._most)
            batch, self._queue = self._queue[:n], self._queue[n:]
            self._in_batches += len(batch)
            return batch

    def _grows(self) -> bool:
        """Whether the length of the queue changes within a moment."""
        n = len(self._queue)
        return self._changed.wait_for(lambda: len(self._queue) != n, self._wait)


def _compute(answer: Callable[[Sequence[R]], Sequence[A]], batch: Sequence[_Place[R, A]]) -> None:
    try:
        answers = answer([place.request for place in batch])
        for place, found in zip(batch, answers, strict=True):
            place.answer = found
    except Exception as error:  # noqa: BLE001 - every thread raises it for its own request
        for place in batch:
            place.error = error
    for place in batch:
        place.is_done = True
