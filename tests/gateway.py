"""An OpenAI-compatible server on 127.0.0.1 that adds two numbers, and spoils answers as it is told to."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import dspy
from lms import digest, requested_fields

Messages = list[dict[str, Any]]
Answer = tuple[int, bytes]  # status and body; closes the connection where the status is 0
# What is answered instead; None for what was asked for. ``spoil(messages, how often they were asked)``.
Spoil = Callable[[Messages, int], Answer | None]

_SUM = re.compile(r"(\d+)\+(\d+)")


def body(choices: Any) -> bytes:
    """A chat completion with these choices."""
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    whole = {"id": "1", "object": "chat.completion", "created": 1, "model": "adder", "choices": choices}
    return json.dumps({**whole, "usage": usage}).encode()


def said(content: str | None) -> bytes:
    """A chat completion with this text."""
    message = {"role": "assistant", "content": content}
    return body([{"index": 0, "finish_reason": "stop", "message": message}])


def ended(reason: str, **more: Any) -> bytes:
    """A chat completion without text, and why it has none."""
    message = {"role": "assistant", "content": None, **more}
    return body([{"index": 0, "finish_reason": reason, "message": message}])


def refusal(message: str, **more: Any) -> bytes:
    """An error as OpenAI words it."""
    return json.dumps({"error": {"message": message, **more}}).encode()


def asks_for_sum(messages: Messages) -> bool:
    """Whether the program asks, and not the proposer."""
    return _SUM.search(str(messages[-1]["content"])) is not None and "answer" in str(messages[-1]["content"])


def _answer(field: str, messages: Messages) -> str:
    if field == "proposed_instruction":
        return f"Add them, manner {digest(messages) % 1000}."
    if field != "answer":
        return f"some {field}"
    a, b = _SUM.findall(str(messages[-1]["content"]))[-1]
    manner = re.findall(r"manner \d+", str(messages[0]["content"]))
    is_wrong = digest(a, b, manner, 4) % 4 == 0  # one in four, other ones for other instructions
    return str(int(a) + int(b) + is_wrong)


class Gateway:
    """What it was asked, and what it spoilt.

    Args:
        spoil: What is answered instead.
    """

    def __init__(self, spoil: Spoil = lambda messages, times: None) -> None:
        self._spoil = spoil
        self._lock = threading.Lock()
        self._asked: Counter[int] = Counter()
        self.requests = self.spoilt = 0
        self.url = ""

    def respond(self, messages: Messages) -> Answer:
        """The answer to one request."""
        with self._lock:
            self.requests += 1
            self._asked[digest(messages)] += 1
            times = self._asked[digest(messages)]
        spoilt = self._spoil(messages, times)
        if spoilt is not None:
            with self._lock:
                self.spoilt += 1
            return spoilt
        fields = requested_fields(messages)
        text = "\n\n".join(f"[[ ## {field} ## ]]\n{_answer(field, messages)}" for field in fields)
        return 200, said(text + "\n\n[[ ## completed ## ]]")

    def lm(self, **given: Any) -> dspy.LM:
        """A real LM that asks it, once for each request."""
        settings = {"cache": False, "num_retries": 0, "max_tokens": 500, **given}
        return dspy.LM("openai/adder", api_base=f"{self.url}/v1", api_key="none", **settings)


@contextmanager
def gateway(spoil: Spoil = lambda messages, times: None) -> Iterator[Gateway]:
    """A server that answers until the block ends."""
    served = Gateway(spoil)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or each answer takes 40 ms

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:  # where a redirect ends
            self._send(200, b"<html>Moved</html>")

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self._send(*served.respond(asked["messages"]))

        def _send(self, status: int, data: bytes) -> None:
            if not status:
                self.close_connection = True
                return
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("location", "/elsewhere")
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
