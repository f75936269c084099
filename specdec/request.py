"""What goes in and what comes out: a request's prompt, its stream of tokens, and its result."""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, Literal

import jinja2

from specdec.metrics import RequestMetrics
from specdec.model import PagedModel
from specdec.pages import PageTable
from specdec.prefix import PrefixPage
from specdec.sampling import SamplingParams
from specdec.sequence import Sequence, batch_sampling
from specdec.text import TextStream

# Text, token ids, or the messages of a chat.
Prompt = str | Seq[int] | Seq[Mapping[str, Any]]


@dataclass(frozen=True)
class Result:
    """A finished request. `finish_reason` is `stop` (an end id or stop string), `length`, `cancelled`, or `failed` where a step
    that computed it raised; the token that ended it is in `token_ids`, a stop string is not in `text`. `logprobs` per token:
    its own and the alternatives asked for."""

    index: int
    prompt: str | None
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    seed: int
    finish_reason: str
    logprobs: list[tuple[float, dict[int, float]]] | None
    metrics: RequestMetrics


@dataclass(frozen=True)
class Token:
    """One final token of request `id`, prompt `index` of its caller, and the text that became certain with it; the last one
    carries the result. `logprob` and those of the likeliest alternatives are None where none were asked for."""

    id: int
    index: int
    token_id: int
    text: str
    result: Result | None = None
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None


class Request:
    """A prompt on its way: its sequence, its text so far, what ends it.

    Raises ValueError where the prompt does not fit the model or stop strings lack a tokenizer.
    """

    def __init__(
        self,
        id: int,
        index: int,
        prompt: Prompt,
        token_ids: list[int],
        params: SamplingParams,
        target: PagedModel,
        table: PageTable,
    ) -> None:
        limit = target.max_positions
        if limit is not None and len(token_ids) > limit:
            raise ValueError(
                f"prompt {index} has {len(token_ids)} tokens; {target.name} takes at most {limit}: shorten the prompt"
            )
        if params.stop and target.tokenizer is None:
            raise ValueError(f"stop={params.stop!r} needs a tokenizer, and {target.name} was loaded without one")
        # Computing ends at the last position; one more token can be emitted behind it.
        longest = len(token_ids) + params.max_new_tokens
        max_tokens = longest if limit is None else min(longest, limit + 1)
        self.id, self.index, self.prompt = id, index, prompt if isinstance(prompt, str) else None
        self.sequence = Sequence(id, token_ids, params, params.with_seed(), table, max_tokens, limit)
        # Building it once finds a biased token that the vocabulary does not have before anything runs.
        batch_sampling([self.sequence], target.vocab_size, "cpu")
        self.metrics = RequestMetrics(submit_s=time.perf_counter())
        self.tokens: list[Token] = []
        self.result: Result | None = None
        # The page that it waits for, which another request is computing.
        self.awaited: PrefixPage | None = None
        self._stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else target.eos_token_ids)
        self._text = TextStream(target.tokenizer, params.stop) if target.tokenizer is not None else None
        self._logprobs: list[tuple[float, dict[int, float]]] | None = None if params.logprobs is None else []

    def append(self, tokens: list[int], logprobs: list[tuple[float, dict[int, float]]] | None) -> list[Token]:
        """Takes the step's final tokens one by one until something ends the request."""
        texts: list[str] = []
        for i, token in enumerate(tokens):
            self.sequence.token_ids.append(token)
            if self._logprobs is not None and logprobs is not None:
                self._logprobs.append(logprobs[i])
            text = self._text.push(token) if self._text is not None else ""
            reason = self._ended_by(token)
            if reason is not None:
                text += self._text.finish() if self._text is not None else ""
            texts.append(text)
            if reason is not None:
                break
        now = time.perf_counter()
        self.metrics.emissions.append((now, len(texts)))
        self.metrics.num_new_tokens += len(texts)
        if reason is not None:
            self._finish(reason, now)
        # What the end of the request has cut off has no text.
        new = [Token(self.id, self.index, token, text) for token, text in zip(tokens, texts, strict=False)]
        if logprobs is not None:
            pairs = zip(new, logprobs, strict=False)
            new = [replace(token, logprob=own, top_logprobs=best) for token, (own, best) in pairs]
        if self.result is not None:
            new[-1] = replace(new[-1], result=self.result)
        self.tokens += new
        return new

    def end(self, reason: Literal["cancelled", "failed"]) -> None:
        """Ends it as it stands."""
        # Decoding the rest of the text may be what failed.
        if self._text is not None and reason == "cancelled":
            self._text.finish()
        self._finish(reason, time.perf_counter())

    def _ended_by(self, token: int) -> str | None:
        if token in self._stop_ids or (self._text is not None and self._text.stopped):
            return "stop"
        return "length" if len(self.sequence.token_ids) >= self.sequence.max_tokens else None

    def _finish(self, reason: str, now: float) -> None:
        one = self.sequence
        one.finish_reason = reason
        self.metrics.end_s = now
        self.result = Result(
            self.index,
            self.prompt,
            one.token_ids[: one.prompt_len],
            one.output_token_ids,
            self._text.text if self._text is not None else "",
            one.seed,
            reason,
            self._logprobs,
            self.metrics,
        )


def encode(target: PagedModel, prompt: Prompt, chat: bool) -> list[int]:
    """Token ids of a prompt: of text, as a user's message where `chat`, of the messages of a chat, or as they are.

    Raises ValueError naming what is wrong.
    """
    if isinstance(prompt, str):
        ids = _of_chat(target, [{"role": "user", "content": prompt}]) if chat else _of_text(target, prompt)
    elif any(isinstance(part, Mapping) for part in prompt):
        ids = _of_chat(target, [_checked(part) for part in prompt])
    else:
        ids = [int(token) for token in prompt]  # type: ignore[arg-type]
    if not ids:
        raise ValueError(f"prompt {prompt!r} has no tokens: give at least one")
    outside = [token for token in ids if not 0 <= token < target.vocab_size]
    if outside:
        raise ValueError(f"prompt token {outside[0]} is outside {target.name}'s vocabulary of {target.vocab_size}")
    return ids


def _of_text(target: PagedModel, text: str) -> list[int]:
    if target.tokenizer is None:
        raise ValueError(f"{target.name} was loaded without a tokenizer: give prompts as token ids")
    return list(target.tokenizer(text)["input_ids"])


def _of_chat(target: PagedModel, messages: list[dict[str, Any]]) -> list[int]:
    if target.tokenizer is None:
        raise ValueError(f"{target.name} was loaded without a tokenizer: give prompts as token ids")
    if not target.tokenizer.chat_template:
        raise ValueError(f"{target.name} has no chat template: use chat=false")
    try:
        text = target.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template of {target.name} refuses these messages: {error}") from error
    # The template writes the special tokens itself.
    return list(target.tokenizer(text, add_special_tokens=False)["input_ids"])


def _checked(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ValueError(f"chat message {message!r} must be a dict with role and content")
    return dict(message)
