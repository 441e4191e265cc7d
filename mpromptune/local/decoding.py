"""Greedy answers of a causal language model to batches of prompts, with a cache of shared beginnings."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from mpromptune.model.devices import plain_torch

Tokens = tuple[int, ...]
# Keys and values of each layer, both `heads x tokens x d`.
_Layers = list[tuple[torch.Tensor, torch.Tensor]]

# NOTE: keys and values of SmolLM2-135M take 46 kB a token, so these take 190 MB: about 40 prompts with eight
# short demos.
_CAPACITY = 4096
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
    """

    prefix: Tokens
    rest: Tokens
    max_tokens: int
    stops: tuple[str, ...] = ()


@dataclass
class Answer:
    """The answer to a request, while it is written and afterwards.

    Attributes:
        tokens: Its tokens, with those of the stop text.
        text: Its text, without white space before it, and without the stop text.
        is_over: Whether nothing follows.
        is_cut: Whether it ended because of ``max_tokens``.
        is_close: Whether there was a token nearly as likely as one of its tokens.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    is_over: bool = False
    is_cut: bool = False
    is_close: bool = False


class Decoder:
    """Completes prompts by the most likely token, and so on; an answer begins with text, not with its end.

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
            answers = self._decode(requests)
            if len(requests) > 1:
                for i, answer in enumerate(answers):
                    if answer.is_close:
                        answers[i] = self._decode([requests[i]])[0]
            return answers

    def _decode(self, requests: Sequence[Request]) -> list[Answer]:
        """Write all answers token by token; a prompt leaves the batch when its answer is over."""
        answers = [Answer() for _ in requests]
        pairs = list(zip(requests, answers, strict=True))
        inputs = self._inputs(requests)
        while pairs:
            logits = self._model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
            empty = [i for i, (_, answer) in enumerate(pairs) if not answer.text]
            logits[torch.tensor(empty, dtype=torch.long)[:, None], self._ends] = -torch.inf
            best, tokens = logits.topk(2)
            gaps = (best[:, 0] - best[:, 1]).tolist()
            for (request, answer), token, gap in zip(pairs, tokens[:, 0].tolist(), gaps, strict=True):
                answer.is_close |= gap < _NEARLY_EQUAL
                self._write(answer, token, request)
            kept = [i for i, (_, answer) in enumerate(pairs) if not answer.is_over]
            pairs = [pairs[i] for i in kept]
            inputs = _next(inputs, tokens[:, :1], kept)
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
        elif len(answer.tokens) >= request.max_tokens:
            answer.is_over = answer.is_cut = True

    def _inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Arguments of the model: prefixes and rests of different lengths are padded on the left."""
        prefixes = [self._prefix(request.prefix) for request in requests]
        n, m = (max(map(len, part)) for part in zip(*((r.prefix, r.rest) for r in requests), strict=True))
        cache = DynamicCache()
        for i in range(len(prefixes[0])):
            keys, values = (
                torch.stack([pad(p[i][kind], (0, 0, n - p[i][kind].shape[1], 0)) for p in prefixes])
                for kind in (0, 1)
            )
            cache.update(keys, values, i)
        lengths = [(len(r.prefix), len(r.rest)) for r in requests]
        mask = [[0] * (n - a) + [1] * a + [0] * (m - b) + [1] * b for a, b in lengths]
        # The position of a padded token does not matter.
        positions = [[max(0, a + b - m + j) for j in range(m)] for a, b in lengths]
        return {
            "input_ids": torch.tensor([[0] * (m - len(r.rest)) + list(r.rest) for r in requests]),
            "attention_mask": torch.tensor(mask),
            "position_ids": torch.tensor(positions),
            "past_key_values": cache,
        }

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


def _next(inputs: dict[str, Any], tokens: torch.Tensor, kept: list[int]) -> dict[str, Any]:
    """Arguments of the model for the next token of the prompts that are kept."""
    cache = inputs["past_key_values"]
    if len(kept) < len(tokens):
        cache.batch_select_indices(torch.tensor(kept, dtype=torch.long))
    return {
        "input_ids": tokens[kept],
        "attention_mask": pad(inputs["attention_mask"][kept], (0, 1), value=1),
        "position_ids": inputs["position_ids"][kept, -1:] + 1,
        "past_key_values": cache,
    }
