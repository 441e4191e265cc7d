"""Greedy answers of a causal language model to batches of prompts, with a cache of shared beginnings."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from transformers import DynamicCache

from mpromptune.model.devices import plain_torch

Tokens = tuple[int, ...]
# Keys and values of each layer, both `heads x tokens x d`.
_Layers = list[tuple[torch.Tensor, torch.Tensor]]

# NOTE: keys and values of SmolLM2-135M take 46 kB a token, so these take 190 MB: about 40 prompts with eight
# short demos.
_CAPACITY = 4096
# NOTE: a token is compared with those of all prefixes of its tree: with so many, this takes a quarter of the
# time, and a tree has room for about ten prompts with eight short demos.
_WIDTH = 1024
# NOTE: 20 times the largest difference seen between the logits of a prompt of SmolLM2-135M alone and in a
# batch, 5e-5.
_NEARLY_EQUAL = 1e-3


@dataclass(frozen=True)
class Request:
    """A prompt to complete.

    Attributes:
        prefix: The tokens that it shares with other prompts; their keys and values are cached.
        rest: Its other tokens, at least one.
        max_tokens: Number of tokens after which the answer ends.
        stops: The answer ends before the first of these texts.
        is_worth: Is given the text of the answer so far; the answer is cut where this returns False.
    """

    prefix: Tokens
    rest: Tokens
    max_tokens: int
    stops: tuple[str, ...] = ()
    is_worth: Callable[[str], bool] = lambda text: True


@dataclass
class Answer:
    """The answer to a request, while it is written and afterwards.

    Attributes:
        tokens: Its tokens, with those of the stop text.
        text: Its text, without white space before it, and without the stop text.
        is_over: Whether nothing follows.
        is_cut: Whether it ended because of ``max_tokens`` or ``is_worth``.
        is_close: Whether there was a token nearly as likely as one of its tokens.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    is_over: bool = False
    is_cut: bool = False
    is_close: bool = False


class Decoder:
    """Completes prompts, always by the most likely token. The first token is never an end token.

    An answer does not depend on the batch that its prompt was in. Sums of floats do, as they depend on the
    shapes of tensors, so logits differ a little from batch to batch. A prompt for which two tokens were
    nearly equally likely is therefore completed once more, alone.

    Args:
        model: A causal model of transformers.
        tokenizer: Its tokenizer.
        capacity: Number of tokens of cached prefixes; the least recently used are dropped.
    """

    def __init__(self, model: Any, tokenizer: Any, capacity: int = _CAPACITY) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._capacity = capacity
        self._cache: OrderedDict[Tokens, _Layers] = OrderedDict()
        self._lock = threading.Lock()
        ends = model.generation_config.eos_token_id
        self._ends = [*{tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}]

    def complete(self, requests: Sequence[Request]) -> list[Answer]:
        """The answers to a batch, in order; several threads may call this at once."""
        with plain_torch(), torch.inference_mode():
            answers: dict[int, Answer] = {}
            for group in _groups(requests):
                answers.update(zip(group, self._decode([requests[i] for i in group]), strict=True))
                for i in group if len(group) > 1 else ():
                    if answers[i].is_close:
                        answers[i] = self._decode([requests[i]])[0]
            return [answers[i] for i in range(len(requests))]

    def _decode(self, requests: Sequence[Request]) -> list[Answer]:
        """Write all answers token by token."""
        answers = [Answer() for _ in requests]
        tree = _Tree({request.prefix: self._prefix(request.prefix) for request in requests})
        places = tree.grow([(tree.roots[request.prefix], request.rest) for request in requests])
        open_ = list(zip(requests, answers, strict=True))
        while open_:
            logits = self._model(**tree.inputs(), logits_to_keep=tree.rows(places)).logits[0]
            empty = [i for i, (_, answer) in enumerate(open_) if not answer.text]
            logits[torch.tensor(empty, dtype=torch.long)[:, None], self._ends] = -torch.inf
            best, tokens = logits.topk(2)
            gaps = (best[:, 0] - best[:, 1]).tolist()
            chosen = tokens[:, 0].tolist()
            for (request, answer), token, gap in zip(open_, chosen, gaps, strict=True):
                answer.is_close |= gap < _NEARLY_EQUAL
                self._write(answer, token, request)
            kept = [i for i, (_, answer) in enumerate(open_) if not answer.is_over]
            places = tree.grow([(places[i], chosen[i : i + 1]) for i in kept])
            open_ = [open_[i] for i in kept]
        return answers

    def _write(self, answer: Answer, token: int, request: Request) -> None:
        if token in self._ends:
            answer.is_over = True
            return
        answer.tokens.append(token)
        text: str = self._tokenizer.decode(answer.tokens, clean_up_tokenization_spaces=False)
        answer.text = text.lstrip()
        ends = [answer.text.index(stop) for stop in request.stops if stop in answer.text]
        if ends:
            answer.text = answer.text[: min(ends)]
            answer.is_over = True
        elif len(answer.tokens) >= request.max_tokens or not request.is_worth(answer.text):
            answer.is_over = answer.is_cut = True

    def _prefix(self, tokens: Tokens) -> _Layers:
        """Keys and values of a prefix; always computed alone, so that they are equal in every batch."""
        with self._lock:
            if tokens in self._cache:
                self._cache.move_to_end(tokens)
                return self._cache[tokens]
        ids = torch.tensor([tokens or (0,)])  # the model accepts no empty text
        layers = self._model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values.layers
        n = len(tokens)
        found = [(layer.keys[0, :, :n], layer.values[0, :, :n]) for layer in layers]
        with self._lock:
            self._cache[tokens] = found
            while len(self._cache) > 1 and sum(map(len, self._cache)) > self._capacity:
                self._cache.popitem(last=False)
        return found


def _groups(requests: Sequence[Request]) -> list[list[int]]:
    """Numbers of the requests, in groups whose prefixes have at most `_WIDTH` tokens together, or are one."""

    def prefix_of(i: int) -> Tokens:
        return requests[i].prefix

    groups: list[list[int]] = []
    width = 0
    for prefix, same in groupby(sorted(range(len(requests)), key=prefix_of), key=prefix_of):
        if not groups or width + len(prefix) > _WIDTH:
            groups.append([])
            width = 0
        groups[-1] += same
        width += len(prefix)
    return groups


class _Tree:
    """Prompts as paths of a tree, of which each part is computed once, however many prompts share it.

    The model takes the tree as one sequence, in which a token sees only those on its own path.

    Args:
        prefixes: Keys and values of the beginnings of paths.

    Attributes:
        roots: The place where each prefix ends, from which paths go on.
    """

    def __init__(self, prefixes: dict[Tokens, _Layers]) -> None:
        self.roots: dict[Tokens, int] = {}
        self._columns: list[list[int]] = []  # what each place sees
        self._depths: list[int] = []  # number of tokens before the one that follows a place
        self._places: dict[tuple[int, int], int] = {}  # of a token after a place
        self._new: list[tuple[int, int]] = []  # places to compute, and their tokens
        self._width = 0
        for tokens in prefixes:
            self.roots[tokens] = len(self._columns)
            self._columns.append(list(range(self._width, self._width + len(tokens))))
            self._depths.append(len(tokens))
            self._width += len(tokens)
        self._cache = DynamicCache()
        for i, parts in enumerate(zip(*prefixes.values(), strict=True)):
            keys, values = (torch.cat([part[kind] for part in parts], dim=1)[None] for kind in (0, 1))
            self._cache.update(keys, values, i)

    def grow(self, paths: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
        """Add tokens after places; returns the last place of each path. `inputs` are then of new places."""
        self._new = []
        ends = []
        for place, tokens in paths:
            for token in tokens:
                place = self._after(place, token)
            ends.append(place)
        return ends

    def _after(self, place: int, token: int) -> int:
        if (place, token) not in self._places:
            self._places[place, token] = len(self._columns)
            self._new.append((len(self._columns), token))
            self._columns.append([*self._columns[place], self._width])
            self._depths.append(self._depths[place] + 1)
            self._width += 1
        return self._places[place, token]

    def inputs(self) -> dict[str, Any]:
        """Arguments of the model for the places that are new."""
        mask = torch.full((len(self._new), self._width), -torch.inf)
        for row, (place, _) in zip(mask, self._new, strict=True):
            row[self._columns[place]] = 0.0
        return {
            "input_ids": torch.tensor([[token for _, token in self._new]]),
            "attention_mask": mask[None, None],
            "position_ids": torch.tensor([[self._depths[place] - 1 for place, _ in self._new]]),
            "past_key_values": self._cache,
            "use_cache": True,
        }

    def rows(self, places: Sequence[int]) -> torch.Tensor:
        """Positions of new places in the inputs."""
        first = self._new[0][0]
        return torch.tensor([place - first for place in places])
