"""Weights & Biases, offline: a row of its history for each trial, through a callback."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import run_tool


def _records(log: bytes) -> Iterator[bytes]:
    """The records of a run's file: LevelDB's log format, after a header of 7 bytes."""
    position, record = 7, b""
    while position + 7 <= len(log):
        if (left := 32768 - position % 32768) < 7:  # too little of a block for another header
            position += left
            continue
        size, kind = struct.unpack("<HB", log[position + 4 : position + 7])
        record += log[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            yield record
            record = b""


def _history(folder: Path) -> list[dict[str, Any]]:
    """The rows that an offline run has written, and would upload."""
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = [protocol.Record.FromString(record) for record in _records(path.read_bytes())]
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{(i.key or i.nested_key[0]): json.loads(i.value_json) for i in row} for row in rows]


def test_a_callback_logs_every_trial(wandb: Any, page_names: dict[str, Any]) -> None:
    """The block of the guide writes params and score of every trial, one row each, in order."""
    best = run_tool("wandb", page_names)
    wandb.teardown()  # its service writes the rest of the file before it ends
    rows = _history(Path(os.environ["WANDB_DIR"]))
    trials = best.search_result.study.trials
    assert [row["_step"] for row in rows] == [t.number for t in trials]
    logged = [{name: row[name] for name in ("score", *best.search_result.best_params)} for row in rows]
    assert logged == [{"score": t.value, **t.params} for t in trials]
