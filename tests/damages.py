"""Damage to the lines of a journal, and to the values in them, at random."""

from __future__ import annotations

import json
import random
from typing import Any

Lines = list[bytes]

_VALUES = [None, -1, 0, 99, 1e308, float("nan"), "x", "", [], {}, True, [None], {"a": 1}, 10**30]


def flipped(lines: Lines, i: int, rng: random.Random) -> Lines:
    line = bytearray(lines[i])
    for _ in range(rng.choice([1, 3])):
        line[rng.randrange(len(line))] = rng.randrange(256)
    return [*lines[:i], bytes(line), *lines[i + 1 :]]


def dropped(lines: Lines, i: int, rng: random.Random) -> Lines:
    return [*lines[:i], *lines[i + 1 :]]


def doubled(lines: Lines, i: int, rng: random.Random) -> Lines:
    j = rng.randrange(len(lines))
    return [*lines[:j], lines[i], *lines[j:]]


def swapped(lines: Lines, i: int, rng: random.Random) -> Lines:
    j = rng.randrange(len(lines))
    changed = list(lines)
    changed[i], changed[j] = changed[j], changed[i]
    return changed


def cut(lines: Lines, i: int, rng: random.Random) -> Lines:
    return [*lines[:i], lines[i][: rng.randrange(len(lines[i]))] + b"\n", *lines[i + 1 :]]


def ended(lines: Lines, i: int, rng: random.Random) -> Lines:
    return [*lines[:i], lines[i][: rng.randrange(len(lines[i]))]]


def changed(lines: Lines, i: int, rng: random.Random) -> Lines:
    """A value somewhere in the record is another one; the line is JSON."""
    try:
        record = json.loads(lines[i])
    except ValueError:
        return lines
    return [*lines[:i], json.dumps(_other(record, rng)).encode() + b"\n", *lines[i + 1 :]]


def _other(value: Any, rng: random.Random) -> Any:
    if value and isinstance(value, dict | list) and rng.random() < 0.8:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value[key] = _other(value[key], rng)
        return value
    return rng.choice(_VALUES)


KINDS = (flipped, dropped, doubled, swapped, cut, ended, changed)


def damaged(lines: Lines, seed: int) -> bytes:
    """The journal after a few of these, each at a place of its own."""
    rng = random.Random(seed)
    for _ in range(rng.choice([1, 1, 2, 5])):
        lines = rng.choice(KINDS)(lines, rng.randrange(len(lines)), rng) or [b"\n"]
    return b"".join(lines)
