"""Random streams of requests through engines of random sizes: how they are drawn, and how one is run."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from specdec.config import EngineConfig
from specdec.engine import Engine
from specdec.experiments.resume import digest
from specdec.experiments.workload import LoadRequest
from specdec.request import Token

PREFILL_CHUNKS = (7, 32, 512)
PAGE_SIZES = (4, 8, 16, 32)
MAX_BATCH_SIZES = (2, 3, 5, 8)


@dataclass(frozen=True)
class Stream:
    """Requests on their way through one engine. Request i comes `gaps[i]` steps after the one before it; where
    `cancel_after[i]` is a number, it is cancelled so many steps after it came, if it still goes on then."""

    engine: EngineConfig
    requests: list[LoadRequest]
    gaps: list[int]
    cancel_after: list[int | None]


@dataclass(frozen=True)
class StreamResult:
    """What came out, by request: tokens, text and why it ended; and what the engine counted."""

    token_ids: dict[str, list[int]]
    texts: dict[str, str]
    finish_reasons: dict[str, str]
    num_steps: int
    num_preemptions: int
    num_prefix_tokens: int


def draw_stream(
    requests: Seq[LoadRequest], temperatures: Seq[float], cancel_share: float, scratch: int, seed: int, number: int
) -> Stream:
    """Stream `number` of a check: bursts and pauses, cancelled requests, a temperature each, and an engine whose pages hold the
    longest request (its tokens and `scratch` slots) between once and three times, so that requests are preempted."""
    chance = random.Random(digest(seed, "stream", number))
    page_size = chance.choice(PAGE_SIZES)
    longest = max(len(one.prompt) + one.params.max_new_tokens for one in requests)
    need = -(-(longest + scratch) // page_size)
    engine = EngineConfig(
        max_batch_size=chance.choice(MAX_BATCH_SIZES),
        prefill_chunk=chance.choice(PREFILL_CHUNKS),
        page_size=page_size,
        num_pages=chance.randint(need, 3 * need),
        share_prefixes=chance.random() < 0.8,
    )
    warm = [replace(one, params=replace(one.params, temperature=chance.choice(temperatures))) for one in requests]
    gaps = [chance.choice((0, 0, 0, 1, 2, 5, 20)) for _ in requests]
    cancelled = [
        chance.randint(0, 2 * one.params.max_new_tokens) if chance.random() < cancel_share else None for one in requests
    ]
    return Stream(engine, warm, gaps, cancelled)


def run_stream(
    engine: Engine, stream: Stream, on_step: Callable[[list[Token]], None] = lambda tokens: None
) -> StreamResult:
    """Runs a stream to its end and checks the engine's pages after every step. Raises AssertionError where they do not add
    up, or where pages are held when nothing runs any more."""
    coming = deque(zip(stream.requests, stream.gaps, stream.cancel_after, strict=True))
    handles = {}
    deadlines: dict[int, int] = {}
    step = 0
    due = coming[0][1]
    while coming or not engine.is_idle:
        while coming and due <= step:
            request, _, cancel_after = coming.popleft()
            handles[request.index] = engine.submit(request.prompt, request.params, index=request.index)
            if cancel_after is not None:
                deadlines[request.index] = step + cancel_after
            due += coming[0][1] if coming else 0
        for index in [index for index, deadline in deadlines.items() if deadline <= step]:
            engine.cancel(handles[index])
            del deadlines[index]
        if engine.is_idle:
            step = max(step, due)
            continue
        on_step(engine.step())
        engine.check()
        step += 1
    engine.check()
    results = {str(index): handle.result for index, handle in handles.items() if handle.result is not None}
    assert len(results) == len(handles), "an idle engine has requests without a result"
    metrics = engine.metrics
    return StreamResult(
        {index: result.token_ids for index, result in results.items()},
        {index: result.text for index, result in results.items()},
        {index: result.finish_reason for index, result in results.items()},
        metrics.num_steps,
        metrics.num_preemptions,
        metrics.num_prefix_tokens,
    )


def differing(result: StreamResult, alone: dict[str, tuple[list[int], str]]) -> list[str]:
    """The requests that do not say what they say alone: all of it, or, where they were cancelled, its beginning."""
    found = []
    for index, (token_ids, text) in alone.items():
        ours = result.token_ids[index]
        if result.finish_reasons[index] == "cancelled":
            same = ours == token_ids[: len(ours)]
        else:
            same = ours == token_ids and result.texts[index] == text
        if not same:
            found.append(index)
    return found
