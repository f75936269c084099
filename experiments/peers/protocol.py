"""What a worker and the benchmark say to each other: a line of JSON on stdin, and one on stdout in answer.

Standard library only: it runs in environments where specdec is not installed. The first line says what to load:
`{"model": FOLDER, "draft": FOLDER or null, "dtype", "num_threads", "max_length", "max_batch_size", "options": {...}}`; the
answer is `{"version": ...}`. Every other line is a batch to decode greedily, `{"prompts": [[id, ...], ...], "max_new_tokens",
"stop_token_ids": [...]}`; the answer is a `Decoded`. Any failure is answered by `{"error": one line}`, and the end of stdin
ends the worker.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Decoded:
    """New tokens per prompt, a stop token included; seconds from the batch's submission, `ttft_s` the mean over its prompts.

    `num_target_forwards` sums, over prompts, the target forwards that emitted tokens of that prompt; None: not known.
    """

    outputs: list[list[int]]
    seconds: float
    ttft_s: float
    num_target_forwards: int | None


@dataclass(frozen=True)
class Loaded:
    """A library with its model: its version, and what decodes (prompts, max_new_tokens, stop_token_ids)."""

    version: str
    decode: Callable[[list[list[int]], int, list[int]], Decoded]


def serve(load: Callable[[dict[str, Any]], Loaded]) -> None:
    """Loads what the first line asks for, then answers batches until stdin ends."""
    _die_with_parent()
    # Libraries print; what they print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    loaded: Loaded | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if loaded is None:
                loaded = load(request)
                answer: dict[str, Any] = {"version": loaded.version}
            else:
                decoded = loaded.decode(request["prompts"], request["max_new_tokens"], request["stop_token_ids"])
                answer = {**asdict(decoded), "peak_memory_bytes": peak_memory_bytes()}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if loaded is None:
            break


def peak_memory_bytes() -> int | None:
    """The most memory that this process has held at once (Linux: VmHWM, which unlike getrusage's begins anew at an exec)."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def _die_with_parent() -> None:
    """A worker may be stopped when the benchmark is killed; the kernel then ends it, which it could not do by itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
