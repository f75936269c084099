"""Where training texts come from: prompts that the target writes itself or is given, and plain documents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from specdec.drafters.training.exclusion import text_hash
from specdec.drafters.training.records import Record
from specdec.engine import Engine
from specdec.request import Result, encode
from specdec.sampling import SamplingParams

_PLACEHOLDER = "PLACEHOLDER"


class Source(Protocol):
    """Batches of texts, which depend on the batch's number alone, and records from texts, which depend on the text alone."""

    def texts(self, batch: int) -> list[str] | None:
        """None behind the last batch; an empty text is one that came to nothing."""
        ...

    def records(self, texts: Seq[str]) -> list[Record]: ...


@dataclass(frozen=True)
class Answers:
    """Has the target answer prompts, as user messages of its chat template where it has one; the answer is to be learnt.

    An answer draws with a seed made of `seed` and the prompt. What is longer than `max_length` tokens is cut, an answer
    of which nothing is left, and a prompt too long for the model, makes no record.
    """

    engine: Engine
    params: SamplingParams
    seed: int
    max_length: int

    def records(self, texts: Seq[str]) -> list[Record]:
        tokenizer = self.engine.target.tokenizer
        chat = bool(tokenizer is not None and tokenizer.chat_template)
        prompts = [(text, encode_prompt(self.engine, text, chat)) for text in texts]
        prompts = [(text, ids) for text, ids in prompts if 0 < len(ids) < self.max_length]
        params = [
            replace(
                self.params,
                seed=seed_of(self.seed, "answer", text),
                max_new_tokens=min(self.params.max_new_tokens, self.max_length - len(ids)),
            )
            for text, ids in prompts
        ]
        results = self.engine.generate([ids for _, ids in prompts], params)
        return [_record(result, text) for (text, _), result in zip(prompts, results, strict=True)]


class SelfPrompts:
    """Prompts that the target writes itself: it is given its chat template up to where the user's words begin, and what it
    writes until the user's turn ends is the prompt (Xu et al. 2024, "Magpie", section 2.1).

    Endless. A turn that does not end within `params.max_new_tokens` is dropped. Raises ValueError without a chat template.
    """

    def __init__(self, answers: Answers, params: SamplingParams, batch_size: int) -> None:
        self._answers, self._batch_size = answers, batch_size
        target = answers.engine.target
        if target.tokenizer is None or not target.tokenizer.chat_template:
            raise ValueError(
                f"{target.name} has no chat template, so it writes no prompts: choose source=prompts or text"
            )
        opening, stop_ids, stop = user_turn(target.tokenizer)
        self._opening = list(target.tokenizer(opening, add_special_tokens=False)["input_ids"])
        self._params = replace(params, stop_token_ids=stop_ids, stop=stop)

    def texts(self, batch: int) -> list[str] | None:
        seeds = [seed_of(self._answers.seed, "prompt", batch, i) for i in range(self._batch_size)]
        params = [replace(self._params, seed=seed) for seed in seeds]
        results = self._answers.engine.generate([self._opening] * self._batch_size, params)
        return [result.text.strip() if result.finish_reason == "stop" else "" for result in results]

    def records(self, texts: Seq[str]) -> list[Record]:
        return self._answers.records(texts)


class GivenPrompts:
    """Prompts from a list, answered by the target."""

    def __init__(self, answers: Answers, prompts: Seq[str], batch_size: int) -> None:
        self._answers, self._prompts, self._batch_size = answers, prompts, batch_size

    def texts(self, batch: int) -> list[str] | None:
        return list(self._prompts[batch * self._batch_size : (batch + 1) * self._batch_size]) or None

    def records(self, texts: Seq[str]) -> list[Record]:
        return self._answers.records(texts)


class Documents:
    """Plain documents, cut into windows of `max_length` tokens, every token to be learnt; windows below `min_length` tokens
    are left out."""

    def __init__(
        self,
        documents: Seq[str],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        min_length: int = 16,
        batch_size: int = 64,
    ) -> None:
        if not 2 <= min_length <= max_length:
            raise ValueError(f"min_length={min_length} must be >= 2 and at most max_length={max_length}")
        self._documents, self._tokenizer, self._batch_size = documents, tokenizer, batch_size
        self._max_length, self._min_length = max_length, min_length

    def texts(self, batch: int) -> list[str] | None:
        return list(self._documents[batch * self._batch_size : (batch + 1) * self._batch_size]) or None

    def records(self, texts: Seq[str]) -> list[Record]:
        found = []
        for text in texts:
            ids = torch.tensor(self._tokenizer(text)["input_ids"])
            for window in ids.split(self._max_length):
                if len(window) >= self._min_length:
                    found.append(Record(window.clone(), torch.ones(len(window), dtype=torch.bool), text_hash(text)))
        return found


def encode_prompt(engine: Engine, text: str, chat: bool) -> list[int]:
    """The prompt's token ids; none where the model has too few positions for it."""
    target = engine.target
    ids = encode(target, text, chat)
    return ids if target.max_positions is None or len(ids) <= target.max_positions else []


def user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, tuple[int, ...], tuple[str, ...]]:
    """The chat template's text before the first user's words, and what ends them: token ids, or else a stop string.

    Raises ValueError where the template does not let the user's words through unchanged.
    """
    message = [{"role": "user", "content": _PLACEHOLDER}]
    text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    opening, found, closing = text.partition(_PLACEHOLDER)
    if not found or not closing.strip():
        raise ValueError(f"the chat template gives {text!r} for the user's words {_PLACEHOLDER!r}: use source=prompts")
    first = tokenizer(closing.strip(), add_special_tokens=False)["input_ids"][0]
    if first in tokenizer.all_special_ids or first in tokenizer.added_tokens_decoder:
        return opening, (int(first),), ()
    return opening, (), (closing.strip().splitlines()[0],)


def seed_of(*parts: object) -> int:
    """A request's seed from what it is for."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def _record(result: Result, text: str) -> Record:
    tokens = torch.tensor(result.prompt_token_ids + result.token_ids)
    return Record(tokens, torch.arange(len(tokens)) >= len(result.prompt_token_ids), text_hash(text))
