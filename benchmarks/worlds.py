"""Search problems in which candidates are written while a search runs.

A world has one component. Its first candidates are prompts of a recorded table, drawn with the validation
examples as in `tables.draw`; writers add others.

*Recorded*: a writer takes one of the table's prompts that are not in the pool. There is an end to them, and
the best of them is seldom far above the best of the pool.
*Parametric*: a child has any skill, so there is no end. Scores, those of the pool too, are drawn from a Rasch
model of the table: P(right) = logistic(skill of prompt - difficulty of example).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import expit, softmax

from benchmarks.pipelines import vector_of
from benchmarks.tables import Table, draw_examples, draw_prompts
from mpromptune import PromptSpace
from mpromptune.engine.proposers import Brief
from mpromptune.errors import ProposalRefusedError
from mpromptune.model import rasch
from mpromptune.model.likelihood import Likelihood
from mpromptune.model.space import FloatArray, IndexArray
from mpromptune.operators.effects import Effects

COMPONENT = "prompt"
# Hidden prompts among which `Recorded.reflect` draws: those nearest to the parent.
_NEAREST = 8
# Standard deviation of a child's skill around its expected one, in logits.
_SPREAD = 0.4
# Prior variance of the skills of a table, in square logits: next to nothing beside 300 scores each.
_PRIOR = 4.0


@dataclass(frozen=True)
class Writer:
    """A `Proposer` of a world.

    Attributes:
        name: Its name in the study.
        write: Makes a candidate, and returns its text.
        world: The world that is charged and told.
        keeps_parent: Whether its children are said to resemble their parents.
        calls: LM requests of a proposal.
    """

    name: str
    write: Callable[[Brief], str]
    world: World = field(repr=False)
    keeps_parent: bool = True
    calls: int = 1

    def components(self, space: PromptSpace) -> Sequence[str]:
        """The only component."""
        return space.names

    def propose(self, brief: Brief) -> str:
        """The text of a new candidate.

        Raises:
            ProposalRefusedError: There is none left.
        """
        return self.world.written(brief, self.write, self.calls)


class World(ABC):
    """A pool of prompts that writers add to: a task for the methods of the benchmark.

    Args:
        table: A table with scores by example.
        seed: Same seed and same proposals, same world.
        pool: Prompts in the pool (all there are, in a smaller table).
        n_val: Validation examples.

    Attributes:
        space: The pool. Texts are keys of vectors.
        baseline: One of the pool, drawn at random.
        texts: Index to text, of every candidate so far.
        spent: Program calls and proposals so far.
    """

    def __init__(self, table: Table, seed: int, pool: int, n_val: int) -> None:
        self.table, self.seed = table, seed
        rng = np.random.default_rng(seed)
        drawn, self.examples = draw_prompts(table, pool, rng), draw_examples(table, n_val, rng)
        self.pool: IndexArray = drawn[np.lexsort((table.demo_set_of[drawn], table.instruction_of[drawn]))]
        self.baseline = {COMPONENT: int(rng.integers(len(self.pool)))}
        self.recorded = np.stack([vector_of(table, prompt) for prompt in range(len(table.truth))])
        self.vectors = {f"p{prompt}": vector for prompt, vector in enumerate(self.recorded)}
        self.texts = {index: f"p{prompt}" for index, prompt in enumerate(self.pool.tolist())}
        self.space = PromptSpace({COMPONENT: list(self.texts.values())})
        self.spent = 0
        self._lock = threading.Lock()

    @property
    def n_examples(self) -> int:
        """Size of the validation set."""
        return len(self.examples)

    def embed(self, texts: Sequence[str]) -> FloatArray:
        """Vectors of texts: those of the instruction and of the demos side by side."""
        return np.stack([self.vectors[text] for text in texts])

    def score(self, params: Mapping[str, int], example: int) -> float:
        """One program call, for any candidate written so far."""
        with self._lock:
            self.spent += 1
        return self.outcome(params[COMPONENT], example)

    def written(self, brief: Brief, write: Callable[[Brief], str], calls: int) -> str:
        """The text of a new candidate; its calls are charged even if it is refused."""
        with self._lock:
            self.spent += calls
            text = self.texts[brief.index] = write(brief)
            return text

    def value(self, params: Mapping[str, int]) -> float:
        """True mean score, in percentage points."""
        return 100.0 * self.truth(params[COMPONENT])

    def best_of_pool(self) -> float:
        """The highest value of the pool, in percentage points."""
        return 100.0 * max(self.truth(index) for index in range(len(self.pool)))

    def parent_vector(self, brief: Brief) -> FloatArray:
        """The vector of the candidate to improve."""
        return self.vectors[self.texts[brief.parent[COMPONENT]]]

    @abstractmethod
    def writer(self, name: str) -> Writer:
        """One of the writers of this world."""

    @abstractmethod
    def outcome(self, index: int, example: int) -> float:
        """The score of a candidate on a validation example, the same whenever it is asked for."""

    @abstractmethod
    def truth(self, index: int) -> float:
        """The true mean score of a candidate over all examples of the table."""


class Recorded(World):
    """Writers take prompts of the table that are not in the pool, each once.

    Writers are ``fresh``, ``bad``, ``demos`` and ``reflect-b``, where b is the bias to quality.

    Attributes:
        drafts: Prompts that a writer draws, of which the one with the best predicted score is taken.
    """

    def __init__(self, table: Table, seed: int, pool: int, n_val: int) -> None:
        super().__init__(table, seed, pool, n_val)
        self.drafts = 1
        assert table.scores is not None
        self.scores: FloatArray = table.scores[:, self.examples]
        self._prompts = dict(enumerate(self.pool.tolist()))  # index to number in the table
        self._hidden = set(range(len(table.truth))) - set(self.pool.tolist())
        by_quality = np.argsort(table.truth, kind="stable")
        self._worst = set(by_quality[: len(by_quality) // 3].tolist())

    def outcome(self, index: int, example: int) -> float:
        """As recorded."""
        return float(self.scores[self._prompts[index], example])

    def truth(self, index: int) -> float:
        """As recorded."""
        return float(self.table.truth[self._prompts[index]])

    def writer(self, name: str) -> Writer:
        """``fresh`` and ``bad`` write without a look at the parent."""
        kind, _, bias = name.partition("-")
        if kind == "reflect":
            return Writer(name, partial(self._reflect, float(bias)), self)
        write = {"fresh": self._fresh, "bad": self._bad, "demos": self._demos}[name]
        return Writer(name, write, self, keeps_parent=False, calls=0 if name == "demos" else 1)

    def _fresh(self, brief: Brief) -> str:
        return self._take(brief, self._left(self._hidden))

    def _bad(self, brief: Brief) -> str:
        """One of the worst third of the table."""
        return self._take(brief, self._left(self._hidden & self._worst))

    def _reflect(self, bias: float, brief: Brief) -> str:
        """One of the prompts nearest to the parent, with a chance in proportion to exp(bias * quality).

        Quality is the true mean score in standard deviations of the table's.
        """
        left = self._left(self._hidden)
        distances = np.linalg.norm(self.recorded[left] - self.parent_vector(brief), axis=1)
        near = left[np.argsort(distances, kind="stable")[:_NEAREST]]
        truth = self.table.truth
        return self._take(brief, near, softmax(bias * truth[near] / truth.std()))

    def _demos(self, brief: Brief) -> str:
        """The prompt whose demos have the best mean effect in a draw, as the operator *demos* foretells it.

        Each recorded demo set has instructions of its own, so the rest of the prompt changes too.
        """
        measured = [self._demos_of(self._prompts[one.params[COMPONENT]]) for one in brief.standings]
        means = [one.posterior_mean for one in brief.standings]
        effects = Effects(measured, means, [one.posterior_std for one in brief.standings])
        left = self._left(self._hidden)
        rng = np.random.default_rng([abs(brief.seed), brief.number, 3])  # not the numbers of `Brief.rng`
        drawn = effects.draw(range(len(self.table.demo_emb)), rng)
        values = [sum(drawn[demo] for demo in self._demos_of(prompt)) for prompt in left.tolist()]
        return self._take(brief, left[[int(np.argmax(values))]])

    def _demos_of(self, prompt: int) -> list[int]:
        return [demo for demo in self.table.demo_sets[self.table.demo_set_of[prompt]].tolist() if demo >= 0]

    def _left(self, prompts: set[int]) -> IndexArray:
        if not prompts:
            raise ProposalRefusedError("No prompt of the table is left.")
        return np.array(sorted(prompts))

    def _take(self, brief: Brief, prompts: IndexArray, chances: FloatArray | None = None) -> str:
        number = min(self.drafts, len(prompts))
        drawn = brief.rng.choice(prompts, number, replace=False, p=chances)
        best = int(np.argmax(self._predicted(brief, self.recorded[drawn]))) if number > 1 else 0
        prompt = self._prompts[brief.index] = int(drawn[best])
        self._hidden.remove(prompt)
        return f"p{prompt}"

    def _predicted(self, brief: Brief, vectors: FloatArray) -> FloatArray:
        """Scores foretold by a Gaussian process on embeddings, from the posterior of what was measured."""
        known = np.stack([self.vectors[self.texts[one.params[COMPONENT]]] for one in brief.standings])
        means = np.array([one.posterior_mean for one in brief.standings])
        noise = np.array([one.posterior_std for one in brief.standings]) ** 2
        scale = float(np.median(cdist(known, known)[np.triu_indices(len(known), 1)])) or 1.0
        variance = float(means.var()) or 1.0
        alike = variance * np.exp(-0.5 * (cdist(known, known) / scale) ** 2)
        across = variance * np.exp(-0.5 * (cdist(vectors, known) / scale) ** 2)
        weights = np.linalg.solve(alike + np.diag(noise + 1e-6), means - means.mean())
        predicted: FloatArray = across @ weights
        return predicted


class Parametric(World):
    """A child has the skill of its parent, changed at random; scores are drawn from the Rasch model.

    Writers are ``delta<gain>``, whose children's skill is the parent's + N(gain, 0.4^2) logits, and ``flat``,
    whose children's skill is the baseline's. All children are said to resemble their parents, and their
    vectors do.

    Attributes:
        skills: Skill of every candidate so far, in logits.
        difficulties: Difficulty of every example of the table, in logits.
        step: Distance of a child's vector from its parent's: the median of those from a prompt of the pool to
            the nearest other one.
    """

    def __init__(self, table: Table, seed: int, pool: int, n_val: int) -> None:
        super().__init__(table, seed, pool, n_val)
        skills, self.difficulties = rasch_of(table)
        self.skills = dict(enumerate(skills[self.pool].tolist()))
        self._draws: dict[int, FloatArray] = {}
        distances = cdist(self.recorded[self.pool], self.recorded[self.pool])
        self.step = float(np.median(np.sort(distances, axis=1)[:, 1]))

    def outcome(self, index: int, example: int) -> float:
        """Right if the draw of the pair, which depends on the seed alone, is below the probability."""
        if index not in self._draws:  # 1 keeps the stream apart from that of a brief
            self._draws[index] = np.random.default_rng([self.seed, index, 1]).random(self.n_examples)
        chance = expit(self.skills[index] - self.difficulties[self.examples[example]])
        return float(self._draws[index][example] < chance)

    def truth(self, index: int) -> float:
        """The mean of the probabilities."""
        return float(expit(self.skills[index] - self.difficulties).mean())

    def writer(self, name: str) -> Writer:
        """``delta+0.1`` gains 0.1 logits on average, and so on."""
        if name == "flat":
            return Writer(name, self._flat, self)
        return Writer(name, partial(self._child, float(name.removeprefix("delta"))), self)

    def _child(self, gain: float, brief: Brief) -> str:
        rng = brief.rng
        skill = self.skills[brief.parent[COMPONENT]] + gain + _SPREAD * rng.standard_normal()
        return self._add(brief, skill, rng)

    def _flat(self, brief: Brief) -> str:
        return self._add(brief, self.skills[self.baseline[COMPONENT]], brief.rng)

    def _add(self, brief: Brief, skill: float, rng: np.random.Generator) -> str:
        parent = self.parent_vector(brief)
        direction = rng.standard_normal(len(parent))
        text = f"c{brief.index}"
        self.vectors[text] = parent + self.step * direction / np.linalg.norm(direction)
        self.skills[brief.index] = float(skill)
        return text


def one_of(writers: Sequence[Writer]) -> Writer:
    """Several writers as one, which leaves each proposal to one of them, drawn at random."""

    def write(brief: Brief) -> str:
        rng = np.random.default_rng([abs(brief.seed), brief.number, 2])  # not the numbers of `Brief.rng`
        return writers[int(rng.integers(len(writers)))].write(brief)

    return Writer("one-of", write, writers[0].world, all(writer.keeps_parent for writer in writers))


@lru_cache(maxsize=8)
def rasch_of(table: Table) -> tuple[FloatArray, FloatArray]:
    """Skills of the prompts and difficulties of the examples of a table, in logits."""
    assert table.scores is not None
    n = len(table.scores)
    prior = _PRIOR * (np.eye(n) + np.ones((n, n)))  # of each skill, and of what they have in common
    posterior = rasch.fit(np.eye(n), table.scores, prior, Likelihood())
    return posterior.mean, posterior.difficulty
