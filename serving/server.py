"""The process: a socket, uvicorn on it, and a shutdown that lets requests end."""

from __future__ import annotations

import asyncio
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from specdec.async_engine import AsyncEngine
from specdec.serving.live import ServerView


class Server(uvicorn.Server):
    """Serves `app` on a bound socket until SIGTERM, SIGINT or `should_exit`.

    Then nothing more is accepted, requests have `drain_s` seconds to end, and those left over end with an error; a second
    SIGINT ends them at once. A shutdown that was asked for is a success: no signal is raised again. `view` is kept up to date.
    """

    def __init__(
        self,
        app: FastAPI,
        front: AsyncEngine,
        *,
        drain_s: float = 30.0,
        access_log: bool = False,
        view: ServerView | None = None,
    ) -> None:
        # uvicorn's own patience is for clients that do not take what is sent to them.
        config = uvicorn.Config(
            app,
            lifespan="on",
            log_level="info" if access_log else "warning",
            access_log=access_log,
            timeout_graceful_shutdown=int(drain_s) + 5,
        )
        super().__init__(config)
        self.front, self.drain_s, self.view = front, drain_s, view

    async def on_tick(self, counter: int) -> bool:
        if self.view is not None:
            self.view.show(self.front)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.create_task(self.front.close(drain=True, timeout_s=self.drain_s))
        await super().shutdown(sockets)
        await self.front.close()
        await draining

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.force_exit or (self.should_exit and sig == signal.SIGINT)
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet; port 0 takes any free one. Raises OSError naming host and port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise OSError(
            f"cannot serve at {host}:{port}: {error}; choose with host= and port= (0: any free port)"
        ) from error
    return bound


def address(bound: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
