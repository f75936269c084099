"""What competes in the benchmark: this library's systems and transformers' own generation, on the same weights."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from specdec.attention import ATTENTION_NAME
from specdec.cli import explain, quote_words
from specdec.config import SystemConfig, TargetConfig, compose, to_typed
from specdec.engine import Engine
from specdec.experiments.measurement import Measurement, decode
from specdec.experiments.system import model_name
from specdec.model import PagedModel
from specdec.sampling import SamplingParams

PLAIN = "plain"
NUM_LOOKUP_TOKENS = 10


@dataclass(frozen=True)
class Decoded:
    """One prompt decoded by one contender; times in seconds, `seconds` with the prompt's forward."""

    token_ids: list[int]
    num_target_forwards: int
    seconds: float
    ttft_s: float
    phases: dict[str, float] = field(default_factory=dict)


class Contender(Protocol):
    """`name` is unique in a benchmark; `labels` are the fields of its result row that say what it is."""

    name: str
    labels: dict[str, Any]

    def decode(self, prompt_token_ids: list[int], params: SamplingParams) -> Decoded: ...


@dataclass
class SpecdecContender:
    """An engine of this library, one prompt at a time."""

    name: str
    engine: Engine
    labels: dict[str, Any]

    def decode(self, prompt_token_ids: list[int], params: SamplingParams) -> Decoded:
        cost = Measurement()
        result = decode(self.engine, [prompt_token_ids], [params], False, cost)[0]
        return Decoded(result.token_ids, cost.num_target_forwards, cost.seconds, cost.ttft_s, cost.phases)


@dataclass
class TransformersContender:
    """transformers' `generate` with its own attention, on a model of plain weights."""

    name: str
    target: PagedModel
    labels: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def decode(self, prompt_token_ids: list[int], params: SamplingParams) -> Decoded:
        """Greedy, with nothing of the model's own generation defaults but its end-of-sequence ids."""
        model = self.target.model
        config = greedy_config(self.target, params)
        ids = torch.tensor([prompt_token_ids], device=model.device)
        clock = _FirstToken()
        with own_attention(model, config), counted_forwards(model) as count, torch.inference_mode():
            start = time.perf_counter()
            out = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **self.options)
            new = out[0, len(prompt_token_ids) :].tolist()
            seconds = time.perf_counter() - start
        return Decoded(new, len(count), seconds, clock.first_token_s - start)


def transformers_contenders(target: PagedModel, draft: str | None, config: TargetConfig) -> list[Contender]:
    """Plain decoding, prompt lookup, and assisted generation where a draft model is given."""
    common = {"system": "transformers", "rule": "transformers", "lossless": True, "policy": "none", "num_nodes": 1}
    lookup = {"prompt_lookup_num_tokens": NUM_LOOKUP_TOKENS}
    found: list[Contender] = [
        TransformersContender("transformers plain", target, {**common, "drafter": PLAIN}),
        TransformersContender(
            "transformers prompt_lookup",
            target,
            {
                **common,
                "drafter": "prompt_lookup",
                "policy": f"chain(depth={NUM_LOOKUP_TOKENS})",
                "num_nodes": NUM_LOOKUP_TOKENS + 1,
            },
            lookup,
        ),
    ]
    if draft is not None:
        assistant = PagedModel.load(draft, dtype=config.dtype, device=config.device, packed=False).model
        assistant.set_attn_implementation("sdpa")
        depth = assistant.generation_config.num_assistant_tokens or GenerationConfig().num_assistant_tokens or 20
        labels = {
            **common,
            "drafter": f"assisted({model_name(draft)})",
            "policy": f"chain(depth<={depth})",
            "num_nodes": depth + 1,
        }
        found.append(TransformersContender("transformers assisted", target, labels, {"assistant_model": assistant}))
    return found


def system_config(overrides: str, target: TargetConfig, draft: str | None) -> SystemConfig:
    """The system that an item of `systems` describes; its drafter takes dtype and device from the target. Raises ValueError for
    what it must not hold."""
    inherited = [f"target.dtype={target.dtype}", f"target.device={target.device}"]
    inherited += [f"draft={draft}"] if draft is not None else []
    words = [*inherited, *shlex.split(overrides)]
    try:
        return to_typed(compose("contender", quote_words(words)))
    except Exception as error:
        raise ValueError(f"systems: {explain(error, ['contender', *words])}") from error


class _FirstToken(BaseStreamer):
    """Notes when the first new token arrives; `generate` puts the prompt first."""

    def __init__(self) -> None:
        self.first_token_s, self._puts = 0.0, 0

    def put(self, value: torch.Tensor) -> None:
        self._puts += 1
        if self._puts == 2:
            self.first_token_s = time.perf_counter()

    def end(self) -> None:
        """Nothing is held back."""


def greedy_config(target: PagedModel, params: SamplingParams) -> GenerationConfig:
    """Greedy generation, with nothing of the model's own defaults but its end-of-sequence ids."""
    ends = sorted(target.eos_token_ids)
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=params.max_new_tokens,
        eos_token_id=None if params.ignore_eos or not ends else ends,
        pad_token_id=ends[0] if ends else 0,
    )


@contextmanager
def own_attention(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Inside, the model generates as transformers has it: its own attention, and `config` as its defaults."""
    saved = model.generation_config
    model.set_attn_implementation("sdpa")
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = saved
        model.set_attn_implementation(ATTENTION_NAME)


@contextmanager
def counted_forwards(model: PreTrainedModel) -> Iterator[list[None]]:
    """A list with one entry per forward of the model."""
    calls: list[None] = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()
