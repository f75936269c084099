"""What runs have in common, and the commands that use a model: generate, serve, inspect, export."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from specdec.config.components import (
    DrafterConfig,
    EngineConfig,
    RuleConfig,
    SamplingConfig,
    TargetConfig,
    TrackingConfig,
)


@dataclass
class SystemConfig:
    """What decodes: drafter (with its policy) and rule. `draft` is the hub id or path of the draft model or head, for whichever
    drafter needs one: a sweep over drafters names it once."""

    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    rule: RuleConfig = field(default_factory=RuleConfig)
    allow_lossy: bool = False
    draft: str | None = None


@dataclass
class PromptsConfig:
    """What is decoded: one text, or a .jsonl or .txt file; see `specdec.experiments.prompts`."""

    prompt_file: str | None = None
    prompt_field: str | None = None
    limit: int | None = None
    template: str = "none"
    chat: str = "auto"


@dataclass
class RunConfig(PromptsConfig):
    """What every experiment that decodes has in common."""

    target: TargetConfig = field(default_factory=TargetConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    output: str = MISSING


@dataclass
class LengthConfig:
    """Numbers of tokens, `low` to `high`, each as likely as the others; both None: as they come."""

    low: int | None = None
    high: int | None = None


@dataclass
class WorkloadConfig(PromptsConfig):
    """`num_requests` requests drawn from `seed`, `prefix_share` of them behind the same `prefix_tokens` tokens; `prompts` names
    the prompt set in rows (None: the file's name). See `specdec.experiments.workload`."""

    prompts: str | None = None
    prompt_length: LengthConfig = field(default_factory=LengthConfig)
    output_length: LengthConfig = field(default_factory=LengthConfig)
    prefix_tokens: int = MISSING
    prefix_share: float = MISSING
    num_requests: int = MISSING
    seed: int = MISSING


@dataclass
class SystemsConfig:
    """Several systems side by side. An item of `systems` holds the overrides that one would give to `generate`; those of
    `draft_systems` join them where `draft` names a draft model. Each decodes at each of `temperatures`."""

    draft: str | None = None
    systems: list[str] = MISSING
    draft_systems: list[str] = MISSING
    temperatures: list[float] = MISSING


@dataclass
class GenerateConfig(SystemConfig, RunConfig):
    prompt: str | None = None
    compare: bool = False


@dataclass
class ServeConfig(SystemConfig):
    """A server at `host`:`port` (0: any free port). `sampling` is what requests leave open. Beyond the batch `max_waiting`
    requests may wait; at a shutdown those under way have `drain_s` seconds to end. `live` shows how it goes."""

    target: TargetConfig = field(default_factory=TargetConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    host: str = MISSING
    port: int = MISSING
    max_waiting: int = MISSING
    drain_s: float = MISSING
    live: bool = MISSING
    access_log: bool = MISSING


@dataclass
class HeadFilesConfig:
    """A checkpoint of a learned head: `path` is a hub id, folder or file, `model` its target, of which only the config is
    read. `layer_ids` input or output and `norm_before_residual` overrule what the checkpoint's format implies."""

    # The key whose value may stand on the command line without it.
    positional: ClassVar[str] = "path"
    path: str = MISSING
    model: str | None = None
    layer_ids: str | None = None
    norm_before_residual: bool | None = None


@dataclass
class ExportConfig(HeadFilesConfig):
    """`base_model` names the target in what is written (None: as the checkpoint does). `dtype` is auto (as stored), bfloat16,
    float16 or float32."""

    format: str = MISSING
    output: str = MISSING
    base_model: str | None = None
    dtype: str = "auto"
