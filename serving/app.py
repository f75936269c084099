"""The application: OpenAI's routes, what they ask of the engine, and how its tokens become their replies."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from specdec.async_engine import AsyncEngine
from specdec.provenance import versions
from specdec.request import Prompt, Result
from specdec.sampling import SamplingParams
from specdec.serving.bodies import BodyReader, described
from specdec.serving.connection import BodyLimit, EventStream, while_connected
from specdec.serving.monitor import Monitor
from specdec.serving.refusals import Refusal, install, refusal_of
from specdec.serving.replies import ChatReply, CompletionReply, Reply, usage
from specdec.serving.requests import ChatRequest, CompletionRequest
from specdec.serving.token_texts import TokenTexts
from specdec.token_stream import TokenStream

MAX_BODY_BYTES = 16 * 1024 * 1024
# What no client waits for; the number is the one that servers log for it.
CLIENT_GONE = 499


def create_app(front: AsyncEngine, model: str, defaults: SamplingParams | None = None) -> FastAPI:
    """The server's application for one engine, which it closes when it shuts down.

    Clients call the target `model`; what a request leaves open is as in `defaults`.
    """
    service = _Service(front, model, defaults or SamplingParams(temperature=1.0))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await front.close()
        service.bodies.close()

    app = FastAPI(title="specdec", version=versions()["specdec"], lifespan=lifespan)
    install(app)
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
    app.add_middleware(service.monitor.counting)
    app.state.service = service

    @app.post("/v1/completions", openapi_extra=described("/v1/completions", CompletionRequest))
    async def completions(request: Request) -> Response:
        return await service.complete(await service.bodies.read(CompletionRequest, request), request)

    @app.post("/v1/chat/completions", openapi_extra=described("/v1/chat/completions", ChatRequest))
    async def chat_completions(request: Request) -> Response:
        return await service.chat(await service.bodies.read(ChatRequest, request), request)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.require_model(name)
        return service.card

    @app.get("/health")
    async def health() -> Response:
        return service.health()

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.monitor.text(), media_type=CONTENT_TYPE_LATEST)

    return app


class _Service:
    """What the routes share."""

    def __init__(self, front: AsyncEngine, model: str, defaults: SamplingParams) -> None:
        self.front, self.model, self.defaults = front, model, defaults
        target = front.engine.target
        known = versions()
        self.tokenizer, self.texts = target.tokenizer, TokenTexts(target.tokenizer)
        self.monitor, self.bodies = Monitor(front, known), BodyReader()
        names = ("specdec", "torch", "transformers")
        self.fingerprint = "_".join(f"{name}-{known[name]}" for name in names)
        self.card = {
            "id": model,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "specdec",
            "max_model_len": target.max_positions,
        }

    def require_model(self, name: str) -> None:
        if name != self.model:
            message = f"model {name!r} is not served here: use {self.model!r}"
            raise Refusal(message, param="model", status=404, code="model_not_found")

    def health(self) -> Response:
        front = self.front
        body = {"status": front.state, "open_requests": front.num_open, "error": front.error and str(front.error)}
        return JSONResponse(body, 200 if front.state == "running" else 503)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        self.require_model(body.model)
        if body.echo and self.tokenizer is None:
            raise Refusal(f"{self.model} has no tokenizer to echo prompts with: leave echo out", param="echo")
        reply = CompletionReply(body, self.texts, self.fingerprint, self._text_of)
        return await self._answer(body, body.prompts, False, reply, request)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        self.require_model(body.model)
        if not getattr(self.tokenizer, "chat_template", None):
            raise Refusal(f"{self.model} has no chat template: use /v1/completions", param="messages")
        messages = [message.turn for message in body.messages]
        return await self._answer(body, [messages], True, ChatReply(body, self.texts, self.fingerprint), request)

    async def _answer(
        self, body: CompletionRequest | ChatRequest, prompts: Seq[Prompt], chat: bool, reply: Reply, request: Request
    ) -> Response:
        try:
            params = body.params(self.defaults)
            # A body may ask for millions of samples: nothing of that size is made before it is known that they fit.
            self.front.require_room(len(prompts) * body.n)
            each = [(prompt, one) for prompt in prompts for one in params]
            submission = self.front.submit([prompt for prompt, _ in each], [one for _, one in each], chat=chat)
            tokens = await while_connected(request.receive, submission)
            if body.stream:
                return EventStream(tokens, self._events(tokens, reply, len(each), body.n))
            try:
                results = await while_connected(request.receive, self._results(tokens))
            finally:
                tokens.cancel()
        except ClientDisconnect:
            raise
        except Exception as error:
            refusal = refusal_of(error, list(type(body).model_fields))
            if refusal.status == 500:
                raise
            raise refusal from error
        return JSONResponse(reply.whole([reply.choice(result) for result in results], usage(results, body.n)))

    async def _results(self, tokens: TokenStream) -> list[Result]:
        results = []
        async for token in tokens:
            if token.result is not None:
                self.monitor.finished(token.result)
                results.append(token.result)
        return sorted(results, key=lambda result: result.index)

    async def _events(
        self, tokens: TokenStream, reply: Reply, num_choices: int, num_samples: int
    ) -> AsyncIterator[dict[str, Any]]:
        results: list[Result] = []
        for choice in reply.first_chunks(num_choices):
            yield reply.part([choice])
        async for token in tokens:
            if (chunk := reply.chunk(token)) is not None:
                yield reply.part([chunk])
            if token.result is not None:
                self.monitor.finished(token.result)
                results.append(token.result)
        if reply.has_usage_chunk:
            yield reply.part([], usage(results, num_samples))

    def _text_of(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        assert self.tokenizer is not None, "echo is refused without a tokenizer"
        return str(self.tokenizer.decode(prompt))
