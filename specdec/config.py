"""Typed configuration: the schemas that Hydra checks, and the way from a checked config to the library's arguments."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf

from specdec.sampling import SamplingParams


@dataclass
class TargetConfig:
    """A model to load; `path` None is the embedded one. `name` is what result rows call it (None: from the path)."""

    path: str | None = MISSING
    gguf_file: str | None = None
    name: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    self_check: bool = True


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
    choices: list[list[int]] = MISSING


@dataclass
class TopKConfig(PolicyConfig):
    label: ClassVar[str] = "top_k"
    total: int = MISSING
    depth: int = MISSING
    k: int = MISSING


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
    policy: PolicyConfig = field(default_factory=PolicyConfig)


@dataclass
class SmallModelConfig(DrafterConfig):
    label: ClassVar[str] = "small_model"
    _target_: str = MISSING
    path: str = MISSING
    gguf_file: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    policy: PolicyConfig = field(default_factory=PolicyConfig)


@dataclass
class RuleConfig:
    _target_: str = MISSING


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
    """See `specdec.engine.Engine`."""

    max_batch_size: int = 8
    prefill_chunk: int = 512
    page_size: int = 16
    num_pages: int | None = None


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


@dataclass
class SystemConfig:
    """What decodes: drafter (with its policy) and rule."""

    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    rule: RuleConfig = field(default_factory=RuleConfig)
    allow_lossy: bool = False


@dataclass
class PromptsConfig:
    """What is decoded: one text, or a .jsonl or .txt file; see `specdec.experiments.prompts`."""

    prompt_file: str | None = None
    prompt_field: str | None = None
    limit: int | None = None
    template: str = "none"
    chat: str = "auto"


@dataclass
class RunConfig(PromptsConfig, SystemConfig):
    """What every experiment that decodes has in common."""

    target: TargetConfig = field(default_factory=TargetConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    output: str = MISSING


@dataclass
class GenerateConfig(RunConfig):
    prompt: str | None = None
    compare: bool = False


@dataclass
class BenchmarkConfig(RunConfig):
    """`drafter` and `rule` are the defaults of `systems`, whose items are overrides as one would give to `generate`."""

    prompts: str | None = None
    systems: list[str] = MISSING
    assistant: str | None = None
    work_dir: str = MISSING


SCHEMAS: dict[str, type] = {
    "generate": GenerateConfig,
    "benchmark": BenchmarkConfig,
    "target": TargetConfig,
    "sampling": SamplingConfig,
    "engine": EngineConfig,
    "rule": RuleConfig,
    "drafter/none": DrafterConfig,
    "drafter/ngram": NGramConfig,
    "drafter/small_model": SmallModelConfig,
    "policy/chain": ChainConfig,
    "policy/static": StaticConfig,
    "policy/top_k": TopKConfig,
    "policy/sampled": SampledConfig,
    "policy/mixed": MixedConfig,
    "tracking/jsonl": TrackingConfig,
    "tracking/wandb": WandbConfig,
}


def register() -> None:
    """Makes the schemas known to Hydra as `schema/...`, from where the files in configs/ take their types."""
    for name, schema in SCHEMAS.items():
        group, _, option = f"schema/{name}".rpartition("/")
        ConfigStore.instance().store(group=group, name=option, node=schema, provider="specdec")


def to_typed(config: DictConfig) -> Any:
    """The instance of its schema that a composed config describes.

    Raises ValueError for a key that was forced in with `+`, OmegaConf's MissingMandatoryValue for a value not given.
    """
    _refuse_unknown(config, "")
    return OmegaConf.to_object(config)


def _refuse_unknown(config: DictConfig, prefix: str) -> None:
    schema = OmegaConf.get_type(config)
    known = {one.name for one in fields(schema)} if is_dataclass(schema) else set(config)
    for key in config:
        if key not in known:
            raise ValueError(f"unknown key {prefix}{key!s}: + adds nothing here; known are {', '.join(sorted(known))}")
        child = config._get_node(key)
        # A value that is an interpolation or None has no keys of its own.
        if isinstance(child, DictConfig) and isinstance(child._value(), dict):
            _refuse_unknown(child, f"{prefix}{key!s}.")


def sampling_params(config: SamplingConfig) -> SamplingParams:
    """Raises ValueError naming the value out of range."""
    try:
        bias = {int(token): float(value) for token, value in dict(config.logit_bias or {}).items()}
    except (TypeError, ValueError):
        raise ValueError(f"logit_bias={config.logit_bias!r} must be {{token id: number, ...}}") from None
    values = {**asdict(config), "logit_bias": bias}
    return SamplingParams(**{**values, "stop": tuple(config.stop), "stop_token_ids": tuple(config.stop_token_ids)})


def build(config: Any) -> Any:
    """The object that a `_target_` node names, from the node's other values; a drafter's policy is built on its own.

    Raises what the object's own constructor raises.
    """
    values = {key: value for key, value in asdict(config).items() if key != "policy"}
    try:
        return instantiate(values, _convert_="all")
    except InstantiationException as error:
        raise error.__cause__ or error from None


def describe(config: Any) -> str:
    """A policy or drafter in a word and its values, as result rows name it: `top_k(total=16, depth=5, k=4)`."""
    skipped = ("_target_", "policy", "path", "gguf_file", "dtype", "device")
    values = {key: value for key, value in asdict(config).items() if key not in skipped}
    return f"{config.label}({', '.join(f'{key}={value}' for key, value in values.items())})" if values else config.label
