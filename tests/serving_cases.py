"""What the tests of the asynchronous engine and the server share: steps and texts that wait, and waiting with a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from transformers import BatchEncoding, PreTrainedTokenizerBase

from specdec import Engine, PagedModel
from specdec.drafters import NGramDrafter, TopK
from specdec.verifiers import Verifier

DEADLINE_S = 60.0


def make_engine(target: PagedModel, **options: object) -> Engine:
    """Speculates, so that several tokens of a request may become final in one step."""
    return Engine(Verifier(target), NGramDrafter(), TopK(8, 4, 2), **options)


class Gate:
    """Lets an engine take the steps that it is permitted, and holds the next one until it is permitted, too."""

    def __init__(self, engine: Engine) -> None:
        self._step, self._permits, self._is_open = engine.step, threading.Semaphore(0), False
        self.num_held = 0
        engine.step = self.step  # type: ignore[method-assign]

    def step(self):  # type: ignore[no-untyped-def]
        if not self._is_open:
            self.num_held += 1
            assert self._permits.acquire(timeout=DEADLINE_S), "no step was permitted in time"
            self.num_held -= 1
        return self._step()

    def permit(self, steps: int = 1) -> None:
        for _ in range(steps):
            self._permits.release()

    def open(self) -> None:
        self._is_open = True
        self.permit()

    def close(self) -> None:
        """From now on steps need a permit each, and none is left over."""
        self._is_open = False
        while self._permits.acquire(blocking=False):
            pass


class HeldTokenizer:
    """A tokenizer that encodes the texts that it is permitted, and holds the next one until it is permitted, too."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._permits = tokenizer, threading.Semaphore(0)
        self.texts: list[str] = []
        self.error: BaseException | None = None

    def __call__(self, text: str, **options: object) -> BatchEncoding:
        self.texts.append(text)
        assert self._permits.acquire(timeout=DEADLINE_S), "no text was permitted in time"
        if self.error is not None:
            raise self.error
        return self._tokenizer(text, **options)

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)

    def permit(self, texts: int = 1) -> None:
        for _ in range(texts):
            self._permits.release()


def eventually(holds: Callable[[], object], what: str = "") -> None:
    """Returns as soon as `holds()`; fails where that takes too long."""
    end, pause = time.monotonic() + DEADLINE_S, threading.Event()
    while not holds():
        assert time.monotonic() < end, f"never came true: {what or holds}"
        pause.wait(0.002)


def is_clean(engine: Engine) -> bool:
    """Whether nothing runs or waits and all pages are free, or kept as prefixes that nobody uses."""
    engine.check()
    metrics = engine.metrics
    return engine.is_idle and metrics.num_used_pages == metrics.num_idle_prefix_pages
