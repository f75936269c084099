"""The commands that measure and check: benchmark, costs, certify, acceptance, accuracies, load, stream_check, gpu_check."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from specdec.config.components import (
    DrafterConfig,
    EngineConfig,
    SamplingConfig,
    ShapeConfig,
    TargetConfig,
    TrackingConfig,
)
from specdec.config.runs import PromptsConfig, RunConfig, SystemConfig, SystemsConfig, WorkloadConfig


@dataclass
class ContenderConfig(SystemConfig):
    """One of the benchmark's systems; its drafter takes dtype and device from the target. `speculation` None: the engine's."""

    target: TargetConfig = field(default_factory=TargetConfig)
    speculation: str | None = None


@dataclass
class PeerModeConfig:
    """A way in which a peer decodes: `drafter` as rows name it, with chains of `depth` drafted tokens (0: plain decoding).
    `options` are the peer's own; `needs_draft` modes take part where `draft` names a draft model."""

    drafter: str = MISSING
    depth: int = 0
    needs_draft: bool = False
    options: Any = field(default_factory=dict)


@dataclass
class PeerConfig:
    """Another system. `python` is the interpreter of an environment that has it (None: it takes no part), `worker` the script
    that runs there, in experiments/peers/ or by absolute path. It reads the model as `model_format`: folder or gguf."""

    python: str | None = None
    worker: str = MISSING
    model_format: str = "folder"
    max_batch_size: int | None = None
    env: Any = field(default_factory=dict)
    modes: dict[str, PeerModeConfig] = field(default_factory=dict)


@dataclass
class PromptSetConfig(PromptsConfig):
    """One prompt set of a mixture, drawn from with `weight`; `name` is what rows call it (None: the file's name)."""

    name: str | None = None
    weight: float = 1.0


@dataclass
class BenchmarkConfig(RunConfig):
    """`prompts` names the prompt set in rows (None: the file's name); a `mixture` holds several sets, whose prompts are all
    taken. An item of `systems` holds the overrides that one would give to `generate`; `draft` is also the draft model of
    transformers and the peers. `transformers` false leaves out its contenders; where there are no peers either, any sampling
    goes.

    The prompts are decoded `num_repeats` times at each of `batch_sizes`. `memory` has each contender's peak memory
    measured in a process of its own.
    """

    prompts: str | None = None
    mixture: list[PromptSetConfig] = field(default_factory=list)
    systems: list[str] = MISSING
    draft: str | None = None
    transformers: bool = True
    # {name: PeerConfig}; untyped because Hydra lets an override add nothing to a typed dict. See `peer_configs`.
    peers: Any = field(default_factory=dict)
    batch_sizes: list[int] = MISSING
    num_repeats: int = MISSING
    memory: bool = MISSING
    work_dir: str = MISSING


@dataclass
class CertifyConfig(SystemsConfig, PromptsConfig):
    """`level` quick, full, real or all; `rules` names the rules (none: all of them). All else is for the levels real and all.

    Laws are tested in `dtype` and at `temperatures`, on `num_tokens` tokens per system and temperature; rounding is counted
    in the target's own dtype on the first `num_judged` prompts, one at a time.
    """

    level: str = MISSING
    rules: list[str] = MISSING
    target: TargetConfig = field(default_factory=TargetConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    prompts: str | None = None
    dtype: str = MISSING
    num_tokens: int = MISSING
    alpha: float = MISSING
    num_judged: int = MISSING
    output: str = MISSING
    work_dir: str = MISSING


@dataclass
class AcceptanceConfig(RunConfig):
    """`policies` holds the overrides of `drafter/policy` that one would give to `generate`, `rules` names (none: all). Of each
    text every `stride`-th token is a root; a tree is judged with `num_repeats` seeds at once, so memory grows with
    `num_repeats` x nodes x vocabulary. `prompts` names the prompt set in rows (None: the file's name)."""

    prompts: str | None = None
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    draft: str | None = None
    policies: list[str] = MISSING
    rules: list[str] = MISSING
    temperatures: list[float] = MISSING
    stride: int = MISSING
    num_repeats: int = MISSING
    allow_lossy: bool = False
    work_dir: str = MISSING


@dataclass
class AccuraciesConfig:
    """How often the drafter's guesses are right on `limit` held-out records (None: all) of `data`, one folder or a list, and
    the best static trees of `totals` nodes, roots included; see `specdec.drafters.accuracies.measure_accuracies`."""

    target: TargetConfig = field(default_factory=TargetConfig)
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    draft: str | None = None
    data: Any = MISSING
    limit: int | None = MISSING
    depth: int = MISSING
    num_ranks: int = MISSING
    stride: int = MISSING
    batch_size: int = MISSING
    totals: list[int] = MISSING
    folder: str = MISSING


@dataclass
class LimitsConfig(RunConfig):
    """Where the drafts of the EAGLE head `draft` end under each of `policies`, the overrides of `drafter/policy` that one
    would give to `generate`. `prompts` names the prompt set in rows (None: the file's name)."""

    prompts: str | None = None
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    draft: str | None = None
    policies: list[str] = MISSING


@dataclass
class CostsConfig(SystemConfig):
    """What steps cost behind each of `contexts`: trees of `num_nodes`, drafts of every depth, medians of `repeats`; and, where
    `startup`, how long the way to a first token is."""

    target: TargetConfig = field(default_factory=TargetConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    contexts: list[int] = MISSING
    num_nodes: list[int] = MISSING
    repeats: int = MISSING
    startup: bool = True
    output: str = MISSING


@dataclass
class LoadConfig(SystemConfig, WorkloadConfig, RunConfig):
    """Requests from `prompt_file` or a `mixture` of sets, sent before `duration_s` (None: whenever).

    Each of `concurrencies` is a closed loop of so many users, each of `rates` an open one of so many requests per second.
    Each of `contenders` serves every point `num_repeats` times, with pages shared or not as `share_prefixes` lists
    (none: as the engine does). With `take_turns` the contenders serve a point at the same time, step by step, each on a clock
    that stands still while others work: a machine that is now slower, now quicker, is so for all of them.
    """

    mixture: list[PromptSetConfig] = field(default_factory=list)
    concurrencies: list[int] = MISSING
    rates: list[float] = MISSING
    duration_s: float | None = None
    contenders: list[str] = MISSING
    share_prefixes: list[bool] = MISSING
    num_repeats: int = MISSING
    take_turns: bool = MISSING
    work_dir: str = MISSING


@dataclass
class StreamCheckConfig(SystemsConfig, WorkloadConfig):
    """Requests in streams of `stream_length`, each through an engine of sizes drawn from the seed with the next of the systems,
    each request at one of the temperatures; a share `cancel_share` is cancelled."""

    target: TargetConfig = field(default_factory=TargetConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cancel_share: float = MISSING
    stream_length: int = MISSING
    output: str = MISSING
    work_dir: str = MISSING


@dataclass
class GpuCheckConfig(PromptsConfig):
    """`parts` are kernels, text, rounding (checks), bandwidth, forward, decode (measures), which are taken of a stand-in of
    `shape` beside the target itself. An item of `systems` holds the overrides that one would give to `generate`; those of a
    head read `draft`. `checked_systems` are checked beside these, not measured. `small` makes the kernels' cases small.
    `prompt_file` None is a few prompts built in."""

    target: TargetConfig = field(default_factory=TargetConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    prompts: str | None = None
    draft: str | None = None
    systems: list[str] = MISSING
    checked_systems: list[str] = MISSING
    parts: list[str] = MISSING
    contexts: list[int] = MISSING
    batch_sizes: list[int] = MISSING
    num_nodes: int = MISSING
    max_new_tokens: int = MISSING
    repeats: int = MISSING
    copy_mib: int = MISSING
    small: bool = False
    output: str | None = None
