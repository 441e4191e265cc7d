"""Whether a search can go on: which failures are the candidates' own, and which end it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

from mpromptune.execution.attempts import INFRASTRUCTURE, Verdict
from mpromptune.execution.outage import Answer, Reliability, are_several, last_failures
from mpromptune.execution.pool import Outcome
from mpromptune.model.space import Row

# Small rounds in a row without a single answer that are read as an outage.
_BARREN_ROUNDS = 10

# What is under way: answers in hand, and calls that have yet to answer.
InHand = Callable[[], tuple[list[Answer], list[Future[Outcome]]]]


@dataclass(frozen=True)
class Alarm:
    """Why a search cannot go on.

    Attributes:
        what: What it stops on.
        cause: The error behind it.
    """

    what: str
    cause: BaseException | None


@dataclass
class Health:
    """Judges every round before it is told.

    Attributes:
        verdict: On a failed outcome; None for a scored or a skipped one.
        outage: Failures in a round that are read as an outage, though all of one configuration or example.
    """

    verdict: Callable[[Outcome], Verdict | None]
    outage: int
    barren: int = 0
    reliability: Reliability = field(default_factory=Reliability)

    def check(self, mine: Sequence[Answer], in_hand: InHand) -> Alarm | None:
        """What the answers of a round say; None when they may be told.

        Args:
            mine: The round's answers.
            in_hand: Those of all rounds in flight.
        """
        answers, failures = self._last_failures(mine, in_hand)
        known = self.reliability.after(answers, failures)
        refusals = known.refusals
        run = [(row, outcome) for row, outcome in failures if not refusals.is_unanswerable(outcome.example)]
        if failures and not run:
            self.reliability.note(mine)
            return None
        fresh = [(row, outcome) for row, outcome in run if not refusals.has_failed(row, outcome.example)]
        if self._is_barren(mine, run, known, bool(fresh)):
            return Alarm(f"all {len(mine)} calls of a round failing", run[0][1].error)
        if fresh and known.is_outage(fresh, self.outage):
            return Alarm(f"the last {len(fresh)} calls failing, whatever was asked", fresh[0][1].error)
        self.reliability.note(mine)
        return None

    def recall(self, row: Row, example: int) -> None:
        """Learns of a failure in an earlier run."""
        self.reliability.refusals.note_failure(row, example)

    def _is_barren(
        self, mine: Sequence[Answer], run: Sequence[Answer], known: Reliability, is_news: bool
    ) -> bool:
        """Whether a round without any answer is the infrastructure's doing.

        Of what has failed before, and is only tried once more, it takes many rounds.
        """
        barren = bool(run) and all(outcome.error is not None for _, outcome in mine)
        infrastructure = {self.verdict(outcome) for _, outcome in mine} <= INFRASTRUCTURE
        self.barren = self.barren + 1 if barren and infrastructure else 0
        many = self.barren and len(mine) >= self.outage
        several = are_several(mine) and (self.barren or known.is_empty)
        return bool(barren and ((is_news and (several or many)) or self.barren >= _BARREN_ROUNDS))

    def _last_failures(self, mine: Sequence[Answer], in_hand: InHand) -> tuple[list[Answer], list[Answer]]:
        """All answers in hand, and the failures since the last success if any is of this round.

        Calls of the rounds behind may be signs of life; they are waited for while that is open.
        """
        own = {id(outcome) for _, outcome in mine}
        while True:
            answers, pending = in_hand()
            run = last_failures(answers)
            if not any(id(outcome) in own for _, outcome in run):
                return answers, []
            if not pending:
                return answers, run
            wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
