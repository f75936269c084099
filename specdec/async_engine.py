"""The asynchronous front of an engine: a thread of its own steps it, coroutines of any event loop await their tokens."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from types import TracebackType
from typing import Literal

from specdec.engine import Engine
from specdec.handle import Handle
from specdec.metrics import EngineMetrics
from specdec.request import Prompt, Token, encode
from specdec.sampling import SamplingParams
from specdec.token_stream import TokenStream

# So many steps in a row may fail before the engine counts as dead.
MAX_FAILURES = 3


class QueueFull(RuntimeError):
    """As many requests are open as the front takes; one of them must end first."""


class EngineClosed(RuntimeError):
    """The front takes no more requests, or was closed before this one ended."""


class StepFailed(RuntimeError):
    """A step that computed this request raised `cause`, and its tokens are lost."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"the step that computed this request failed: {_described(cause)}")
        self.__cause__ = cause


class EngineDead(RuntimeError):
    """The engine raised `cause` and could not be proved clean afterwards; it takes no more requests."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"the engine is dead: {_described(cause)}")
        self.__cause__ = cause


class AsyncEngine:
    """Serves an engine to any number of coroutines, threads and event loops; from now on nobody else may touch the engine.

    At most `engine.max_batch_size + max_waiting` requests are open at once. Prompts are encoded in a thread of their own, one
    call's after another's. A step that raises fails the requests that it computed; the others go on if the engine's pages
    check out afterwards, else everything open fails and `state` is `dead`. Close it when done, or use it in an `async with`:
    that waits for what is open, or cancels it where the block raised. `watch` is called in the engine's thread with the tokens
    of each step.
    """

    def __init__(
        self, engine: Engine, *, max_waiting: int = 64, watch: Callable[[Seq[Token]], None] | None = None
    ) -> None:
        if max_waiting < 0:
            raise ValueError(f"max_waiting={max_waiting} must be >= 0")
        self.engine, self.max_open = engine, engine.max_batch_size + max_waiting
        self.error: Exception | None = None
        # Guards everything above the next blank line; what is below belongs to the engine's thread.
        self._wake = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        # What is still to be encoded, or being so, in the order in which it came.
        self._encoding: dict[TokenStream, tuple[Seq[Prompt], Seq[SamplingParams], bool]] = {}
        self._num_open = 0
        self._closing: Literal["no", "drain", "cancel"] = "no"
        # One thread, for tokenizers are not promised to be safe in several.
        self._encoder = ThreadPoolExecutor(1, "specdec-encoder")

        self._streams: dict[TokenStream, dict[int, Handle]] = {}
        self._owners: dict[int, TokenStream] = {}
        self._num_failures, self._watch = 0, watch
        self._thread = threading.Thread(target=self._run, name="specdec-engine", daemon=True)
        self._thread.start()

    @property
    def state(self) -> Literal["running", "closing", "closed", "dead"]:
        if self.error is not None:
            return "dead"
        if not self._thread.is_alive():
            return "closed"
        return "running" if self._closing == "no" else "closing"

    @property
    def num_open(self) -> int:
        """Requests that were submitted and have not ended."""
        return self._num_open

    @property
    def metrics(self) -> EngineMetrics:
        """The engine's counts; read at any time, they may be those of a step that is under way."""
        return self.engine.metrics

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, chat: bool = False
    ) -> AsyncGenerator[Token, None]:
        """The tokens of one prompt as they become final; closing the generator cancels the request. Raises as `submit` does."""
        stream = await self.submit([prompt], params, chat=chat)
        try:
            async for token in stream:
                yield token
        finally:
            stream.cancel()

    async def submit(
        self, prompts: Seq[Prompt], params: SamplingParams | Seq[SamplingParams] | None = None, *, chat: bool = False
    ) -> TokenStream:
        """One stream for all prompts, taken together or not at all; a token's `index` says whose it is.

        `params` is one for all or one each. Raises what `Engine.submit` refuses them with, ValueError for more prompts than the
        front ever takes, QueueFull, EngineClosed or EngineDead. Whoever reads the stream no further must cancel it.
        """
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Seq) else list(params)
        if not prompts or len(each) != len(prompts):
            raise ValueError(
                f"{len(each)} sampling parameters for {len(prompts)} prompts: give one each for at least one"
            )
        stream = TokenStream(len(prompts), self._cancel)
        with self._wake:
            self.require_room(len(prompts))
            self._encoder.submit(self._encode_next)
            self._encoding[stream] = prompts, each, chat
            self._num_open += len(prompts)
        try:
            await stream.opened()
        except BaseException:
            stream.cancel()
            raise
        return stream

    def require_room(self, num_requests: int) -> None:
        """Raises what `submit` would refuse so many requests with at this moment, whatever their prompts."""
        with self._wake:
            if self.error is not None:
                raise EngineDead(self.error)
            if self._closing != "no":
                raise EngineClosed("the engine is closed and takes no more requests")
            if num_requests > self.max_open:
                raise ValueError(
                    f"{num_requests} prompts at once, and the engine never has more than {self.max_open} open: split them"
                )
            if self._num_open + num_requests > self.max_open:
                raise QueueFull(f"{self._num_open} requests are open, {self.max_open} is the limit: try again later")

    async def close(self, *, drain: bool = False, timeout_s: float | None = None) -> None:
        """Takes nothing more and returns when the thread has ended: with `drain` after what is open, at most `timeout_s`
        later; otherwise, and when that time is over, open requests fail with EngineClosed."""
        await asyncio.to_thread(self._close, drain, timeout_s)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(drain=error is None)

    def _close(self, drain: bool, timeout_s: float | None) -> None:
        if drain:
            self._end("drain")
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._end("cancel")
            self._thread.join()

    def _end(self, how: Literal["drain", "cancel"]) -> None:
        with self._wake:
            if self._closing != "cancel":
                self._closing = how
            self._wake.notify()

    def _cancel(self, stream: TokenStream) -> None:
        with self._wake:
            if not self._drop(stream):
                self._inbox.append(partial(self._stop, stream))
            self._wake.notify()

    def _drop(self, *streams: TokenStream) -> list[TokenStream]:
        """Those of the streams that were still to be encoded: their places are free, and nothing of them reaches the inbox."""
        with self._wake:
            dropped = [stream for stream in streams if stream in self._encoding]
            for stream in dropped:
                prompts, _, _ = self._encoding.pop(stream)
                self._leave(len(prompts))
        return dropped

    # This runs in the encoder's thread, where a long text holds up neither the engine nor an event loop.

    def _encode_next(self) -> None:
        with self._wake:
            if not self._encoding:
                return
            stream, (prompts, each, chat) = next(iter(self._encoding.items()))
        encoded: list[list[int]] | Exception
        try:
            encoded = []
            # The samples of a prompt follow one another and share its tokens.
            for _, group in groupby(prompts, key=id):
                if stream not in self._encoding:
                    return
                same = list(group)
                encoded += [encode(self.engine.target, same[0], chat)] * len(same)
        except Exception as error:
            encoded = error
        except BaseException as panic:
            # A tokenizer in Rust may end so, and its caller must not wait for ever.
            encoded = RuntimeError(f"the tokenizer failed: {_described(panic)}")
        with self._wake:
            if self._encoding.pop(stream, None) is not None:
                self._inbox.append(partial(self._start, stream, prompts, encoded, each))
                self._wake.notify()

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:
            self._die(error)
        self._encoder.shutdown(wait=False)

    def _turn(self) -> bool:
        """What callers asked for, then one step; waits where there is nothing to do. False at the end."""
        with self._wake:
            # A drain also waits for what is still to be encoded.
            while (
                not self._inbox
                and self.engine.is_idle
                and (self._closing == "no" or (self._closing == "drain" and self._encoding))
            ):
                self._wake.wait()
            closing = self._closing
            dropped = self._drop(*self._encoding) if closing == "cancel" else []
        self._answer()
        if closing == "cancel":
            for stream in [*dropped, *self._streams]:
                self._stop(stream, EngineClosed("the engine was closed before the request ended"))
            return False
        if self.engine.is_idle:
            with self._wake:
                return closing == "no" or bool(self._encoding or self._inbox)
        try:
            tokens = self.engine.step()
        except Exception as error:
            self._recover(error)
        else:
            self._num_failures = 0
            self._hand_out(tokens)
            if self._watch is not None:
                self._watch(tokens)
        return self.error is None

    def _answer(self) -> None:
        """Takes the calls out one by one, so that none is lost where one raises."""
        while True:
            with self._wake:
                if not self._inbox:
                    return
                call = self._inbox.popleft()
            call()

    def _start(
        self,
        stream: TokenStream,
        prompts: Seq[Prompt],
        encoded: list[list[int]] | Exception,
        each: Seq[SamplingParams],
    ) -> None:
        handles: dict[int, Handle] = {}
        try:
            if self.error is not None:
                raise EngineDead(self.error)
            if isinstance(encoded, Exception):
                raise encoded
            for index, (prompt, token_ids, params) in enumerate(zip(prompts, encoded, each, strict=True)):
                if stream.is_cancelled:
                    break
                handle = self.engine.submit(prompt, params, index=index, token_ids=token_ids)
                handles[handle.id] = handle
        except Exception as error:
            # Whoever learns of it finds the places free already.
            for handle in handles.values():
                self.engine.cancel(handle)
            self._leave(len(prompts))
            stream.put(error)
            return
        self._leave(len(prompts) - len(handles))
        if handles:
            self._streams[stream] = handles
            self._owners.update(dict.fromkeys(handles, stream))
        # Where the reader has cancelled meanwhile, its own call follows in the inbox.
        stream.put([])

    def _hand_out(self, tokens: list[Token]) -> None:
        batches: dict[TokenStream, list[Token]] = {}
        for token in tokens:
            batches.setdefault(self._owners[token.id], []).append(token)
        for stream, batch in batches.items():
            # Whoever reads its last token finds the place free already.
            for token in batch:
                if token.result is not None:
                    self._forget(stream, token.id)
            if not stream.put(batch):
                self._stop(stream)

    def _stop(self, stream: TokenStream, error: Exception | None = None) -> None:
        """Cancels what is open of a stream and tells its reader why."""
        for id, handle in list(self._streams.get(stream, {}).items()):
            self.engine.cancel(handle)
            self._forget(stream, id)
        if error is not None:
            stream.put(error)

    def _forget(self, stream: TokenStream, id: int) -> None:
        del self._owners[id], self._streams[stream][id]
        if not self._streams[stream]:
            del self._streams[stream]
        self._leave(1)

    def _leave(self, count: int) -> None:
        with self._wake:
            # A dead engine has freed all places at once.
            if self.error is None:
                self._num_open -= count

    def _recover(self, error: Exception) -> None:
        """Fails the requests that the step computed; the engine goes on where its pages check out without them."""
        self._num_failures += 1
        for stream, handles in list(self._streams.items()):
            # Whatever was in the step has ended with it; the tokens that it had are lost.
            if any(handle.is_done for handle in handles.values()):
                self._stop(stream, StepFailed(error))
        try:
            self.engine.check()
        except AssertionError as broken:
            raise broken from error
        if self._num_failures >= MAX_FAILURES:
            raise error

    def _die(self, error: Exception) -> None:
        # Whoever learns of it finds the places free already; nothing is taken in any more.
        with self._wake:
            self.error, self._num_open = error, 0
            dropped = self._drop(*self._encoding)
        self._answer()
        for stream in [*dropped, *self._streams]:
            stream.put(EngineDead(error))
        self._streams.clear()
        self._owners.clear()


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
