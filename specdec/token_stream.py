"""What a caller of the asynchronous engine holds: the tokens of its requests, on their way from the engine's thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from specdec.request import Token


class TokenStream:
    """The tokens of `num_requests` requests as they become final, for one reader in the event loop that made it.

    Iterating ends with the last request, or after `cancel()`, and raises what ended the requests against their will. Tokens
    wait for a slow reader: at most as many as the requests may emit.
    """

    def __init__(self, num_requests: int, on_cancel: Callable[[TokenStream], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[list[Token] | Exception | None] = asyncio.Queue()
        self._ready: deque[Token] = deque()
        self._on_cancel = on_cancel
        self._num_open = num_requests
        self.is_cancelled = False

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> Token:
        while not self._ready:
            if self._num_open == 0:
                raise StopAsyncIteration
            await self._receive()
        token = self._ready.popleft()
        if token.result is not None:
            self._num_open -= 1
        return token

    async def opened(self) -> None:
        """Returns once the engine has taken the requests. Raises what it refused them with."""
        await self._receive()

    def cancel(self) -> None:
        """Gives up what is still open; its pages are free before the engine's next step. Does nothing the second time."""
        if self._num_open and not self.is_cancelled:
            self.is_cancelled = True
            self._ready.clear()
            self._items.put_nowait(None)
            self._on_cancel(self)

    def put(self, item: list[Token] | Exception) -> bool:
        """Hands tokens, none when the requests have been taken, or an error over to the reader, from any thread; False where
        the reader's loop is closed."""
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:
            return False
        return True

    async def _receive(self) -> None:
        item = await self._items.get()
        if isinstance(item, Exception) or item is None or self.is_cancelled:
            self._num_open = 0
            if isinstance(item, Exception):
                raise item
        else:
            self._ready.extend(item)
