"""The parts that configs are put together from: a class per option of a config group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING


@dataclass
class TargetConfig:
    """A model to load; `path` None is the embedded one. `name` is what result rows call it (None: from the path), `head` the
    shipped head that fits it."""

    path: str | None = MISSING
    head: str | None = None
    gguf_file: str | None = None
    name: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    self_check: bool = True
    packed: bool = True
    numerics: str = "auto"


@dataclass
class ShapeConfig:
    """See `specdec.stand_in.ModelShape`."""

    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    num_layers: int = MISSING
    num_heads: int = MISSING
    num_kv_heads: int = MISSING
    head_size: int = MISSING
    vocab_size: int = MISSING


@dataclass
class StandInConfig(TargetConfig):
    """A small model widened to `shape`: it says what the small one does and costs what a large one does."""

    shape: ShapeConfig = field(default_factory=ShapeConfig)


@dataclass
class PolicyConfig:
    """Base of the tree policies."""

    label: ClassVar[str] = "none"
    _target_: str = MISSING


@dataclass
class ChainConfig(PolicyConfig):
    label: ClassVar[str] = "chain"
    depth: int = MISSING
    kind: str = MISSING


@dataclass
class StaticConfig(PolicyConfig):
    label: ClassVar[str] = "static"
    # Rank paths, or the path of a file that holds them.
    choices: Any = MISSING


@dataclass
class TopKConfig(PolicyConfig):
    label: ClassVar[str] = "top_k"
    total: int = MISSING
    depth: int = MISSING
    k: int = MISSING


@dataclass
class CoupledConfig(TopKConfig):
    label: ClassVar[str] = "coupled"


@dataclass
class SampledConfig(PolicyConfig):
    label: ClassVar[str] = "sampled"
    branching: list[int] = MISSING
    kind: str = MISSING


@dataclass
class MixedConfig(PolicyConfig):
    label: ClassVar[str] = "mixed"
    branching: list[int] = MISSING


@dataclass
class DrafterConfig:
    """Base of the drafters; by itself it is no drafter: plain decoding."""

    label: ClassVar[str] = "plain"


@dataclass
class NGramConfig(DrafterConfig):
    label: ClassVar[str] = "ngram"
    _target_: str = MISSING
    min_ngram: int = MISSING
    max_ngram: int = MISSING
    max_matches: int = MISSING
    policy: PolicyConfig | None = field(default_factory=PolicyConfig)


@dataclass
class SmallModelConfig(DrafterConfig):
    label: ClassVar[str] = "small_model"
    _target_: str = MISSING
    path: str | None = None
    gguf_file: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    int8: bool = MISSING
    policy: PolicyConfig | None = field(default_factory=PolicyConfig)


@dataclass
class MedusaDrafterConfig(DrafterConfig):
    """`path` is a checkpoint of heads in any known format. `draft_vocab_size` and `token_frequencies`: see
    `specdec.drafters.heads.frequencies.frequent_tokens`."""

    label: ClassVar[str] = "medusa"
    _target_: str = MISSING
    path: str | None = None
    draft_vocab_size: int | None = None
    token_frequencies: str | None = None
    int8: bool = MISSING
    policy: PolicyConfig | None = field(default_factory=PolicyConfig)


@dataclass
class EagleDrafterConfig(MedusaDrafterConfig):
    """See `specdec.drafters.heads.formats.load_head` for what overrules the checkpoint."""

    label: ClassVar[str] = "eagle"
    layer_ids: str | None = None
    norm_before_residual: bool | None = None


@dataclass
class UnionConfig(DrafterConfig):
    """See `specdec.drafters.UnionDrafter`. `first` and `second` are drafters that follow the union's `policy`."""

    label: ClassVar[str] = "union"
    _target_: str = MISSING
    first: DrafterConfig = field(default_factory=DrafterConfig)
    second: DrafterConfig = field(default_factory=DrafterConfig)
    enough: float = MISSING
    policy: PolicyConfig | None = field(default_factory=PolicyConfig)


@dataclass
class RuleConfig:
    _target_: str = MISSING


@dataclass
class TypicalConfig(RuleConfig):
    epsilon: float = MISSING
    delta: float = MISSING


@dataclass
class ThresholdConfig(RuleConfig):
    threshold: float = MISSING


@dataclass
class SamplingConfig:
    """See `specdec.sampling.SamplingParams`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # {token id: bias}; untyped because Hydra lets an override add nothing to a typed dict.
    logit_bias: Any = None
    seed: int | None = 0
    max_new_tokens: int = 128
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass
class EngineConfig:
    """See `specdec.engine.Engine`. `speculation` is fixed (every step grows the policy's trees), adaptive (as much of them as
    is worth its time), or auto: adaptive where the rule's text is the same whatever is drafted, else fixed."""

    max_batch_size: int = 8
    prefill_chunk: int = 512
    page_size: int = 16
    num_pages: int | None = None
    speculation: str = "fixed"
    share_prefixes: bool = True
    cuda_graphs: bool = True


@dataclass
class TrackingConfig:
    """Where rows go; every tracker writes them to `path`."""

    _target_: str = MISSING
    path: str = MISSING


@dataclass
class WandbConfig(TrackingConfig):
    mode: str = MISSING
    project: str = MISSING
    name: str | None = None
    dir: str = MISSING
