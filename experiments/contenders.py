"""What competes in the benchmark: this library's systems and transformers' own generation, on the same weights."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from specdec.attention import ATTENTION_NAME
from specdec.cli import explain, quote_words
from specdec.config import BenchmarkConfig, SystemConfig, TargetConfig, compose, to_typed
from specdec.engine import Engine
from specdec.experiments.measurement import Measurement, decode
from specdec.experiments.system import load_system, load_target, model_name, plain_system
from specdec.model import PagedModel
from specdec.sampling import SamplingParams

PLAIN = "plain"
NUM_LOOKUP_TOKENS = 10


@dataclass(frozen=True)
class Decoded:
    """A batch of prompts decoded by one contender: new tokens per prompt; `seconds` with the prompts' forwards, `ttft_s` the
    mean time to the first token.

    `num_target_forwards` sums over prompts the target's forwards that emitted tokens of it; None: not known.
    `peak_memory_bytes` is that of a process that runs this contender alone; None: not known from this run.
    """

    outputs: list[list[int]]
    num_target_forwards: int | None
    seconds: float
    ttft_s: float
    phases: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(output) for output in self.outputs)


class Contender(Protocol):
    """`name` is unique in a benchmark; `labels` are the fields of its result row that say what it is, `versions` those of what
    only it runs; `max_batch_size` None: as many prompts at once as one likes."""

    name: str
    labels: dict[str, Any]
    versions: dict[str, str]
    max_batch_size: int | None

    def decode(self, prompts: list[list[int]], params: SamplingParams) -> Decoded: ...


@dataclass
class SpecdecContender:
    """An engine of this library."""

    name: str
    engine: Engine
    labels: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    max_batch_size: int | None = None

    def decode(self, prompts: list[list[int]], params: SamplingParams) -> Decoded:
        cost = Measurement()
        results = decode(self.engine, prompts, [params] * len(prompts), False, cost)
        outputs = [result.token_ids for result in results]
        return Decoded(outputs, cost.num_target_forwards, cost.seconds, cost.mean_ttft_s, cost.phases)


@dataclass
class TransformersContender:
    """transformers' `generate` with its own attention, on a model of plain weights."""

    name: str
    target: PagedModel
    labels: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    max_batch_size: int | None = None

    def decode(self, prompts: list[list[int]], params: SamplingParams) -> Decoded:
        """Greedy, with nothing of the model's own generation defaults but its end-of-sequence ids; prompts are padded to one
        length, as `generate` wants them."""
        model = self.target.model
        config = greedy_config(self.target, params)
        longest = max(len(prompt) for prompt in prompts)
        pad = config.pad_token_id
        padded = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
        kept = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        ids, mask = (torch.tensor(one, device=model.device) for one in (padded, kept))
        clock = _FirstToken()
        with own_attention(model, config), counted_forwards(model) as count, torch.inference_mode():
            start = time.perf_counter()
            out = model.generate(ids, attention_mask=mask, streamer=clock, **self.options)
            new = out[:, longest:].tolist()
            seconds = time.perf_counter() - start
        outputs = [_until_end(one, config.eos_token_id) for one in new]
        # In a batch nothing is drafted: each forward gives each sequence that has not ended one token.
        num_forwards = len(count) if len(prompts) == 1 else sum(len(output) for output in outputs)
        return Decoded(outputs, num_forwards, seconds, clock.first_token_s - start)


def own_name(overrides: str | None) -> str:
    return "specdec plain" if overrides is None else overrides


def own_contender(overrides: str | None, config: BenchmarkConfig, target: PagedModel | None = None) -> SpecdecContender:
    """The system that an item of `systems` describes, or plain decoding (None), on `target` or on one that is loaded for it."""
    target = load_target(config.target) if target is None else target
    system = plain_system() if overrides is None else load_system(system_config(overrides, config.target, config.draft))
    settings = replace(config.engine, max_batch_size=max(config.batch_sizes))
    speculation = PLAIN if overrides is None else system.speculation(settings)
    labels = {"system": "specdec", **system.labels, "speculation": speculation}
    return SpecdecContender(own_name(overrides), system.engine(target, settings), labels)


def their_names(config: BenchmarkConfig) -> list[str]:
    """transformers' plain decoding, prompt lookup, and assisted generation where a draft model is given."""
    names = ("plain", "prompt_lookup", *(("assisted",) if config.draft is not None else ()))
    return [f"transformers {name}" for name in names]


def their_contender(name: str, config: BenchmarkConfig, target: PagedModel | None = None) -> TransformersContender:
    """One of `their_names`, on `target` or on one that is loaded for it; it has plain weights."""
    if target is None:
        target = load_target(replace(config.target, packed=False, self_check=False, numerics="fast"))
    labels = {"system": "transformers", "rule": "transformers", "lossless": True}
    kind = name.removeprefix("transformers ")
    if kind == PLAIN:
        return TransformersContender(name, target, {**labels, "drafter": PLAIN, "policy": "none", "num_nodes": 1})
    # Both draft for batches of one alone.
    if kind == "prompt_lookup":
        chain = {"policy": f"chain(depth={NUM_LOOKUP_TOKENS})", "num_nodes": NUM_LOOKUP_TOKENS + 1}
        options: dict[str, Any] = {"prompt_lookup_num_tokens": NUM_LOOKUP_TOKENS}
        return TransformersContender(name, target, {**labels, "drafter": kind, **chain}, options, max_batch_size=1)
    assert kind == "assisted" and config.draft is not None
    like = config.target
    assistant = PagedModel.load(config.draft, dtype=like.dtype, device=like.device, packed=False).model
    assistant.set_attn_implementation("sdpa")
    depth = assistant.generation_config.num_assistant_tokens or GenerationConfig().num_assistant_tokens or 20
    chain = {"policy": f"chain(depth<={depth})", "num_nodes": depth + 1}
    drafter = f"assisted({model_name(config.draft)})"
    options = {"assistant_model": assistant}
    return TransformersContender(name, target, {**labels, "drafter": drafter, **chain}, options, max_batch_size=1)


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


def _until_end(token_ids: list[int], ends: list[int] | None) -> list[int]:
    """What comes before the padding: up to the first end token, which belongs to it."""
    last = next((i for i, token in enumerate(token_ids) if token in (ends or ())), len(token_ids))
    return token_ids[: last + 1]


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
