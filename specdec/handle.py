"""What a caller holds of a request that was submitted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from specdec.metrics import RequestMetrics
from specdec.request import Request, Result, Token

if TYPE_CHECKING:
    from specdec.engine import Engine


class Handle:
    """A request on its way; iterating it yields its tokens from the first on and steps the engine for those to come."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine, self.request = engine, request

    @property
    def id(self) -> int:
        return self.request.id

    @property
    def index(self) -> int:
        return self.request.index

    @property
    def result(self) -> Result | None:
        """None while it goes on."""
        return self.request.result

    @property
    def is_done(self) -> bool:
        return self.request.result is not None

    @property
    def metrics(self) -> RequestMetrics:
        return self.request.metrics

    def cancel(self) -> None:
        """Ends it at once, unless it has ended: its pages are free then, and the result holds what there is."""
        self._engine.cancel(self)

    def __iter__(self) -> Iterator[Token]:
        at = 0
        while True:
            while at < len(self.request.tokens):
                yield self.request.tokens[at]
                at += 1
            if self.is_done:
                return
            self._engine.step()
