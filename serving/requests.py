"""The bodies of requests: OpenAI's fields, checked strictly, and those of ours beside them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, SkipValidation, model_validator

from specdec.sampling import SamplingParams
from specdec.serving.fields import Body, check_bias, check_content, check_prompt, check_stop
from specdec.serving.refusals import Refusal

MAX_LOGPROBS = 20


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class Message(Body):
    """One turn of a chat."""

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        "tool_calls": ([],),
        "annotations": ([],),
        "function_call": (),
        "refusal": (),
        "audio": (),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(check_content)]
    name: str | None = None

    @property
    def turn(self) -> dict[str, str]:
        # Chat templates know OpenAI's newer name of the system's role by its old one.
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content} | ({} if self.name is None else {"name": self.name})


class _Generation(Body):
    """What both APIs share. Whatever is not given is as the server's `sampling` has it."""

    ignored = (
        "user",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "parallel_tool_calls",
    )
    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        "store": (False,),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "suffix": ("",),
        "best_of": (1,),
    } | dict.fromkeys(("audio", "moderation", "prediction", "reasoning_effort", "verbosity", "web_search_options"), ())

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    n: int = Field(1, ge=1, le=128)
    stop: Annotated[list[str] | None, BeforeValidator(check_stop)] = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(check_bias)] = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    # Only the first mistake is told, and millions of them would have to be listed.
    stop_token_ids: list[int] | None = Field(None, fail_fast=True)
    return_token_ids: bool = False

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives reported per token; None: no log-probabilities at all."""
        raise NotImplementedError

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def params(self, defaults: SamplingParams) -> list[SamplingParams]:
        """The parameters of each of the `n` samples of a prompt. Raises ValueError naming the value out of range."""
        names = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        )
        given = {name: getattr(self, name) for name in (*names, "logit_bias", "ignore_eos", "seed", "max_new_tokens")}
        given |= {name: tuple(getattr(self, name) or ()) or None for name in ("stop", "stop_token_ids")}
        # OpenAI's and others' way to switch it off.
        given["top_k"] = 0 if self.top_k == -1 else self.top_k
        given = {name: value for name, value in given.items() if value is not None}
        params = replace(defaults, **given, logprobs=self.num_logprobs)
        return [replace(params, seed=seed_of(params.seed, sample)) for sample in range(self.n)]


class CompletionRequest(_Generation):
    """The body of /v1/completions."""

    # Checked whole already: pydantic would try every form, and hold the interpreter meanwhile.
    prompt: Annotated[str | list[str] | list[int] | list[list[int]], SkipValidation, BeforeValidator(check_prompt)]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False

    @model_validator(mode="after")
    def _supported(self) -> CompletionRequest:
        _check_streaming(self)
        if self.echo and self.logprobs is not None:
            message = "echo=true with logprobs is not supported, the prompt's are not computed: leave one of them out"
            raise Refusal(message, param="echo")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


class ChatRequest(_Generation):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _supported(self) -> ChatRequest:
        _check_streaming(self)
        if self.top_logprobs is not None and not self.logprobs:
            raise Refusal(f"top_logprobs={self.top_logprobs} needs logprobs=true", param="top_logprobs")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise Refusal(f"max_tokens={both[0]} and max_completion_tokens={both[1]}: give one", param="max_tokens")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def seed_of(seed: int | None, sample: int) -> int | None:
    """The seed of a prompt's n-th sample: the first has the request's own, so that it is what n=1 gives; the others have
    numbers that no neighbouring seed of another request runs into."""
    if seed is None or sample == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _check_streaming(body: _Generation) -> None:
    if body.stream_options is not None and not body.stream:
        raise Refusal("stream_options is only for stream=true: leave it out", param="stream_options")
