"""What goes back to the client: whole replies and chunks of a stream, in the shapes of both APIs."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from functools import cached_property
from typing import Any, Protocol

from specdec.request import Result, Token
from specdec.serving.requests import ChatRequest, CompletionRequest
from specdec.serving.token_texts import TokenTexts

Json = dict[str, Any]
Logprob = tuple[float, dict[int, float]]
# OpenAI's number for a log-probability too low to tell, since JSON has none for minus infinity.
LOWEST = -9999.0


class Reply(Protocol):
    """One request's answer; a choice's `index` counts samples within prompts. A token that has nothing to show has no chunk."""

    has_usage_chunk: bool

    def choice(self, result: Result) -> Json: ...

    def first_chunks(self, num_choices: int) -> list[Json]: ...

    def chunk(self, token: Token) -> Json | None: ...

    def whole(self, choices: list[Json], usage: Json | None = None) -> Json: ...

    def part(self, choices: list[Json], usage: Json | None = None) -> Json: ...


class _Reply:
    prefix: str
    names: tuple[str, str]

    def __init__(self, body: CompletionRequest | ChatRequest, texts: TokenTexts, fingerprint: str) -> None:
        self.returns_ids, self.has_usage_chunk = body.return_token_ids, body.includes_usage
        self._texts = texts
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(16)}",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, choices: list[Json], usage: Json | None = None) -> Json:
        """The reply to a request that does not stream."""
        return {**self._head, "object": self.names[0], "choices": choices, "usage": usage}

    def part(self, choices: list[Json], usage: Json | None = None) -> Json:
        """One event of a stream; where a usage was asked for, all but the last have it null."""
        return {**self._head, "object": self.names[1], "choices": choices} | (
            {"usage": usage} if self.has_usage_chunk else {}
        )


class CompletionReply(_Reply):
    """The shapes of /v1/completions; `text_of` is the text of a prompt where it is to be echoed."""

    prefix, names = "cmpl", ("text_completion", "text_completion")

    def __init__(
        self,
        body: CompletionRequest,
        texts: TokenTexts,
        fingerprint: str,
        text_of: Callable[[str | list[int]], str],
    ) -> None:
        super().__init__(body, texts, fingerprint)
        self._num_samples, self._is_echoed = body.n, body.echo
        self._prompts, self._text_of = body.prompts, text_of
        # Where the next token's text begins in its choice's text.
        self._offsets: dict[int, int] = {}

    def choice(self, result: Result) -> Json:
        return {
            "index": result.index,
            "text": self._echo(result.index) + result.text,
            "logprobs": self._logprobs(result.index, result.token_ids, result.logprobs),
            "finish_reason": result.finish_reason,
        } | _ids(self.returns_ids, result.token_ids, result.prompt_token_ids)

    def first_chunks(self, num_choices: int) -> list[Json]:
        """The prompts, where they are to be echoed."""
        if not self._is_echoed:
            return []
        return [_text_choice(i, self._echo(i)) for i in range(num_choices)]

    def chunk(self, token: Token) -> Json | None:
        logprobs = _logprobs_of(token)
        if not token.text and token.result is None and logprobs is None and not self.returns_ids:
            return None
        shown = self._logprobs(token.index, [token.token_id], logprobs)
        return _text_choice(token.index, token.text, shown, _reason(token)) | _ids(self.returns_ids, [token.token_id])

    @cached_property
    def _echoes(self) -> list[str]:
        # Read once the engine has taken the prompts: only then are they few, and their ids in the vocabulary.
        return [self._text_of(prompt) for prompt in self._prompts]

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._num_samples] if self._is_echoed else ""

    def _logprobs(self, index: int, token_ids: Seq[int], logprobs: Seq[Logprob] | None) -> Json | None:
        if logprobs is None:
            return None
        tokens = [self._texts.text(token) for token in token_ids]
        offsets = []
        for text in tokens:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        best = [{self._texts.text(token): max(value, LOWEST) for token, value in top.items()} for _, top in logprobs]
        return {
            "tokens": tokens,
            "token_logprobs": [max(value, LOWEST) for value, _ in logprobs],
            # As OpenAI has it, the sampled token is always among them.
            "top_logprobs": [
                {**top, text: max(value, LOWEST)} for top, text, (value, _) in zip(best, tokens, logprobs, strict=True)
            ],
            "text_offset": offsets,
        }


class ChatReply(_Reply):
    """The shapes of /v1/chat/completions."""

    prefix, names = "chatcmpl", ("chat.completion", "chat.completion.chunk")

    def choice(self, result: Result) -> Json:
        return {
            "index": result.index,
            "message": {"role": "assistant", "content": result.text, "refusal": None},
            "logprobs": self._logprobs(result.token_ids, result.logprobs),
            "finish_reason": result.finish_reason,
        } | _ids(self.returns_ids, result.token_ids, result.prompt_token_ids)

    def first_chunks(self, num_choices: int) -> list[Json]:
        """The role that speaks."""
        return [_delta(i, {"role": "assistant", "content": ""}) for i in range(num_choices)]

    def chunk(self, token: Token) -> Json | None:
        logprobs = _logprobs_of(token)
        if not token.text and token.result is None and logprobs is None and not self.returns_ids:
            return None
        shown = self._logprobs([token.token_id], logprobs)
        delta = {"content": token.text} if token.text else {}
        return _delta(token.index, delta, shown, _reason(token)) | _ids(self.returns_ids, [token.token_id])

    def _logprobs(self, token_ids: Seq[int], logprobs: Seq[Logprob] | None) -> Json | None:
        if logprobs is None:
            return None
        pairs = zip(token_ids, logprobs, strict=True)
        return {
            "content": [
                {**self._named(token, value), "top_logprobs": [self._named(*one) for one in top.items()]}
                for token, (value, top) in pairs
            ],
            "refusal": None,
        }

    def _named(self, token: int, logprob: float) -> Json:
        texts = self._texts
        return {"token": texts.text(token), "logprob": max(logprob, LOWEST), "bytes": texts.byte_values(token)}


def usage(results: Iterable[Result], num_samples: int) -> Json:
    """Tokens that a request cost; the samples of a prompt share it, so it counts once. `cached_tokens` of it were computed for
    some other request."""
    prompt = output = cached = 0
    for result in results:
        output += len(result.token_ids)
        if result.index % num_samples == 0:
            prompt += len(result.prompt_token_ids)
            cached += result.metrics.num_prefix_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _text_choice(index: int, text: str, logprobs: Json | None = None, reason: str | None = None) -> Json:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _delta(index: int, delta: Json, logprobs: Json | None = None, reason: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _logprobs_of(token: Token) -> list[Logprob] | None:
    return None if token.logprob is None else [(token.logprob, token.top_logprobs or {})]


def _reason(token: Token) -> str | None:
    return None if token.result is None else token.result.finish_reason


def _ids(wanted: bool, token_ids: Seq[int], prompt_token_ids: Seq[int] | None = None) -> Json:
    if not wanted:
        return {}
    return {"token_ids": list(token_ids)} | (
        {} if prompt_token_ids is None else {"prompt_token_ids": list(prompt_token_ids)}
    )
