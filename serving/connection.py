"""The client's side of the wire: how long it stays, how much it may send, and events sent to it one by one."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specdec.serving.refusals import refusal_of
from specdec.token_stream import TokenStream

T = TypeVar("T")
_log = logging.getLogger(__name__)


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled at once when the client goes away. Raises ClientDisconnect then.

    Only for requests whose body has been read.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.wait((working, gone))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: every object of `events` as a line of data, [DONE] behind the last one.

    What `events` raises is sent as a last event in the shape of OpenAI's errors. However it ends, `tokens` are cancelled.
    """

    media_type = "text/event-stream"

    def __init__(self, tokens: TokenStream, events: AsyncIterator[dict[str, Any]]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.tokens, self.events = tokens, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        except (ClientDisconnect, OSError):
            _log.info("a client went away")
        finally:
            self.tokens.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = "[DONE]"
        try:
            async for event in self.events:
                await send(_event(json.dumps(event, ensure_ascii=False, separators=(",", ":"))))
        except OSError:
            raise
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.status == 500:
                _log.exception("a stream broke off")
            last = json.dumps(refusal.body)
        await send(_event(last))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(data: str) -> Message:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}


class BodyLimit:
    """Middleware that answers bodies of more than `max_bytes` with status 413, without reading them to their end."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                raise HTTPException(413, f"the body has more than {self.max_bytes} bytes: send less at once")
            return message

        await self.app(scope, limited, send)
